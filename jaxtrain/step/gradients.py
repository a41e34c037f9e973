"""The gradients of a microbatch, and the accumulators that microbatches are added to."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxtrain.data.augment import train_inputs
from jaxtrain.models.layers import Context
from jaxtrain.optim.param_groups import merge
from jaxtrain.parallel.layout import Layout
from jaxtrain.precision import scale_factor
from jaxtrain.step.batch import Batch, Resident, all_labels, select_microbatch
from jaxtrain.step.layer_wrap import layer_wrapper
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import AUGMENT, DROPOUT, TrainState, role_key
from jaxtrain.trees import PyTree, path_of, shapes_of


@flax.struct.dataclass
class GradientSums:
    """Sums over the microbatches so far.

    Attributes:
      gradients: of the mean loss over the global batch, times the loss scale; a tree like the trained
        parameters, in their dtypes.
      batch_stats: the new running statistics, each microbatch's divided by the number of microbatches.
      loss: [], the mean loss over the global batch, in `Task.sums_dtype`.
      correct: [], how many examples were classified correctly, in `Task.sums_dtype`.
    """

    gradients: PyTree
    batch_stats: PyTree
    loss: jax.Array
    correct: jax.Array


def zero_sums(task: Task, params: PyTree, batch_stats: PyTree) -> GradientSums:
    """The sums of no microbatch.

    Args:
      task: says which parameters are trained.
      params: arrays or shapes; the gradients have their shapes and dtypes.
      batch_stats: arrays or shapes.
    """
    zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
    numbers = (jnp.zeros((), task.sums_dtype) for _ in range(2))
    return GradientSums(zeros(task.groups.trained(params)), zeros(batch_stats), *numbers)


def sums_shapes(task: Task, layout: Layout, params: PyTree, batch_stats: PyTree) -> GradientSums:
    """The shapes of `zero_sums`, with the shardings of the accumulators: the gradients' from the layout, else replicated."""
    shapes = jax.eval_shape(functools.partial(zero_sums, task, params, batch_stats))
    replicated = jax.tree.map(lambda _: layout.sharding(), shapes)
    gradients = like_params(layout, "gradients", shapes.gradients)
    return shapes_of(shapes, dataclasses.replace(replicated, gradients=gradients))


def add_sums(sums: GradientSums, more: GradientSums) -> GradientSums:
    """`sums` with those of one more microbatch; in the dtypes of `sums`."""
    return jax.tree.map(lambda total, new: total + new.astype(total.dtype), sums, more)


