"""The laws of scaling, and what they say about measured points. Numbers alone, no JAX.

`n` is how many times as many devices there are as at the base. Amdahl 1967 keeps the work: t(n) / t(1) = s + (1 - s) / n, where
s is the share of the base's time that more devices do not shorten. Gustafson 1988 lets the work grow with the devices: in the
same time n devices do n - s (n - 1) times the work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class SerialFit:
    """A serial share that was fitted to points.

    Attributes:
      share: s, in [0, 1].
      fitted: before it was brought into [0, 1]: below 0 where more devices gained more than there are of them.
      error: the largest |speed-up by the law / speed-up - 1| of the points.
      points: how many points were fitted, the base not counted.
    """

    share: float
    fitted: float
    error: float
    points: int

    @property
    def limit(self) -> float:
        """Amdahl's limit of the speed-up, 1 / s; infinite for 0."""
        return 1 / self.share if self.share else math.inf


def amdahl(n: float, share: float) -> float:
    """The speed-up of n times the devices on the same work: 1 / (s + (1 - s) / n)."""
    return 1 / (share + (1 - share) / n)


def gustafson(n: float, share: float) -> float:
    """The scaled speed-up of n times the devices on n times the work: n - s (n - 1)."""
    return n - share * (n - 1)


def fit_amdahl(points: Sequence[tuple[float, float]]) -> SerialFit | None:
    """The serial share whose times t(n) / t(1) are nearest to those of the points (least squares).

    Args:
      points: (n, speed-up); those with n = 1 say nothing.

    Returns:
      The fit; None without a point that says something.
    """
    rows = [(1 - 1 / n, 1 / speedup - 1 / n) for n, speedup in points if n > 1 and speedup > 0]
    return _fit(rows, amdahl, points)


def fit_gustafson(points: Sequence[tuple[float, float]]) -> SerialFit | None:
    """The serial share whose scaled speed-ups are nearest to those of the points, in relative terms. As `fit_amdahl`."""
    rows = [((n - 1) / n, (n - speedup) / n) for n, speedup in points if n > 1 and speedup > 0]
    return _fit(rows, gustafson, points)


def _fit(
    rows: Sequence[tuple[float, float]],
    law: Callable[[float, float], float],
    points: Sequence[tuple[float, float]],
) -> SerialFit | None:
    """Fits y = s x to `rows` of (x, y)."""
    if not rows:
        return None
    fitted = math.fsum(x * y for x, y in rows) / math.fsum(x * x for x, _ in rows)
    share = min(max(fitted, 0.0), 1.0)
    used = [(n, speedup) for n, speedup in points if n > 1 and speedup > 0]
    error = max(abs(law(n, share) / speedup - 1) for n, speedup in used)
    return SerialFit(share, fitted, error, len(used))
