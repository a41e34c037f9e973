"""What is asked of `scale`: which numbers of devices, of which kind, and the config at each of them. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxtrain.config import CHOSEN_FIELDS, Config, are_listed, nearest_multiples
from jaxtrain.errors import ConfigError
from jaxtrain.recipes import change

STRONG, WEAK = "strong", "weak"
MOST_DEVICES = 1 << 20

_STEPS = 1_000_000  # of a run that is measured: more than it ever makes
# What is not part of a step, or would write to somebody else's server.
_STILL = {
    "train.steps": _STEPS,
    "train.steps_per_call": 1,
    "train.eval_every": "0",
    "train.hang_seconds": 0.0,
    "train.rollbacks": 0,
    "checkpoint.every": "0",
    "checkpoint.milestone_every": "0",
    "checkpoint.resume": "auto",
    "telemetry.every": 0.0,
    "telemetry.probe_every": 0,
    "telemetry.port": 0,
    "callbacks.names": (),
    "sinks.names": (),
    "profile.steps": (),
    "data.batch_per_device": 0,
}


def counts_of(text: str) -> tuple[int, ...]:
    """The numbers of --devices, `1,2,4`, in rising order.

    Raises:
      ConfigError: one of them is no number from 1 on, or stands there twice.
    """
    counts = []
    for word in text.split(","):
        number = int(word) if word.strip().isdecimal() and word.isascii() else 0
        if not 1 <= number <= MOST_DEVICES:
            raise ConfigError(
                f"--devices {text}: {word.strip() or 'an empty place'} is no number of devices; write numbers from 1 on, such "
                "as 1,2,4."
            )
        if number in counts:
            raise ConfigError(f"--devices {text}: {number} stands there twice.")
        counts.append(number)
    return tuple(sorted(counts))


def powers_up_to(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most` itself."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    return tuple(sorted({*powers, most}))


@dataclasses.dataclass(frozen=True)
class Study:
    """A run at several numbers of devices.

    Attributes:
      config: the run, with `layout.data` left to the number of devices.
      counts: of devices, rising; the first is the base.
      modes: `strong` (the global batch stays), `weak` (that of a device does).
    """

    config: Config
    counts: tuple[int, ...]
    modes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises `ConfigError` where the run cannot be at one of the counts."""
        config = self.config
        if config.layout.strategy == "auto":
            raise ConfigError(
                "config.layout.strategy='auto': scaling compares one layout at several numbers of devices; set "
                "--config.layout.strategy=manual, or take what `jaxtrain plan` chooses."
            )
        if config.layout.data > 0 and len(self.counts) > 1:
            raise ConfigError(
                f"config.layout.data={config.layout.data} fits one number of devices; leave it out, and it takes those that "
                "--devices gives."
            )
        for mode in self.modes:
            for count in self.counts:
                self._check(mode, count)

    def _check(self, mode: str, count: int) -> None:
        layout, batch = self.config.layout, self.batch(mode, count)
        model = layout.stages * layout.replica * layout.tensor
        if count % model:
            axes = f"layout.stages={layout.stages} x layout.replica={layout.replica} x layout.tensor={layout.tensor}"
            raise ConfigError(
                f"--devices {count}: config.{axes} needs a multiple of {model} devices; the nearest "
                f"{are_listed(nearest_multiples(count, model))}."
            )
        unit = self.ways(count) * max(layout.microbatches, 1)
        if batch % unit:
            parts = f"{self.ways(count)} shards of the batch"
            parts += f" x layout.microbatches={layout.microbatches}" if layout.microbatches > 1 else ""
            raise ConfigError(
                f"--devices {count}: config.data.global_batch={batch} does not divide by {parts}; the nearest that do "
                f"{are_listed(nearest_multiples(batch, unit))}."
            )
        Config.check_batch(batch, layout.microbatches, self.config.model.bn_groups)

    @property
    def base(self) -> int:
        """The smallest number of devices."""
        return self.counts[0]

    def ways(self, count: int) -> int:
        """How many shards the batch has on so many devices."""
        return count // (self.config.layout.stages * self.config.layout.tensor)

    def batch(self, mode: str, count: int) -> int:
        """Examples of the global batch on so many devices: that of the base, or as many a device as there."""
        data = self.config.data
        base = data.batch_per_device * self.ways(self.base) if data.batch_per_device else data.global_batch
        return base if mode == STRONG else base * count // self.base

    def at(self, mode: str, count: int) -> Config:
        """The run on so many devices."""
        return change(self.config, **{"data.global_batch": self.batch(mode, count), "data.batch_per_device": 0})

    def measured(self, mode: str, count: int) -> Config:
        """The run on so many devices, without an end, and without what is not part of a step."""
        return change(self.at(mode, count), **_STILL)

    def planned(self, mode: str, count: int) -> Config:
        """The run on so many devices for the planner, which chooses only what the config leaves open."""
        keep = {*self.config.layout.keep, *CHOSEN_FIELDS} - {"data", "microbatches"}
        if self.config.layout.microbatches:
            keep.add("microbatches")
        return change(self.at(mode, count), **{"layout.keep": tuple(sorted(keep))})


def check_there(counts: Sequence[int], there: int, what: str, hint: str) -> None:
    """Raises `ConfigError` where one of the counts is more than there are."""
    if counts[-1] > there:
        raise ConfigError(f"--devices {counts[-1]}: this machine has {there} {what}; {hint}.")
