"""Decides what a run does about numbers that are not finite, and about spikes. Every process decides the same."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from typing import Literal

_WINDOW = 100  # steps that a spike is compared with
_LEAST = 20  # with fewer steps to compare with, nothing is a spike
_NORMAL = 1.4826  # standard deviation of normally distributed numbers / their median absolute deviation

# `stop` and `roll back` ask for a roll-back. Where none is allowed, the run stops (`stop`) or goes on (`roll back`).
Action = Literal["go on", "roll back", "stop"]


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """What is wrong with a step, and what to do."""

    text: str = ""
    """A sentence; '' where nothing is wrong."""
    action: Action = "go on"
    first: int = 0
    """The first step that it concerns."""


class AnomalyDetector:
    """Observes the loss and the gradient norm of every step, in their order."""

    def __init__(self, skips: int, spike: float):
        """Sets the limits.

        Args:
          skips: refused updates in a row that are skipped; one more asks for a roll-back.
          spike: a loss or gradient norm is a spike if it is so many robust standard deviations (Iglewicz & Hoaglin 1993)
            above the median of the last hundred steps; 0: nothing is a spike.
        """
        self._skips, self._spike = skips, spike
        self._refused: list[int] = []  # the last steps, in a row
        self._seen: dict[str, collections.deque[float]] = {
            name: collections.deque(maxlen=_WINDOW) for name in ("loss", "gradient norm")
        }

    def observe(self, step: int, loss: float, grad_norm: float, update_norm: float, *, skipped: bool) -> Anomaly:
        """Decides about one step.

        Args:
          step: the number of the update.
          loss: mean over the batch.
          grad_norm: global norm of the gradients.
          update_norm: global norm of the update.
          skipped: the update was refused on the devices, and the run went on without it.
        """
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
    """How many robust standard deviations `value` is above the median of `seen`. One is at least 1 % of the median."""
    middle = statistics.median(seen)
    deviation = _NORMAL * statistics.median(abs(number - middle) for number in seen)
    return (value - middle) / max(deviation, 0.01 * abs(middle), 1e-12)
