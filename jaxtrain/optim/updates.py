"""What is done to gradients and weights outside the optimizer: global norm, clipping, exponential moving average (EMA)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.precision import at_least_f32
from jaxtrain.trees import PyTree


def global_norm(tree: PyTree, shardings: PyTree = None) -> jax.Array:
    """The Euclidean norm of all leaves together: a scalar [] of at least float32. 0 for a tree without leaves.

    The order of the additions is fixed, so that the result is always the same.

    Args:
      tree: float arrays.
      shardings: `NamedSharding`s like `tree`, as the leaves are sharded. With them the norm is a few kernels on a GPU;
        without them it is two for each leaf.
    """
    leaves = [leaf.astype(at_least_f32(leaf.dtype)) for leaf in jax.tree.leaves(tree)]
    if shardings is None or not leaves:
        return jnp.sqrt(_squares_by_leaf(leaves))
    joined = functools.partial(_squares_joined, shardings=jax.tree.leaves(shardings))
    return jnp.sqrt(jax.lax.platform_dependent(leaves, cpu=_squares_by_leaf, default=joined))


def _squares_by_leaf(leaves: Sequence[jax.Array]) -> jax.Array:
    """The sum [] of all squares: each leaf's, added in their order."""
    return functools.reduce(jnp.add, [jnp.sum(jnp.square(leaf)) for leaf in leaves], jnp.float32(0.0))


def _squares_joined(leaves: Sequence[jax.Array], shardings: Sequence[NamedSharding]) -> jax.Array:
    """The sum [] of all squares, for a GPU: leaves that are split alike are read by one kernel, as one long vector.

    The barrier makes each leaf an array in memory: else XLA computes all of them again inside that kernel. Each device
    reads its shards, so that nothing is gathered.
    """
    leaves = jax.lax.optimization_barrier(leaves)
    axes = [_axes(sharding.spec) for sharding in shardings]

    def of_device(shards: Sequence[jax.Array]) -> jax.Array:
        totals = []
        for along in dict.fromkeys(axes):
            alike = [shard.reshape(-1) for shard, its in zip(shards, axes, strict=True) if its == along]
            parts = [
                jnp.sum(jnp.square(jnp.concatenate(alike[i : i + _OPERANDS]))) for i in range(0, len(alike), _OPERANDS)
            ]
            total = functools.reduce(jnp.add, parts)
            totals.append(jax.lax.psum(total, along) if along else total)
        return functools.reduce(jnp.add, totals)

    specs = [sharding.spec for sharding in shardings]
    return jax.shard_map(of_device, mesh=shardings[0].mesh, in_specs=(specs,), out_specs=P(), check_vma=False)(leaves)


_OPERANDS = 90
"""Of how many leaves a kernel is: XLA:GPU makes none of more than 96 operands and results."""


def _axes(spec: P) -> tuple[str, ...]:
    """The mesh axes that a spec splits an array over."""
    return tuple(axis for axes in spec if axes for axis in (axes if isinstance(axes, tuple) else (axes,)))


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
