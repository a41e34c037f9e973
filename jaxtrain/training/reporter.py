"""What a start of a run reports while it trains: rows of metrics, lines of the log, the time that steps take."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax

from jaxtrain.checkpoint.resume_point import Position
from jaxtrain.distributed import straggler
from jaxtrain.observability import diagnostics
from jaxtrain.observability.clock import Span, StepClock, explain
from jaxtrain.observability.events import event
from jaxtrain.observability.metrics_writer import MetricsWriter, NullMetricsWriter
from jaxtrain.observability.progress import Progress
from jaxtrain.observability.rendering import duration
from jaxtrain.observability.sinks import Sinks
from jaxtrain.observability.tensorboard import Histogram
from jaxtrain.observability.text_log import FILE_ONLY, NOT_LIVE, to_screen
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.histograms import WeightHistograms
from jaxtrain.training.cadence import Timetable
from jaxtrain.training.compiled import CompiledRun
from jaxtrain.training.example_grid import first_examples, grid_png
from jaxtrain.training.results import closing_lines, done_lines
from jaxtrain.training.run_view import RunView
from jaxtrain.training.telemetry import Telemetry
from jaxtrain.trees import PyTree
from jaxtrain.workdir import Workdir

log = logging.getLogger("jaxtrain")

_QUIET_SECONDS = 30.0  # without a terminal a logged step is a line only so long after the line before


class Reporter:
    """Process 0 writes and shows; every process keeps `history`, and tells how long its own part of a step takes.

    Attributes:
      history: the rows of this start, without telemetry: with many devices that is most of a row.
      view: what is shown.
    """

    def __init__(
        self,
        compiled: CompiledRun,
        timetable: Timetable,
        position: Position,
        directory: Workdir,
        clock: StepClock,
        progress: Progress,
        telemetry: Telemetry,
    ):
        """Opens the files of metrics.

        Args:
          compiled: the run.
          timetable: of this start.
          position: where it goes on from.
          directory: of the run.
          clock: of the run.
          progress: the line of what is done now.
          telemetry: of this process.
        """
        run = self._run = compiled.run
        self._resident, self._speed = bool(compiled.inputs.offsets), compiled.speed
        self._telemetry, self._weight_histograms = telemetry, WeightHistograms(run.layout)
        self._config, self._timetable, self._clock, self._directory = run.config, timetable, clock, directory
        self._devices, self._batch = run.layout.mesh.size, run.config.data.global_batch
        self.history: list[dict[str, Any]] = []
        self._unlogged = {"loss"} if run.config.train.precision == "fp16" else {"loss", "loss_scale"}
        self._writer = NullMetricsWriter()
        if jax.process_index() == 0:
            # A complete run trains nothing again, so the row of an epoch that its last step broke off stays too.
            rounded = math.floor if position.step < run.steps else math.ceil
            epochs_done = rounded(Fraction(position.examples, timetable.train_examples))
            sinks = Sinks(run.config, directory)
            self._writer = MetricsWriter(directory, position.step, epochs_done, position.data_since, sinks)
        num_batches = {split: run.num_evaluation_batches(split) for split in ("validation", "test")}
        ema = run.config.optim.ema > 0
        self.view = RunView(timetable, clock, progress, self._batch, num_batches=num_batches, ema=ema)
        self._marks: dict[str, Span] = dict.fromkeys(("log", "epoch", "process"), clock.now())
        self._process_times, self._spread = straggler.ProcessTimes(), 1.0
        self._data_wait = 0.0  # of the last logged row, seconds
        self._said_at = time.monotonic()
        self._bound, self._slow = "step", False  # of the epoch before
        self._show_first_examples()

    def close(self) -> None:
        """Ends the display and closes the files."""
        self.view.close()
        self._writer.close()

    def flush(self) -> None:
        """Puts all rows so far on disk."""
        self._writer.flush()

    def _since(self, mark: str) -> Span:
        now = self._clock.now()
        span, self._marks[mark] = now - self._marks[mark], now
        return span

    def step(self, position: Position, metrics: Mapping[str, float], correct: float) -> None:
        """Shows a step; a row every `train.log_every` steps.

        Args:
          position: after it.
          metrics: `loss`, norms, learning rate and the like, as the step reports them.
          correct: right answers in the batch.
        """
        step = position.step
        self.view.step(step, *position.epoch_means(), metrics["learning_rate"])
        if step % self._config.train.log_every == 0:
            span, epoch = self._since("log"), self._timetable.epoch_of(step)
            # Rows that are read at once, of one call or before an evaluation, have no time of their own but the first: the
            # median step stands in, and the wait of the row before.
            median = self._clock.step_seconds
            self._data_wait = span.data_wait if span.steps else self._data_wait
            throughput = span.throughput if span.steps or not median else self._batch / median
            shown = {"loss": metrics["loss"], "accuracy": correct / self._batch}
            row = {"step": step, "epoch": epoch, "phase": "train", **shown}
            row |= {name: value for name, value in metrics.items() if name not in self._unlogged}
            row |= {"throughput": throughput, "throughput_per_device": throughput / self._devices}
            row |= {"data_wait": self._data_wait}
            row |= {"process_spread": self._spread} if jax.process_count() > 1 else {}
            row |= self._speed.numbers(throughput)
            self.history.append(row)
            row = row | {f"time/{category}": seconds for category, seconds in self._clock.now().seconds.items()}
            row |= self._telemetry.numbers()
            self._telemetry.row(row)
            self._writer.train_step(row)
            self._log_step(step, shown, throughput, median)
        if step % straggler.EVERY == 0:
            self._tell_process_time()

    def epoch(self, epoch: int, position: Position) -> None:
        """The row of an epoch of training, from its totals in `position`."""
        span = self._since("epoch")
        loss, accuracy = position.epoch_means()
        self._writer.epoch(epoch, "train", loss, accuracy, throughput=span.throughput, step=position.step)
        self.view.trained(loss, accuracy, span.throughput)
        self._said_at = time.monotonic()  # a row of the table follows
        where = self._where(position.step)
        log.info("%s train: loss %.4f, accuracy %.4f; %s", where, loss, accuracy, explain(span, "it"), extra=FILE_ONLY)
        bound = self._bound if span.bound == "compile" else span.bound  # compiling is over
        if bound != self._bound:
            to_screen(explain(span, where))
        warning = diagnostics.slow_data(span, resident=self._resident)
        if warning:
            log.warning("%s", warning, extra=FILE_ONLY if self._slow else None)
        self._bound, self._slow = bound, bool(warning)
        self._tell_process_time()

    def evaluation(self, step: int, phase: str, results: Mapping[str, EvalResult], seconds: float) -> None:
        """The row of an evaluation.

        Args:
          step: the update that the weights come from.
          phase: `val` or `test`.
          results: by weights, `raw` and perhaps `ema`.
          seconds: how long it took.
        """
        epoch, raw = self._timetable.epoch_of(step), results["raw"]
        extra = {"top5": raw.top5}
        if ema := results.get("ema"):
            extra |= {"ema_loss": ema.loss, "ema_accuracy": ema.accuracy, "ema_top5": ema.top5}
        throughput = raw.examples * len(results) / seconds
        self._writer.epoch(epoch, phase, raw.loss, raw.accuracy, throughput=throughput, step=step, extra=extra)
        numbers = {"loss": raw.loss, "accuracy": raw.accuracy, "throughput": throughput, **extra}
        self.history.append({"step": step, "epoch": epoch, "phase": phase, **numbers})
        shown = f"loss {raw.loss:.4f}, accuracy {raw.accuracy:.4f}"
        shown += f", EMA accuracy {ema.accuracy:.4f}" if ema else ""
        log.info("%s %s: %s", self._where(step), phase, shown, extra=FILE_ONLY)
        if phase == "val":
            self.view.validated(results)

    def _where(self, step: int) -> str:
        return f"epoch {self._timetable.epoch_shown(step)}/{self.view.epochs}"

    def _log_step(self, step: int, shown: Mapping[str, float], throughput: float, median: float | None) -> None:
        """A line for the log, and now and then for what is no terminal.

        Args:
          step: the update's number.
          shown: numbers by name.
          throughput: examples per second.
          median: seconds of a step; None while it is not known.
        """
        total, numbers = self._timetable.steps, "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        left = "?" if median is None else duration((total - step) * median)
        extra, now = FILE_ONLY, time.monotonic()
        if now - self._said_at > _QUIET_SECONDS:
            extra, self._said_at = NOT_LIVE, now
        text = "%s  step %d/%d  %s  %.1f images/s  ETA %s"
        log.info(text, self._where(step), step, total, numbers, throughput, left, extra=extra)

    def _show_first_examples(self) -> None:
        """Shows how the model of a new run sees its first examples (`telemetry.images`)."""
        count = self._config.telemetry.images
        if count and jax.process_index() == 0 and self._timetable.first_step == 0:
            with self._clock.charge("compile"):
                self._writer.picture(0, "first examples", *grid_png(first_examples(self._run, count)))

    def histograms(self, step: int, params: PyTree) -> None:
        """Writes histograms of the parameters after `step`, where they are due; with pipeline stages, none."""
        if not self._timetable.due(step).histograms or self._run.layout.stages > 1:
            return
        with self._clock.charge("other"):
            rows = self._weight_histograms(params)
        tags = {f"params/{path}": Histogram(*row[:4].tolist(), counts=row[4:].tolist()) for path, row in rows.items()}
        self._writer.histograms(step, tags)

    def bad_batch(self, step: int, text: str, examples: list[int]) -> None:
        """Warns of a step whose numbers were not as they should be, and notes which examples it had."""
        path = self._directory.bad_batches
        log.warning("%s; its examples are in %s", text, path, extra=event("anomaly", step))
        self._writer.bad_batch({"step": step, "text": text, "examples": examples})

    def finish(self, result: Mapping[str, Any], span: Span, *, tested: bool, has_best: bool) -> None:
        """Writes `result.json`, and says what it holds.

        Args:
          result: what it holds.
          span: this start's time.
          tested: whether there is a test split.
          has_best: whether a checkpoint was chosen by its validation.
        """
        self._writer.result(result)
        for line in closing_lines(result, self._config, span, tested=tested, has_best=has_best):
            log.info("%s", line, extra=FILE_ONLY)
        log.info("result: %s", self._directory.result, extra=FILE_ONLY)
        for line in done_lines(result, self._config, span, self._timetable.epoch_shown, self._directory.result):
            to_screen(line)

    def _tell_process_time(self) -> None:
        """Tells how long this process takes for its own part of a step; process 0 warns of one that is slow."""
        span = self._since("process")
        times = self._process_times.exchange((span.seconds["input"] + span.seconds["other"]) / max(span.steps, 1))
        if not times:
            return
        middle = statistics.median(process.seconds for process in times)
        self._spread = max(process.seconds for process in times) / middle if middle else 1.0
        if warning := straggler.imbalanced(times):
            log.warning("%s", warning)