def like_params(layout: Layout, tree: str, params: PyTree) -> PyTree:
    """A tree like `params` with the shardings at rest that its leaves would have in the state's tree named `tree`.

    ZeRO does not know the name "computing", so that gives the shardings of the forward and backward pass.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    placements = [layout.place(tree, path_of(path), leaf.shape, leaf.dtype) for path, leaf in leaves]
    return structure.unflatten([layout.sharding(placement.spec) for placement in placements])


def constrain_gradients(layout: Layout, gradients: PyTree) -> PyTree:
    """`gradients`, sharded as the layout says that their accumulator is.

    Without the constraint XLA shards them as it likes: 531 all-gathers instead of 160 for a ResNet-50 under ZeRO-1.
    There are two constraints: first the sharding that they were computed with, then that at rest. This is all-reduce
    and slice, which XLA:GPU makes a reduce-scatter. (With the second alone XLA:CPU gathers activations: 84 all-gathers
    instead of 0 for a ResNet-18.)
    """
    gradients = jax.lax.with_sharding_constraint(gradients, like_params(layout, "computing", gradients))
    return jax.lax.with_sharding_constraint(gradients, like_params(layout, "gradients", gradients))


def train_context(
    task: Task, layout: Layout, seed: jax.Array, step: jax.Array, index: Any, size: int
) -> tuple[Context, jax.Array, jax.Array]:
    """What the layers know about a microbatch, and its random keys.

    Args:
      task: gives the BatchNorm groups of the global batch, and the BatchNorms that are frozen.
      layout: gives the number of microbatches.
      seed: int32 [], of the run.
      step: int32 [], updates done so far.
      index: int32 [] or a Python int, the microbatch.
      size: how many examples it has.

    Returns:
      The layers' `Context`, the key of the augmentation, and the key of dropout.
    """
    # A random number belongs to an example of the global batch, whichever microbatch, stage or device it is on.
    example = index * size + jnp.arange(size, dtype=jnp.int32)
    groups = max(task.bn_groups // layout.config.microbatches, 1)
    augment, dropout = (jax.random.fold_in(role_key(seed, role), step) for role in (AUGMENT, DROPOUT))
    context = Context(example=example, train=True, bn_groups=groups, frozen_stats=task.frozen_stats)
    return context, augment, dropout


def scaled_loss(
    task: Task, logits: jax.Array, targets: jax.Array, labels: jax.Array, whole_batch: jax.Array, loss_scale: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What a microbatch adds to the mean loss over the global batch.

    Class weights multiply the targets, and the sum over the batch is divided by the sum of its labels' weights. This is
    PyTorch's CrossEntropyLoss of labels, with label smoothing or without; mixed with the partners' targets it is the same
    mixture of both losses, since partners exchange their labels.

    Args:
      task: gives the loss function, and the classes' weights.
      logits: float [B/M, C].
      targets: float [B/M, C], probabilities.
      labels: int32 [B/M].
      whole_batch: int32 [M, B/M], the labels of all microbatches.
      loss_scale: `TrainState.loss_scale`.

    Returns:
      The loss times the loss scale, which is differentiated; and the loss and the number of correct answers. All are
      scalars [] of the loss's dtype.
    """
    total: Any = whole_batch.size
    if task.class_weights:
        weights = jnp.asarray(task.class_weights, targets.dtype)
        targets, total = targets * weights, jnp.sum(weights[whole_batch])
    loss = jnp.sum(task.loss(logits, targets)) / total
    correct = jnp.sum(jnp.argmax(logits, -1) == labels)
    return loss * scale_factor(loss_scale, loss.dtype), (loss, correct.astype(loss.dtype))


def microbatch_gradients(
    task: Task, layout: Layout, state: TrainState, batch: Batch, resident: Resident, index: Any
) -> GradientSums:
    """What one microbatch adds to the accumulators.

    Args:
      task: what to compute.
      layout: of the state and the batch.
      state: the current state.
      batch: the global batch.
      resident: the data set, if it lives on the devices.
      index: int32 [] or a Python int, the microbatch.
    """
    images, labels = select_microbatch(batch, resident, index, layout)
    context, augment, dropout = train_context(task, layout, batch.hyperparams.seed, state.step, index, labels.shape[0])
    with jax.named_scope("augmentation"):
        inputs, targets = train_inputs(task.preprocess, images, labels, context.example, augment)
    whole = all_labels(batch.labels, batch.rows, resident.labels)

    def loss_fn(trained: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array, PyTree]]:
        params = merge(state.params, trained)  # layers below the first trained one get no backward pass
        logits, batch_stats = task.model.apply(
            params, state.batch_stats, inputs, context, dropout, wrap=layer_wrapper(layout, state.params, task.remat)
        )
        scaled, (loss, correct) = scaled_loss(task, logits, targets, labels, whole, state.loss_scale)
        return scaled, (loss, correct, batch_stats)

    trained = task.groups.trained(state.params)
    gradients, (loss, correct, batch_stats) = jax.grad(loss_fn, has_aux=True)(trained)
    gradients = constrain_gradients(layout, gradients)
    batch_stats = jax.tree.map(lambda s: s / layout.config.microbatches, batch_stats)
    batch_stats = jax.lax.with_sharding_constraint(batch_stats, like_params(layout, "batch_stats", batch_stats))
    return GradientSums(gradients, batch_stats, loss, correct)
