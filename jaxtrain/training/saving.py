"""When a run saves its state, and what is stored with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import jax

from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.resume_point import Position
from jaxtrain.config import Config, to_dict
from jaxtrain.distributed.coordination import broadcast_bool
from jaxtrain.durations import Duration
from jaxtrain.observability.events import event
from jaxtrain.observability.text_log import FILE_ONLY
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.cadence import Timetable
from jaxtrain.training.callback_list import Callbacks

log = logging.getLogger("jaxtrain")

Figures = Mapping[str, float | None]
"""Of a validation, by their names in the manifest."""


class Saver:
    """Saves a step once, with its position and config; knows how long the last save is ago."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: Config,
        timetable: Timetable,
        saved_step: int,
        flush: Callable[[], None],
        callbacks: Callbacks,
    ):
        """Takes over a start's checkpoints.

        Args:
          checkpointer: of the run's own directory.
          config: the run's; it is stored with each checkpoint.
          timetable: the start's.
          saved_step: the step that this start goes on from.
          flush: puts the rows of metrics on disk: those up to a step must survive whatever its checkpoint survives.
          callbacks: their arrays are saved too, and they hear which checkpoints are complete.
        """
        self._callbacks = callbacks
        self._checkpointer, self._config, self._timetable, self._flush = checkpointer, config, timetable, flush
        self._saved_step, self._saved_at = saved_step, time.monotonic()
        self._told_step = -1
        self._every = Duration.parse(config.checkpoint.every, "config.checkpoint.every", minutes=True)

    def save(
        self,
        state: TrainState,
        position: Position,
        figures: Figures | None = None,
        *,
        last: bool = False,
    ) -> None:
        """Saves the state after `position.step`, unless that step was saved before.

        Args:
          state: the whole state.
          position: how far the run has come with it.
          figures: of its validation, where there was one; by one of them the best checkpoint is chosen.
          last: the run ends or stops after it.
        """
        step = position.step
        if step == self._saved_step:
            return
        due = self._timetable.due(step)
        epoch = self._timetable.epoch_of(step) + 1 if due.epoch_end else -1
        self._flush()
        stored = position.to_json(to_dict(self._config))
        kinds, arrays = {"milestone": due.milestone, "last": last}, self._callbacks.arrays
        self._checkpointer.save(step, state, stored, epoch=epoch, figures=figures, callbacks=arrays, **kinds)
        self._saved_step, self._saved_at = step, time.monotonic()
        self._tell()  # of the one before

    def check(self) -> None:
        """As `Checkpointer.check`; cheap."""
        self._checkpointer.check()
        self._tell()

    def wait(self) -> None:
        """As `Checkpointer.wait`."""
        self._checkpointer.wait()
        self._tell()

    def _tell(self) -> None:
        step = self._checkpointer.completed
        if step not in (-1, self._told_step):
            log.info("the checkpoint of step %d is complete", step, extra=event("checkpoint", step, also=FILE_ONLY))
            self._told_step = step
        if step >= 0:
            self._callbacks.on_checkpoint(step)

    def annotate(self, position: Position, figures: Figures) -> None:
        """Adds the figures of a validation that comes after its checkpoint."""
        self._checkpointer.annotate(position.step, figures, position.to_json(to_dict(self._config)))

    def time_has_come(self, steps: range) -> bool:
        """For `checkpoint.every` in minutes. Process 0's clock decides; asking it costs the others a collective."""
        if self._every.unit != "minutes" or not self._every.value:
            return False
        if jax.process_count() > 1 and not any(step % self._config.train.log_every == 0 for step in steps):
            return False
        with jax.transfer_guard("allow"):  # to tell the others, JAX puts it on the devices
            return broadcast_bool(time.monotonic() - self._saved_at >= self._every.seconds)
