"""After which steps something is due: functions of the step alone, the same on every process."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from fractions import Fraction

from jaxtrain.checkpoint.resume_point import Position
from jaxtrain.config import Config
from jaxtrain.durations import Duration

log = logging.getLogger("jaxtrain")

READ_BEHIND = 2
"""Metrics are read this many calls after theirs was dispatched, so that the devices never wait for the host."""


@dataclasses.dataclass(frozen=True)
class Cadence:
    """Once every `duration`, counted from the first step of the run."""

    duration: Duration
    train_examples: int

    def count(self, step: int, examples: int) -> int:
        """How often it was due by `step`, when `examples` were consumed. Never, for a duration of 0 or in minutes."""
        value = Fraction(self.duration.value).limit_denominator(10**6)
        if not value or self.duration.unit == "minutes":
            return 0
        done = {"steps": step, "examples": examples, "epochs": Fraction(examples, self.train_examples)}
        return math.floor(done[self.duration.unit] / value)

    def next_after(self, step: int, examples: int, batch: int) -> float:
        """The first later step that it is due after; infinity if it never is.

        Args:
          step: a step.
          examples: consumed by then.
          batch: examples a step.
        """
        value = Fraction(self.duration.value).limit_denominator(10**6)
        if not value or self.duration.unit == "minutes":
            return math.inf
        wanted = (self.count(step, examples) + 1) * value
        if self.duration.unit == "steps":
            return math.ceil(wanted)
        left = wanted * (self.train_examples if self.duration.unit == "epochs" else 1) - examples
        return step + math.ceil(left / batch)


@dataclasses.dataclass(frozen=True)
class Due:
    """What is due after a step.

    Attributes:
      last: it is the run's last step.
      epoch_end: an epoch ended with one of its examples.
      validation: the weights are evaluated on the validation split.
      save: `checkpoint.every` asks for a checkpoint.
      milestone: `checkpoint.milestone_every` asks for one that is never deleted.
      replica_check: the copies of the weights are compared.
      histograms: those of the weights are written.
    """

    last: bool = False
    epoch_end: bool = False
    validation: bool = False
    save: bool = False
    milestone: bool = False
    replica_check: bool = False
    histograms: bool = False


class Timetable:
    """What is due after each step of a start, and how many steps may be dispatched at once."""

    def __init__(self, config: Config, train_examples: int, steps: int, position: Position, *, validates: bool = True):
        """Reads the durations of `config`.

        Args:
          config: the run's.
          train_examples: examples of an epoch.
          steps: the run's last step.
          position: where this start goes on from.
          validates: whether there is a validation split.
        """
        self.first_step, self.steps, self.train_examples = position.step, steps, train_examples
        self._batch, self._first_example, self._validates = config.data.global_batch, position.examples, validates
        self._replicas_every = config.train.check_replicas_every
        self._histograms_every = config.telemetry.histograms_every
        save = Duration.parse(config.checkpoint.every, "config.checkpoint.every", minutes=True)
        milestone = Duration.parse(config.checkpoint.milestone_every, "config.checkpoint.milestone_every")
        evaluation = Duration.parse(config.train.eval_every, "config.train.eval_every")
        self._epoch_ends, self._evaluations, self._saves, self._milestones = (
            Cadence(duration, train_examples) for duration in (Duration(1, "epochs"), evaluation, save, milestone)
        )

    def examples_at(self, step: int) -> int:
        """The examples that are consumed once `step` is done."""
        return self._first_example + (step - self.first_step) * self._batch

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that update `step` belongs to: that of its first example."""
        return max(self.examples_at(step) - self._batch, 0) // self.train_examples

    def epoch_shown(self, step: int) -> int:
        """The epoch of update `step` as people count: from 1, and where a batch holds several, the last that it ends."""
        return max(self.epoch_of(step) + 1, self.examples_at(step) // self.train_examples)

    @property
    def pauses_within_epochs(self) -> bool:
        """Whether a validation or the end of the run comes elsewhere than at the end of an epoch."""
        duration = self._evaluations.duration
        by_epochs = duration.unit == "epochs" and duration.value == int(duration.value)
        return not self.due(self.steps).epoch_end or not (by_epochs or not duration.value)

    def epoch_steps(self, step: int) -> range:
        """The steps of the epoch that update `step` belongs to, within the run."""
        first = self.epoch_of(step) * self.train_examples
        return range(self._step_at(first) + 1, min(self._step_at(first + self.train_examples), self.steps) + 1)

    def _step_at(self, examples: int) -> int:
        """The step by whose end `examples` are consumed."""
        return self.first_step + math.ceil((examples - self._first_example) / self._batch)

    def left_after(self, step: int) -> tuple[int, int]:
        """How many validations, and how many saves that the config asks for, come after `step`; the last step has both."""

        def count(cadence: Cadence) -> int:
            due = cadence.count(self.steps, self.examples_at(self.steps)) - cadence.count(step, self.examples_at(step))
            return due + (not self._is_due(cadence, self.steps))

        if step >= self.steps:
            return 0, 0
        return count(self._evaluations) * self._validates, max(count(self._saves), count(self._milestones))

    def due(self, step: int) -> Due:
        """What is due after `step`."""
        last = step == self.steps
        return Due(
            last=last,
            epoch_end=self._is_due(self._epoch_ends, step),
            validation=self._validates and (last or self._is_due(self._evaluations, step)),
            save=self._is_due(self._saves, step),
            milestone=self._is_due(self._milestones, step),
            replica_check=bool(self._replicas_every) and step % self._replicas_every == 0,
            histograms=bool(self._histograms_every) and step % self._histograms_every == 0,
        )

    def _is_due(self, cadence: Cadence, step: int) -> bool:
        examples = self.examples_at(step)
        return cadence.count(step, examples) > cadence.count(step - 1, examples - self._batch)

    def next_pause(self, step: int) -> float:
        """The first step after `step` after which something is due that needs its metrics."""
        cadences = self._epoch_ends, self._evaluations, self._saves, self._milestones
        due = [cadence.next_after(step, self.examples_at(step), self._batch) for cadence in cadences]
        by_steps = [(step // every + 1) * every for every in (self._replicas_every, self._histograms_every) if every]
        return min(self.steps, *due, *by_steps)

    def log_start(self, steps_per_call: int) -> None:
        """Says what a user should know before the first step."""
        if self.first_step >= self.steps:
            log.info("this run is complete: it is at step %d of %d", self.first_step, self.steps)
        elif (gap := self.next_pause(self.first_step) - self.first_step) < steps_per_call:
            log.warning(
                "train.steps_per_call=%d is more than the %d steps to the next evaluation, save or end of an epoch, so each "
                "is a call of its own.",
                steps_per_call,
                gap,
            )

    def calls(self, steps_per_call: int) -> Iterator[tuple[range, bool]]:
        """The steps of each call of the train step, and whether something is due after them.

        Calls are whole until the next pause; what is left before it goes step by step.
        """
        step, pause = self.first_step, self.first_step
        while step < self.steps:
            if step == pause:
                pause = self.next_pause(step)
            count = steps_per_call if step + steps_per_call <= pause else 1
            step += count
            yield range(step - count + 1, step + 1), step == pause
