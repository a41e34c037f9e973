"""What a sweep shows while it runs: one line that is drawn again and again, and a line for each run that ends."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

from jaxtrain.host.text import printable
from jaxtrain.jobs.run_status import RunStatus, read_status
from jaxtrain.observability.progress import Progress
from jaxtrain.observability.rendering import Activity, Number, percent, short_duration
from jaxtrain.observability.text_log import make_console
from jaxtrain.sweeps.worker import DONE, PAUSED, Outcome, Task

_READ_SECONDS = 1.0  # between looks at the files of the runs


class View:
    """Shows one sweep."""

    def __init__(self, *, quiet: bool = False):
        """quiet: shows nothing."""
        self._console = make_console(quiet=quiet)
        self._activity: Activity | None = None
        self._looked = 0.0
        self._began: dict[str, float] = {}
        self._steps: dict[str, tuple[int, int]] = {}  # by run: done, and to be done in this round
        self._first_steps: dict[str, int] = {}

    def say(self, text: str) -> None:
        """Prints a line, above the live one."""
        self._console.print(f"jaxtrain: {printable(text)}", markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Shows what takes a moment, inside the context."""
        with contextlib.closing(Progress(self._console, prints=True)) as progress, progress.activity(what):
            yield

    @contextlib.contextmanager
    def round(self, what: str, done: int, total: int) -> Iterator[None]:
        """Shows runs that are worked through, inside the context.

        Args:
          what: they are, in a word or two.
          done: how many have been done before.
          total: how many there are, with those.
        """
        with contextlib.closing(Progress(self._console)) as progress, progress.activity(what, total) as activity:
            self._activity, activity.done = activity, done
            self._steps, self._first_steps = {}, {}
            try:
                yield
            finally:
                self._activity = None

    def look(self, running: Sequence[Task], waiting: int) -> None:
        """Draws the line anew.

        Args:
          running: the runs that are trained now.
          waiting: how many are not begun.
        """
        now = time.monotonic()
        for task in running:
            self._began.setdefault(task.name, now)
        if self._activity is None or now - self._looked < _READ_SECONDS:
            return
        self._looked = now
        states = {task.name: read_status(task.folder) for task in running}
        for task in running:
            if (last := states[task.name].last_step) is not None:
                step = states[task.name].step
                self._first_steps.setdefault(task.name, step)
                self._steps[task.name] = step, math.ceil(last * task.pause_at)
        numbers = [Number(_words(name, state), 3) for name, state in states.items()]
        self._activity.numbers = tuple(numbers[:2])
        self._activity.ends = self._end(now, waiting)

    def _end(self, now: float, waiting: int) -> float:
        """When the round will be done, at its pace so far."""
        made = sum(step - self._first_steps[name] for name, (step, _) in self._steps.items())
        if self._activity is None or made <= 0:
            return math.nan
        mean = sum(last - self._first_steps[name] for name, (_, last) in self._steps.items()) / len(self._steps)
        left = sum(max(last - step, 0) for step, last in self._steps.values()) + waiting * mean
        return now + left * (now - self._activity.began) / made

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Says how a run has ended for now."""
        if task.name in self._steps:
            _, last = self._steps[task.name]
            self._steps[task.name] = last, last
        if self._activity is not None:
            self._activity.done += 1
        took = time.monotonic() - self._began.pop(task.name, time.monotonic())
        status, words = read_status(task.folder), [outcome.state]
        if outcome.state in (DONE, PAUSED):
            words[0] += f" at step {status.step}"
            words += [f"validation {percent(status.val_accuracy)}"] if status.val_accuracy is not None else []
            words += [short_duration(took, 1), f"{outcome.compiled} programs compiled"]
        else:
            words[0] += f": {outcome.message}"
        self.say(f"{task.name} {', '.join(words)}")


def _words(name: str, state: RunStatus) -> str:
    step = f" {state.step}/{state.last_step}" if state.last_step else " starts"
    return f"{name}{step}" + (f" {percent(state.val_accuracy)}" if state.val_accuracy is not None else "")
