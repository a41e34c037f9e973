"""Ends a process that makes no progress: a hung collective, a stuck reader or a deadlock would wait for ever.

The process itself notices what leaves its threads alive. Where the interpreter itself is stuck (a library that holds the
GIL), the supervisor sees that the heartbeat stops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxtrain.errors import HangError, JaxtrainError
from jaxtrain.host.files import no_link, replace_unsynced

HEARTBEAT_FILE = "JAXTRAIN_HEARTBEAT"  # set by `jaxtrain launch`, for each process its own
_BEAT_SECONDS = 1.0
_SLOW_PHASES = 30  # compiling, saving, the first steps: so many times longer than a step may take
_WAIT_SECONDS = (
    5.0  # longer for a process that waits for others in a collective: the one that stands still shall say so
)
_MEDIANS = 10  # a step that took as long as so many others is no progress
_STOPPED_SECONDS = 5.0  # a thread that wakes so much later than it should was stopped meanwhile, with its process


@dataclasses.dataclass(frozen=True)
class Beat:
    """A sign of life, and where the process is. time: of the host's monotonic clock, which nobody sets."""

    time: float
    pid: int
    phase: str
    step: int


class Wakes:
    """When this process last went on after it had been stopped as a whole: Ctrl-Z, Slurm's suspend, a paused container.

    Nothing makes progress in such a time, so it says nothing of what hangs. `look` must be called every second or so.
    """

    def __init__(self) -> None:
        self._looked, self.last = time.monotonic(), float("-inf")  # it has not been stopped yet

    def look(self) -> None:
        """Notices a stop since the last call."""
        now = time.monotonic()
        if now - self._looked > _STOPPED_SECONDS:
            self.last = now
        self._looked = now


class Watchdog:
    """Knows what the run does and since when. limit: seconds that a step may take, or ten of the median step; 0: any time."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._now = ("start", 0, time.monotonic())  # phase, step, since when; replaced as a whole
        self._step_seconds = 0.0
        self.wakes = Wakes()

    def feed(self, phase: str, step: int = -1, step_seconds: float | None = None) -> None:
        """The run has come so far. step: -1 where it is the same. step_seconds: what a step takes, where it is known."""
        self._now = (phase, self._now[1] if step < 0 else step, time.monotonic())
        self._step_seconds = step_seconds or self._step_seconds

    def complaint(self) -> str:
        """What to say of a process that has stood still for too long, else ''."""
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
        """For the heartbeat file."""
        phase, step, _ = self._now
        return Beat(time.monotonic(), os.getpid(), phase, step)


@contextlib.contextmanager
def watching(watchdog: Watchdog, leave: Callable[[JaxtrainError], None] | None, log: Path) -> Iterator[None]:
    """Inside, a thread watches. leave: ends the process; without it stacks are dumped and nothing else happens, once."""
    closed = threading.Event()
    beats = os.environ.get(HEARTBEAT_FILE)

    supervisor = os.getppid()

    def watch() -> None:
        if beats:
            write_beat(Path(beats), watchdog.beat())
        while not closed.wait(_BEAT_SECONDS):
            watchdog.wakes.look()
            if beats:
                write_beat(Path(beats), watchdog.beat())
                if os.getppid() != supervisor:  # it was killed: nobody would end or replace this process
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
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
            Path(beats).unlink(missing_ok=True)  # who has finished need not give signs of life


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
    """The last sign of life, if there is one."""
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
