"""What happens to gradients and weights outside the optimizer: global norm, clipping, moving average."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxtrain.precision import at_least_f32
from jaxtrain.trees import PyTree


def global_norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all leaves together, a scalar of at least float32; leaves are added in the tree's order.

    0 for a tree without leaves.
    """
    squares = [jnp.sum(jnp.square(leaf.astype(at_least_f32(leaf.dtype)))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(functools.reduce(jnp.add, squares, 0.0))


def clip_by_global_norm(gradients: PyTree, norm: jax.Array, max_norm: float) -> PyTree:
    """`gradients`, of global norm `norm`, scaled down to at most `max_norm`, as torch.nn.utils.clip_grad_norm_ does.

    A norm that is not finite gives gradients that are not: the caller refuses that update.
    """
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)


# ------------------------------------------------------------------------------------------------------------ average


def ema_update(ema: PyTree, params: PyTree, decay: float, step: jax.Array) -> PyTree:
    """d * ema + (1 - d) * params, with d = min(decay, (1 + step) / (10 + step)), in at least float32.

    `step` is the number of updates before this one. The warm-up of d, as in tf.train.ExponentialMovingAverage, lets the
    average forget the random initial weights: 0.1 of them is left after the first update, instead of `decay`.
    """
    step = jnp.asarray(step, jnp.result_type(float))  # JAX divides int32 in float32, x64 or not
    warm = jnp.minimum(decay, (1 + step) / (10 + step))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        d = warm.astype(at_least_f32(old.dtype))
        return (d * old + (1 - d) * new).astype(old.dtype)

    return jax.tree.map(average, ema, params)
