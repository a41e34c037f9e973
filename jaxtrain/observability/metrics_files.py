"""`metrics.csv` (one row an epoch and phase) and `metrics.jsonl` (one object a logged step), safe to resume.

Both survive a kill at any byte. Lines are appended, an incomplete last line is dropped when the file is opened again, and a
rewrite replaces the whole file atomically. Opening at step S drops what was recorded after S: the run does it again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import atomic_write, open_to_append, parse_json, reading, write_all, writing

log = logging.getLogger("jaxtrain")
PHASES = ("train", "val", "test")
HEADER = "epoch,phase,loss,accuracy,throughput"


# -------------------------------------------------------------------------------------------------------------- CSV


@dataclasses.dataclass(frozen=True)
class EpochRow:
    """One row of `metrics.csv`."""

    epoch: int
    """From 0."""
    phase: str
    loss: float
    """Mean over the examples."""
    accuracy: float
    """In [0, 1]."""
    throughput: float
    """Examples per second."""

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase={self.phase!r}: must be one of {', '.join(PHASES)}")

    @property
    def key(self) -> tuple[int, int]:
        """Rows are unique in, and sorted by, epoch and phase."""
        return self.epoch, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"{self.epoch},{self.phase},{_decimals(self.loss)},{_decimals(self.accuracy)},{self.throughput:.1f}"

    @classmethod
    def parse(cls, line: str) -> EpochRow | None:
        """The row in `line`, None when it is incomplete or no row."""
        cells = line.split(",")
        try:
            epoch, phase, *numbers = cells
            return cls(int(epoch), phase, *map(float, numbers))
        except (ValueError, TypeError):
            return None


def _decimals(value: float) -> str:
    """At most six decimals and at least four: 0.8215, 0.821537, 1.0000."""
    text = f"{value:.6f}"
    return text if not math.isfinite(value) else text[:-2] + text[-2:].rstrip("0")


class MetricsCsv:
    """`metrics.csv`: one row for each epoch and phase, sorted, and at most one test row (the run's last).

    A second row of the same epoch and phase replaces the first (of two validations in an epoch the later counts). So a step
    that is done twice leaves the same bytes as one that is done once.
    """

    def __init__(self, path: Path):
        """Reads the file, or writes a new one. Raises `WorkdirError` for a file with another header."""
        self._path = path
        self._rows: dict[tuple[int, int], EpochRow] = {}
        with reading(path):
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        # An incomplete row can look complete (834.5 cut to 8), so only the newline shows that a line is complete.
        *lines, incomplete = text.split("\n")
        ours = lines[0] == HEADER if lines else HEADER.startswith(incomplete)
        if not ours:
            raise WorkdirError(f"{path} does not begin with {HEADER!r}; move it away, or choose another --workdir.")
        for number, line in enumerate(lines[1:], 2):
            row = EpochRow.parse(line)
            if row is None:
                log.warning("%s: line %d is damaged and was dropped.", path, number)
            else:
                self._rows[row.key] = row
        self._rewrite()

    @property
    def rows(self) -> list[EpochRow]:
        """All rows, sorted."""
        return [self._rows[key] for key in sorted(self._rows)]

    def replace(self, rows: Iterable[EpochRow]) -> None:
        """Makes `rows` the whole content, as if appended one after the other."""
        self._rows = {}
        for row in rows:
            self._add(row)
        self._rewrite()

    def append(self, row: EpochRow) -> None:
        """Adds a row, or replaces the one of this epoch and phase (for `test`: of any epoch)."""
        if not self._add(row):
            self._rewrite()
            return
        with writing(self._path), open_to_append(self._path) as file:
            write_all(file, f"{row}\n".encode())
            os.fsync(file.fileno())  # once an epoch: milliseconds

    def _add(self, row: EpochRow) -> bool:
        """Whether the row came at the end and replaced none."""
        others = {k: r for k, r in self._rows.items() if k != row.key and not (row.phase == r.phase == "test")}
        last = len(others) == len(self._rows) and (not others or max(others) < row.key)
        self._rows = {**others, row.key: row}
        return last

    def _rewrite(self) -> None:
        atomic_write(self._path, "".join(f"{line}\n" for line in (HEADER, *self.rows)))


# ------------------------------------------------------------------------------------------------------------ JSONL


class MetricsJsonl:
    """`metrics.jsonl`: one JSON object a line, with at least `step`, `epoch` and `phase`; floats in full precision.

    JSON has no NaN or infinity: they are written as null. The operating system gets each line when it is appended, so a
    killed process loses none. After `flush` they survive a power cut.
    """

    def __init__(self, path: Path, step: int):
        """Opens the file of a run that goes on from `step` (0: a new run), and drops the rows of later steps.

        `evaluations` is then the list of the validation and test rows that were kept.
        """
        self._path = path
        kept = [row for row in _read_rows(path) if row["step"] <= step]
        atomic_write(path, "".join(map(_line, kept)))
        self.evaluations = [row for row in kept if row["phase"] != "train"]
        self._again = {(row["step"], row["phase"]) for row in kept if row["step"] == step}
        self._file = self._open()

    def _open(self) -> FileIO:
        with writing(self._path):
            return open_to_append(self._path)

    def append(self, row: Mapping[str, Any]) -> bool:
        """Adds one object. It replaces a row of the resumed step (an evaluation that is done again): whether it did."""
        key = (row["step"], row["phase"])
        replaces = key in self._again
        if replaces:
            self._again.remove(key)
            self._file.close()
            others = [r for r in _read_rows(self._path) if (r["step"], r["phase"]) != key]
            atomic_write(self._path, "".join(map(_line, others)))
            self._file = self._open()
        with writing(self._path):
            write_all(self._file, _line(row).encode())
        return replaces

    def flush(self) -> None:
        """Syncs to the disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes; may be called twice."""
        if not self._file.closed:
            with self._file:
                self.flush()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of the file. A damaged line is dropped, with a warning unless it is the last (which a kill cut)."""
    with reading(path):
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if not (isinstance(row["step"], int) and isinstance(row["epoch"], int) and row["phase"] in PHASES):
                raise ValueError
            epoch_row(row)
            rows.append(row)
        except (ValueError, TypeError, KeyError, OverflowError):  # no prefix of a one-line object is itself an object
            if number < len(lines):
                log.warning("%s: line %d is damaged and was dropped.", path, number)
    return rows


def epoch_row(row: Mapping[str, Any]) -> EpochRow:
    """The row of `metrics.csv` for an evaluation's row of `metrics.jsonl`. Raises `ValueError`, `TypeError` or the like."""
    loss, accuracy, throughput = (
        float("nan") if row.get(key) is None else float(row[key]) for key in ("loss", "accuracy", "throughput")
    )
    return EpochRow(row["epoch"], row["phase"], loss, accuracy, throughput)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(json_value(row), allow_nan=False) + "\n"


def json_value(value: Any) -> Any:
    """`value` in JSON's types: arrays of one element become numbers, NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (int, float, str)):  # a NumPy or JAX scalar
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None  # float(): np.float64 is a float with another repr
    return value
