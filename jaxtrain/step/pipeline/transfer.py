"""Activations and cotangents on their way between stages, within a process or between processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import BATCH_AXES
from jaxtrain.step.pipeline.chunks import ModelChunk
from jaxtrain.step.pipeline.schedule import Op


class StageTransfer:
    """How activations get from one stage's devices to another's.

    Where both stages touch the same processes, each shard is copied to its counterpart. Otherwise the two stages' buffers are
    taken for the halves of one array, and a program that both run moves the first half (`ppermute`; NCCL or gloo).
    """

    def __init__(self, layout: Layout, source: int, target: int, shape: jax.ShapeDtypeStruct):
        self.sharding = layout.sharding(layout.examples.spec, target)
        here, there = (layout.on_stage(stage).mesh.devices.ravel().tolist() for stage in (source, target))
        self._counterpart = dict(zip(here, there, strict=True))
        self.crosses = any(a.process_index != b.process_index for a, b in self._counterpart.items())
        self.joins = any(d.process_index == jax.process_index() for d in (*here, *there))
        self._program: Any = None
        if not (self.crosses and self.joins):
            return
        pair = Mesh(np.stack([layout.mesh.devices[source], layout.mesh.devices[target]]), layout.mesh.axis_names)
        halves = NamedSharding(pair, P(("stage", *BATCH_AXES)))

        @functools.partial(jax.shard_map, mesh=pair, in_specs=halves.spec, out_specs=halves.spec, check_vma=False)
        def shift(x: jax.Array) -> jax.Array:
            return jax.lax.ppermute(x, "stage", [(0, 1)])

        self._both = (2 * shape.shape[0], *shape.shape[1:])
        both = jax.ShapeDtypeStruct(self._both, shape.dtype, sharding=halves)
        self._halves, self._program = halves, jax.jit(shift, out_shardings=halves).lower(both).compile()
        blank = np.zeros(self.sharding.shard_shape(shape.shape), shape.dtype)
        mine = [d for d in there if d.process_index == jax.process_index()]
        self._blank = jax.device_put([blank] * len(mine), mine)

    def copy(self, array: jax.Array) -> jax.Array:
        """`array` on the target's devices, in the same processes."""
        if array.is_fully_addressable:
            return jax.device_put(array, self.sharding)
        shards = array.addressable_shards
        moved = jax.device_put([shard.data for shard in shards], [self._counterpart[shard.device] for shard in shards])
        return jax.make_array_from_single_device_arrays(array.shape, self.sharding, moved)

    def exchange(self, array: jax.Array | None) -> jax.Array | None:
        """`array` from the source's processes (elsewhere `None`) on the target's (elsewhere `None`). A collective."""
        own = [shard.data for shard in array.addressable_shards] if array is not None else []
        whole = jax.make_array_from_single_device_arrays(self._both, self._halves, own + self._blank)
        arrived = self._program(whole)
        there = self.sharding.device_set
        shards = [shard.data for shard in arrived.addressable_shards if shard.device in there]
        if not shards:
            return None
        shape = (self._both[0] // 2, *self._both[1:])
        return jax.make_array_from_single_device_arrays(shape, self.sharding, shards)


def edge(op: Op) -> tuple[int, int]:
    """From which chunk to which the result of `op` goes."""
    return op.chunk, op.chunk + (1 if op.kind == "F" else -1)


def make_transfers(
    layout: Layout, chunks: Sequence[ModelChunk], inputs: Sequence[Any], *, back: bool
) -> dict[Any, StageTransfer]:
    """A transfer for each edge between chunks, forward and, with `back`, backward. inputs: what comes into each chunk."""
    transfers: dict[tuple[int, int], StageTransfer] = {}
    for before, after in itertools.pairwise(chunks):
        for source, target in ((before, after), (after, before))[: 2 if back else 1]:
            transfers[source.index, target.index] = StageTransfer(
                layout, source.stage, target.stage, inputs[after.index]
            )
    return transfers
