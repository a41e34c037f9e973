"""Goodput: the share of a run's wall time, over all its starts, that went into steps that count; and where the rest went.

Each start of a run has a file in `starts/`, which process 0 replaces every two seconds, so a kill loses at most two seconds.
How the start ended stands there too. Where the process itself could not write it, its launcher does, or else the next start.
(The term, and what it leaves out, are those of Google's "ML productivity goodput", 2023.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.errors import PeerError, WorkdirError
from jaxtrain.host.files import parse_json, replace_unsynced
from jaxtrain.host.processes import start_time
from jaxtrain.observability.clock import StepClock

log = logging.getLogger("jaxtrain")

_WRITE_SECONDS = 2.0
_files = itertools.count()  # that this process has made


@dataclasses.dataclass(frozen=True)
class StartEnd:
    """How a start ended."""

    time: float
    """When, in seconds since 1970; for a start that only the next one found ended, when its file was last written."""
    code: int | None
    """The exit code: as shells have it, 137 for SIGKILL. None where nobody knows."""
    message: str
    """Why, in a sentence."""
    step: int
    """The last step that it did."""
    host: str
    by: str
    """Who says so: `itself`, `its launcher` or `the next start`."""


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
    host: str = ""
    """Where process 0 ran."""
    end: StartEnd | None = None
    """None while it runs, or where nobody has said how it ended."""
    last_step: int = 0
    """The step at which the run is to end; 0 where that is not known yet."""
    gpus: int = 0
    """That it trains on; 0 on a CPU, or where that is not known yet."""
    price: float = 0.0
    """Of a GPU an hour (`cost.per_gpu_hour`); 0 where none was given."""

    @property
    def wall(self) -> float:
        """Seconds from its beginning to the last update of its file."""
        return sum(self.seconds.values())

    @property
    def gpu_hours(self) -> float:
        """Its wall time in hours, times its GPUs."""
        return self.gpus * self.wall / 3600


class NullTimes:
    """Writes nothing; for every process but the first."""

    path: Path | None = None

    def ends(self, code: int, message: str) -> None:
        """Notes how this start ends, with which exit code and sentence. The first reason stays."""

    def goes_on_from(self, step: int, last_step: int) -> None:
        """The run goes on from `step` to `last_step`: at the start, or after a roll-back."""

    def runs_on(self, gpus: int, price: float) -> None:
        """The start trains on so many GPUs, at `price` for one an hour (0: not given)."""

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
        before = _files_of(folder)
        for path in before:
            _end_unsaid(path)
        self.path = folder / f"{1 + max((int(path.stem) for path in before), default=0):06d}.json"
        self._clock, self._step = clock, step
        # In a program that trains a second time, the file of the first run has the time before it.
        self._before = 0.0 if next(_files) else time.time() - start_time() - clock.now().wall
        self._began = time.time() - clock.now().wall - self._before
        self._first: int | None = None
        self._last_step = 0
        self._gpus, self._price = 0, 0.0
        self._lost = 0
        self._end: StartEnd | None = None
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="start times", daemon=True)
        self._thread.start()

    def goes_on_from(self, step: int, last_step: int) -> None:
        self._last_step = last_step
        if self._first is None:
            self._first = step
        else:
            self._lost += max(self._step() - step, 0)

    def runs_on(self, gpus: int, price: float) -> None:
        self._gpus, self._price = gpus, price

    def summary(self) -> Goodput | None:
        self._write()
        with contextlib.suppress(WorkdirError):
            return goodput(read_starts(self.path.parent))
        return None

    def ends(self, code: int, message: str) -> None:
        with self._writing:
            if self._end is None:
                self._end = StartEnd(time.time(), code, message, self._step(), socket.gethostname(), "itself")
        self._write()

    def _write(self) -> None:
        step = self._step()
        first = step if self._first is None else self._first
        seconds = {"start": self._before, **self._clock.now().seconds}
        with self._writing:
            host = socket.gethostname()
            done = max(step, first)
            times = StartTimes(
                self._began, first, done, self._lost, seconds, host, self._end, self._last_step, self._gpus, self._price
            )
            _replace(self.path, times)

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
    gpu_hours: float = 0.0
    """Of all starts, without the time between them; 0 on a CPU."""
    cost: float | None = None
    """`gpu_hours` times the price that the latest start was given; None where it was given none."""

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


def read_starts(folder: Path) -> list[StartTimes]:
    """The starts of a run, in their order. Raises `WorkdirError` where there is none, or a file is damaged."""
    starts = [_read(path) for path in _files_of(folder)]
    if not starts:
        raise WorkdirError(f"{folder} holds no start of a run.")
    return starts


def read_last_start(folder: Path) -> StartTimes | None:
    """The latest start of a run; None where there is none yet. Raises `WorkdirError` where its file is damaged."""
    files = _files_of(folder)
    return _read(files[-1]) if files else None


def _files_of(folder: Path) -> list[Path]:
    """The files of the starts in their order. What has another name than they (1x.json) is none of them."""
    return sorted(path for path in folder.glob("*.json") if re.fullmatch(r"[0-9]{1,18}", path.stem))


def _read(path: Path) -> StartTimes:
    try:
        times = StartTimes(**parse_json(path.read_bytes()))
        numbers = [times.began, times.first_step, times.step, times.lost_steps, times.gpus, times.price]
        numbers += times.seconds.values()
        if "step" not in times.seconds or not all(math.isfinite(number) for number in numbers):
            raise ValueError("it does not hold the times of a start")
        return dataclasses.replace(times, end=StartEnd(**times.end)) if isinstance(times.end, dict) else times
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise WorkdirError(f"{path} cannot be read ({error}).") from None


def _replace(path: Path, times: StartTimes) -> None:
    with contextlib.suppress(OSError):  # a full disk must not end the run for this
        replace_unsynced(path, json.dumps(dataclasses.asdict(times)) + "\n")


def end_start(path: Path, code: int, message: str) -> None:
    """Writes how a start ended whose processes have all ended; for their launcher. What process 0 has said of itself stays.

    Args:
      path: the start's file.
      code: of the process that failed first.
      message: why, in a sentence.
    """
    with contextlib.suppress(WorkdirError):
        times = _read(path)
        if (
            times.end is None or times.end.code == PeerError.exit_code
        ):  # process 0 may know less: only that another is gone
            end = StartEnd(time.time(), code, message, times.step, socket.gethostname(), "its launcher")
            _replace(path, dataclasses.replace(times, end=end))


def _end_unsaid(path: Path) -> None:
    """Ends an earlier start of which nobody has said how it ended: all that could have are gone."""
    with contextlib.suppress(WorkdirError):
        times = _read(path)
        if times.end is None:
            text = "It ended without a word: it was killed, or its host went down."
            end = StartEnd(times.began + times.wall, None, text, times.step, times.host, "the next start")
            _replace(path, dataclasses.replace(times, end=end))
            log.warning("start %d of this run, on %s: %s", int(path.stem), times.host or "a host unknown", text)


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
    steps, gpu_hours = sum(last - first for first, last, _ in counting), sum(start.gpu_hours for start in starts)
    price = next((start.price for start in reversed(starts) if start.gpus), 0.0)
    return Goodput(dict(total), len(starts), steps, lost_steps, gpu_hours, gpu_hours * price if price else None)
