"""Goodput: the share of a run's wall time, over all its starts, that went into steps that count; and where the rest went.

Each start of a run has a file in `starts/`, which process 0 replaces every two seconds, so a kill loses at most two seconds.
(The term, and what it leaves out, are those of Google's "ML productivity goodput", 2023.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import parse_json, replace_unsynced
from jaxtrain.host.processes import start_time
from jaxtrain.observability.clock import StepClock

_WRITE_SECONDS = 2.0
_files = itertools.count()  # that this process has made


@dataclasses.dataclass(frozen=True)
class StartTimes:
    """One start of a run."""

    began: float
    """When its process did, in seconds since 1970."""
    first_step: int
    """The step that it went on from."""
    step: int
    """The last step that it did."""
    lost_steps: int
    """The steps that it rolled back itself."""
    seconds: Mapping[str, float]
    """Wall time by category: those of the `StepClock`, and `start` for the time before (imports, rendezvous)."""

    @property
    def wall(self) -> float:
        """Seconds from its beginning to the last update of its file."""
        return sum(self.seconds.values())


class NullTimes:
    """Writes nothing; for every process but the first."""

    path: Path | None = None

    def goes_on_from(self, step: int) -> None:
        """The run goes on from `step`: at the start, or after a roll-back."""

    def summary(self) -> Goodput | None:
        """The goodput over all starts; None where it is not known."""
        return None

    def close(self) -> None:
        """Writes the file a last time."""


class TimesFile(NullTimes):
    """Keeps the file of this start, `path`, up to date until it is closed."""

    path: Path

    def __init__(self, folder: Path, clock: StepClock, step: Callable[[], int]):
        """Starts a thread that writes the file.

        Args:
          folder: where it is; made if need be.
          clock: of the run's loop.
          step: returns the last step that was done.
        """
        with contextlib.suppress(OSError):  # as in `_write`
            folder.mkdir(exist_ok=True)
        self.path = folder / f"{1 + max((int(path.stem) for path in _files_of_starts(folder)), default=0):06d}.json"
        self._clock, self._step = clock, step
        # In a program that trains a second time, the file of the first run has the time before it.
        self._before = 0.0 if next(_files) else time.time() - start_time() - clock.now().wall
        self._began = time.time() - clock.now().wall - self._before
        self._first: int | None = None
        self._lost = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="start times", daemon=True)
        self._thread.start()

    def goes_on_from(self, step: int) -> None:
        if self._first is None:
            self._first = step
        else:
            self._lost += max(self._step() - step, 0)

    def summary(self) -> Goodput | None:
        self._write()
        with contextlib.suppress(WorkdirError):
            return goodput(read_starts(self.path.parent))
        return None

    def _write(self) -> None:
        step = self._step()
        first = step if self._first is None else self._first
        seconds = {"start": self._before, **self._clock.now().seconds}
        times = StartTimes(self._began, first, max(step, first), self._lost, seconds)
        with contextlib.suppress(OSError):  # a full disk must not end the run for this
            replace_unsynced(self.path, json.dumps(dataclasses.asdict(times)) + "\n")

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._write()

    def _keep(self) -> None:
        self._write()
        while not self._closed.wait(_WRITE_SECONDS):
            self._write()


# -------------------------------------------------------------------------------------------------------------- report


@dataclasses.dataclass(frozen=True)
class Goodput:
    """How the wall time of all starts of a run was spent."""

    seconds: Mapping[str, float]
    """By category: `training` is steps that count, `done again` lost steps, `down` the time between two starts."""
    starts: int
    steps: int
    """That count."""
    lost_steps: int
    """That were done again."""

    @property
    def wall(self) -> float:
        """Seconds from the beginning of the first start to the last update of the last."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The share of the wall time that went into steps that count, in [0, 1]."""
        return self.seconds["training"] / self.wall if self.wall else 0.0

    def to_json(self) -> dict[str, Any]:
        """As `jaxtrain goodput --json` prints it."""
        return {"goodput": self.share, "wall_seconds": self.wall, **dataclasses.asdict(self)}


def _files_of_starts(folder: Path) -> list[Path]:
    """The files of all starts, in their order, without what has another name (1x.json)."""
    return sorted(path for path in folder.glob("*.json") if re.fullmatch(r"[0-9]{1,18}", path.stem))


def read_starts(folder: Path) -> list[StartTimes]:
    """The starts of a run, in their order. Raises `WorkdirError` where there is none, or a file is damaged."""
    starts = []
    for path in _files_of_starts(folder):
        try:
            start = StartTimes(**parse_json(path.read_bytes()))
            numbers = [start.began, start.first_step, start.step, start.lost_steps, *start.seconds.values()]
            if "step" not in start.seconds or not all(math.isfinite(number) for number in numbers):
                raise ValueError("it does not hold the times of a start")
        except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise WorkdirError(f"{path} cannot be read ({error}).") from None
        starts.append(start)
    if not starts:
        raise WorkdirError(f"{folder} holds no start of a run.")
    return starts


def goodput(starts: Sequence[StartTimes]) -> Goodput:
    """Adds up the starts. Lost steps count with the mean time of the steps of their start."""
    total: collections.defaultdict[str, float] = collections.defaultdict(float, {"training": 0.0, "done again": 0.0})
    counting: list[tuple[int, int, float]] = []  # (first, last, seconds a step) of the steps that count
    lost_steps = 0
    for number, start in enumerate(starts):
        while counting and counting[-1][1] > start.first_step:  # this start did the steps behind `first_step` again
            first, last, step_seconds = counting.pop()
            kept = max(start.first_step, first)
            lost_steps += last - kept
            total["done again"] += (last - kept) * step_seconds
            if kept > first:
                counting.append((first, kept, step_seconds))
        for name, value in start.seconds.items():
            if name != "step":
                total[name] += value
        steps = start.step - start.first_step
        done = steps + start.lost_steps
        step_seconds = start.seconds["step"] / done if done else 0.0
        lost_steps += start.lost_steps
        total["done again"] += start.lost_steps * step_seconds
        if steps:
            counting.append((start.first_step, start.step, step_seconds))
        else:  # the time went into a step that was never finished
            total["done again"] += start.seconds["step"] - start.lost_steps * step_seconds
        if number + 1 < len(starts):
            total["down"] += max(starts[number + 1].began - start.began - start.wall, 0.0)
    total["training"] = sum((last - first) * step_seconds for first, last, step_seconds in counting)
    return Goodput(dict(total), len(starts), sum(last - first for first, last, _ in counting), lost_steps)
