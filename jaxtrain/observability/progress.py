"""Live progress: a bar on a terminal; elsewhere a log line for each logged step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from jaxtrain.observability.text_log import FILE_ONLY

log = logging.getLogger("jaxtrain")


class NullProgress:
    """Shows nothing; for every process but the first."""

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; call it at every step. Costs microseconds, and prints nothing without a terminal."""

    def update(
        self,
        step: int,
        epoch: int,
        epochs: int,
        metrics: Mapping[str, float],
        images_per_sec: float,
        *,
        step_seconds: float | None = None,
    ) -> None:
        """Shows one logged step.

        Args:
          step: optimizer steps done so far.
          epoch: counted from 0, as in the metrics; shown from 1.
          epochs: how many there will be.
          metrics: numbers to show, such as loss and accuracy.
          images_per_sec: examples per second.
          step_seconds: the median step time (`StepClock.step_seconds`), which gives the time left; a slow step does not
            change it much. None while it is not known.
        """

    def message(self, text: str) -> None:
        """Prints a line (above the bar, where there is one) and logs it."""

    def close(self) -> None:
        """Restores the terminal; may be called twice."""

    def __enter__(self) -> NullProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Progress(NullProgress):
    """Process 0's progress. Lines are log records of `jaxtrain`, so an open `TextLog` decides where they go."""

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None):
        """Starts the bar at once when the console is a terminal; `console` must be the `TextLog`'s (standard error)."""
        if console is None:
            console = Console(stderr=True)
        self._total = total_steps
        self._bar = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._bar = _TwoLines(
                TextColumn("{task.fields[epoch]}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("step {task.completed:.0f}/{task.total:.0f}  ETA {task.fields[left]}", markup=False),
                console=console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task(
                "train", total=total_steps, completed=start_step, epoch="starting", left="?", numbers=""
            )
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def update(
        self,
        step: int,
        epoch: int,
        epochs: int,
        metrics: Mapping[str, float],
        images_per_sec: float,
        *,
        step_seconds: float | None = None,
    ) -> None:
        where = f"epoch {epoch + 1}/{epochs}"
        left = "?" if step_seconds is None else duration((self._total - step) * step_seconds)
        shown = [*(f"{name} {value:.4f}" for name, value in metrics.items()), f"{images_per_sec:.1f} images/s"]
        numbers = "  ".join(shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, epoch=where, left=left, numbers=numbers)
        extra = FILE_ONLY if self._bar is not None else None
        log.info("%s  step %d/%d  %s  ETA %s", where, step, self._total, numbers, left, extra=extra)

    def message(self, text: str) -> None:
        log.info("%s", text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class _TwoLines(RichProgress):
    """The bar, and the numbers below it: on one line they would need more than the usual 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["numbers"], no_wrap=True, overflow="ellipsis")


def duration(seconds: float) -> str:
    """H:MM:SS, with days in front when there are any: `0:01:05`, `2d 3:00:00`."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    return f"{f'{days}d ' if days else ''}{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
