"""Arrays of one pipeline stage and of all: the same buffers seen in two ways, and what checkpoints need of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.trees import PyTree


def view(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """What every stage has, as one stage sees it: the same buffers, on its devices alone."""
    devices = sharding.device_set
    shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards, dtype=array.dtype)


def join(arrays: Sequence[jax.Array], shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """One array over all stages from each stage's part of it; no copy."""
    shards = [shard.data for array in arrays for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=arrays[0].dtype)


def is_everywhere(array: Any) -> bool:
    """Whether every process has a device that the array's sharding names; Orbax needs that of what it writes and reads."""
    return len({device.process_index for device in array.sharding.device_set}) == jax.process_count()


def to_every_process(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree` with the arrays of a single stage's processes copied to the other stages' devices of `mesh`. A collective."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = [i for i, leaf in enumerate(leaves) if not is_everywhere(leaf)]
    if not chosen:
        return tree
    stacked = [_stacked(leaves[i], mesh) for i in chosen]
    targets = [NamedSharding(mesh, leaves[i].sharding.spec) for i in chosen]
    with jax.transfer_guard("allow"):
        summed = jax.jit(lambda arrays: [jnp.sum(a, 0, dtype=a.dtype) for a in arrays], out_shardings=targets)(stacked)
    for i, leaf in zip(chosen, summed, strict=True):
        leaves[i] = leaf
    return structure.unflatten(leaves)


def _stacked(leaf: jax.Array, mesh: Mesh) -> jax.Array:
    """[stages, ...]: `leaf` in the row of its stage, zeros in the others."""
    spec: P = leaf.sharding.spec  # type: ignore[union-attr]
    sharding = NamedSharding(mesh, P("stage", *spec))
    own = {shard.device: shard.data for shard in leaf.addressable_shards}
    shape = (mesh.shape["stage"], *leaf.shape)
    blank = functools.partial(np.zeros, sharding.shard_shape(shape), leaf.dtype)
    with jax.transfer_guard("allow"):
        shards = [
            jnp.expand_dims(own[device], 0) if device in own else jax.device_put(blank(), device)
            for device in sharding.addressable_devices
        ]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
