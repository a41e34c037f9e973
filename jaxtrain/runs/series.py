"""Curves of a run that may still be written: what is new is read alone, and of a huge file evenly spaced pieces."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxtrain.host.folder import Folder
from jaxtrain.runs.columns import PHASES, Table, add_lines

METRICS = "metrics.jsonl"
WHOLE_BYTES = 8 << 20
"""A file, or the part of it that is asked for, is read whole up to this size."""

_PIECES, _PIECE_BYTES = 256, 16 << 10  # of a larger one
_CHUNK = 4 << 20
_SEARCH_SECONDS = 0.2  # a call, for the evaluations in a huge file
_MOST_EVALUATIONS = 100_000
_MARK = 256  # bytes before a position, by which a file is known again


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve."""

    x: np.ndarray
    """f64 [n], in the order of the file."""
    y: np.ndarray
    """f64 [n]; NaN where the file says null."""
    rows: int
    """So many points of the file it stands for, as far as they were read."""
    sampled: bool = False
    """Whether only pieces of the file were read."""

    @property
    def downsampled(self) -> bool:
        """Whether points were left out."""
        return self.rows > self.x.size


def downsample(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """About `points` of the points [n] at most, in their order: of each of equal pieces the least and the greatest.

    The first and the last stay too, and the first NaN of a piece, so that a run that diverged is seen to.
    """
    if x.size <= points:
        return x, y
    edges = np.linspace(0, x.size, max(points // 2, 1) + 1).astype(np.int64)
    kept = {0, x.size - 1}
    for first, end in itertools.pairwise(edges):
        piece = y[first:end]
        bad = np.isnan(piece)
        if bad.any():
            kept.add(int(first + bad.argmax()))
        if not bad.all():
            kept.update((int(first + np.nanargmin(piece)), int(first + np.nanargmax(piece))))
    order = np.array(sorted(kept))
    return x[order], y[order]


@dataclasses.dataclass(frozen=True)
class Position:
    """A place at the beginning of a line of a file that is appended to, by which the file is known again."""

    inode: int
    offset: int
    mark: int
    """Of the bytes before it."""

    @classmethod
    def at(cls, file: BinaryIO, offset: int) -> Position:
        """The place `offset` of an open file."""
        descriptor = file.fileno()
        before = os.pread(descriptor, min(_MARK, offset), max(offset - _MARK, 0))
        return cls(os.fstat(descriptor).st_ino, offset, zlib.crc32(before))

    @classmethod
    def parse(cls, text: str) -> Position | None:
        """What `str` gave; None where the text is none of that."""
        try:
            inode, offset, mark = (int(part, 16) for part in text.split("."))
        except ValueError:
            return None
        return cls(inode, offset, mark) if offset >= 0 else None

    def __str__(self) -> str:
        return f"{self.inode:x}.{self.offset:x}.{self.mark:x}"

    def is_in(self, file: BinaryIO) -> bool:
        """Whether the file is the same one, appended to at most. False: it was replaced, cut or written anew."""
        return os.fstat(file.fileno()).st_size >= self.offset and Position.at(file, self.offset) == self


def whole_lines(file: BinaryIO, first: int, end: int) -> bytes:
    """The bytes from `first` up to the last line that is complete before `end`."""
    text = os.pread(file.fileno(), max(end - first, 0), first)
    return text[: text.rfind(b"\n") + 1]


class MetricsLog:
    """The `metrics.jsonl` of a run. Safe to be used by several threads. All of it raises `OSError` where it cannot be read."""

    def __init__(self, opened: Callable[[], BinaryIO], whole_bytes: int = WHOLE_BYTES):
        """Reads nothing yet.

        Args:
          opened: opens the file.
          whole_bytes: up to this size it is read whole.
        """
        self._opened, self._whole_bytes = opened, whole_bytes
        self._lock = threading.Lock()
        self._position: Position | None = None
        self._tables: dict[str, Table] = {}
        self._first_size = 0
        self._search: EvaluationSearch | None = None

    @property
    def nbytes(self) -> int:
        """What is kept in memory."""
        searched = self._search.tables if self._search else {}
        return sum(table.nbytes for table in [*self._tables.values(), *searched.values()])

    @property
    def sampled(self) -> bool:
        """Whether only pieces of the file were read."""
        return self._search is not None

    @property
    def complete(self) -> float:
        """The share of the file in which evaluations were looked for; 1 where all of it was read."""
        return self._search.share(self._position.offset) if self._search and self._position else 1.0

    def refresh(self) -> str:
        """Reads what is new, or the whole file where it was replaced. Returns the cursor for `since`."""
        with self._lock, self._opened() as file:
            self._refresh(file)
            return str(self._position)

    def _refresh(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        position = self._position
        if position is None or not position.is_in(file) or size - self._first_size > self._whole_bytes:
            self._tables, self._first_size, start = {}, size, 0
            self._search = None
            if size > self._whole_bytes:
                self._search = EvaluationSearch()
                add_pieces(self._tables, file, 0, size)
                start = max(size - _PIECE_BYTES, 0)
                start += os.pread(file.fileno(), size - start, start).rfind(b"\n") + 1
        else:
            start = position.offset
        text = whole_lines(file, start, size)
        add_lines(self._tables, text)
        self._position = Position.at(file, start + len(text))
        if self._search:
            self._search.go_on(file, self._position.offset)

    def columns(self) -> dict[str, list[str]]:
        """The names of the columns by phase, in the order in which they came; after `refresh`."""
        with self._lock:
            return {phase: list(self._table(phase).columns) for phase in PHASES if self._table(phase).columns}

    def _table(self, phase: str) -> Table:
        tables = self._tables
        if self._search and phase != "train" and not self._search.overflowed:
            tables = self._search.tables
        return tables.get(phase) or Table()

    def series(
        self,
        columns: Iterable[str],
        x: str = "step",
        *,
        first: float = -math.inf,
        last: float = math.inf,
        points: int = 1500,
    ) -> dict[str, Series]:
        """The curves of columns such as `train/loss` and `val/ema_accuracy`, those that there are; after `refresh`.

        Args:
          columns: their names.
          x: the column that they are drawn over: `step`, `epoch` or `time`.
          first: where x begins.
          last: where it ends.
          points: about how many points a curve has at most.
        """
        with self._lock:
            tables, sampled = {phase: self._table(phase) for phase in PHASES}, self.sampled
            if self.sampled and (math.isfinite(first) or math.isfinite(last)):
                tables["train"], sampled = self._zoom(x, first, last)
            return {
                column: found
                for column in columns
                if (found := _series(tables, column, x, (first, last), points, sampled and not self._searched(column)))
            }

    def _searched(self, column: str) -> bool:
        return not column.startswith("train/") and self._search is not None and not self._search.overflowed

    def _zoom(self, x: str, first: float, last: float) -> tuple[Table, bool]:
        """The training rows of a part of a huge file, and whether they were sampled."""
        tables: dict[str, Table] = {}
        with self._opened() as file:
            size = os.fstat(file.fileno()).st_size
            begin = offset_of(file, x, first, size) if math.isfinite(first) else 0
            end = offset_of(file, x, math.nextafter(last, math.inf), size) if math.isfinite(last) else size
            end = min(end + 2 * _PIECE_BYTES, size)
            if end - begin > self._whole_bytes:
                add_pieces(tables, file, begin, end)
            else:
                add_lines(tables, whole_lines(file, begin, end))
        return tables.get("train") or Table(), end - begin > self._whole_bytes

    def since(self, cursor: str, columns: Iterable[str], x: str = "step") -> tuple[dict[str, Series], str] | None:
        """The points after a cursor, all of them, and the next cursor.

        Args:
          cursor: of an earlier call, or of `refresh`.
          columns: as in `series`; so is `x`.
          x: the column that they are drawn over.

        Returns:
          The curves that have new points. None where the file is not the same any more, or too much is new: draw anew.
        """
        position = Position.parse(cursor)
        with self._opened() as file:
            size = os.fstat(file.fileno()).st_size
            if position is None or size - position.offset > self._whole_bytes or not position.is_in(file):
                return None
            text = whole_lines(file, position.offset, size)
            after = Position.at(file, position.offset + len(text))
        tables: dict[str, Table] = {}
        add_lines(tables, text)
        everything = (-math.inf, math.inf)
        named = {column: _series(tables, column, x, everything, len(text), False) for column in columns}
        return {column: found for column, found in named.items() if found}, str(after)


def _series(
    tables: Mapping[str, Table], column: str, x: str, bounds: tuple[float, float], points: int, sampled: bool
) -> Series | None:
    phase, _, name = column.partition("/")
    found = tables[phase].points(x, name) if phase in tables else None
    if found is None:
        return None
    x_values, y_values = found
    inside = (x_values >= bounds[0]) & (x_values <= bounds[1])
    x_values, y_values = x_values[inside], y_values[inside]
    return Series(*downsample(x_values, y_values, points), int(x_values.size), sampled)


def add_pieces(tables: dict[str, Table], file: BinaryIO, begin: int, end: int) -> None:
    """Adds the whole lines of evenly spaced pieces of the bytes from `begin` to `end` of a file."""
    texts = []
    for at in np.linspace(begin, max(end - _PIECE_BYTES, begin), _PIECES).astype(np.int64):
        text = os.pread(file.fileno(), _PIECE_BYTES, int(at))
        whole = 0 if at == begin else text.find(b"\n") + 1
        texts.append(text[whole : text.rfind(b"\n") + 1])
    add_lines(tables, b"".join(texts))


def offset_of(file: BinaryIO, x: str, value: float, size: int) -> int:
    """Where the first line begins whose number `x` is at least `value`, within a piece's length. Lines must rise in it."""
    low, high = 0, size
    while high - low > _PIECE_BYTES:
        middle = (low + high) // 2
        text = os.pread(file.fileno(), _PIECE_BYTES, middle)
        tables: dict[str, Table] = {}
        add_lines(tables, text[text.find(b"\n") + 1 : text.rfind(b"\n") + 1])
        numbers = [table.columns[x].arrays()[1] for table in tables.values() if x in table.columns]
        if numbers and min(each.min() for each in numbers) < value:
            low = middle
        else:
            high = middle
    text = os.pread(file.fileno(), _PIECE_BYTES, low)
    return low + (text.find(b"\n") + 1 if low else 0)


class EvaluationSearch:
    """Finds the rows of evaluations in a huge file, a part in each call: they are few, and pieces would miss most."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.overflowed = False
        """There are so many that the pieces do."""
        self._offset = 0

    def share(self, size: int) -> float:
        """How much of the file was searched."""
        return 1.0 if self.overflowed else min(self._offset / max(size, 1), 1.0)

    def go_on(self, file: BinaryIO, end: int) -> None:
        """Searches from where it was up to `end`, where a line ends, for at most a moment."""
        until = time.monotonic() + _SEARCH_SECONDS
        while self._offset < end and not self.overflowed and time.monotonic() < until:
            text = whole_lines(file, self._offset, min(self._offset + _CHUNK, end))
            if not text:  # a line of megabytes
                self.overflowed = True
                return
            add_lines(self.tables, b"\n".join(_evaluations(text)), ("val", "test"))
            self._offset += len(text)
            self.overflowed = sum(table.rows for table in self.tables.values()) > _MOST_EVALUATIONS


def _evaluations(text: bytes) -> list[bytes]:
    """The lines of evaluations, in their order."""
    found = set()
    for needle in (b'"phase": "val"', b'"phase": "test"'):
        at = text.find(needle)
        while at >= 0:
            found.add((text.rfind(b"\n", 0, at) + 1, text.find(b"\n", at)))
            at = text.find(needle, at + 1)
    return [text[first:end] for first, end in sorted(found)]


def metrics_of(run: Path, whole_bytes: int = WHOLE_BYTES) -> MetricsLog:
    """The metrics of the run of a work directory."""
    return MetricsLog(lambda: Folder(run).open(METRICS), whole_bytes)
