"""Loss functions: one number for each example of a batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.errors import ConfigError
from jaxtrain.host.text import did_you_mean
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


def check_own_loss(name: str, logits: jax.ShapeDtypeStruct) -> None:
    """Calls a user's loss with shapes alone: a mean over the batch, or a number for each class, would be summed in silence.

    Args:
      name: `optim.loss`.
      logits: float [B, C].

    Raises:
      ConfigError: it does not return one float for each example.
    """
    if ":" not in name:
        return
    found = jax.eval_shape(loss_fn(name), logits, logits)
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", np.dtype(bool))
    if shape != logits.shape[:1] or not jnp.issubdtype(dtype, jnp.floating):
        returned = f"a {type(found).__name__}" if shape is None else f"{dtype} {list(shape)}"
        raise ConfigError(
            f"config.optim.loss={name!r}: returned {returned} for logits of {list(logits.shape)}; it must return a float for "
            f"each example, {list(logits.shape[:1])}."
        )


def balanced_weights(counts: np.ndarray) -> tuple[float, ...]:
    """A weight for each class, N / (K N_k), so that every class has the same share of the loss (King and Zeng 2001).

    The mean weight of an example is 1. counts: int [classes], the examples N_k of each; N is their sum, and K how many
    classes have any. A class without examples weighs 1.
    """
    present = counts > 0
    weights = counts.sum() / (present.sum() * np.maximum(counts, 1))
    return tuple(np.where(present, weights, 1.0).tolist())
