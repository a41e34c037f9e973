"""How a run spends its time: every second of the loop belongs to one category, and all add up to the wall time."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

CATEGORIES: tuple[str, ...] = ("compile", "input", "step", "checkpoint", "evaluation", "profile", "other")
# Work between steps: part of neither a step's time nor the throughput of training.
_BETWEEN_STEPS = ("compile", "checkpoint", "evaluation", "profile")

WARMUP_STEPS = 2
"""Steps after a start that throughput and step time leave out: caches are cold and reading ahead has just begun."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of a run. The difference of two spans that begin together is the stretch between their ends."""

    seconds: Mapping[str, float]
    """Wall time by category; `step` is dispatching steps and waiting for their results."""
    steps: int
    examples: int
    steady_examples: int
    """Those after the warm-up."""
    steady_seconds: float
    """The time of the steps after the warm-up, without the work between steps."""

    def __sub__(self, other: Span) -> Span:
        return Span(
            {name: self.seconds[name] - other.seconds[name] for name in CATEGORIES},
            self.steps - other.steps,
            self.examples - other.examples,
            self.steady_examples - other.steady_examples,
            self.steady_seconds - other.steady_seconds,
        )

    @property
    def wall(self) -> float:
        """Wall time in seconds."""
        return sum(self.seconds.values())

    @property
    def throughput(self) -> float:
        """Examples per second of training, without the warm-up if there are steps after it. 0 without steps."""
        if self.steady_examples:
            return self.steady_examples / self.steady_seconds if self.steady_seconds else 0.0
        training = self.wall - sum(self.seconds[name] for name in _BETWEEN_STEPS)
        return self.examples / training if training else 0.0

    @property
    def data_wait(self) -> float:
        """Mean time in seconds that a step waited for its batch."""
        return self.seconds["input"] / self.steps if self.steps else 0.0

    def share(self, category: str) -> float:
        """The share of `category` in the wall time, in [0, 1]."""
        return self.seconds[category] / self.wall if self.wall else 0.0

    @property
    def bound(self) -> str:
        """The category that took the most time."""
        return max(CATEGORIES, key=lambda name: self.seconds[name])


class StepClock:
    """Charges wall time to the current category, at first `other`.

        clock = StepClock()
        with clock.charge("input"):
            batch = next(batches)
        with clock.charge("step"):
            state, metrics = step(state, batch)
        clock.step_done(examples)

    Take `now()` at the start and the end of an epoch; the difference is the epoch's `Span`. Blocks may be nested: the inner
    category counts. Other threads may call `now()`.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter):
        self._timer = timer
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._category = "other"
        self._last = timer()
        self._calls = self._steps = self._examples = self._steady_examples = 0
        self._steady_seconds = 0.0
        self._step_began = 0.0  # on the clock of `_training_seconds`
        self._recent: deque[float] = deque(maxlen=101)

    @contextlib.contextmanager
    def charge(self, category: str) -> Iterator[None]:
        """Charges the time inside the block to `category`, one of `CATEGORIES`."""
        if category not in self._seconds:
            raise ValueError(f"category={category!r}: must be one of {', '.join(CATEGORIES)}")
        before = self._switch(category)
        try:
            yield
        finally:
            self._switch(before)

    def step_done(self, examples: int, steps: int = 1) -> None:
        """Marks the end of a step over `examples`, or of several `steps` in one call. It began at the end of the one before."""
        self._settle()
        training = self._training_seconds()
        seconds, self._step_began = training - self._step_began, training
        self._calls += 1
        self._steps += steps
        self._examples += steps * examples
        if self._calls > WARMUP_STEPS:
            self._recent.extend([seconds / steps] * steps)
            self._steady_examples += steps * examples
            self._steady_seconds += seconds

    def now(self) -> Span:
        """Everything since the clock was made."""
        self._settle()
        return Span(
            MappingProxyType(dict(self._seconds)),
            self._steps,
            self._examples,
            self._steady_examples,
            self._steady_seconds,
        )

    @property
    def step_seconds(self) -> float | None:
        """The median time of the last hundred steps in seconds, without the work between them; None during the warm-up."""
        return statistics.median(self._recent) if self._recent else None

    def _training_seconds(self) -> float:
        return sum(seconds for name, seconds in self._seconds.items() if name not in _BETWEEN_STEPS)

    def _switch(self, category: str) -> str:
        self._settle()
        before, self._category = self._category, category
        return before

    def _settle(self) -> None:
        with self._lock:
            instant = self._timer()
            self._seconds[self._category] += instant - self._last
            self._last = instant


_ADVICE = {
    "compile": "the next start of the same program finds it, where the compile cache can be written",
    "input": "raise config.data.workers, or keep the data set on the device with config.data.residency=device",
    "step": "more devices would help",
    "checkpoint": "save less often with config.checkpoint.every",
    "evaluation": "evaluate less often with config.train.eval_every",
    "profile": "a run without config.profile.steps is not slowed down by it",
    "other": "the host is busy between steps; raise config.train.log_every, or leave it more CPU",
}


def explain(span: Span, what: str = "this epoch") -> str:
    """A sentence on what limited `span`, and what would help; '' when no time passed. what: the name of the span."""
    if not span.wall:
        return ""
    bound = span.bound
    name = {"step": "compute", "other": "other work"}.get(bound, bound)
    return f"{what} was bound by {name} ({span.share(bound):.0%} of {span.wall:.1f} s); {_ADVICE[bound]}"
