"""Symptoms of docs/troubleshooting.md that a run detects by itself. Each function returns a warning, or ''."""

from __future__ import annotations

from jaxtrain.observability.clock import Span
from jaxtrain.precision import MIN_SCALE

SLOW_DATA_SHARE = 0.2


def slow_data(span: Span, *, resident: bool) -> str:
    """A warning where the devices waited for data in more than a fifth of the time of training steps.

    Compilation, checkpoints and evaluation do not count, so a long compilation does not hide it.

    Args:
      span: of an epoch.
      resident: whether the data set lives on the devices: then the host only says which examples are next.
    """
    waited = span.seconds["input"]
    training = waited + span.seconds["step"] + span.seconds["other"]
    if waited <= SLOW_DATA_SHARE * training:
        return ""
    text = (
        f"slow data: training waited for its input {waited / training:.0%} of the time "
        f"({span.data_wait * 1e3:.1f} ms a step); "
    )
    if resident:
        return text + "the data set is on the device, so the host is too busy: see what else runs on its cores."
    return text + (
        "raise config.data.workers, put config.data.dir on a faster disk, "
        "or keep the data set on the device with config.data.residency=device."
    )


def loss_scale_at_floor(scale: float, floor: float = MIN_SCALE) -> str:
    """A warning where the dynamic loss scale of fp16 is at its minimum: gradients overflow at any scale."""
    if scale > floor:
        return ""
    return (
        f"fp16 underflow: the loss scale is at its floor ({floor:g}), so gradients overflow and small ones are lost; "
        "use config.train.precision=bf16, or lower config.optim.learning_rate or set config.optim.clip_norm."
    )
