"""What `scale` and the processes that it measures say to each other. Imports no JAX.

A process says `Ready` when it is about to make its first step. Then it waits for a command, and answers each: a count of steps
with a `Block`, `Profile` with a `Breakdown` of such steps or None, `LINK` with a `LinkFit`. At the end it is killed.
"""

from __future__ import annotations

import dataclasses

from jaxtrain.config import Config

LINK = "link"


@dataclasses.dataclass(frozen=True)
class Profile:
    """A command: a profile of so many steps."""

    steps: int


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process has to do.

    Attributes:
      config: of the run.
      workdir: of the run; a temporary one.
      index: of this process among those that share the run.
      processes: how many these are.
      port: where they meet.
      devices: of this process.
      simulated: whether they are CPU devices that share its cores.
      cores: that it is pinned to; () leaves it all.
    """

    config: Config
    workdir: str
    index: int = 0
    processes: int = 1
    port: int = 0
    devices: int = 1
    simulated: bool = False
    cores: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ready:
    """What a process knows before its first step.

    Attributes:
      train_examples: of the data set.
      collectives: how many a step has; None where they are not known (pipeline stages).
      messages: one after the other, in rings. On a CPU gloo adds the arrays of a collective in turns.
      sent_bytes: that a device sends in a step, in rings; None where they are not known.
      microbatches: of a step.
      devices: as JAX names their kind.
      jax: its version.
    """

    train_examples: int
    collectives: int | None
    messages: int | None
    sent_bytes: float | None
    microbatches: int
    devices: str
    jax: str


@dataclasses.dataclass(frozen=True)
class Block:
    """Some steps.

    Attributes:
      steps: seconds of each, from its numbers to the next one's.
      input: mean seconds that a step waited for its batch, by the run's clock.
      host: mean seconds that the clock charges neither to the step nor to its input.
    """

    steps: tuple[float, ...]
    input: float
    host: float

    @property
    def seconds(self) -> float:
        """Of a step, the mean."""
        return sum(self.steps) / len(self.steps)


@dataclasses.dataclass(frozen=True)
class LinkFit:
    """Latency (alpha, seconds a message) and bandwidth (1 / beta, bytes/s) of the sums over all devices, or why there are none.

    Attributes:
      latency: of a message.
      bandwidth: of a device.
      median_error: of the fitted times, relative.
      points: (bytes, seconds) of the sums that were measured.
    """

    latency: float
    bandwidth: float
    median_error: float
    points: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a process cannot go on: the exit code and the sentence of its error."""

    code: int
    text: str
