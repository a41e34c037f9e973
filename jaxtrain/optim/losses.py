"""Losses of a batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from jaxtrain.config import did_you_mean
from jaxtrain.errors import ConfigError
from jaxtrain.plugins import load_callable
from jaxtrain.precision import at_least_f32

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross entropy of each example, [B], in at least float32; `targets` [B, C] are probabilities."""
    dtype = at_least_f32(logits.dtype)
    return optax.softmax_cross_entropy(logits.astype(dtype), targets.astype(dtype))


def loss_fn(name: str) -> Loss:
    """The loss `optim.loss=name`: (logits [B, C], targets [B, C]) -> [B]. Raises `ConfigError` for an unknown name.

    Label smoothing, mixup and cutmix are in the targets already.
    """
    if ":" in name:
        return load_callable(name, "optim.loss")
    if name != "cross_entropy":
        raise ConfigError(
            f"config.optim.loss={name!r}: must be cross_entropy, or package.module:function."
            f"{did_you_mean(name, ['cross_entropy'])}"
        )
    return cross_entropy
