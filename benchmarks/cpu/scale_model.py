"""What a step should cost on n devices: formulas alone, no JAX. Everything that comes out of here is *modelled*.

Sizes in bytes, times in seconds. A link takes `latency + size / bandwidth` for a message (Hockney 1994).
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins two devices. latency: of a message. bandwidth: bytes/s each way."""

    latency: float
    bandwidth: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """Nodes of `node` devices: `inside` joins those of a node, `across` a device to one of another node."""

    node: int
    inside: Link
    across: Link


@dataclasses.dataclass(frozen=True)
class Work:
    """One step of one device.

    compute: seconds of its own examples, without communication. gradients: bytes of all of them, as they are added.
    statistics: all-reduces of BatchNorm, forward and backward, one after the other. activations: bytes that a stage hands on
    for one microbatch. hidden: seconds of the backward pass that the gradients' traffic may run beside.
    """

    compute: float
    gradients: float
    statistics: int = 0
    activations: float = 0.0
    hidden: float = 0.0


LAST = 0.05  # share of the gradients that are there only when the backward pass ends, so that nothing hides them


def gather(size: float, devices: int, link: Link) -> float:
    """All-gather, or reduce-scatter, of `size` bytes in all, in a ring: n - 1 messages of size / n."""
    return (devices - 1) * (link.latency + size / devices / link.bandwidth)


def ring(size: float, devices: int, link: Link) -> float:
    """All-reduce in a ring, reduce-scatter and all-gather: 2 (n - 1) / n of `size` leave each device."""
    return 2 * gather(size, devices, link)


def tree(size: float, devices: int, link: Link) -> float:
    """All-reduce up and down a binary tree, in pieces: what many small messages take."""
    if devices == 1:
        return 0.0
    return 2 * math.ceil(math.log2(devices)) * link.latency + 2 * size / link.bandwidth


def all_reduce(size: float, devices: int, machine: Machine) -> float:
    """Scattered within a node, added across nodes by ring or tree (the quicker), gathered within the node."""
    inside = min(devices, machine.node)
    nodes = math.ceil(devices / machine.node)
    part = size / inside
    between = min(ring(part, nodes, machine.across), tree(part, nodes, machine.across))
    return min(ring(size, inside, machine.inside), tree(size, inside, machine.inside)) + between


def traffic(parameters: float, devices: int, zero: int) -> float:
    """Elements that leave each device in a step: 2 P (n - 1) / n, under ZeRO-3 3 P (n - 1) / n (Rajbhandari 2020)."""
    return (3 if zero == 3 else 2) * parameters * (devices - 1) / devices


def bubble(stages: int, microbatches: int, chunks: int = 1) -> float:
    """Idle share of a pipeline's step: (S - 1) / (V M + S - 1)."""
    return (stages - 1) / (chunks * microbatches + stages - 1)


@dataclasses.dataclass(frozen=True)
class Step:
    """The parts of a step's time; they add up to `seconds`. efficiency: compute over all of it."""

    compute: float
    gradients: float
    statistics: float
    bubble: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.gradients + self.statistics + self.bubble

    @property
    def efficiency(self) -> float:
        """What `devices` devices do per second, over `devices` times one."""
        return self.compute / self.seconds


def step(work: Work, machine: Machine, devices: int, *, zero: int = 0, stages: int = 1, microbatches: int = 1) -> Step:
    """One step of `devices` devices in `stages` pipeline stages, each device with `work` of its own (weak scaling)."""
    ways = devices // stages
    factor = 1.5 if zero == 3 else 1.0  # the parameters are gathered again for the backward pass
    gradients = factor * all_reduce(work.gradients / stages, ways, machine)
    statistics = work.statistics / stages * microbatches * all_reduce(1024.0, ways, machine)
    moved = 0.0
    if stages > 1:  # each boundary is waited for once, each way, before the last stage is busy
        moved = 2 * (stages - 1) * (machine.across.latency + work.activations / machine.across.bandwidth)
    idle = work.compute * bubble(stages, microbatches) / (1 - bubble(stages, microbatches)) + moved
    exposed = max(gradients - work.hidden, gradients * LAST)
    return Step(work.compute, exposed, statistics, idle)


# ------------------------------------------------------------------------------------------------------------ failures


def best_interval(save: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose the least: sqrt(2 save MTBF) (Young 1974)."""
    return math.sqrt(2 * save * between_failures)


def goodput(interval: float, save: float, recovery: float, between_failures: float) -> float:
    """Share of the time that trains: without saves (`save`: what one blocks), lost steps, and recoveries."""
    lost = save / interval + (interval / 2 + recovery) / between_failures
    return max(0.0, 1 - lost)


# ------------------------------------------------------------------------------------------- the machine that we mean

# Assumed, nothing of it measured by us: 8 H200 a node, NVLink (450 GB/s each way, of which NCCL gives some 80 %), InfiniBand
# NDR (400 Gb/s a device, some 85 %), hops of 5 and 10 microseconds.
H200 = Machine(8, Link(5e-6, 360e9), Link(10e-6, 42e9))
