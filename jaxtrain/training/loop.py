"""The training loop."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import jax
from rich.console import Console

from jaxtrain import config as config_lib
from jaxtrain.checkpoint import resume_point
from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.lease import Lease, NoLease
from jaxtrain.checkpoint.manifest import manifested_steps, read_manifest
from jaxtrain.checkpoint.resume_point import CheckpointStep, Position, ResumePoint
from jaxtrain.config import Config
from jaxtrain.data.order import batch_indices
from jaxtrain.distributed import coordination, straggler
from jaxtrain.distributed.coordination import broadcast_bool
from jaxtrain.distributed.interrupt import Interrupt
from jaxtrain.distributed.watchdog import Watchdog
from jaxtrain.durations import Duration
from jaxtrain.errors import NumericError
from jaxtrain.observability import diagnostics
from jaxtrain.observability.anomaly import Anomaly, AnomalyDetector
from jaxtrain.observability.clock import StepClock, explain
from jaxtrain.observability.goodput import NullTimes
from jaxtrain.observability.metrics_writer import MetricsWriter, NullMetricsWriter
from jaxtrain.observability.progress import NullProgress, Progress
from jaxtrain.parallel.replicas import ReplicaCheck
from jaxtrain.precision import MIN_SCALE
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.metrics import StepMetrics
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.cadence import Cadence
from jaxtrain.training.compiled import CompiledRun
from jaxtrain.training.setup import RunSpec
from jaxtrain.workdir import Workdir

log = logging.getLogger("jaxtrain")

# Metrics are read this many calls after theirs was dispatched, so that the devices never wait for the host.
READ_BEHIND = 2

_REPLICAS_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` returns. history: the rows that this start added to metrics.jsonl. result: what result.json holds."""

    state: TrainState
    history: list[dict[str, Any]]
    result: dict[str, Any]
    workdir: Workdir


@dataclasses.dataclass(frozen=True)
class Host:
    """What the starts of one call of `train` share."""

    directory: Workdir
    interrupt: Interrupt
    watchdog: Watchdog
    clock: StepClock
    console: Console
    lease: Lease | NoLease
    times: NullTimes


class RollBack(Exception):
    """The run goes on from an older checkpoint, past the examples that spoiled it."""

    def __init__(self, resume: ResumePoint):
        super().__init__()
        self.resume = resume


class _StopEvaluation(Exception):
    """The run is told to stop before this batch."""


