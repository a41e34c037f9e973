"""Ends a run whose validation gets no better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.checkpoint.manifest import is_better
from jaxtrain.config import Config
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.callbacks import Callback, RunHandle
from jaxtrain.training.results import deciding_figures


class EarlyStopping(Callback):
    """Ends the run after `callbacks.patience` validations in a row whose `checkpoint.best` is no better than the best before.

    Better means: by more than `callbacks.min_delta`. A figure that is not finite is no better.
    """

    name = "early_stopping"

    def __init__(self, config: Config):
        self._by, self._config = config.checkpoint.best, config.callbacks
        self._best: float | None = None
        self._waited = 0  # validations since

    def on_evaluation(self, run: RunHandle, state: TrainState, results: Mapping[str, EvalResult]) -> None:
        figure, sign = deciding_figures(results)[self._by], -1 if self._by == "val_loss" else 1
        if figure is not None and is_better(self._by, figure - sign * self._config.min_delta, self._best):
            self._best, self._waited = figure, 0
            return
        self._waited += 1
        if self._waited >= self._config.patience:
            best = "none was finite" if self._best is None else f"the best is {self._best:.6g}"
            run.stop(f"{self._by} got no better in {self._waited} validations in a row ({best})")

    def state_dict(self) -> dict[str, Any]:
        return {"by": self._by, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begins to count anew where `checkpoint.best` was another figure."""
        same = state["by"] == self._by
        self._best, self._waited = (state["best"], state["waited"]) if same else (None, 0)
