"""Makes the callbacks of a run, calls them, and keeps their state. What a user's own raises names the callback."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint.checkpointer import Checkpointer, restore_callbacks
from jaxtrain.checkpoint.resume_point import CheckpointStep, Position
from jaxtrain.config import Config
from jaxtrain.distributed.coordination import broadcast_str
from jaxtrain.errors import CallbackError, CheckpointError, ConfigError, JaxtrainError
from jaxtrain.host.files import closing
from jaxtrain.observability.clock import Span
from jaxtrain.observability.text_log import FILE_ONLY
from jaxtrain.plugins import load_callable, place_in_own_code
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.callbacks import Callback, RunHandle
from jaxtrain.training.compiled import CompiledRun
from jaxtrain.training.early_stopping import EarlyStopping
from jaxtrain.training.stoppable import StopEvaluation, StoppableEvaluator
from jaxtrain.training.swa import StochasticWeightAveraging
from jaxtrain.trees import PyTree

log = logging.getLogger("jaxtrain")

_SHIPPED: Mapping[str, Callable[[Config], Callback]] = {
    "early_stopping": EarlyStopping,
    "swa": StochasticWeightAveraging,
}
_SECONDS = 600.0  # that process 0 may take before the others hear whether the run ends


def name_of(callback: Callback) -> str:
    """Its `name`, or else that of its class."""
    return callback.name or type(callback).__name__


def make_callbacks(config: Config, own: Sequence[Callback] = ()) -> Callbacks:
    """The callbacks that the config names, and then the `own` ones.

    Raises:
      ConfigError: a name is that of no callback, or two callbacks have the same name.
    """
    found = []
    for name in config.callbacks.names:
        if make := _SHIPPED.get(name):
            found.append(make(config))
            continue
        factory = load_callable(name, "callbacks.names")
        try:
            found.append(factory(config))
        except Exception as error:
            raise ConfigError(
                f"config.callbacks.names={name!r}: making it failed with {_words(error)}{place_in_own_code(error)}; it is "
                "called with the config."
            ) from error
    for callback in (*found, *own):
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"The callback {callback!r} is a {type(callback).__name__}; it must be a jaxtrain.training.callbacks.Callback."
            )
    names = [name_of(callback) for callback in (*found, *own)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two callbacks are called {name!r}, which names their state; give one another `name`.")
    return Callbacks([*found, *own])


class Callbacks:
    """The callbacks of a run, through all of its starts in this process."""

    def __init__(self, callbacks: Sequence[Callback]):
        self._all = {name_of(callback): callback for callback in callbacks}
        first = jax.process_index() == 0
        self._here = {name: each for name, each in self._all.items() if first or each.every_process}
        self._initial = {name: self._state_of(name) for name in self._all}
        self._run: RunHandle | None = None
        self._told = -1  # the step of the last `on_checkpoint`
        self._calling, self._asked = "", {}  # who is called now; who has asked that the run ends
        self._asked_to_pause = ""
        self._ask_for_profile: Callable[[int], None] = lambda _: None  # until `begin`
        self.pause = ""
        """Why all processes save and stop where `noted` was called last; "": they go on."""

    def __len__(self) -> int:
        return len(self._all)

    @property
    def names(self) -> list[str]:
        """Of all callbacks, in their order."""
        return list(self._all)

    # ------------------------------------------------------------------------------------------------------ the state

    def begin(
        self,
        start: CheckpointStep | None,
        position: Position,
        compiled: CompiledRun,
        workdir: Path,
        state: TrainState,
        evaluator: StoppableEvaluator,
        spent: Callable[[], Span],
        profile: Callable[[int], None],
    ) -> None:
        """Gives each callback its state, and calls `on_start`.

        Args:
          start: the checkpoint that this start goes on from; None for a fresh run.
          position: how far the run is there.
          compiled: the run on its devices.
          workdir: the run's.
          state: that it goes on with.
          evaluator: of the run.
          spent: gives what this start's time went into.
          profile: asks for a profile of the next steps.

        Raises:
          CheckpointError: the stored state does not fit a callback.
        """
        self._ask_for_profile = profile
        self._run = RunHandle(compiled, workdir, evaluator, self._stop, self._pause, spent, self._profile)
        self._run.step = position.step
        self._told, self._asked_to_pause, self.pause = -1, "", ""
        self._asked = {key: text for key, text in position.ending.items() if key != "step"}
        stored = position.callbacks
        for name, callback in self._here.items():
            if start is not None and name not in stored:
                log.warning("step %d has no state of the callback %s, which begins anew", position.step, name)
            try:
                callback.load_state_dict(copy.deepcopy(stored.get(name, self._initial[name])))
            except Exception as error:
                raise CheckpointError(
                    f"The callback {name} does not take the state that step {position.step} has of it "
                    f"({_words(error)}{place_in_own_code(error)}); bring back the version that stored it, or give it another "
                    "`name`, under which it begins anew."
                ) from error
        for name, callback in self._here.items():
            self._call(name, callback.on_start, state)
            if callback.arrays is not None and not callback.every_process:
                raise ConfigError(f"The callback {name} has arrays, so it must set `every_process`.")
        if start is not None and (arrays := self.arrays):
            with closing(Checkpointer(start.directory, read_only=True)) as checkpoints:
                for name, found in restore_callbacks(checkpoints, start.step, arrays, state).items():
                    self._here[name].arrays = found

    @property
    def arrays(self) -> dict[str, PyTree]:
        """The arrays of the callbacks that have some, by name."""
        return {name: each.arrays for name, each in self._here.items() if jax.tree.leaves(each.arrays)}

    def state(self) -> dict[str, Any]:
        """The state of each callback of this process, for a checkpoint."""
        return {name: self._state_of(name) for name in self._here}

    def _state_of(self, name: str) -> Any:
        with _blamed(name, "state_dict"):
            return json.loads(json.dumps(self._all[name].state_dict()))

    # ------------------------------------------------------------------------------------------------------ the hooks

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            self._run.step = step
        for name, callback in self._here.items():
            self._call(name, callback.on_step, step, metrics)

    def on_epoch(self, epoch: int, state: TrainState, loss: float, accuracy: float) -> None:
        for name, callback in self._here.items():
            self._call(name, callback.on_epoch, epoch, state, {"loss": loss, "accuracy": accuracy})

    def on_evaluation(self, state: TrainState, results: Mapping[str, EvalResult]) -> None:
        for name, callback in self._here.items():
            self._call(name, callback.on_evaluation, state, results)

    def on_checkpoint(self, step: int) -> None:
        """Calls the hooks once a step. step: that of the checkpoint that has become complete last."""
        if step == self._told or self._run is None:
            return
        self._told, folder = step, self._run.workdir / "checkpoints" / str(step)
        for name, callback in self._here.items():
            self._call(name, callback.on_checkpoint, step, folder)

    def on_end(self, state: TrainState) -> dict[str, Any]:
        """What the callbacks have to say in `result.json`, by their names."""
        said = {name: self._call(name, callback.on_end, state) for name, callback in self._here.items()}
        return {name: dict(values) for name, values in said.items() if values}

    def noted(self, position: Position, *, may_end: bool) -> Position:
        """The position with the state of the callbacks, and with the end of the run where one of them has asked for it.

        Every process calls it, and hears the same: process 0 decides, by figures that are those of the whole run.

        may_end: whether the run may end or pause here.
        """
        if not self._all:
            return position
        asked = self._asked
        if may_end:
            said = json.dumps((asked, self._asked_to_pause))
            asked, pause = json.loads(broadcast_str("ending", said, _SECONDS))
            self.pause = "" if asked else pause
        ending = asked | ({"step": position.step} if asked and may_end else {})
        return dataclasses.replace(position, callbacks=self.state(), ending=ending)

    def _call(self, name: str, hook: Callable[..., Any], *arguments: Any) -> Any:
        self._calling = name
        try:
            with _blamed(name, hook.__name__), jax.transfer_guard("allow"):
                return hook(self._run, *arguments)
        except StopEvaluation:
            if hook.__name__ == "on_end":  # the next start calls it again
                raise
            log.warning("the run is told to stop: %s of the callback %s was broken off", hook.__name__, name)

    def _stop(self, reason: str) -> None:
        self._asked = self._asked or {"by": self._calling, "reason": str(reason)}

    def _profile(self, steps: int) -> None:
        if not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"run.profile({steps!r}): must be a whole number of steps from 1 on")
        if jax.process_count() > 1 and not self._all[self._calling].every_process:
            raise ValueError(
                "run.profile of one process of several; set every_process, and ask on all after the same step"
            )
        self._ask_for_profile(int(steps))

    def _pause(self, reason: str) -> None:
        self._asked_to_pause = self._asked_to_pause or str(reason)


@contextlib.contextmanager
def _blamed(name: str, hook: str) -> Iterator[None]:
    """Turns what a callback raises into one sentence with its name; its traceback goes to the log file."""
    try:
        yield
    except (
        JaxtrainError,
        StopEvaluation,
        jax.errors.JaxRuntimeError,
    ):  # the last may be of the devices, or of a process
        raise
    except Exception as error:
        log.error("the callback %s failed in %s", name, hook, exc_info=True, extra=FILE_ONLY)
        raise CallbackError(
            f"The callback {name} failed in {hook} ({_words(error)}){place_in_own_code(error)}; the last checkpoint is as it "
            "was, and the log has the traceback."
        ) from error


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
