"""Writes what programs read of a run: `metrics.csv`, `metrics.jsonl`, TensorBoard scalars and `result.json`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxtrain.config import flatten
from jaxtrain.host.files import atomic_write, closing, open_to_append, write_all, writing
from jaxtrain.observability.metrics_files import PHASES, EpochRow, MetricsCsv, MetricsJsonl, epoch_row, json_value
from jaxtrain.observability.sinks import Sinks
from jaxtrain.observability.tensorboard import EventFile, Histogram
from jaxtrain.workdir import Workdir

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class NullMetricsWriter:
    """Writes nothing; for every process but the first, so that the loop is the same on all."""

    def train_step(self, row: Mapping[str, Any]) -> None:
        """One logged step: `step`, `epoch` (from 0) and the numbers of the step, as Python or NumPy scalars."""

    def epoch(
        self,
        epoch: int,
        phase: str,
        loss: float,
        accuracy: float,
        throughput: float,
        *,
        step: int,
        extra: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """The end of a training epoch (`phase="train"`) or of an evaluation (`val`, `test`).

        Args:
          epoch: counted from 0.
          phase: `train`, `val` or `test`.
          loss: mean over the examples.
          accuracy: in [0, 1].
          throughput: examples per second.
          step: optimizer steps done so far.
          extra: more numbers, for `metrics.jsonl` and TensorBoard.
        """

    def picture(self, step: int, tag: str, png: bytes, size: tuple[int, int]) -> None:
        """A picture for TensorBoard. png: the file's content. size: width and height, in pixels."""

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Histograms of the weights for TensorBoard, by tag."""

    def bad_batch(self, values: Mapping[str, Any]) -> None:
        """A batch with a non-finite number or a spike: `step`, `text`, `examples` (their indices in the training set)."""

    def result(self, values: Mapping[str, Any]) -> None:
        """Writes `result.json`: the run is complete."""

    def flush(self) -> None:
        """Syncs every row so far. Call it before a checkpoint is written, which must not be newer than the rows on the disk."""

    def close(self) -> None:
        """Syncs and closes every file; may be called twice."""

    def __enter__(self) -> NullMetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsWriter(NullMetricsWriter):
    """Process 0's writer. Opening drops what was recorded after the resumed step, so that no row is there twice."""

    def __init__(
        self, workdir: Workdir, step: int = 0, epochs_done: int = 0, since: int = 0, sinks: Sinks | None = None
    ):
        """Opens the files.

        The rows up to `step` must have been written before the checkpoint of `step`. A kill in between would lose them:
        nothing computes them again.

        Args:
          workdir: of the run.
          step: where it goes on from; 0 for a new run.
          epochs_done: whole epochs that were trained by then.
          since: the step after which the run has had its present data set; the CSV has the epochs of this data set only.
          sinks: that get the rows too; None: there are none. They are closed with the files.
        """
        self._workdir, self._sinks, self._complete = workdir, sinks, False
        self._jsonl = MetricsJsonl(workdir.metrics_jsonl, step)
        self._csv = MetricsCsv(workdir.metrics_csv)
        # The CSV has no steps. Evaluations of the present epoch come from metrics.jsonl: in the CSV an evaluation after
        # `step`, which is undone now, may have replaced an earlier one.
        whole = [row for row in self._csv.rows if row.epoch < epochs_done and step > since]
        evaluations = [row for row in self._jsonl.evaluations if row["step"] > since]
        self._csv.replace(whole + [epoch_row(row) for row in evaluations])
        self._events = {phase: EventFile(workdir.tensorboard / phase, step) for phase in PHASES}
        # In the folder above, so that TensorBoard takes the numbers of all phases for those of this config.
        if config := workdir.read_config():
            with closing(EventFile(workdir.tensorboard, step)) as events:
                events.hparams(step, flatten(config))

    def train_step(self, row: Mapping[str, Any]) -> None:
        head = {"step": row["step"], "epoch": row["epoch"], "phase": "train"}
        numbers = {key: value for key, value in row.items() if key not in head}
        self._jsonl.append(head | {"time": _now()} | numbers)
        self._events["train"].scalars(row["step"], _scalars(numbers))
        self._send("train/", row["step"], numbers)

    def epoch(
        self,
        epoch: int,
        phase: str,
        loss: float,
        accuracy: float,
        throughput: float,
        *,
        step: int,
        extra: Mapping[str, Any] = _NOTHING,
    ) -> None:
        loss, accuracy, throughput = float(loss), float(accuracy), float(throughput)
        numbers = {"loss": loss, "accuracy": accuracy, "throughput": throughput, **extra}
        if phase == "train":
            # Its steps are in metrics.jsonl already; a row of means would look like one more step.
            self._events[phase].scalars(step, {f"epoch/{k}": v for k, v in _scalars(numbers).items()})
            self._jsonl.flush()
            self._send("train/epoch/", step, numbers)
        else:
            if self._jsonl.append({"step": step, "epoch": epoch, "phase": phase, "time": _now(), **numbers}):
                self._events[phase].drop(step)
            self._events[phase].scalars(step, _scalars(numbers))
            self._send(f"{phase}/", step, numbers)
        self._csv.append(EpochRow(epoch, phase, loss, accuracy, throughput))

    def picture(self, step: int, tag: str, png: bytes, size: tuple[int, int]) -> None:
        self._events["train"].picture(step, tag, png, size)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        self._events["train"].histograms(step, values)

    def _send(self, prefix: str, step: int, numbers: Mapping[str, Any]) -> None:
        if self._sinks is not None:
            self._sinks.log(step, {prefix + name: value for name, value in _scalars(numbers).items()})

    def bad_batch(self, values: Mapping[str, Any]) -> None:
        path = self._workdir.bad_batches
        with writing(path), open_to_append(path) as file:
            write_all(file, f"{json.dumps(json_value(values))}\n".encode())

    def result(self, values: Mapping[str, Any]) -> None:
        self._complete = True
        atomic_write(self._workdir.result, json.dumps(json_value(values), indent=2, allow_nan=False) + "\n")

    def flush(self) -> None:
        for sink in (self._jsonl, *self._events.values()):
            sink.flush()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            if self._sinks is not None:  # last, since it may take seconds
                stack.callback(self._sinks.close, complete=self._complete)
            for sink in (self._jsonl, *self._events.values()):
                stack.callback(sink.close)


def _now() -> float:
    """Of a row of `metrics.jsonl`: seconds since 1970."""
    return round(time.time(), 3)


def _scalars(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among `numbers`, which TensorBoard can draw."""
    values = {key: json_value(value) for key, value in numbers.items()}
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
