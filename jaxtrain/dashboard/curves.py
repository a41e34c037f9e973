"""Curves and events of runs as the page takes them, and a memory of the columns that were read, bounded in bytes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.dashboard.details import recorded_starts
from jaxtrain.dashboard.overview import Row
from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import parse_json
from jaxtrain.host.folder import Folder
from jaxtrain.host.redaction import without_logins
from jaxtrain.runs.series import METRICS, MetricsLog, Position, Series, whole_lines

AXES = ("step", "epoch", "examples", "time")

_MOST_BYTES = 128 << 20
_MOST_EVENTS = 4 << 20


class Curves:
    """The metrics of the runs that were asked for last."""

    def __init__(self, most_bytes: int = _MOST_BYTES):
        """Keeps at most about `most_bytes` of columns."""
        self._most_bytes = most_bytes
        self._logs: collections.OrderedDict[str, MetricsLog] = collections.OrderedDict()
        self._lock = threading.Lock()

    def log(self, folder: Folder) -> tuple[MetricsLog, str]:
        """The metrics of a run, read as far as they are written, and the cursor. Raises `OSError`."""
        with self._lock:
            log = self._logs.pop(folder.name, None) or MetricsLog(lambda: folder.open(METRICS))
            self._logs[folder.name] = log
        try:
            return log, log.refresh()
        except OSError:
            with self._lock:
                self._logs.pop(folder.name, None)
            raise
        finally:
            self._forget()

    def _forget(self) -> None:
        with self._lock:
            held = sum(log.nbytes for log in self._logs.values())
            while held > self._most_bytes and len(self._logs) > 1:
                _, log = self._logs.popitem(last=False)
                held -= log.nbytes

    def columns(self, folder: Folder) -> dict[str, list[str]]:
        """The names of a run's columns by phase; none where it has written nothing yet."""
        with contextlib.suppress(OSError):
            return self.log(folder)[0].columns()
        return {}


@dataclasses.dataclass(frozen=True)
class Axis:
    """What curves are drawn over: a column, times a factor."""

    column: str
    factor: float = 1.0

    @classmethod
    def of(cls, name: str, folder: Folder, row: Row) -> Axis | None:
        """The axis of that name for a run; None where the run does not say what it needs."""
        if name == "epoch" and row.epochs and row.last_step:
            return cls("step", row.epochs / row.last_step)
        if name == "examples":
            batch = _batch(folder)
            return cls("step", float(batch)) if batch else None
        return cls(name)

    def values(self, x: np.ndarray) -> np.ndarray:
        """The places of points whose column says `x`."""
        return x if self.factor == 1.0 else x * self.factor

    def place(self, value: float) -> float:
        """What the column says at a place of the axis."""
        return value / self.factor


def _batch(folder: Folder) -> int:
    """Examples a step; 0 where that is not known."""
    with contextlib.suppress(WorkdirError, TypeError, KeyError):
        batch = folder.read_json("config.json")["data"]["global_batch"]
        return batch if type(batch) is int and batch > 0 else 0
    return 0


@dataclasses.dataclass(frozen=True)
class Question:
    """Which curves are asked for."""

    columns: Sequence[str]
    axis: str = "step"
    first: float = -math.inf
    last: float = math.inf
    points: int = 1500
    since: str = ""


def curves(memory: Curves, folder: Folder, row: Row, question: Question) -> dict[str, Any]:
    """The answer to `api/runs/ID/series`. Raises `OSError` where the metrics cannot be read."""
    axis = Axis.of(question.axis, folder, row)
    answer = {"id": row.id, "x": question.axis, "reset": False, "complete": 1.0, "missing": list(question.columns)}
    if axis is None:
        return {**answer, "series": {}, "cursor": "", "size": 0}
    if question.since:
        with_new = MetricsLog(lambda: folder.open(METRICS)).since(question.since, question.columns, axis.column)
        if with_new is not None:
            found, cursor = with_new
            series = {column: to_json(each, axis) for column, each in found.items()}
            return {**answer, "missing": [], "series": series, "cursor": cursor, "size": _size(cursor)}
    log, cursor = memory.log(folder)
    first, last = axis.place(question.first), axis.place(question.last)
    found = log.series(question.columns, axis.column, first=first, last=last, points=question.points)
    return {
        **answer,
        "series": {column: to_json(each, axis) for column, each in found.items()},
        "missing": [column for column in question.columns if column not in found],
        "cursor": cursor,
        "reset": bool(question.since),
        "size": _size(cursor),
        "complete": log.complete,
    }


def _size(cursor: str) -> int:
    position = Position.parse(cursor)
    return position.offset if position else 0


def to_json(series: Series, axis: Axis) -> dict[str, Any]:
    """A curve as the page takes it; NaN and infinity are null there."""
    return {
        "x": _numbers(axis.values(series.x)),
        "y": _numbers(series.y),
        "rows": series.rows,
        "downsampled": series.downsampled,
        "sampled": series.sampled,
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    numbers = values.tolist()
    return numbers if np.isfinite(values).all() else [each if math.isfinite(each) else None for each in numbers]


def events(folder: Folder, cursor: str) -> dict[str, Any]:
    """The answer to `api/runs/ID/events`: those after a cursor, or the latest that a few megabytes hold."""
    try:
        file = folder.open("events.jsonl")
    except OSError:
        return {"cursor": "", "reset": False, "recorded": False, "events": _ends(folder)}
    with file:
        size, position = os.fstat(file.fileno()).st_size, Position.parse(cursor) if cursor else None
        goes_on = position is not None and size - position.offset <= _MOST_EVENTS and position.is_in(file)
        start = position.offset if position and goes_on else max(size - _MOST_EVENTS, 0)
        text = whole_lines(file, start, size)
        after = str(Position.at(file, start + len(text)))
    lines = text.split(b"\n")[0 if start == 0 or goes_on else 1 :]
    found = [event for line in lines if line and (event := _event(line))]
    return {"cursor": after, "reset": bool(cursor) and not goes_on, "recorded": True, "events": found}


def _event(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        event = parse_json(line)
        moment, step = float(event["time"]), event["step"]
        if math.isfinite(moment) and isinstance(event["kind"], str) and (step is None or type(step) is int):
            text = without_logins(str(event["message"]))
            return {"time": moment, "step": step, "kind": event["kind"], "message": text}
    return None


def _ends(folder: Folder) -> list[dict[str, Any]]:
    """Of an older run: where its starts began and ended."""
    found = []
    for number, start in enumerate(recorded_starts(folder), 1):
        text = f"Start {number}, from step {start.first_step}"
        found.append({"time": start.began, "step": start.first_step, "kind": "start", "message": text})
        if start.end:
            message = without_logins(start.end.message)
            found.append({"time": start.end.time, "step": start.end.step, "kind": "end", "message": message})
    return found


def compared(memory: Curves, runs: Mapping[str, tuple[Folder, Row]], question: Question) -> dict[str, Series | None]:
    """One column of several runs, by their identifiers, over the axis; None where a run does not have it."""
    found: dict[str, Series | None] = {}
    for identifier, (folder, row) in runs.items():
        axis = Axis.of(question.axis, folder, row)
        column = question.columns[0]
        found[identifier] = None
        with contextlib.suppress(OSError):
            if axis and (series := _one(memory.log(folder)[0], column, axis, question)):
                found[identifier] = dataclasses.replace(series, x=axis.values(series.x))
    return found


def _one(log: MetricsLog, column: str, axis: Axis, question: Question) -> Series | None:
    return log.series([column], axis.column, points=question.points).get(column)
