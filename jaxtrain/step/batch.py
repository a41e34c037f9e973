"""What a step computes on: batches, and data sets that live on the devices."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax

from jaxtrain.parallel.layout import Layout


@flax.struct.dataclass
class EvalBatch:
    """A padded batch. batch: as in training, with one microbatch. mask: bool [1, B], false where an example is padding."""

    batch: Batch
    mask: jax.Array


@flax.struct.dataclass
class Batch:
    """One global batch of B examples as M microbatches.

    step: int32, the number of the update that this batch is for; a state at another step is left as it is. rows: int32
    [M, B/M] row numbers into `Resident`, or `()`. images: uint8 [M, B/M, H, W, C] and labels: int32 [M, B/M], or `()`.
    """

    step: jax.Array
    rows: Any = ()
    images: Any = ()
    labels: Any = ()


@flax.struct.dataclass
class Resident:
    """A data set that lives on the devices: images uint8 [N, H, W, C], labels int32 [N]; both `()` when it is streamed."""

    images: Any = ()
    labels: Any = ()


def select_microbatch(batch: Batch, resident: Resident, index: Any, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Images uint8 [B/M, H, W, C] and labels int32 [B/M] of microbatch `index`, split over the batch axes."""
    images = select_from(batch.images, batch.rows, resident.images, index, layout)
    return images, select_from(batch.labels, batch.rows, resident.labels, index, layout)


def select_from(streamed: Any, rows: Any, resident: Any, index: Any, layout: Layout) -> jax.Array:
    """Microbatch `index` of what is `streamed` [M, B/M, ...], or of the `rows` [M, B/M] of what is `resident` [N, ...]."""
    pick = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
    if isinstance(rows, tuple):
        return pick(streamed)
    return jax.lax.with_sharding_constraint(resident[pick(rows)], layout.examples)
