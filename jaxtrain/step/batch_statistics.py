"""BatchNorm statistics of weights that were not trained with them: means over training batches, as PyTorch's `update_bn`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.data.augment import train_inputs
from jaxtrain.optim.param_groups import merge
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.batch import Batch, Resident, select_microbatch
from jaxtrain.step.gradients import train_context
from jaxtrain.step.layer_wrap import layer_wrapper
from jaxtrain.step.task import Task
from jaxtrain.trees import PyTree


def estimate_statistics(
    task: Task,
    layout: Layout,
    params: PyTree,
    batch_stats: PyTree,
    batches: Iterable[Batch],
    resident: Resident,
    before_batch: Callable[[], None] = lambda: None,
) -> PyTree:
    """The mean over `batches` of what each BatchNorm sees of a batch, in training; frozen ones keep theirs. One pipeline stage.

    Args:
      task: what the run computes.
      layout: of the run.
      params: float arrays, keyed by layer.
      batch_stats: running statistics of the run, keyed by layer.
      batches: of training, augmented as there; at least one.
      resident: the data set, if it lives on the devices.
      before_batch: called before every batch.

    Returns:
      Running statistics with the shapes, dtypes and shardings of `batch_stats`.
    """

    def add(sums: PyTree, params: PyTree, batch_stats: PyTree, batch: Batch, resident: Resident, index: Any) -> PyTree:
        found = _statistics(task, layout, params, batch_stats, batch, resident, index)
        return jax.tree.map(jnp.add, sums, found)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, batch_stats)
    program = jax.jit(add, donate_argnums=0, out_shardings=shardings)
    sums, count = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), out_shardings=shardings)(batch_stats), 0
    for batch in batches:
        before_batch()
        for index in range(layout.config.microbatches):
            sums, count = program(sums, params, batch_stats, batch, resident, np.int32(index)), count + 1
        jax.block_until_ready(sums)  # streamed batches would fill the devices' memory
    return jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf / count, tree), out_shardings=shardings)(sums)


def _statistics(
    task: Task, layout: Layout, params: PyTree, batch_stats: PyTree, batch: Batch, resident: Resident, index: Any
) -> PyTree:
    """What a microbatch alone would make of the running statistics, after many of its kind.

    The new statistics are `share` times the old ones and a rest that is the batch's: `share` is a derivative, so that a
    layer of a user's own may have any momentum. Where nothing else depends on the old ones, it costs nothing.
    """
    images, labels = select_microbatch(batch, resident, index, layout)
    context, augment, dropout = train_context(task, layout, batch.hyperparams.seed, batch.step, index, labels.shape[0])
    inputs, _ = train_inputs(task.preprocess, images, labels, context.example, augment)
    wrap = layer_wrapper(layout, params, "none")

    def new(moving: PyTree) -> PyTree:
        old = merge(batch_stats, moving)
        return task.moving(task.model.apply(params, old, inputs, context, dropout, wrap=wrap)[1])

    moving = task.moving(batch_stats)
    found, share = jax.jvp(new, (moving,), (jax.tree.map(jnp.ones_like, moving),))
    fixed = jax.tree.map(lambda new, old, share: (new - share * old) / (1 - share), found, moving, share)
    return merge(batch_stats, fixed)
