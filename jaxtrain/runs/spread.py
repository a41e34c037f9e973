"""Means over seeds and their spread, and whether two of them differ by more than that."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

Verdict = Literal["larger", "within", "unknown"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """A figure over several runs that are equal but for their seed."""

    mean: float
    deviation: float | None
    """The sample standard deviation, with n - 1 below; None for one value."""
    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many runs it is of."""
        return len(self.values)

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, tuple(values))


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two means, with the interval that it is in."""

    value: float
    """First mean less second."""
    low: float | None
    """Of the interval; None, as is the next, where no interval can be computed."""
    high: float | None
    confidence: float
    """Of the interval, such as 0.95."""
    verdict: Verdict
    """`larger` than the spread over seeds: the interval does not hold 0. `within` it. `unknown`: a side has one seed."""


def shown_confidence(confidence: float) -> str:
    """Such as `95.0%`; with as many digits as tell it from 100 %."""
    digits = max(math.ceil(-math.log10(100 * (1 - confidence))), 1)
    return f"{confidence:.{digits}%}"


def difference(a: Spread, b: Spread, *, pairs: int = 1) -> Difference:
    """Welch's interval for the difference of two means whose variances may differ.

    value +- t(1 - alpha/2, f) * sqrt(s_a^2/n_a + s_b^2/n_b), with Satterthwaite's degrees of freedom
    f = (s_a^2/n_a + s_b^2/n_b)^2 / ((s_a^2/n_a)^2/(n_a - 1) + (s_b^2/n_b)^2/(n_b - 1)) (B. L. Welch, "The generalization of
    'Student's' problem when several different population variances are involved", Biometrika 34, 1947). It takes the figures
    of seeds for normally distributed. alpha is 0.05 / `pairs`, which is Bonferroni's correction.

    Args:
      a: the first mean.
      b: the second.
      pairs: how many differences could have been looked at: the more, the likelier one is large by chance.
    """
    from scipy.special import stdtrit  # noqa: PLC0415  it takes 0.1 s

    confidence, value = 1 - 0.05 / pairs, a.mean - b.mean
    if a.deviation is None or b.deviation is None:
        return Difference(value, None, None, confidence, "unknown")
    parts = [each.deviation**2 / each.n for each in (a, b) if each.deviation is not None]
    if not sum(parts):  # every seed gave the same number: the interval is a point
        return Difference(value, value, value, confidence, "larger" if value else "within")
    freedom = sum(parts) ** 2 / sum(part**2 / (each.n - 1) for part, each in zip(parts, (a, b), strict=True))
    margin = float(stdtrit(freedom, 1 - 0.025 / pairs)) * math.sqrt(sum(parts))
    low, high = value - margin, value + margin
    return Difference(value, low, high, confidence, "larger" if low > 0 or high < 0 else "within")
