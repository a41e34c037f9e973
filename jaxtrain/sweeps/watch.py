"""What a sweep adds to a run: it hears of the first step, and pauses the run at its rung."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtrain.errors import ConfigError
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.train_state import TrainState
from jaxtrain.sweeps.halving import rung_step
from jaxtrain.training import callbacks
from jaxtrain.training.callbacks import RunHandle


class Watch(callbacks.Callback):
    """Pauses the run at the first validation after a part of its length."""

    name = "sweep"

    def __init__(self, pause_at: float, on_first_step: Callable[[], None]):
        """Watches one start.

        Args:
          pause_at: the share of the run's length; 1: it runs to its end.
          on_first_step: called once, after the first step of the start.
        """
        self.paused = False
        self._pause_at, self._on_first_step = pause_at, on_first_step
        self._said = False

    def on_start(self, run: RunHandle, state: TrainState) -> None:
        """Refuses a run whose validation is to decide, and that has none."""
        if self._pause_at < 1 and not len(run.compiled.run.dataset.validation):
            raise ConfigError(
                f"halving: {run.config.data.name} has no validation split, and what goes on is decided by one; hold some out "
                "with config.data.validation."
            )

    def on_step(self, run: RunHandle, step: int, metrics: Mapping[str, float]) -> None:
        if not self._said:
            self._said = True
            self._on_first_step()

    def on_evaluation(self, run: RunHandle, state: TrainState, results: Mapping[str, EvalResult]) -> None:
        if self._pause_at < 1 and rung_step(self._pause_at, run.steps) <= run.step < run.steps:
            self.paused = True
            run.pause(f"at {self._pause_at:.3g} of its length the sweep decides whether it goes on")
