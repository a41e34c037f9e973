"""What a run shows on a screen while it trains: a line for what it does now, and a table with a row an epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping

from jaxtrain.observability import rendering
from jaxtrain.observability.clock import StepClock
from jaxtrain.observability.progress import Progress
from jaxtrain.observability.rendering import Activity, Number
from jaxtrain.observability.text_log import to_screen
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.training.cadence import Timetable

_UPDATE_SECONDS = 0.1  # the line gets new numbers no more often, so that quick steps do not wait for it


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long things take in seconds; None where none of them was measured yet."""

    step: float | None
    batch: float | None
    """Of an evaluation."""
    save: float | None


def seconds_left(pace: Pace, steps: int, batches: int, saves: int) -> tuple[float, str]:
    """How long the rest of a run takes, and what that leaves out since nothing is known of it.

    Args:
      pace: as measured so far.
      steps: that are left.
      batches: of evaluations that are left.
      saves: that are left.

    Returns:
      Seconds, NaN where even a step was not measured; and `evaluation`, `saves`, both with `and`, or ''.
    """
    if pace.step is None:
        return math.nan, ""
    needed = {"evaluation": (batches, pace.batch), "saves": (saves, pace.save)}
    missing = [name for name, (left, each) in needed.items() if left and each is None]
    return steps * pace.step + batches * (pace.batch or 0.0) + saves * (pace.save or 0.0), " and ".join(missing)


def evaluation_left(
    num_batches: Mapping[str, int], weights: int, validations: int, *, tested: int = 0, running: int = 0
) -> int:
    """How many batches of evaluations are left of a run.

    At its end the last weights are tested, and the best on both splits, where those are others.

    Args:
      num_batches: of an evaluation of each split.
      weights: how many each evaluates: the average too, where the run keeps one.
      validations: that are left; the one that runs now is none of them.
      tested: batches of the evaluations at the end that have begun.
      running: batches that are left of the evaluation that runs now.
    """
    at_end = num_batches["test"] + (sum(num_batches.values()) if num_batches["validation"] else 0)
    return weights * (validations * num_batches["validation"] + at_end) - tested + running


