"""Finds copies of a parameter that differ between devices.

They should be equal. A difference means a flipped bit in a device's memory, or a broken device.
"""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.trees import PyTree, path_of


class ReplicaCheck:
    """Compares the copies of every leaf on every device.

    A checksum is the sum of a copy's bits as 32-bit words, modulo 2^32: one flipped bit always changes it. The program
    is compiled at the first call, once for each mesh.
    """

    def __init__(self) -> None:
        self._programs: dict[Mesh, Any] = {}

    def __call__(self, tree: PyTree) -> list[str]:
        """A sentence for each device whose copies differ from those on other devices.

        A collective: every process must call it. A process is told about the stages that it has devices of.
        """
        by_mesh = collections.defaultdict(list)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            by_mesh[leaf.sharding.mesh].append((path_of(path), leaf))
        differences = []
        for mesh, leaves in by_mesh.items():
            if mesh.local_devices:
                differences += self._compare(mesh, leaves)
        return differences

    def _compare(self, mesh: Mesh, named: list[tuple[str, jax.Array]]) -> list[str]:
        """The sentences for the devices of one mesh. named: path and array of each leaf that lies on it."""
        leaves: list[Any] = [leaf for _, leaf in named]
        if mesh not in self._programs:
            specs: Any = [leaf.sharding.spec for leaf in leaves]
            axes = mesh.axis_names

            def sums(leaves: list[jax.Array]) -> jax.Array:
                return jax.lax.all_gather(jnp.stack([_checksum(leaf) for leaf in leaves]), axes)

            mapped = jax.shard_map(sums, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False)
            self._programs[mesh] = jax.jit(mapped)
        table = np.asarray(self._programs[mesh](leaves).addressable_data(0))  # [devices, leaves]
        devices, wrong = list(mesh.devices.flat), collections.defaultdict(list)
        for column, (name, leaf) in enumerate(named):
            copies = collections.defaultdict(list)
            for row, device in enumerate(devices):
                shard = leaf.sharding.devices_indices_map(leaf.shape)[device]
                copies[str(shard)].append((row, int(table[row, column])))
            for checksums in copies.values():
                usual = collections.Counter(value for _, value in checksums).most_common(1)[0][0]
                for row, value in checksums:
                    if value != usual:
                        wrong[row].append(name)
        return [
            f"{len(names)} parameters on {devices[row]} of process {devices[row].process_index} differ from their copies on "
            f"other devices, the first {names[0]}"
            for row, names in wrong.items()
        ]


def _checksum(x: jax.Array) -> jax.Array:
    """uint32 []: the sum of the bits of `x` as words of at most 32 bits, modulo 2^32."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, kind)
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)
