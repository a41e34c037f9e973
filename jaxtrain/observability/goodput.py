"""Goodput: how much of a run's wall time went into steps that count, over all its starts, and where the rest went.

Each start of a run keeps a file in `starts/`, which process 0 replaces every other second, so that a kill loses two seconds
of it at most. (The term, and what it leaves out, as in Google's "ML productivity goodput", 2023.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import replace_unsynced
from jaxtrain.host.processes import start_time
from jaxtrain.observability.clock import StepClock

_WRITE_SECONDS = 2.0
_accounts = itertools.count()


@dataclasses.dataclass(frozen=True)
class StartTimes:
    """One start of a run. began: when its process did, in seconds since 1970. first_step: where it went on from.

    step: the furthest it came. lost_steps: those that it rolled back itself. seconds: wall time so far by category: those
    of the `StepClock`, and `start` for what came before (imports, and meeting the other processes).
    """

    began: float
    first_step: int
    step: int
    lost_steps: int
    seconds: Mapping[str, float]

    @property
    def wall(self) -> float:
        """Seconds from its beginning to its last word."""
        return sum(self.seconds.values())


class NullTimes:
    """Keeps nothing: what every process but the first holds."""

    path: Path | None = None

    def goes_on_from(self, step: int) -> None:
        """The run goes on from `step`: at the start, or after a roll-back."""

    def summary(self) -> Goodput | None:
        """Over all starts; None where it is not known."""
        return None

    def close(self) -> None:
        """Writes a last time."""


class TimesFile(NullTimes):
    """Keeps the file of this start, `path`, up to date until it is closed. step: the last step that was done."""

    path: Path

    def __init__(self, folder: Path, clock: StepClock, step: Callable[[], int]):
        with contextlib.suppress(OSError):  # as in `_write`
            folder.mkdir(exist_ok=True)
        self.path = folder / f"{1 + max((int(path.stem) for path in folder.glob('[0-9]*.json')), default=0):06d}.json"
        self._clock, self._step = clock, step
        # A program that trains a second time has told of the time before already.
        self._before = 0.0 if next(_accounts) else time.time() - start_time() - clock.now().wall
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
    """seconds: the whole wall time by what it went into; `training` is steps that count, `done again` those lost, `down` the
    time between two starts. starts: how many. lost_steps: steps that a later start did again.
    """

    seconds: Mapping[str, float]
    starts: int
    steps: int
    lost_steps: int

    @property
    def wall(self) -> float:
        """Seconds from the beginning of the first start to the last word of the last."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Of the wall time that went into steps that count, in [0, 1]."""
        return self.seconds["training"] / self.wall if self.wall else 0.0

    def to_json(self) -> dict[str, Any]:
        """As `jaxtrain goodput --json` prints it."""
        return {"goodput": self.share, "wall_seconds": self.wall, **dataclasses.asdict(self)}


def read_starts(folder: Path) -> list[StartTimes]:
    """The starts of a run, in their order. Raises `WorkdirError` where there is none, or a file is damaged."""
    found = []
    for path in sorted(folder.glob("[0-9]*.json")):
        try:
            found.append(StartTimes(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError) as error:
            raise WorkdirError(f"{path} cannot be read ({error}).") from None
    if not found:
        raise WorkdirError(f"{folder} holds no start of a run.")
    return found


def goodput(starts: Sequence[StartTimes]) -> Goodput:
    """Adds the starts up. The steps that a start lost are taken to have been as long as its others."""
    total: collections.defaultdict[str, float] = collections.defaultdict(float, {"training": 0.0, "done again": 0.0})
    counting: list[tuple[int, int, float]] = []  # (first, last, seconds a step) of the steps that count
    lost_steps = 0
    for number, start in enumerate(starts):
        while counting and counting[-1][1] > start.first_step:  # this start did the steps behind `first_step` again
            first, last, each = counting.pop()
            kept = max(start.first_step, first)
            lost_steps += last - kept
            total["done again"] += (last - kept) * each
            if kept > first:
                counting.append((first, kept, each))
        for name, value in start.seconds.items():
            if name != "step":
                total[name] += value
        steps = start.step - start.first_step
        each = start.seconds["step"] / (steps + start.lost_steps) if steps + start.lost_steps else 0.0
        lost_steps += start.lost_steps
        total["done again"] += start.lost_steps * each
        if steps:
            counting.append((start.first_step, start.step, each))
        else:  # a step that was never finished
            total["done again"] += start.seconds["step"] - start.lost_steps * each
        if number + 1 < len(starts):
            total["down"] += max(starts[number + 1].began - start.began - start.wall, 0.0)
    total["training"] = sum((last - first) * each for first, last, each in counting)
    return Goodput(dict(total), len(starts), sum(last - first for first, last, _ in counting), lost_steps)
