"""What is done to gradients and weights outside the optimizer: global norm, clipping, exponential moving average (EMA)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxtrain.precision import at_least_f32
from jaxtrain.trees import PyTree


def global_norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all leaves together: a scalar [] of at least float32. 0 for a tree without leaves.

    The leaves' sums are added in the tree's order, so that the result is always the same.
    """
    squares = [jnp.sum(jnp.square(leaf.astype(at_least_f32(leaf.dtype)))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(functools.reduce(jnp.add, squares, 0.0))


def clip_by_global_norm(gradients: PyTree, norm: jax.Array, max_norm: float) -> PyTree:
    """`gradients` scaled down to a global norm of at most `max_norm`, as torch.nn.utils.clip_grad_norm_ does.

    Args:
      gradients: float arrays; they keep their dtypes.
      norm: float [], their global norm. If it is not finite, the result is not finite either: the caller must refuse
        that update.
      max_norm: the largest norm allowed.
    """
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)


def ema_update(ema: PyTree, params: PyTree, decay: float, step: jax.Array) -> PyTree:
    """d * ema + (1 - d) * params, with d = min(decay, (1 + step) / (10 + step)), computed in at least float32.

    d grows from 0.1 to `decay`, as in tf.train.ExponentialMovingAverage. So the average forgets the random initial
    weights: a tenth of them is left after the first update, instead of `decay`.

    Args:
      ema: the average so far; float arrays, which keep their dtypes.
      params: the new values; a tree like `ema`.
      decay: the final d, in [0, 1).
      step: int32 [], the number of updates before this one.
    """
    step = jnp.asarray(step, jnp.result_type(float))  # JAX divides int32 in float32, x64 or not
    warm = jnp.minimum(decay, (1 + step) / (10 + step))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        d = warm.astype(at_least_f32(old.dtype))
        return (d * old + (1 - d) * new).astype(old.dtype)

    return jax.tree.map(average, ema, params)
