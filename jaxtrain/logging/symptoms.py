"""Symptoms of docs/troubleshooting.md that a run detects by itself: a warning each, or '' when all is well."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from jaxtrain.distributed.pace import Pace
from jaxtrain.logging.clock import Span

SLOW_DATA_SHARE = 0.2
IMBALANCE = 1.3
IMBALANCE_SECONDS = 2e-3  # less than this a step nobody would feel


def slow_data(span: Span) -> str:
    """The devices waited for data more than a fifth of the time that went into training steps.

    Compilation, checkpoints and evaluation are left out: a first epoch that mostly compiles hides nothing.
    """
    waited = span.seconds["input"]
    training = waited + span.seconds["step"] + span.seconds["other"]
    if waited <= SLOW_DATA_SHARE * training:
        return ""
    return (
        f"slow data: training waited for its input {waited / training:.0%} of the time "
        f"({span.data_wait * 1e3:.1f} ms a step); raise config.data.workers, put config.data.dir on a faster disk, "
        "or keep the data set on the device with config.data.residency=device."
    )


def imbalanced(paces: Sequence[Pace]) -> str:
    """One process takes more than 1.3 times as long for its own part of a step as the others, and 2 ms longer.

    The whole step's time will not do: collectives make every process wait for the slowest, so all have the same.
    """
    if len(paces) < 2:
        return ""
    slow = max(paces, key=lambda pace: pace.seconds)
    # the median of the others: of two processes, the slow one would be half of its own yardstick
    others = statistics.median(pace.seconds for pace in paces if pace is not slow)
    if slow.seconds <= max(IMBALANCE * others, others + IMBALANCE_SECONDS):
        return ""
    ratio = f"{slow.seconds / others:.1f} times" if others else "and not"
    return (
        f"imbalanced: process {slow.process} on {slow.host} needs {slow.seconds:.3g} s for its part of a step, {ratio} the "
        f"{others:.3g} s of the others; look for other programs, a slower disk or fewer CPUs on that host."
    )


def loss_scale_at_floor(scale: float, floor: float) -> str:
    """fp16 underflow: the dynamic loss scale fell as far as it may, so gradients overflow at any scale."""
    if scale > floor:
        return ""
    return (
        f"fp16 underflow: the loss scale is at its floor ({floor:g}), so gradients overflow and small ones are lost; "
        "use config.train.precision=bf16, or lower config.optim.learning_rate or set config.optim.clip_norm."
    )
