"""Rows of JSON as columns of numbers: a few bytes a number, and nothing for a name that a row does not have."""

from __future__ import annotations

import array
import contextlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxtrain.host.files import parse_json

PHASES = ("train", "val", "test")
_MOST_COLUMNS = 1024  # of a phase; a run has some dozens


class Column:
    """The numbers of one name, with the rows that have it. NaN where the file says null."""

    def __init__(self) -> None:
        self._rows, self._values = array.array("i"), array.array("d")

    def append(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Adds `values`, f64 [n], of `rows`, i32 [n], which rise."""
        self._rows.frombytes(rows.astype(np.int32).tobytes())
        self._values.frombytes(values.tobytes())

    @property
    def nbytes(self) -> int:
        """What it holds."""
        return len(self._rows) * self._rows.itemsize + len(self._values) * self._values.itemsize

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies: rows, i32 [n], and values, f64 [n], by row."""
        rows, values = np.array(self._rows, np.int32), np.array(self._values, np.float64)
        if rows.size and np.any(rows[1:] < rows[:-1]):
            order = np.argsort(rows, kind="stable")
            rows, values = rows[order], values[order]
        return rows, values


class Table:
    """The rows of one phase."""

    def __init__(self) -> None:
        self.columns: dict[str, Column] = {}
        self.rows = 0

    @property
    def nbytes(self) -> int:
        """What its columns hold."""
        return sum(column.nbytes for column in self.columns.values())

    def extend(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows. What is no number is left out."""
        alike: dict[tuple[str, ...], list[int]] = {}
        for index, row in enumerate(rows):
            alike.setdefault(tuple(row), []).append(index)
        for names, indices in alike.items():
            where = np.array(indices, np.int32) + self.rows
            values = list(zip(*(rows[index].values() for index in indices), strict=True))
            for name, each in zip(names, values, strict=True):
                self._add(name, where, each)
        self.rows += len(rows)

    def _add(self, name: str, rows: np.ndarray, values: Sequence[Any]) -> None:
        numbers = [_is_number(value) for value in values]
        if not all(numbers):
            rows = rows[np.array(numbers)]
            values = [value for value, is_number in zip(values, numbers, strict=True) if is_number]
        if not values or (name not in self.columns and len(self.columns) >= _MOST_COLUMNS):
            return
        with contextlib.suppress(OverflowError):  # an integer of 400 digits
            self.columns.setdefault(name, Column()).append(rows, np.array(values, np.float64))

    def points(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The numbers of `y` with those of `x` in the same rows, f64 [n] each; None where no row has both."""
        if x not in self.columns or y not in self.columns:
            return None
        x_rows, x_values = self.columns[x].arrays()
        y_rows, y_values = self.columns[y].arrays()
        at = np.minimum(np.searchsorted(x_rows, y_rows), x_rows.size - 1)
        both = x_rows[at] == y_rows
        x_values, y_values = x_values[at][both], y_values[both]
        known = np.isfinite(x_values)
        return (x_values[known], y_values[known]) if known.any() else None


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def add_lines(tables: dict[str, Table], text: bytes, phases: Iterable[str] = PHASES) -> None:
    """Adds the whole lines of `text` to the tables of their phases. Lines that are no row are left out."""
    rows: dict[str, list[dict[str, Any]]] = {phase: [] for phase in phases}
    for row in _parse(text.split(b"\n")):
        if isinstance(row, dict):
            phase = row.pop("phase", None)
            if isinstance(phase, str) and phase in rows:
                rows[phase].append(row)
    for phase, found in rows.items():
        if found:
            tables.setdefault(phase, Table()).extend(found)


def _parse(lines: Sequence[bytes]) -> list[Any]:
    """The values of the lines that are JSON."""
    lines = [line for line in lines if line]
    with contextlib.suppress(ValueError, RecursionError):  # one text is parsed faster than its lines
        values = json.loads(b"[" + b",".join(lines) + b"]")
        if len(values) == len(lines):
            return values
    values = []
    for line in lines:
        with contextlib.suppress(ValueError):
            values.append(parse_json(line))
    return values
