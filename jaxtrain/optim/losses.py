"""Loss functions: one number for each example of a batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import optax

from jaxtrain.config import did_you_mean
from jaxtrain.errors import ConfigError
from jaxtrain.plugins import load_callable
from jaxtrain.precision import at_least_f32

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross entropy of each example.

    Args:
      logits: float [B, C].
      targets: float [B, C], probabilities.

    Returns:
      float [B], in at least float32.
    """
    dtype = at_least_f32(logits.dtype)
    return optax.softmax_cross_entropy(logits.astype(dtype), targets.astype(dtype))


def loss_fn(name: str) -> Loss:
    """The loss function `optim.loss=name`: (logits float [B, C], targets float [B, C]) -> float [B].

    Label smoothing, mixup and cutmix are already in the targets.

    Raises:
      ConfigError: there is no such loss.
    """
    if ":" in name:
        return load_callable(name, "optim.loss")
    if name != "cross_entropy":
        raise ConfigError(
            f"config.optim.loss={name!r}: must be cross_entropy, or package.module:function."
            f"{did_you_mean(name, ['cross_entropy'])}"
        )
    return cross_entropy


def balanced_weights(counts: np.ndarray) -> tuple[float, ...]:
    """A weight for each class, N / (K N_k), so that every class has the same share of the loss (King and Zeng 2001).

    The mean weight of an example is 1. counts: int [classes], the examples N_k of each; N is their sum, and K how many
    classes have any. A class without examples weighs 1.
    """
    present = counts > 0
    weights = counts.sum() / (present.sum() * np.maximum(counts, 1))
    return tuple(np.where(present, weights, 1.0).tolist())
