"""Samples numbers in threads, so that whatever they are asked of may hang or fail and the training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

log = logging.getLogger("jaxtrain")

Source = Callable[[], Mapping[str, float]]

_FIRST_SECONDS = 1.0  # after which the first sample is taken, so that a short run has one
_PATIENCE = 10.0  # seconds that a source may take to answer before its last numbers are no longer shown
_CLOSE_SECONDS = 0.5


class Sampler:
    """Asks each source every few seconds, in a thread of its own. Nothing waits for one that does not answer."""

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Source]],
        seconds: float,
        timer: Callable[[], float] = time.monotonic,
    ):
        """Starts to sample.

        Args:
          sources: by a name for the log. Each is opened in its thread, where its numbers are read afterwards.
          seconds: between two samples.
          timer: the clock, in seconds.
        """
        self._seconds, self._timer = seconds, timer
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._latest: dict[str, Mapping[str, float]] = {}
        self._asked: dict[str, float] = {}  # when, where the answer has not come yet
        self._said: set[str] = set()
        self._threads = [
            threading.Thread(target=self._sample, args=(name, source), name=f"telemetry: {name}", daemon=True)
            for name, source in sources.items()
        ]
        for thread in self._threads:
            thread.start()

    def values(self) -> dict[str, float]:
        """The latest numbers of all sources; without those of a source that has not answered for ten seconds."""
        with self._lock:
            latest, asked, now = dict(self._latest), dict(self._asked), self._timer()
        for name, began in asked.items():
            if (waited := now - began) > _PATIENCE:
                latest[name] = {}
                self._say(name, f"it has not answered for {waited:.0f} s")
        return {key: value for values in latest.values() for key, value in values.items()}

    def close(self) -> None:
        """Ends the threads, and does not wait for one that hangs; may be called twice."""
        self._closed.set()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _sample(self, name: str, source: Callable[[], Source]) -> None:
        read: Source | None = None
        wait = min(self._seconds, _FIRST_SECONDS)
        while True:
            values: Mapping[str, float] = {}
            with self._lock:
                self._asked[name] = self._timer()
            try:
                if read is None:
                    read = source()
                else:
                    values = read()
            except Exception as error:  # of a driver, a library, the system: none of them may end a run
                self._say(name, f"{type(error).__name__}: {error}")
            with self._lock:
                self._latest[name] = values
                del self._asked[name]
            if self._closed.wait(wait):
                return
            wait = self._seconds

    def _say(self, name: str, why: str) -> None:
        """Warns once of a source whose numbers are missing."""
        with self._lock:
            first = name not in self._said
            self._said.add(name)
        if first and not self._closed.is_set():
            log.warning("telemetry: %s gives no numbers (%s); the run goes on without them.", name, why)
