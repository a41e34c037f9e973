"""How activations and their gradients get from one stage to another, within a process or between processes."""

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

TRANSFER_MODULE = "jit_transfer"
"""What a profile calls the program of a `StageTransfer` between processes."""


class StageTransfer:
    """Moves arrays from one stage's devices to another's.

    If each device and its counterpart belong to the same process, each shard is copied (`copy`). Otherwise the two
    stages' buffers are the halves of one array, and a program that both stages run moves the first half (`exchange`:
    `ppermute` with NCCL or gloo).

    Attributes:
      sharding: of the arrays on the target stage.
      crosses: whether arrays go from one process to another.
      joins: whether this process has devices of either stage. If not, it takes no part.
    """

    def __init__(self, layout: Layout, source: int, target: int, shape: jax.ShapeDtypeStruct):
        """A transfer between two stages.

        Args:
          layout: of the run.
          source: the stage that has the arrays.
          target: the stage that needs them.
          shape: of an array, [B/M, ...], and its dtype.
        """
        self.sharding = layout.sharding(layout.examples.spec, target)
        sources, targets = (layout.on_stage(stage).mesh.devices.ravel().tolist() for stage in (source, target))
        self._counterpart = dict(zip(sources, targets, strict=True))
        self.crosses = any(a.process_index != b.process_index for a, b in self._counterpart.items())
        self.joins = any(d.process_index == jax.process_index() for d in (*sources, *targets))
        self._program: Any = None
        if not (self.crosses and self.joins):
            return
        pair = Mesh(np.stack([layout.mesh.devices[source], layout.mesh.devices[target]]), layout.mesh.axis_names)
        halves = NamedSharding(pair, P(("stage", *BATCH_AXES)))

        @functools.partial(jax.shard_map, mesh=pair, in_specs=halves.spec, out_specs=halves.spec, check_vma=False)
        def transfer(x: jax.Array) -> jax.Array:
            return jax.lax.ppermute(x, "stage", [(0, 1)])

        self._both = (2 * shape.shape[0], *shape.shape[1:])
        both = jax.ShapeDtypeStruct(self._both, shape.dtype, sharding=halves)
        self._halves, self._program = halves, jax.jit(transfer, out_shardings=halves).lower(both).compile()
        self._dtype, self._local_targets = shape.dtype, [d for d in targets if d.process_index == jax.process_index()]

    @functools.cached_property
    def _blank(self) -> list[jax.Array]:
        """What this process's targets give to an exchange: zeros [B/M, ...], a shard a device."""
        half = (self._both[0] // 2, *self._both[1:])
        blank = np.zeros(self.sharding.shard_shape(half), self._dtype)
        return jax.device_put([blank] * len(self._local_targets), self._local_targets)

    def copy(self, array: jax.Array) -> jax.Array:
        """`array` [B/M, ...] on the target's devices; only if the transfer does not cross processes."""
        if array.is_fully_addressable:
            return jax.device_put(array, self.sharding)
        shards = array.addressable_shards
        moved = jax.device_put([shard.data for shard in shards], [self._counterpart[shard.device] for shard in shards])
        return jax.make_array_from_single_device_arrays(array.shape, self.sharding, moved)

    def exchange(self, array: jax.Array | None) -> jax.Array | None:
        """Sends an array to another process. A collective: every process that `joins` must call it, in the same order.

        Args:
          array: [B/M, ...], in a process that has devices of the source; otherwise `None`.

        Returns:
          The array on the target's devices, in a process that has some of them; otherwise `None`.
        """
        outgoing = [shard.data for shard in array.addressable_shards] if array is not None else []
        both = jax.make_array_from_single_device_arrays(self._both, self._halves, outgoing + self._blank)
        arrived = self._program(both)
        shards = [shard.data for shard in arrived.addressable_shards if shard.device in self.sharding.device_set]
        if not shards:
            return None
        shape = (self._both[0] // 2, *self._both[1:])
        return jax.make_array_from_single_device_arrays(shape, self.sharding, shards)


def edge(op: Op) -> tuple[int, int]:
    """(source, target): from which chunk to which chunk the result of `op` goes."""
    return op.chunk, op.chunk + (1 if op.kind == "F" else -1)


def make_transfers(
    layout: Layout, chunks: Sequence[ModelChunk], activations: Sequence[Any], *, back: bool
) -> dict[tuple[int, int], StageTransfer]:
    """The transfers between neighbouring chunks, by (source, target).

    Args:
      layout: of the run.
      chunks: of the model, in order.
      activations: the shape of what comes into each chunk.
      back: whether gradients go back too, from the chunks that compute them.
    """
    transfers: dict[tuple[int, int], StageTransfer] = {}
    for before, after in itertools.pairwise(chunks):
        for source, target in ((before, after), (after, before))[: 2 if back else 1]:
            if source is before or source.gives_gradient:
                shape = activations[after.index]
                transfers[source.index, target.index] = StageTransfer(layout, source.stage, target.stage, shape)
    return transfers
