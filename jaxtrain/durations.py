"""Lengths of training: steps, epochs, examples, minutes. Imports no JAX."""

from __future__ import annotations

import dataclasses
import math
import re

from jaxtrain.errors import ConfigError

_UNITS = {
    "": "steps", "step": "steps", "steps": "steps",
    "epoch": "epochs", "epochs": "epochs",
    "example": "examples", "examples": "examples",
    "minute": "minutes", "minutes": "minutes", "min": "minutes",
}  # fmt: skip
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][0-9]+)?)\s*([a-zA-Z]*)\s*")


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training, written as "500", "500 steps", "2.5 epochs", "1e6 examples" or "30 minutes"."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str, field: str, *, minutes: bool = False) -> Duration:
        """Reads a duration.

        Args:
          text: such as "5 epochs".
          field: the name of the setting, for the error.
          minutes: whether wall-clock time is allowed.

        Raises:
          ConfigError: `text` is no duration.
        """
        match = _DURATION.fullmatch(text)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None or not math.isfinite(float(match[1])) or (unit == "minutes" and not minutes):
            units = "steps, epochs or examples" + (" or minutes" if minutes else "")
            raise ConfigError(f"{field}={text!r} is not a duration; write a number of {units}, such as '5 epochs'.")
        return cls(float(match[1]), unit)

    def steps(self, examples_per_epoch: int, global_batch: int) -> int:
        """The number of optimizer steps, rounded up: any duration above 0 is at least one step."""
        if self.unit == "steps":
            return math.ceil(self.value)
        examples = self.value * examples_per_epoch if self.unit == "epochs" else self.value
        return math.ceil(examples / global_batch - 1e-9)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds; only for a duration in minutes."""
        return self.value * 60.0
