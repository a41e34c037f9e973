"""Decides what a run does about numbers that are not finite, and about spikes: on every process alike, from the same ones."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from typing import Literal

_WINDOW = 100  # steps that a spike is compared with
_LEAST = 20  # before there are so many, nothing is a spike
_NORMAL = 1.4826  # the median absolute deviation of normal numbers, times this, is their standard deviation

# `stop` and `roll back` ask for a roll-back; where none may be made, the one stops the run and the other goes on.
Action = Literal["go on", "roll back", "stop"]


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """What is amiss with a step. text: '' when nothing is. first: the first step that it concerns."""

    text: str = ""
    action: Action = "go on"
    first: int = 0


class AnomalyDetector:
    """Looks at the loss and the gradient norm of every step, in their order.

    skips: refused updates in a row that are passed over; one more asks for a roll-back. spike: robust standard deviations
    (Iglewicz & Hoaglin 1993) above the median of the last hundred steps that make a loss or gradient norm a spike; 0: none.
    """

    def __init__(self, skips: int, spike: float):
        self._skips, self._spike = skips, spike
        self._refused: list[int] = []
        self._seen: dict[str, collections.deque[float]] = {
            name: collections.deque(maxlen=_WINDOW) for name in ("loss", "gradient norm")
        }

    def observe(self, step: int, loss: float, grad_norm: float, update_norm: float, *, skipped: bool) -> Anomaly:
        """step: the update these numbers belong to. skipped: it was refused, and the run went on without it."""
        if skipped:
            self._refused.append(step)
            text = f"the update of step {step} was refused: loss {loss:g}, gradient norm {grad_norm:g}"
            if len(self._refused) > self._skips:
                return Anomaly(f"{text}; {len(self._refused)} in a row", "stop", self._refused[0])
            return Anomaly(f"{text} ({len(self._refused)} of at most {self._skips} in a row are passed over)")
        self._refused.clear()
        if not math.isfinite(update_norm):
            text = f"the update of step {step} is not finite (norm {update_norm:g}; try a lower config.optim.learning_rate)"
            return Anomaly(text, "stop", step)
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            seen = self._seen[name]
            if self._spike and len(seen) >= _LEAST and (score := robust_score(value, list(seen))) > self._spike:
                return Anomaly(
                    f"the {name} of step {step} is a spike: {value:.4g}, {score:.0f} robust standard deviations above the "
                    f"median {statistics.median(seen):.4g} of the last {len(seen)} steps",
                    "roll back",
                    step,
                )
            seen.append(value)
        return Anomaly()


def robust_score(value: float, seen: list[float]) -> float:
    """How many robust standard deviations `value` is above the median of `seen`; noise of a hundredth counts for nothing."""
    middle = statistics.median(seen)
    deviation = _NORMAL * statistics.median(abs(each - middle) for each in seen)
    return (value - middle) / max(deviation, 0.01 * abs(middle), 1e-12)
