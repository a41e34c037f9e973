"""The training loop: `TrainLoop.run` is the whole of it; what is due between steps is `TrainLoop._between_steps`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Mapping
from typing import NoReturn

from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.lease import Lease, NoLease
from jaxtrain.checkpoint.manifest import is_better
from jaxtrain.checkpoint.resume_point import Position, how_to_go_on
from jaxtrain.data.order import batch_indices
from jaxtrain.distributed.interrupt import Interrupt
from jaxtrain.distributed.watchdog import Watchdog
from jaxtrain.observability import diagnostics
from jaxtrain.observability.anomaly import Anomaly, AnomalyDetector
from jaxtrain.observability.clock import StepClock
from jaxtrain.observability.goodput import NullTimes
from jaxtrain.observability.progress import Progress
from jaxtrain.parallel.replicas import ReplicaCheck
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.metrics import StepMetrics
from jaxtrain.step.train_state import TrainState
from jaxtrain.training import recovery
from jaxtrain.training.cadence import READ_BEHIND, Due, Timetable
from jaxtrain.training.callback_list import Callbacks
from jaxtrain.training.compiled import CompiledRun
from jaxtrain.training.profiling import Profiler, ProfileRequest, read
from jaxtrain.training.reporter import Reporter
from jaxtrain.training.results import (
    TrainResult,
    best_weights,
    deciding_figures,
    final_result,
    on_both_splits,
)
from jaxtrain.training.saving import Figures, Saver
from jaxtrain.training.setup import RunSpec
from jaxtrain.training.stoppable import StopEvaluation, StoppableEvaluator
from jaxtrain.training.telemetry import Telemetry
from jaxtrain.workdir import Workdir

log = logging.getLogger("jaxtrain")

Unread = collections.deque[tuple[range, StepMetrics]]
"""Calls of the step and their metrics, the oldest first."""


@dataclasses.dataclass(frozen=True)
class Host:
    """What the starts of one call of `train` share."""

    directory: Workdir
    interrupt: Interrupt
    watchdog: Watchdog
    clock: StepClock
    progress: Progress
    lease: Lease | NoLease
    times: NullTimes
    telemetry: Telemetry
    callbacks: Callbacks
    profiles: ProfileRequest
    origins: Mapping[str, str]


class TrainLoop:
    """One start of a run, from its first step to its result. Close its `reporter` afterwards."""

    def __init__(
        self,
        run: RunSpec,
        compiled: CompiledRun,
        checkpointer: Checkpointer,
        host: Host,
        position: Position,
        rollbacks_left: int,
    ):
        self.run_spec, self.compiled, self.checkpointer, self.host = run, compiled, checkpointer, host
        self.config, self.position, self.rollbacks_left = run.config, position, rollbacks_left
        self.clock, self.watchdog, self.callbacks = host.clock, host.watchdog, host.callbacks
        validates = len(run.dataset.validation) > 0
        self.timetable = Timetable(run.config, len(run.dataset.train), run.steps, position, validates=validates)
        parts = host.directory, host.clock, host.progress, host.telemetry
        self.reporter = Reporter(compiled, self.timetable, position, *parts)
        poll = host.interrupt.poll
        self.evaluator = StoppableEvaluator(compiled.evaluate, self.watchdog, self.clock, self.reporter.view, poll)
        self.anomalies = AnomalyDetector(self.config.train.nonfinite_skips, self.config.train.spike_threshold)
        self.replica_check = ReplicaCheck()
        self.validated: tuple[int, dict[str, EvalResult]] = (-1, {})  # the last step that was, and its results
        self.profiler = Profiler(compiled, host.directory, host.progress, host.watchdog, host.clock, host.profiles)
        self.saver = Saver(checkpointer, run.config, self.timetable, position.step, self.reporter.flush, host.callbacks)
        self.stopping = self.time_to_save = (
            False  # all processes stop after this call; process 0's clock asks for a save
        )

    # ------------------------------------------------------------------------------------------------------- the loop

    def run(self, state: TrainState) -> TrainResult:
        """Steps, and what is due between them, until the last step; then the test, and `result.json`.

        The host stays ahead of the devices: a call's metrics are read `READ_BEHIND` calls later. Only where something is due
        (or a signal, the clock or a profile asks for it) are all of them read first, since what is due needs them. Every
        process comes to the same pauses: they depend on the step alone, or the processes agree on them (`_told_to_pause`).
        """
        self.timetable.log_start(self.compiled.steps_per_call)
        batches = self.compiled.batches(
            first_step=self.timetable.first_step,
            first_example=self.position.examples,
            steps=max(self.run_spec.steps - self.timetable.first_step, 0),
            calls=(len(steps) for steps, _ in self.timetable.calls(self.compiled.steps_per_call)),
        )
        if self.position.owes_validation:
            self._validate_late(state)
        unread: Unread = collections.deque()
        with contextlib.closing(batches), contextlib.closing(self.profiler):
            calls = self.timetable.calls(self.compiled.steps_per_call)
            for steps, due in itertools.takewhile(lambda _: not self.position.ended, calls):
                self.profiler.begin_if_due(steps, functools.partial(self._read, unread, 0, state))
                self.watchdog.feed("input", steps[0] - 1, len(steps) * (self.clock.step_seconds or 0.0))
                with self.clock.charge("input"):
                    batch = next(batches)
                self.watchdog.feed("step")
                with self.clock.charge("step"):
                    state, metrics = self.profiler.step(steps, state, batch)
                    metrics.numbers.copy_to_host_async()
                    unread.append((steps, metrics))
                    pause = self._told_to_pause(steps) or due
                    self.watchdog.feed("wait")
                    self._read(unread, 0 if pause or self.profiler.ends(steps) else READ_BEHIND, state)
                self.clock.step_done(self.config.data.global_batch, len(steps))
                self.host.telemetry.after(steps, metrics.numbers, self.clock)
                self.profiler.end_if_due(steps, pauses=pause)
                if pause:
                    state = self.compiled.averaged(state)
                    self._between_steps(state)
            self.profiler.end()
        return self._finish(state)

    def _told_to_pause(self, steps: range) -> bool:
        """Whether a signal or the clock asks for a pause after these `steps`; the same answer on every process."""
        self.saver.check()
        self.stopping, self.time_to_save = self.host.interrupt.poll(), self.saver.time_has_come(steps)
        return self.stopping or self.time_to_save

    # ------------------------------------------------------------------------------------------------- a step's numbers

    def _read(self, unread: Unread, behind: int, state: TrainState) -> None:
        """Reads the metrics of calls, step by step, until `behind` are unread. state: after the call dispatched last."""
        while len(unread) > behind:
            steps, metrics = unread.popleft()
            for step, numbers in zip(steps, read(metrics, steps), strict=True):
                self._observe(step, numbers, state)

    def _observe(self, step: int, metrics: dict[str, float], state: TrainState) -> None:
        """Adds a step to the epoch's totals, reports it, and acts on numbers that are not as they should be."""
        if not metrics.pop("made"):
            self._stop_before(step, metrics, state)
        skipped, overflowed = bool(metrics.pop("skipped")), bool(metrics.pop("overflowed"))
        anomaly = Anomaly()
        if overflowed:  # fp16's loss scale has shrunk, as it is meant to
            if warning := diagnostics.loss_scale_at_floor(metrics["loss_scale"] / 2):
                log.warning("%s", warning)
        else:
            norms = metrics["grad_norm"], metrics["update_norm"]
            anomaly = self.anomalies.observe(step, metrics["loss"], *norms, skipped=skipped)
        correct, batch = metrics.pop("correct"), self.config.data.global_batch
        self.position = self.position.after_step(step, batch, metrics["loss"], correct, skipped=skipped)
        self.reporter.step(self.position, metrics, correct)
        self.callbacks.on_step(step, metrics | {"accuracy": correct / batch})
        if anomaly.text:
            self._handle_anomaly(anomaly, step)

    def _handle_anomaly(self, anomaly: Anomaly, step: int) -> None:
        """Warns and notes the batch's examples. Raises `RollBack` or `NumericError` where the run may not just go on."""
        examples, batch = self.timetable.examples_at(step), self.config.data.global_batch
        rows = batch_indices(self.timetable.train_examples, self.config.seed, examples - batch, batch)
        self.reporter.bad_batch(step, anomaly.text, rows.tolist())
        if (response := recovery.respond(anomaly, self.rollbacks_left)) == "go on":
            return
        self.saver.wait()
        if response == "stop":
            raise recovery.out_of_rollbacks(anomaly)
        point = recovery.rollback_point(self.host.directory.checkpoints, anomaly, examples, self.config)
        raise recovery.RollBack(point)

    def _stop_before(self, step: int, metrics: Mapping[str, float], state: TrainState) -> NoReturn:
        """Rolls back, or stops the run, at an update that was refused; `state` is still that before it."""
        if self.rollbacks_left:
            self._handle_anomaly(recovery.refused_update(step, metrics), step)
        if self.position.step:
            self.position = self.callbacks.noted(self.position, may_end=False)
            self._save(self.compiled.averaged(state), last=True)
            self.saver.wait()
        raise recovery.not_finite(step, metrics, recovery.what_is_kept(self.position.step))

    def _compare_replicas(self, state: TrainState) -> None:
        """Rolls back or stops where the copies of a weight differ; every process hears what any has found."""
        self.watchdog.feed("compare the copies")
        step, every = self.position.step, self.config.train.check_replicas_every
        with self.clock.charge("other"):
            anomaly = recovery.compare_replicas(self.replica_check, state.params, step, every)
        if anomaly.text:
            self._handle_anomaly(anomaly, step)

    # --------------------------------------------------------------------------------------------------- between steps

    def _between_steps(self, state: TrainState) -> None:
        """Whatever is due after the step that was read last.

        The order matters. Copies that differ are found before their weights are evaluated or saved. The epoch's row comes
        before that of its validation. The validation comes before the save, since a checkpoint holds the figures that
        decide whether it is the best. The stop comes last, when all of it is on disk.
        """
        step, due = self.position.step, self.timetable.due(self.position.step)
        self.watchdog.feed("save", step)
        if due.replica_check:
            self._compare_replicas(state)
        self.reporter.histograms(step, state.params)
        if due.epoch_end or due.last:
            self.reporter.epoch(self.timetable.epoch_of(step), self.position)
        if due.epoch_end:
            self.callbacks.on_epoch(self.timetable.epoch_of(step), state, *self.position.epoch_means())
            self.position = self.position.at_new_epoch()
        figures, is_best = self._validate(state) if due.validation else (None, False)
        self.reporter.view.row(step, is_best=is_best)
        self.position = dataclasses.replace(self.position, owes_validation=due.validation and figures is None)
        paused = due != Due() or self.time_to_save
        self.position = self.callbacks.noted(self.position, may_end=paused and not due.last)
        last, stopping = due.last or self.position.ended, self.stopping or bool(self.callbacks.pause)
        if self.position.ended and not due.epoch_end:
            self.reporter.epoch(self.timetable.epoch_of(step), self.position)
        if is_best or last or due.milestone or due.save or stopping or self.time_to_save:
            self._save(state, figures, last=last or stopping)
        if stopping and not last:
            self._stop()

    def _validate_late(self, state: TrainState) -> None:
        """The validation that an earlier start was stopped before; the checkpoint that it left learns the figures."""
        step = self.position.step
        self.watchdog.feed("save", step)
        figures, is_best = self._validate(state)
        self.position = dataclasses.replace(self.position, owes_validation=figures is None)
        if figures is not None:
            self.reporter.view.row(step, is_best=is_best)
            self.position = self.callbacks.noted(self.position, may_end=step != self.run_spec.steps)
            self.saver.annotate(self.position, figures)
        if (self.stopping or self.callbacks.pause) and step != self.run_spec.steps and not self.position.ended:
            self._stop()

    def _stop(self) -> NoReturn:
        self.profiler.end()
        self.watchdog.feed("save")
        self.saver.wait()
        done = f"Stopped after step {self.position.step} and saved it{self.callbacks.pause and f' ({self.callbacks.pause})'}"
        raise self.host.interrupt.error(f"{done}; {how_to_go_on(self.config)}.")

    def _validate(self, state: TrainState) -> tuple[Figures | None, bool]:
        """Evaluates the weights, and their average where there is one.

        Returns:
          The figures, of which one decides what the best weights are, and whether it is the best so far. None when the run is
          told to stop before or meanwhile: the next start will do it.
        """
        began = time.perf_counter()
        try:
            with self.clock.charge("evaluation"):
                results = self.evaluator.of_state(state, "validation")
        except StopEvaluation:
            self.stopping = True
            return None, False
        self.validated = (self.position.step, results)
        self.reporter.evaluation(self.position.step, "val", results, time.perf_counter() - began)
        self.callbacks.on_evaluation(state, results)
        figures, by = deciding_figures(results), self.config.checkpoint.best
        is_best = is_better(by, figures[by], self.position.best)
        if is_best:
            self.position = dataclasses.replace(self.position, best=figures[by], best_by=by)
        return figures, is_best

    def _save(self, state: TrainState, figures: Figures | None = None, *, last: bool = False) -> None:
        self.watchdog.feed("save")
        with self.clock.charge("checkpoint"), self.reporter.view.saving(self.position.step):
            self.saver.save(state, self.position, figures, last=last)

    # ---------------------------------------------------------------------------------------------------------- the end

    def _finish(self, state: TrainState) -> TrainResult:
        """Tests the last and the best weights, and writes `result.json`."""
        self.watchdog.feed("save")
        with self.clock.charge("checkpoint"):
            self.saver.wait()
        try:
            return self._test(state)
        except StopEvaluation:
            text = "Stopped in the final evaluation; the run is complete and saved, and the same command evaluates it."
            raise self.host.interrupt.error(text) from None

    def _test(self, state: TrainState) -> TrainResult:
        began, step, dataset = time.perf_counter(), self.position.step, self.run_spec.dataset
        evaluate, (validated_at, validation) = self.evaluator.of_state, self.validated
        with self.clock.charge("evaluation"):
            last = on_both_splits(evaluate, state, dataset, validation if validated_at == step else None)
            seconds = time.perf_counter() - began
            best_step, best = self.checkpointer.best_step(), last
            if best_step not in (None, step):
                best = on_both_splits(evaluate, self.checkpointer.restore_weights(best_step, state), dataset)
        if "test" in last:
            self.reporter.evaluation(step, "test", last["test"], seconds)
        with self.clock.charge("evaluation"):
            said = self.callbacks.on_end(state)
        chosen = best_weights(self.host.directory.checkpoints, best_step, self.position, self.config)
        time_so_far, goodput = self.clock.now(), self.host.times.summary()
        result = final_result(self.run_spec, self.position, time_so_far, last, best, chosen, goodput, said)
        self.reporter.finish(result, time_so_far, tested="test" in last, has_best=best_step is not None)
        return TrainResult(state, self.reporter.history, result, self.host.directory)
