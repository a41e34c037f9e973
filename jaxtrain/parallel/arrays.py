"""Arrays with pipeline stages: between the devices of one stage and those of all stages.

`view` and `join` wrap buffers that are already on the devices; they copy nothing. `to_every_process` copies: Orbax
needs every process to hold a part of each array that it saves.
"""

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
    """An array that every stage has, as an array on one stage's devices (those of `sharding`): the same buffers, no copy."""
    devices = sharding.device_set
    shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards, dtype=array.dtype)


def join(arrays: Sequence[jax.Array], shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """One array over the devices of all stages, from the shards that lie on each stage; no copy.

    Args:
      arrays: for each stage of this process, an array with its shards.
      shape: of the result.
      sharding: of the result, on the mesh of all stages.
    """
    shards = [shard.data for array in arrays for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=arrays[0].dtype)


def is_everywhere(array: Any) -> bool:
    """Whether every process has a device of the array's sharding. Orbax needs that for what it writes and reads."""
    return len({device.process_index for device in array.sharding.device_set}) == jax.process_count()


def to_every_process(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree`, each array that some process has no part of copied to all stages' devices of `mesh`.

    A collective: every process must call it.
    """
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
    """[stages, ...]: `leaf` in its stage's row, zeros in the other rows."""
    spec: P = leaf.sharding.spec  # type: ignore[union-attr]
    sharding = NamedSharding(mesh, P("stage", *spec))
    data_on = {shard.device: shard.data for shard in leaf.addressable_shards}
    shape = (mesh.shape["stage"], *leaf.shape)
    blank = functools.partial(np.zeros, sharding.shard_shape(shape), leaf.dtype)
    with jax.transfer_guard("allow"):
        shards = [
            jnp.expand_dims(data_on[device], 0) if device in data_on else jax.device_put(blank(), device)
            for device in sharding.addressable_devices
        ]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
