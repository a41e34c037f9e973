"""Histograms of the weights, computed on the devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.parallel.layout import Layout
from jaxtrain.trees import PyTree, path_of

BINS = 30


class WeightHistograms:
    """One program for all leaves; compiled at the first call. Every process calls it alike."""

    def __init__(self, layout: Layout):
        """layout: of the parameters, without pipeline stages."""
        self._program = jax.jit(self._compute, out_shardings=layout.sharding())

    def __call__(self, params: PyTree) -> dict[str, np.ndarray]:
        """For each leaf, by its path: [4 + BINS] least, most, sum and sum of squares of its numbers, and the bins' counts."""
        leaves = jax.tree_util.tree_leaves_with_path(params)
        numbers = jax.device_get(self._program(params))
        return {path_of(path): row for (path, _), row in zip(leaves, numbers, strict=True)}

    @staticmethod
    def _compute(params: PyTree) -> jax.Array:
        return jnp.stack([_row(leaf) for leaf in jax.tree.leaves(params)])


def _row(leaf: jax.Array) -> jax.Array:
    values = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    least, most = values.min(), values.max()
    width = jnp.where(most > least, most - least, 1)
    bins = jnp.clip((BINS * (values - least) / width).astype(jnp.int32), 0, BINS - 1)
    # A sum over each bin, not a scatter, which would gather a leaf that is split over devices.
    counts = jnp.stack([(bins == k).sum(dtype=values.dtype) for k in range(BINS)])
    return jnp.concatenate([jnp.stack([least, most, values.sum(), jnp.square(values).sum()]), counts])
