"""Ends a process that makes no progress: a hung collective, a stuck reader or a deadlock would wait for ever.

A thread of the process itself notices it. Where no thread can run (a library holds the GIL), the heartbeat stops, and the
supervisor ends the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxtrain.errors import HangError, JaxtrainError
from jaxtrain.host.files import no_link, replace_unsynced

HEARTBEAT_FILE = "JAXTRAIN_HEARTBEAT"  # set by `jaxtrain launch`, for each process its own
_BEAT_SECONDS = 1.0
_SLOW_PHASES = 30  # times as long as a step: what compiling, saving and the first steps may take
_WAIT_SECONDS = 5.0  # more for a process that waits for others in a collective: the one that is stuck must report first
_MEDIANS = 10  # times the median step: a step that takes longer counts as no progress
_STOPPED_SECONDS = 5.0  # a thread that wakes so much later than it should was stopped meanwhile, with its process


@dataclasses.dataclass(frozen=True)
class Beat:
    """A heartbeat: the process is alive, and what it does."""

    time: float
    """Seconds of the host's monotonic clock, which is never set."""
    pid: int
    phase: str
    step: int
    """The last one that was done."""
    start_file: str = ""
    """Where the run keeps how this start ends; '' for all but process 0."""


class Wakes:
    """When this process last went on after it was stopped as a whole: by Ctrl-Z, Slurm's suspend, a paused container.

    Such a pause is no sign of a hang. `look` must be called about every second.
    """

    def __init__(self) -> None:
        self._looked, self.last = time.monotonic(), float("-inf")  # it was never stopped

    def look(self) -> None:
        """Notices a stop since the last call."""
        now = time.monotonic()
        if now - self._looked > _STOPPED_SECONDS:
            self.last = now
        self._looked = now


class Watchdog:
    """Knows what the run does and since when."""

    def __init__(self, limit: float) -> None:
        """limit: seconds that a step may take, or ten median steps if these are longer; 0 is no limit."""
        self._limit = limit
        self._now = ("start", 0, time.monotonic())  # phase, step, since when; replaced as a whole
        self._step_seconds = 0.0
        self.start_file = ""  # see `Beat`
        self.wakes = Wakes()

    def feed(self, phase: str, step: int = -1, step_seconds: float | None = None) -> None:
        """Tells the watchdog that the run makes progress.

        Args:
          phase: what it does from now on: `input`, `step` and `wait` are parts of a step, others are slow phases.
          step: the last one that was done; -1 where it is the same as before.
          step_seconds: the median time of a step, where it is known.
        """
        self._now = (phase, self._now[1] if step < 0 else step, time.monotonic())
        self._step_seconds = step_seconds or self._step_seconds

    def complaint(self) -> str:
        """A sentence where the process has made no progress for too long, else ''."""
        phase, step, since = self._now
        of_a_step = phase in ("input", "step", "wait") and self._step_seconds > 0
        allowed = max(self._limit, _MEDIANS * self._step_seconds) * (1 if of_a_step else _SLOW_PHASES)
        allowed += _WAIT_SECONDS if phase == "wait" else 0
        stood = time.monotonic() - max(since, self.wakes.last)
        if not self._limit or stood <= allowed:
            return ""
        return (
            f"No progress for {stood:.0f} s in {phase!r} after step {step} (allowed: {allowed:.0f} s; "
            "config.train.hang_seconds). Its threads' stacks are above, and in the log of this process."
        )

    def beat(self) -> Beat:
        """What to write to the heartbeat file."""
        phase, step, _ = self._now
        return Beat(time.monotonic(), os.getpid(), phase, step, self.start_file)


@contextlib.contextmanager
def watching(watchdog: Watchdog, leave: Callable[[JaxtrainError], None] | None, log: Path) -> Iterator[None]:
    """Watches the run in a thread, inside the block.

    Args:
      watchdog: what the run feeds.
      leave: ends the process. Without it, the first hang dumps the stacks, and nothing else happens.
      log: the process's log file, which gets the stacks.
    """
    closed = threading.Event()
    beats = os.environ.get(HEARTBEAT_FILE)

    def watch() -> None:
        if beats:
            write_beat(Path(beats), watchdog.beat())
        while not closed.wait(_BEAT_SECONDS):
            watchdog.wakes.look()
            if beats:
                write_beat(Path(beats), watchdog.beat())
            if complaint := watchdog.complaint():
                dump_stacks(log)
                if leave is not None:
                    leave(HangError(complaint))
                return

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join(2 * _BEAT_SECONDS)
        if beats:
            Path(beats).unlink(missing_ok=True)  # a process that has finished needs no heartbeat


def dump_stacks(log: Path) -> None:
    """The stacks of all threads, on standard error and into the log file."""
    faulthandler.dump_traceback(sys.__stderr__ or 2)
    with contextlib.suppress(OSError), open(log, "a", encoding="utf-8", opener=no_link) as file:
        faulthandler.dump_traceback(file)


def write_beat(path: Path, beat: Beat) -> None:
    """Replaces the heartbeat file."""
    with contextlib.suppress(OSError):
        replace_unsynced(path, json.dumps(dataclasses.asdict(beat)))


def read_beat(path: Path) -> Beat | None:
    """The last heartbeat, if there is one."""
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