class Loop:
    """One start of a run: owns the records and the progress display, and closes them."""

    def __init__(
        self,
        run: RunSpec,
        engine: CompiledRun,
        checkpoints: Checkpointer,
        host: Host,
        position: Position,
        rollbacks_left: int,
    ):
        self.run, self.engine, self.checkpoints = run, engine, checkpoints
        self.directory, self.clock, self.interrupt, self.watchdog = (
            host.directory,
            host.clock,
            host.interrupt,
            host.watchdog,
        )
        self.position, self.rollbacks_left, self.times = position, rollbacks_left, host.times
        self.stopping = False  # all processes stop after the step that was dispatched last
        self.config, self.train_examples = run.config, len(run.dataset.train)
        self.first_step = position.step
        self.history: list[dict[str, Any]] = []
        first = jax.process_index() == 0
        # A complete run trains nothing again, so the row of an epoch that its last step broke off stays too.
        rounded = math.floor if position.step < run.steps else math.ceil
        epochs_done = rounded(Fraction(position.examples, self.train_examples))
        self.guard = AnomalyDetector(self.config.train.nonfinite_skips, self.config.train.spike_threshold)
        self.check_replicas = ReplicaCheck()
        self.records = NullMetricsWriter()
        if first:
            self.records = MetricsWriter(host.directory, position.step, epochs_done, since=position.data_since)
        self.progress = Progress(run.steps, position.step, host.console) if first else NullProgress()
        self.epochs = self._epoch(run.steps) + 1
        self.log_span = self.epoch_span = self.pace_span = self.clock.now()
        self.paces, self.spread = straggler.ProcessTimes(), 1.0
        self.data_wait = 0.0  # of the last logged row, seconds
        self.saved_step, self.saved_at = position.step, time.monotonic()
        self.validated: tuple[int, dict[str, EvalResult]] = (-1, {})  # the last step that was, and its results
        every, milestone = self.config.checkpoint.every, self.config.checkpoint.milestone_every
        self.time_to_save = False  # what process 0's clock said after the last step
        self.save_every = Duration.parse(every, "config.checkpoint.every", minutes=True)
        self.saves = Cadence(self.save_every, self.train_examples)
        self.milestones = self._cadence(milestone, "config.checkpoint.milestone_every")
        self.evaluations = self._cadence(self.config.train.eval_every, "config.train.eval_every")
        self.epoch_ends = self._cadence("1 epoch", "")

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()
        self.records.close()

    def _cadence(self, text: str, field: str) -> Cadence:
        return Cadence(Duration.parse(text, field), self.train_examples)

    @property
    def _batch(self) -> int:
        return self.config.data.global_batch

    def _epoch(self, step: int) -> int:
        """The epoch, from 0, that update `step` belongs to: that of its first example."""
        return max(self._examples_at(step) - self._batch, 0) // self.train_examples

    # ------------------------------------------------------------------------------------------------------ the loop

    def run_to_end(self, state: TrainState) -> TrainResult:
        """Steps, evaluations and saves until the last step; then the test, and result.json."""
        if self.first_step >= self.run.steps:
            log.info("this run is complete: it is at step %d of %d", self.first_step, self.run.steps)
        elif (gap := self._next_pause(self.first_step) - self.first_step) < self.engine.steps_per_call:
            log.warning(
                "train.steps_per_call=%d is more than the %d steps to the next evaluation, save or end of an epoch, so each "
                "is a call of its own.",
                self.engine.steps_per_call,
                gap,
            )
        batches = self.engine.feed.train(
            seed=self.config.seed,
            global_batch=self._batch,
            first_step=self.first_step,
            first_example=self.position.examples,
            steps=max(self.run.steps - self.first_step, 0),
            calls=(len(steps) for steps, _ in self._calls()),
        )
        if self.position.owes_validation:
            self._between_steps(state, owed=True)
        pending: collections.deque[tuple[range, StepMetrics]] = collections.deque()
        with contextlib.closing(batches):
            for steps, due in self._calls():
                self.watchdog.feed("input", steps[0] - 1, len(steps) * (self.clock.step_seconds or 0.0))
                with self.clock.charge("input"):
                    batch = next(batches)
                self.watchdog.feed("step")
                with self.clock.charge("step"):
                    state, metrics = self.engine.step(state, batch, self.engine.feed.resident)
                    metrics.numbers.copy_to_host_async()
                    pending.append((steps, metrics))
                    pause = self._told_to_pause(steps) or due
                    self.watchdog.feed("wait")
                    while len(pending) > (0 if pause else READ_BEHIND):
                        self._read(*pending.popleft(), state)
                self.clock.step_done(self._batch, len(steps))
                self.progress.advance(steps[-1])
                if pause:
                    self._between_steps(state)
        return self._finish(state)

    def _calls(self) -> Iterator[tuple[range, bool]]:
        """The steps of each call, and whether something is due after them: single steps, where it is before a whole call ends.

        The same on every process, and the same steps for any `train.steps_per_call`.
        """
        step, pause, size = self.first_step, self.first_step, self.engine.steps_per_call
        while step < self.run.steps:
            if step == pause:
                pause = self._next_pause(step)
            count = size if step + size <= pause else 1
            step += count
            yield range(step - count + 1, step + 1), step == pause

    def _next_pause(self, step: int) -> float:
        """The first step after `step` after which something is due that needs its metrics."""
        cadences, every = (self.epoch_ends, self.evaluations, self.saves, self.milestones), self._replicas_every
        due = [cadence.next_after(step, self._examples_at(step), self._batch) for cadence in cadences]
        return min(self.run.steps, *due, (step // every + 1) * every if every else math.inf)

    def _told_to_pause(self, steps: range) -> bool:
        """Whether a signal or the clock asks for a pause after these `steps`."""
        self.checkpoints.check()
        self.stopping = self.interrupt.poll()
        self.time_to_save = self._save_time_has_come(steps)
        return self.stopping or self.time_to_save

    def _due(self, cadence: Cadence, step: int) -> bool:
        examples = self._examples_at(step)
        return cadence.count(step, examples) > cadence.count(step - 1, examples - self._batch)

    def _examples_at(self, step: int) -> int:
        return self.position.examples + (step - self.position.step) * self._batch

    def _save_time_has_come(self, steps: range) -> bool:
        """For `checkpoint.every` in minutes. Process 0's clock decides; asking it costs the others a collective."""
        duration = self.save_every
        if duration.unit != "minutes" or not duration.value:
            return False
        if jax.process_count() > 1 and not any(step % self.config.train.log_every == 0 for step in steps):
            return False
        with jax.transfer_guard("allow"):  # to tell the others, JAX puts it on the devices
            return broadcast_bool(time.monotonic() - self.saved_at >= duration.seconds)

    # ----------------------------------------------------------------------------------------------------- one step

    def _read(self, steps: range, metrics: StepMetrics, state: TrainState) -> None:
        """Takes note of the metrics of a call, step by step. state: that after the call that was dispatched last."""
        for step, values in zip(steps, metrics.rows(), strict=True):
            self._note(step, values, state)

    def _note(self, step: int, values: dict[str, float], state: TrainState) -> None:
        """Adds a step's metrics to the epoch's sums, and writes a row when it is due. Raises `NumericError`."""
        if not values.pop("made"):
            self._stop_at_bad_numbers(step, values, state)
        skipped = values.pop("skipped")
        overflowed = skipped and self.config.train.precision == "fp16" and values["loss_scale"] > MIN_SCALE
        if overflowed and (text := diagnostics.loss_scale_at_floor(values["loss_scale"] / 2, MIN_SCALE)):
            log.warning("%s", text)
        norms = values["grad_norm"], values["update_norm"]
        finding = Anomaly() if overflowed else self.guard.look(step, values["loss"], *norms, skipped=bool(skipped))
        correct = values.pop("correct")
        position = self.position
        self.position = dataclasses.replace(
            position,
            step=step,
            examples=position.examples + self._batch,
            # a batch that was passed over updated nothing, and its loss may be infinite
            epoch_loss=position.epoch_loss + (0.0 if skipped else values["loss"] * self._batch),
            epoch_correct=position.epoch_correct + (0.0 if skipped else correct),
            epoch_examples=position.epoch_examples + (0 if skipped else self._batch),
        )
        if step % self.config.train.log_every == 0:
            now = self.clock.now()
            span, self.log_span = now - self.log_span, now
            values = {"loss": values.pop("loss"), "accuracy": correct / self._batch, **values}
            epoch = self._epoch(step)
            # Rows that are read at once, of one call or before an evaluation, have no time of their own but the first: the
            # median step stands in, and the wait of the row before.
            median = self.clock.step_seconds
            self.data_wait = span.data_wait if span.steps else self.data_wait
            throughput = span.throughput if span.steps or not median else self._batch / median
            rates = {"throughput": throughput, "throughput_per_device": throughput / self._devices}
            row = {"step": step, "epoch": epoch, "phase": "train", **values, **rates, "data_wait": self.data_wait}
            row |= {"process_spread": self.spread} if jax.process_count() > 1 else {}
            self.records.train_step(row)
            self.history.append(row)
            shown = {"loss": values["loss"], "accuracy": values["accuracy"]}
            self.progress.update(step, epoch, self.epochs, shown, throughput, step_seconds=self.clock.step_seconds)
        if step % straggler.EVERY == 0:
            self._tell_pace()
        if finding.text:
            self._heed(finding, step)

    @property
    def _devices(self) -> int:
        return self.run.layout.mesh.size

    def _heed(self, finding: Anomaly, step: int) -> None:
        """Warns, notes the batch's examples, and rolls back or stops where the finding asks for it."""
        count, last = self.train_examples, self._examples_at(step)
        examples = batch_indices(count, self.config.seed, last - self._batch, self._batch)
        log.warning("%s; its examples are in %s", finding.text, self.directory.bad_batches)
        self.records.bad_batch({"step": step, "text": finding.text, "examples": examples.tolist()})
        if finding.action == "go on" or (finding.action == "roll back" and not self.rollbacks_left):
            return
        self.checkpoints.wait()
        if not self.rollbacks_left:
            raise NumericError(
                f"The run stops: {finding.text}, and config.train.rollbacks allows no more roll-back; the last checkpoint "
                "is as it was."
            )
        older = [s for s in manifested_steps(self.directory.checkpoints) if s < finding.first]
        start = CheckpointStep(self.directory.checkpoints, older[-1]) if older else None
        stored = Position()
        if start is not None:
            stored = Position.from_json(read_manifest(start.directory / str(start.step)).position)
        passed_over = last - stored.examples
        log.warning("rolled back to step %d; the %d examples since are passed over", stored.step, passed_over)
        raise RollBack(ResumePoint(start, dataclasses.replace(stored, examples=last), self.config))

    @property
    def _replicas_every(self) -> int:
        return self.config.train.check_replicas_every

    def _compare_replicas(self, state: TrainState) -> None:
        """Rolls back or stops where the copies of a weight differ; every process hears what any has found."""
        self.watchdog.feed("compare the copies")
        with self.clock.charge("other"):
            own = self.check_replicas(state.params)
        word = coordination.unique_key("replicas")
        found = [
            text
            for said in coordination.allgather_str(word, json.dumps(own), _REPLICAS_SECONDS)
            for text in json.loads(said)
        ]
        if found:
            step = self.position.step
            text = f"after step {step} {found[0]}: a device's memory or arithmetic is at fault"
            # How long they have differed is not known: back to before the comparison that was the last to be good.
            self._heed(Anomaly(text, "stop", max(step - self._replicas_every, 0) + 1), step)

    def _stop_at_bad_numbers(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        if self.rollbacks_left:
            text = (
                f"the update of step {step} was refused: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}"
            )
            self._heed(Anomaly(text, "stop", step), step)
        kept = "the last checkpoint is as it was"
        if self.position.step and not self.guard.poisoned:
            kept = f"the state after step {self.position.step} is kept"
            self._save(state)  # every update since was refused, so this is the state before the bad one
            self.checkpoints.wait()
        raise NumericError(
            f"The loss ({values['loss']:g}) or the gradient norm ({values['grad_norm']:g}) of step {step} is not finite; the "
            f"run stopped before that update, and {kept}. Try a lower "
            "config.optim.learning_rate, config.optim.clip_norm=1.0, a longer config.optim.warmup, or precision f32."
        )

    # -------------------------------------------------------------------------------------------------- between steps

    def _between_steps(self, state: TrainState, *, owed: bool = False) -> None:
        """Epoch row, evaluation, checkpoint: whatever is due after the step that was read last.

        owed: that step's validation alone, which an earlier start was stopped before.
        """
        step, last = self.position.step, self.position.step == self.run.steps
        self.watchdog.feed("save", step)
        if not owed and self._replicas_every and step % self._replicas_every == 0:
            self._compare_replicas(state)
        epoch, ends_epoch = self._epoch(step), self._due(self.epoch_ends, step)
        if not owed and (ends_epoch or last):
            self._end_epoch(epoch)
        if not owed and ends_epoch:
            self.position = dataclasses.replace(self.position, epoch_loss=0.0, epoch_correct=0.0, epoch_examples=0)
        validates = owed or bool(len(self.run.dataset.validation) and (last or self._due(self.evaluations, step)))
        accuracy = self._validate(state, epoch) if validates else None
        best = accuracy is not None and accuracy > self.position.best_accuracy
        if best:
            self.position = dataclasses.replace(self.position, best_accuracy=accuracy)
        self.position = dataclasses.replace(self.position, owes_validation=validates and accuracy is None)
        if owed and accuracy is not None:
            self.checkpoints.annotate(step, accuracy, self._stored_position())
        milestone = self._due(self.milestones, step)
        if best or last or milestone or self.stopping or self.time_to_save or self._due(self.saves, step):
            self._save(state, epoch + 1 if ends_epoch else -1, accuracy, milestone)
        if self.stopping and not last:
            self.watchdog.feed("save")
            self.checkpoints.wait()
            raise self.interrupt.error(
                f"Stopped after step {step} and saved it; {resume_point.how_to_go_on(self.config)}."
            )

    def _end_epoch(self, epoch: int) -> None:
        now = self.clock.now()
        span, self.epoch_span = now - self.epoch_span, now
        position = self.position
        count = max(position.epoch_examples, 1)
        loss, accuracy = position.epoch_loss / count, position.epoch_correct / count
        self.records.epoch(epoch, "train", loss, accuracy, throughput=span.throughput, step=position.step)
        bound = explain(span, "it")
        self.progress.message(
            f"epoch {epoch + 1}/{self.epochs} train: loss {loss:.4f}, accuracy {accuracy:.4f}; {bound}"
        )
        if warning := diagnostics.slow_data(span):
            log.warning("%s", warning)
        self._tell_pace()

    def _tell_pace(self) -> None:
        """Tells how long this process takes for its own part of a step; process 0 warns of one that is slow."""
        now = self.clock.now()
        span, self.pace_span = now - self.pace_span, now
        paces = self.paces.tell((span.seconds["input"] + span.seconds["other"]) / max(span.steps, 1))
        if not paces:
            return
        middle = statistics.median(each.seconds for each in paces)
        self.spread = max(each.seconds for each in paces) / middle if middle else 1.0
        if warning := straggler.imbalanced(paces):
            log.warning("%s", warning)

    def _validate(self, state: TrainState, epoch: int) -> float | None:
        """Evaluates the weights, and their average where there is one; returns the accuracy that decides which is best.

        None when the run is told to stop before or meanwhile: the next start will do it.
        """
        began = time.perf_counter()
        try:
            with self.clock.charge("evaluation"):
                results = self._evaluate(state, "validation")
        except _StopEvaluation:
            return None
        self.validated = (self.position.step, results)
        seconds = time.perf_counter() - began
        self._record(epoch, "val", results, seconds)
        return (results.get("ema") or results["raw"]).accuracy

    def _evaluate(self, state: TrainState, split: str) -> dict[str, EvalResult]:
        self.watchdog.feed("evaluation")  # the first one compiles
        weights = {"raw": (state.params, state.batch_stats)}
        if state.ema:
            weights["ema"] = state.ema["params"], state.ema["batch_stats"]
        return {name: self.engine.evaluate(split, *each, self._before_batch) for name, each in weights.items()}

    def _before_batch(self) -> None:
        self.watchdog.feed("evaluation")
        self.stopping = self.stopping or self.interrupt.poll()
        if self.stopping:
            raise _StopEvaluation

    def _record(self, epoch: int, phase: str, results: Mapping[str, EvalResult], seconds: float) -> None:
        raw, step = results["raw"], self.position.step
        extra = {"top5": raw.top5}
        if "ema" in results:
            extra |= {
                "ema_loss": results["ema"].loss,
                "ema_accuracy": results["ema"].accuracy,
                "ema_top5": results["ema"].top5,
            }
        throughput = raw.examples * len(results) / seconds
        self.records.epoch(epoch, phase, raw.loss, raw.accuracy, throughput=throughput, step=step, extra=extra)
        numbers = {"loss": raw.loss, "accuracy": raw.accuracy, "throughput": throughput, **extra}
        self.history.append({"step": step, "epoch": epoch, "phase": phase, **numbers})
        shown = f"loss {raw.loss:.4f}, accuracy {raw.accuracy:.4f}"
        shown += f", EMA accuracy {extra['ema_accuracy']:.4f}" if "ema" in results else ""
        self.progress.message(f"epoch {epoch + 1}/{self.epochs} {phase}: {shown}")

    def _save(self, state: TrainState, epoch: int = -1, accuracy: float | None = None, milestone: bool = False) -> None:
        step = self.position.step
        if step == self.saved_step:
            return
        if self.guard.poisoned:
            log.warning("the state after step %d is not saved: its update was not finite", step)
            return
        self.watchdog.feed("save")
        with self.clock.charge("checkpoint"):
            self.records.flush()  # the rows up to this step must survive whatever the checkpoint survives
            position = self._stored_position()
            self.checkpoints.save(step, state, position, epoch=epoch, val_accuracy=accuracy, milestone=milestone)
        self.saved_step, self.saved_at = step, time.monotonic()

    def _stored_position(self) -> dict[str, Any]:
        return self.position.to_json(config_lib.to_dict(self.config))

    # --------------------------------------------------------------------------------------------------------- the end

    def _finish(self, state: TrainState) -> TrainResult:
        """Tests the last and the best weights, and writes result.json."""
        self.watchdog.feed("save")
        with self.clock.charge("checkpoint"):
            self.checkpoints.wait()
        try:
            return self._tested(state)
        except _StopEvaluation:
            text = "Stopped in the final evaluation; the run is complete and saved, and the same command evaluates it."
            raise self.interrupt.error(text) from None

    def _tested(self, state: TrainState) -> TrainResult:
        epoch, began = self._epoch(self.position.step), time.perf_counter()
        with self.clock.charge("evaluation"):
            step, validation = self.validated
            last = self._test(state, validation if step == self.position.step else {})
            seconds = time.perf_counter() - began
            best_step, best = self.checkpoints.best_step(), last
            if best_step is not None and best_step != self.position.step:
                best = self._test(self.checkpoints.restore_weights(best_step, state))
        if "test" in last["results"]:
            self._record(epoch, "test", last["results"]["test"], seconds)
        whole = self.clock.now()
        judged = self.config if best_step is None else self._config_of(best_step)
        chosen = "ema" if judged.optim.ema else "raw"
        result = {
            "steps": self.position.step,
            "examples": self.position.examples,
            "epochs": self.position.examples / self.train_examples,
            "last": {"step": self.position.step} | last["summary"],
            "best": {"step": self.position.step if best_step is None else best_step, "weights": chosen}
            | best["summary"],
            "wall_seconds": whole.wall,
            "seconds": dict(whole.seconds),
            "throughput": whole.throughput,
            "devices": self._devices,
            "device_kind": self.run.layout.mesh.devices.flat[0].device_kind,
            "precision": self.config.train.precision,
        }
        found = self.times.summary()
        if found is not None:
            result |= {"goodput": found.share, "starts": found.starts}
        self.records.result(result)
        self._show_end(result, best_step)
        self.progress.message(explain(whole, "this run"))
        if found is not None and found.starts > 1:
            self.progress.message(f"goodput {found.share:.1%} over {found.starts} starts (jaxtrain goodput)")
        log.info("result: %s", self.directory.result)
        return TrainResult(state, self.history, result, self.directory)

    def _config_of(self, step: int) -> Config:
        """The config that a checkpoint of this run was made with."""
        return config_lib.from_dict(read_manifest(self.directory.checkpoints / str(step)).position["config"])

    def _show_end(self, result: Mapping[str, Any], best_step: int | None) -> None:
        """The last weights and the best ones, and what each of their figures is of."""
        chosen = result["best"]["weights"]
        keys = {"": "", "EMA ": "_ema"} if self.config.optim.ema else {"": ""}
        for name in ("last",) if best_step is None else ("last", "best"):
            figures = [
                f"{label}{split} accuracy {result[name][split + key]['accuracy']:.4f}"
                for split in ("validation", "test")
                for label, key in keys.items()
                if result[name].get(split + key)
            ]
            why = f", by the validation accuracy of the {'EMA' if chosen == 'ema' else 'raw'} weights" * (
                name == "best"
            )
            if figures:
                self.progress.message(f"{name}, step {result[name]['step']}{why}: {', '.join(figures)}")
        if not len(self.run.dataset.test):
            self.progress.message(f"nothing was tested: {self.config.data.name} has no test examples")

    def _test(self, state: TrainState, validation: dict[str, EvalResult] | None = None) -> dict[str, Any]:
        """Results by split and weights, and what result.json says of them. validation: if these were evaluated before."""
        dataset = self.run.dataset
        results: dict[str, dict[str, EvalResult]] = {}
        if len(dataset.validation):
            results["validation"] = validation or self._evaluate(state, "validation")
        if len(dataset.test):
            results["test"] = self._evaluate(state, "test")
        summary: dict[str, Any] = {} if len(dataset.test) else {"test": None}
        for name, each in results.items():
            for weights, outcome in each.items():
                key = name if weights == "raw" else f"{name}_{weights}"
                summary[key] = {"loss": outcome.loss, "accuracy": outcome.accuracy, "top5": outcome.top5}
        return {"results": results, "summary": summary}