class RunView:
    """Process 0's view of a start. It reads no device: it is told what the loop has read."""

    def __init__(
        self,
        timetable: Timetable,
        clock: StepClock,
        progress: Progress,
        batch: int,
        *,
        num_batches: Mapping[str, int],
        ema: bool,
    ):
        """Begins to show the training.

        Args:
          timetable: of the start.
          clock: of the run.
          progress: the line of what is done now.
          batch: examples a step.
          num_batches: of an evaluation of each split.
          ema: whether the run keeps an average of the weights, which is evaluated too.
        """
        self._timetable, self._clock, self._progress, self._batch = timetable, clock, progress, batch
        self._num_batches, self._weights = num_batches, 1 + ema
        self.epochs = timetable.epoch_shown(timetable.steps)
        self._columns = rendering.columns(
            self.epochs, parts=timetable.pauses_within_epochs, validates=num_batches["validation"] > 0, ema=ema
        )
        self._header, self._row_began = "", time.monotonic()
        self._row: dict[str, float] = {}
        self._evaluated = self._evaluations = self._saves = 0  # batches; how often
        self._evaluating_seconds = self._saving_seconds = 0.0
        self._step, self._next_update = timetable.first_step, 0.0
        self._validated_to = self._saved_to = timetable.first_step  # up to that step, what was due has begun
        self._tested = 0  # batches of the evaluations at the end that have begun
        self._evaluation, self._split = Activity("", 0.0), ""
        self._open = contextlib.ExitStack()
        self._training = self._open.enter_context(progress.activity("training"))
        self._epoch(timetable.first_step + 1)

    def close(self) -> None:
        """Ends the display; may be called twice."""
        self._open.close()

    # -------------------------------------------------------------------------------------------------------- the line

    def step(self, step: int, loss: float, accuracy: float, rate: float) -> None:
        """Shows a step whose metrics were read. Costs microseconds.

        Args:
          step: its number.
          loss: mean of the epoch so far.
          accuracy: likewise.
          rate: the learning rate.
        """
        self._step, self._validated_to, self._saved_to = step, step - 1, step - 1
        self._row |= {"loss": loss, "accuracy": accuracy, "learning_rate": rate}
        now = time.monotonic()
        if now < self._next_update:
            return
        self._next_update = now + _UPDATE_SECONDS
        median = self._clock.step_seconds or (now - self._training.began) / max(step - self._timetable.first_step, 1)
        self._epoch(step)
        self._training.numbers = (
            Number(f"loss {rendering.loss(loss)}", 2),
            Number(f"acc {rendering.percent(accuracy):>7}", 4),
            Number(f"{rendering.rate(self._batch / median)} images/s", 3),
        )
        self._tell_end(self._training, now, median)

    def _epoch(self, step: int) -> None:
        """Points the bar at the epoch of `step`, or at the run where a step is an epoch or more."""
        steps, epoch = self._timetable.epoch_steps(step), self._timetable.epoch_shown(step)
        if len(steps) < 2:
            steps = range(1, self._timetable.steps + 1)
        epoch = min(epoch, self.epochs)
        self._training.what = f"epoch {epoch:{len(str(self.epochs))}}/{self.epochs}"
        self._training.total, self._training.done = len(steps), max(self._step - steps.start + 1, 0)

    def _tell_end(self, activity: Activity, now: float, median: float, running: int = 0) -> None:
        """Estimates when the run will be done. running: batches that are left of the evaluation that runs now."""
        validations, saves = (
            self._timetable.left_after(self._validated_to)[0],
            self._timetable.left_after(self._saved_to)[1],
        )
        if self._evaluations:  # some save the best weights, whenever saves are due
            saves = max(saves, round(validations * min(self._saves / self._evaluations, 1)))
        batches = evaluation_left(self._num_batches, self._weights, validations, tested=self._tested, running=running)
        pace = Pace(
            median,
            self._evaluating_seconds / self._evaluated if self._evaluated else None,
            self._saving_seconds / self._saves if self._saves else None,
        )
        left, activity.ends_without = seconds_left(pace, self._timetable.steps - self._step, batches, saves)
        activity.ends = now + left

    # -------------------------------------------------------------------------------------------------- between steps

    @contextlib.contextmanager
    def evaluating(self, split: str) -> Iterator[None]:
        """Shows a bar over the batches of `split`, which moves with `next_batch`. At first, its program may be compiled."""
        if split == "test" or self._validated_to >= self._timetable.steps:
            self._tested += self._num_batches[split] * self._weights
        else:
            self._validated_to = self._step
        with self._progress.activity("compiling the evaluation") as activity:
            self._evaluation, self._split = activity, split
            yield
            self._evaluations += split == "validation"
            self._evaluated += activity.done
            self._evaluating_seconds += time.monotonic() - activity.began

    def next_batch(self) -> None:
        """A batch of the evaluation comes now; what the first one waited for is not part of its time."""
        activity, now = self._evaluation, time.monotonic()
        if not activity.total:
            activity.what = self._split.ljust(len(self._training.what))
            activity.total, activity.began = self._num_batches[self._split] * self._weights, now
            self._next_update = 0.0
        if now >= self._next_update and self._clock.step_seconds is not None:
            self._next_update = now + _UPDATE_SECONDS
            self._tell_end(activity, now, self._clock.step_seconds, activity.total - activity.done)
        activity.done += 1

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Shows that `step` is saved."""
        began, self._saved_to = time.monotonic(), step
        with self._progress.activity(f"saving step {step}"):
            yield
        self._saves, self._saving_seconds = self._saves + 1, self._saving_seconds + time.monotonic() - began

    # ------------------------------------------------------------------------------------------------------- the table

    def trained(self, loss: float, accuracy: float, throughput: float) -> None:
        """Notes an epoch of training for its row: means, and examples per second."""
        self._row |= {"loss": loss, "accuracy": accuracy, "throughput": throughput}

    def validated(self, results: Mapping[str, EvalResult]) -> None:
        """Notes the results of a validation by weights, `raw` and perhaps `ema`, for the row."""
        self._row |= {"val_loss": results["raw"].loss, "val_accuracy": results["raw"].accuracy}
        if ema := results.get("ema"):
            self._row |= {"ema_accuracy": ema.accuracy}

    def row(self, step: int, *, is_best: bool) -> None:
        """Prints the row of what was noted since the one before, where an epoch, a validation or the run ends.

        Args:
          step: the last one.
          is_best: whether these weights are the best so far.
        """
        now, due = time.monotonic(), self._timetable.due(step)
        if not (due.epoch_end or due.validation or due.last):
            return
        done = self._timetable.examples_at(step) / self._timetable.train_examples
        done = self._timetable.epoch_shown(step) if due.epoch_end else math.floor(100 * done) / 100
        self._row |= {"epochs_done": done, "epochs": self.epochs, "seconds": now - self._row_began}
        width = self._progress.width
        header = rendering.table_line(self._columns, None, width)
        if header.plain != self._header:  # the first row, or the first in a window of another width
            self._header = header.plain
            to_screen(header)
        to_screen(rendering.table_line(self._columns, rendering.row(self._row, is_best), width))
        self._row, self._row_began, self._next_update = {}, now, 0.0
        if step < self._timetable.steps:
            self._epoch(step + 1)
