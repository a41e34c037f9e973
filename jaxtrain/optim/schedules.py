"""The learning rate as a function of the step, and the length of a run in steps."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.config import Config, OptimConfig
from jaxtrain.durations import Duration


def peak_learning_rate(config: OptimConfig, global_batch: int) -> float:
    """The peak rate for `global_batch` examples a step: scaled linearly (Goyal 2017), by the square root, or not at all."""
    ratio = global_batch / config.lr_reference_batch
    return config.learning_rate * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[config.lr_scaling]


def learning_rate_schedule(
    config: OptimConfig, total_steps: int, warmup_steps: int, global_batch: int
) -> optax.Schedule:
    """The learning rate of each step, as a function of the number of updates before it.

    With t the step (from 0), W = warmup_steps, T = total_steps, the rate is peak * warm(t) * shape(t), where

    - warm(t) = min(1, (t + 1) / W). It is never 0, and the last warm-up step has the peak rate. If the warm-up is longer
      than the run, the rate rises until the run ends.
    - shape(t), with the progress p = (t - start) / (T - start) clipped to [0, 1] and F = final_scale:
      `constant` 1; `step` step_gamma to the number of shares s of `step_at` with t >= s T;
      `cosine` F + (1 - F) (1 + cos(pi p)) / 2 (Loshchilov 2017) and `linear` F + (1 - F) (1 - p), from start = W;
      `wsd` F + (1 - F) (1 - p), from start = T - decay_share T, or W if that is later.

    So the last step, t = T - 1, is one step before F.

    Args:
      config: the section `optim`.
      total_steps: T, the length of the run.
      warmup_steps: W, the length of the warm-up.
      global_batch: examples a step, for the peak rate.

    Returns:
      An elementwise function. A JAX array or tracer gives an array of JAX's default float dtype (float64 if x64 is on).
      A number or a NumPy array is computed by NumPy in float64, and uses no device.
    """
    peak = peak_learning_rate(config, global_batch)
    milestones = [math.ceil(share * total_steps - 1e-9) for share in config.step_at]
    start = warmup_steps
    if config.schedule == "wsd":
        start = max(warmup_steps, total_steps - math.ceil(config.decay_share * total_steps - 1e-9))

    def rate(step: Any) -> Any:
        xp: Any = jnp if isinstance(step, jax.Array) else np
        t = xp.asarray(step, dtype=xp.result_type(float))
        warm = xp.minimum(1.0, (t + 1) / max(warmup_steps, 1))
        progress = xp.clip((t - start) / max(total_steps - start, 1), 0.0, 1.0)
        match config.schedule:
            case "constant":
                shape = xp.ones_like(t)
            case "step":
                passed = [xp.where(t >= milestone, config.step_gamma, 1.0) for milestone in milestones]
                shape = functools.reduce(xp.multiply, passed, xp.ones_like(t))
            case "cosine":
                shape = _from_one_to(config.final_scale, (1 + xp.cos(math.pi * progress)) / 2)
            case _:  # linear, wsd
                shape = _from_one_to(config.final_scale, 1 - progress)
        return peak * warm * shape

    return rate


def _from_one_to(final: float, fraction: Any) -> Any:
    return final + (1 - final) * fraction


def total_steps(config: Config, train_examples: int, start_step: int = 0, start_example: int = 0) -> int:
    """The step at which the run ends: `train.steps`, or as many steps as `train.epochs` takes.

    Args:
      config: of the run.
      train_examples: examples in the training split.
      start_step: the step that the run goes on from.
      start_example: examples that were consumed before that step.
    """
    if config.train.steps:
        return config.train.steps
    left = max(config.train.epochs * train_examples - start_example, 0)
    return start_step + -(-left // config.data.global_batch)


def make_schedule(config: Config, train_examples: int, start_step: int = 0, start_example: int = 0) -> optax.Schedule:
    """The learning rate as a function of the step.

    A run whose length is in steps counts steps. A run whose length is in epochs counts examples: if its first steps had
    another batch size, it goes on where `start_example` examples are on the curve.

    Args:
      config: of the run.
      train_examples: examples in the training split.
      start_step: the step that the run goes on from.
      start_example: examples that were consumed before that step.
    """
    batch, warmup = config.data.global_batch, warmup_steps(config, train_examples)
    if config.train.steps:
        return learning_rate_schedule(config.optim, config.train.steps, warmup, batch)
    rate = learning_rate_schedule(config.optim, -(-config.train.epochs * train_examples // batch), warmup, batch)
    ahead = start_example / batch - start_step
    return (lambda step: rate(step + ahead)) if ahead else rate


def warmup_steps(config: Config, train_examples: int) -> int:
    """`optim.warmup` in steps."""
    duration = Duration.parse(config.optim.warmup, "config.optim.warmup")
    return duration.steps(train_examples, config.data.global_batch)
