"""After which steps something is due."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

from jaxtrain.durations import Duration


@dataclasses.dataclass(frozen=True)
class Cadence:
    """Tells after which steps something is due, from a duration. A pure function of the examples and steps done."""

    duration: Duration
    train_examples: int

    def count(self, step: int, examples: int) -> int:
        """How often it was due until then; never, for a duration of 0 or in minutes."""
        value = Fraction(self.duration.value).limit_denominator(10**6)
        if not value or self.duration.unit == "minutes":
            return 0
        done = {"steps": step, "examples": examples, "epochs": Fraction(examples, self.train_examples)}
        return math.floor(done[self.duration.unit] / value)

    def next_after(self, step: int, examples: int, batch: int) -> float:
        """The first step after `step`, at which `examples` are done, after which it is due; infinity if it never is."""
        value = Fraction(self.duration.value).limit_denominator(10**6)
        if not value or self.duration.unit == "minutes":
            return math.inf
        wanted = (self.count(step, examples) + 1) * value
        if self.duration.unit == "steps":
            return math.ceil(wanted)
        left = wanted * (self.train_examples if self.duration.unit == "epochs" else 1) - examples
        return step + math.ceil(left / batch)
