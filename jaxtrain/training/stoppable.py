"""Evaluations of a run that end before the next batch where the run is told to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from jaxtrain.distributed.watchdog import Watchdog
from jaxtrain.observability.clock import StepClock
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.compiled import Evaluator
from jaxtrain.training.run_view import RunView
from jaxtrain.trees import PyTree


class StopEvaluation(Exception):
    """The run is told to stop before the next batch."""


class StoppableEvaluator:
    """Evaluates on a split, shows how far it is, and raises `StopEvaluation` where the run is told to stop."""

    def __init__(
        self, evaluate: Evaluator, watchdog: Watchdog, clock: StepClock, view: RunView, stops: Callable[[], bool]
    ):
        self._evaluate, self._watchdog, self._clock, self._view, self._stops = evaluate, watchdog, clock, view, stops

    def of_state(self, state: TrainState, split: str) -> dict[str, EvalResult]:
        """Results by weights: `raw`, and `ema` where the run keeps an average."""
        with self._shown(split):
            with self._clock.charge("compile"):
                self._evaluate.wait(state)
            return self._evaluate.of_state(state, split, self._before_batch)

    def of_weights(self, split: str, params: PyTree, batch_stats: PyTree) -> EvalResult:
        """The result of other weights of the run's shapes."""
        with self._shown(split):
            return self._evaluate(split, params, batch_stats, self._before_batch)

    @contextlib.contextmanager
    def _shown(self, split: str) -> Iterator[None]:
        self._watchdog.feed("evaluation")  # the first one compiles
        with self._view.evaluating(split):
            yield

    def pulse(self) -> None:
        """Tells the watchdog of progress; raises `StopEvaluation` where the run is told to stop. For every process alike."""
        self._watchdog.feed("evaluation")
        if self._stops():
            raise StopEvaluation

    def _before_batch(self) -> None:
        self.pulse()
        self._view.next_batch()
