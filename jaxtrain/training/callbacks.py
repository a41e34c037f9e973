"""Callbacks: a user's own code beside the training loop. This is the one way to extend it (docs/callbacks.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.observability.clock import Span
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.compiled import CompiledRun
from jaxtrain.training.stoppable import StoppableEvaluator
from jaxtrain.trees import PyTree


class RunHandle:
    """What a callback may know of its run, and ask of it.

    Attributes:
      config: of the run.
      workdir: its work directory; below it a callback may write files of its own names.
      steps: the run's last step.
      step: the last step whose numbers are known.
      compiled: the run on its devices: its programs, batches and data set. This may change between versions.
      spent: gives what this start's time went into so far, by category.
    """

    def __init__(
        self,
        compiled: CompiledRun,
        workdir: Path,
        evaluator: StoppableEvaluator,
        stop: Callable[[str], None],
        pause: Callable[[str], None],
        spent: Callable[[], Span],
        profile: Callable[[int], None],
    ):
        self.config, self.workdir, self.steps, self.step = compiled.run.config, workdir, compiled.run.steps, 0
        self.compiled, self.spent, self._evaluator = compiled, spent, evaluator
        self._stop, self._pause, self._profile = stop, pause, profile

    def stop(self, reason: str) -> None:
        """Ends the run where the next epoch or validation ends, or after the next save: complete, with `result.json`.

        In `on_epoch` and `on_evaluation` that is at once. What process 0 asks for counts. reason: for `result.json`.
        """
        self._stop(reason)

    def pause(self, reason: str) -> None:
        """Saves the run and stops it, where `stop` would end it: with `PreemptedError`, and the next start goes on from there.

        What process 0 asks for counts. reason: for that error.
        """
        self._pause(reason)

    def profile(self, steps: int) -> None:
        """Asks for a profile of at least so many steps from the next call of the step on (docs/profiling.md).

        It goes on over whatever comes between, which is in its figures too, and ends with the run at the latest. What is
        asked for while one is taken is forgotten. On several processes each must ask for the same after the same step, so it
        needs `every_process`.

        Raises:
          ValueError: `steps` is no whole number from 1 on, or the callback is not called on all processes.
        """
        self._profile(steps)

    def evaluate(self, split: str, params: PyTree, batch_stats: PyTree) -> EvalResult:
        """Evaluates weights with the shapes and shardings of the run's own. Every process must call it.

        A run that is told to stop meanwhile breaks it off, with the hook: `on_end` is called again by the next start.

        Args:
          split: `validation` or `test`.
          params: float arrays, keyed by layer.
          batch_stats: running statistics, keyed by layer.
        """
        return self._evaluator.of_weights(split, params, batch_stats)

    def before_batch(self) -> None:
        """For `on_end` on every process alike: what takes long calls it now and then. It ends where the run is told to stop."""
        self._evaluator.pulse()


class Callback:
    """Code that a run calls. Override the hooks that you need; the others do nothing.

    Process 0 alone calls it, unless `every_process` is set: what computes with the state's arrays must run on all. Metrics
    are numbers that the host has read anyway. So a hook makes the devices wait only where it reads an array of the state, or
    takes long.
    """

    name = ""
    """Names it in the checkpoint, in `result.json` and in errors; no two of a run may have the same. "": the class's name."""

    every_process = False
    """Whether all processes call it. They must then all do the same."""

    arrays: PyTree = None
    """Arrays that belong to its state, such as an average of the weights; None: it has none. `on_start` makes them, with the
    shapes and shardings that they keep, and a run that goes on then finds the stored values here."""

    def on_start(self, run: RunHandle, state: TrainState) -> None:
        """A start of the run begins, at the step of `state`; `load_state_dict` was called before."""

    def on_step(self, run: RunHandle, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of a step are known, two calls after it was dispatched: `loss`, `accuracy`, `learning_rate`, norms."""

    def on_epoch(self, run: RunHandle, epoch: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """An epoch has ended: its number, from 0; the state after it; its mean `loss` and `accuracy`."""

    def on_evaluation(self, run: RunHandle, state: TrainState, results: Mapping[str, EvalResult]) -> None:
        """The weights were validated: results by weights, `raw` and perhaps `ema`."""

    def on_checkpoint(self, run: RunHandle, step: int, folder: Path) -> None:
        """The checkpoint of `step` is complete, maybe some steps later: what changes here is not in it."""

    def on_end(self, run: RunHandle, state: TrainState) -> Mapping[str, Any] | None:
        """The run is complete. What is returned stands in `result.json`, under `callbacks` and its name."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, as JSON has it. That of process 0 is stored."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned. A start that has nothing stored gets what the first `state_dict` returned."""
