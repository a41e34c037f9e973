"""The inputs of a step: batches, and data sets that live on the devices."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax

from jaxtrain.parallel.layout import Layout


@flax.struct.dataclass
class EvalBatch:
    """A batch for evaluation, padded to B examples.

    Attributes:
      batch: as in training, with one microbatch.
      mask: bool [1, B], false where an example is padding.
    """

    batch: Batch
    mask: jax.Array


@flax.struct.dataclass
class Hyperparams:
    """Numbers that the programs take as arguments: runs that differ in them alone share their compiled programs.

    Rates of many steps are one array, which goes to the devices once for all of these steps: a transfer a step costs the
    host more than anything else that it does for a small model.

    Attributes:
      rates: float [RATES], the learning rates of the steps `first`, `first + 1`, ...
      first: int32 [].
      weight_decay: float [].
      seed: int32 [], of all random numbers.
    """

    rates: jax.Array
    first: jax.Array
    weight_decay: jax.Array
    seed: jax.Array

    def learning_rate(self, step: jax.Array) -> jax.Array:
        """The learning rate, float [], of the update `step` (int32 [])."""
        return self.rates[step - self.first]


RATES = 1024
"""How many steps' learning rates are on the devices: as many updates at most can be one call."""


@flax.struct.dataclass
class Batch:
    """One global batch of B examples in M microbatches. It has either `rows`, or `images` and `labels`; the others are `()`.

    Attributes:
      step: int32 [], the update that this batch is for. A state at another step does not change.
      hyperparams: of the run; `()` in an evaluation. They are not stacked where the batches of several updates are.
      rows: int32 [M, B/M], the examples' row numbers in `Resident`.
      images: uint8 [M, B/M, H, W, C].
      labels: int32 [M, B/M].
    """

    step: jax.Array
    hyperparams: Any = ()
    rows: Any = ()
    images: Any = ()
    labels: Any = ()


@flax.struct.dataclass
class Resident:
    """A data set that lives on the devices. Both are `()` if the data set is streamed.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
    """

    images: Any = ()
    labels: Any = ()


def select_microbatch(batch: Batch, resident: Resident, index: Any, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """The images and labels of one microbatch, sharded over the batch axes.

    Args:
      batch: the global batch.
      resident: the data set, if it lives on the devices.
      index: int32 [] or a Python int, the microbatch.
      layout: of the batch.

    Returns:
      Images, uint8 [B/M, H, W, C], and labels, int32 [B/M].
    """
    images = select_from(batch.images, batch.rows, resident.images, index, layout)
    return images, select_from(batch.labels, batch.rows, resident.labels, index, layout)


def all_labels(batch_labels: Any, rows: Any, resident: Any) -> jax.Array:
    """The labels of the whole global batch, int32 [M, B/M]; the arguments are those of `select_from`."""
    return batch_labels if isinstance(rows, tuple) else resident[rows]


def select_from(streamed: Any, rows: Any, resident: Any, index: Any, layout: Layout) -> jax.Array:
    """The images or the labels of one microbatch, [B/M, ...].

    Args:
      streamed: [M, B/M, ...], the batch's own; used where `rows` is `()`.
      rows: int32 [M, B/M], rows of `resident`.
      resident: [N, ...], those of the whole data set.
      index: int32 [] or a Python int, the microbatch.
      layout: of the batch.
    """
    pick = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
    if isinstance(rows, tuple):
        return pick(streamed)
    return jax.lax.with_sharding_constraint(resident[pick(rows)], layout.examples)
