"""The gradients of a microbatch, and the accumulators that microbatches are added to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtrain.data.augment import train_inputs
from jaxtrain.models.layers import Context
from jaxtrain.optim.param_groups import merge
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import BATCH_AXES, batch_ways
from jaxtrain.parallel.reduce import reduce_leaves
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
        parameters, in their dtypes. Where `Layout.accumulates_by_device`, each [n, ...]: what each shard of the batch adds.
      batch_stats: the new running statistics, each microbatch's divided by the number of microbatches. Where
        `Layout.trains_by_device`, each [n, ...].
      loss: [], the mean loss over the global batch, in `Task.sums_dtype`.
      correct: [], how many examples were classified correctly, in `Task.sums_dtype`.
      communication: `TrainState.communication` after the exchange of a step's gradients; () before.
    """

    gradients: PyTree
    batch_stats: PyTree
    loss: jax.Array
    correct: jax.Array
    communication: PyTree = ()


def zero_sums(task: Task, layout: Layout, params: PyTree, batch_stats: PyTree) -> GradientSums:
    """The sums of no microbatch.

    Args:
      task: says which parameters are trained.
      layout: says what each shard of the batch adds up for itself.
      params: arrays or shapes; the gradients have their shapes and dtypes.
      batch_stats: arrays or shapes.
    """

    def zeros(tree: PyTree, by_device: bool) -> PyTree:
        first = (batch_ways(layout.mesh),) * by_device
        return jax.tree.map(lambda leaf: jnp.zeros((*first, *leaf.shape), leaf.dtype), tree)

    gradients = zeros(task.groups.trained(params), layout.accumulates_by_device)
    numbers = (jnp.zeros((), task.sums_dtype) for _ in range(2))
    return GradientSums(gradients, zeros(batch_stats, layout.trains_by_device), *numbers)


def sums_shapes(task: Task, layout: Layout, params: PyTree, batch_stats: PyTree) -> GradientSums:
    """The shapes of `zero_sums`, with the shardings of the accumulators: the gradients' from the layout, else replicated."""
    shapes = jax.eval_shape(functools.partial(zero_sums, task, layout, params, batch_stats))
    replicated = jax.tree.map(lambda _: layout.sharding(), shapes)
    if layout.accumulates_by_device:
        gradients = like_params_by_device(layout, shapes.gradients)
    else:
        gradients = like_params(layout, "gradients", shapes.gradients)
    stats = like_params_by_device(layout, shapes.batch_stats) if layout.trains_by_device else replicated.batch_stats
    return shapes_of(shapes, dataclasses.replace(replicated, gradients=gradients, batch_stats=stats))


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


def like_params_by_device(layout: Layout, leaves: PyTree) -> PyTree:
    """A tree of shardings like `leaves`, each [n, ...]: what each of the n shards of the batch has for itself."""
    found, structure = jax.tree_util.tree_flatten_with_path(leaves)
    placements = [layout.place_by_device(path_of(path), leaf.shape[1:], leaf.dtype) for path, leaf in found]
    return structure.unflatten([layout.sharding(placement.spec) for placement in placements])


def constrain_gradients(layout: Layout, gradients: PyTree) -> PyTree:
    """`gradients`, sharded as the layout says that their accumulator is.

    Without the constraint XLA shards them as it likes: 531 all-gathers instead of 160 for a ResNet-50 under ZeRO-1.
    What each shard of the batch adds up for itself stays where it is. Else
    there are two constraints: first the sharding that they were computed with, then that at rest. This is all-reduce
    and slice, which XLA:GPU makes a reduce-scatter. (With the second alone XLA:CPU gathers activations: 84 all-gathers
    instead of 0 for a ResNet-18.)
    """
    if layout.accumulates_by_device:
        return jax.lax.with_sharding_constraint(gradients, like_params_by_device(layout, gradients))
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
    if layout.trains_by_device:  # inside `by_device`, a shard of the batch has groups of its own
        groups = max(groups // batch_ways(layout.mesh), 1)
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

    function = functools.partial(_gradients, task, layer_wrapper(layout, state.params, task.remat))
    weights = (state.params, state.batch_stats)
    if layout.trains_by_device:
        function = trained_by_device(layout, function)
        weights = (state.communication["local"]["params"], state.communication["local"]["batch_stats"])
    elif layout.by_device:
        function = reduced_over_batch(layout, function)
    gradients, batch_stats, (loss, correct) = function(
        weights, (inputs, targets, labels, context), (whole, dropout, state.loss_scale)
    )
    gradients = constrain_gradients(layout, gradients)
    batch_stats = jax.tree.map(lambda s: s / layout.config.microbatches, batch_stats)
    if layout.trains_by_device:
        stats = like_params_by_device(layout, batch_stats)
    else:
        stats = like_params(layout, "batch_stats", batch_stats)
    batch_stats = jax.lax.with_sharding_constraint(batch_stats, stats)
    return GradientSums(gradients, batch_stats, loss, correct)


def _gradients(
    task: Task, wrap: Any, weights: tuple[Any, ...], examples: tuple[Any, ...], shared: tuple[Any, ...]
) -> tuple[PyTree, PyTree, tuple[jax.Array, jax.Array]]:
    """The gradients of a microbatch's examples, or of one device's part of them.

    Args:
      task: what to compute.
      wrap: of `layer_wrapper`.
      weights: parameters and running statistics.
      examples: inputs float [B/M, H, W, C], targets float [B/M, C], labels int32 [B/M], and the layers' `Context`.
      shared: labels of all microbatches int32 [M, B/M], the key of dropout, `TrainState.loss_scale`.

    Returns:
      The gradients of the trained parameters, the new running statistics, and what the examples add to the loss and to the
      correct answers.
    """
    (params, batch_stats), (inputs, targets, labels, context), (whole, dropout, loss_scale) = weights, examples, shared

    def loss_fn(trained: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array, PyTree]]:
        whole_params = merge(params, trained)  # layers below the first trained one get no backward pass
        logits, new_stats = task.model.apply(whole_params, batch_stats, inputs, context, dropout, wrap=wrap)
        scaled, (loss, correct) = scaled_loss(task, logits, targets, labels, whole, loss_scale)
        return scaled, (loss, correct, new_stats)

    gradients, (loss, correct, new_stats) = jax.grad(loss_fn, has_aux=True)(task.groups.trained(params))
    return gradients, new_stats, (loss, correct)


def reduced_over_batch(layout: Layout, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run by each device on its own examples alone; its gradients are added up by `reduce_gradients`.

    Args:
      layout: of the parameters and the batch.
      function: as `_gradients` without its first two arguments.
    """

    def of_device(weights: PyTree, examples: PyTree, shared: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        gradients, batch_stats, sums = function(weights, of_one_device(examples), shared)
        return jax.tree.map(lambda g: g[None], gradients), *add_over_batch(batch_stats, sums)

    def reduced(weights: PyTree, examples: PyTree, shared: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        weights = jax.lax.with_sharding_constraint(weights, tuple(like_params(layout, "computing", w) for w in weights))
        batch = P(BATCH_AXES)
        mapped = by_device(layout, of_device, (P(), batch, P()), (batch, P(), P()))
        gradients, *more = mapped(weights, examples, shared)
        return reduce_gradients(layout, gradients), *more

    return reduced


def trained_by_device(layout: Layout, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run by each device on its own examples and its own weights: no gradient and no statistic is added up.

    Args:
      layout: of the parameters and the batch.
      function: as `_gradients` without its first two arguments.
    """

    def of_device(weights: PyTree, examples: PyTree, shared: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        own = jax.tree.map(lambda leaf: leaf[0], weights)
        gradients, batch_stats, sums = function(own, examples, shared)
        kept = jax.tree.map(lambda leaf: leaf[None], (gradients, batch_stats))
        return *kept, jax.lax.psum(sums, BATCH_AXES)

    batch = P(BATCH_AXES)
    return by_device(layout, of_device, (batch, batch, P()), (batch, batch, P()))


def by_device(layout: Layout, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function`, run by each device on its part of the batch. What the tensor axis splits, XLA splits as everywhere."""
    by_hand = {"mesh": layout.mesh, "axis_names": set(BATCH_AXES), "check_vma": False}
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, **by_hand)


def of_one_device(examples: tuple[Any, ...]) -> tuple[Any, ...]:
    """`examples`, whose last is the layers' `Context`: inside `by_device`, layers must know that there are more elsewhere."""
    *arrays, context = examples
    return (*arrays, context.replace(batch_axes=BATCH_AXES))


def add_over_batch(batch_stats: PyTree, sums: PyTree) -> tuple[PyTree, PyTree]:
    """Inside `by_device`: the running statistics of the whole microbatch, and `sums` added up.

    New statistics are linear in those of the groups, and each device has as many examples: their mean is exact.
    """
    return jax.lax.pmean(batch_stats, BATCH_AXES), jax.lax.psum(sums, BATCH_AXES)


def reduce_gradients(layout: Layout, gradients: PyTree) -> PyTree:
    """The sum of `gradients`, a tree like the parameters with a first dim for the device that computed them.

    Where a device accumulates them for itself, they stay as they are.
    """
    if layout.accumulates_by_device:
        return gradients
    leaves, structure = jax.tree.flatten(gradients)
    shardings = jax.tree.leaves(like_params(layout, "computing", jax.tree.map(lambda g: g[0], gradients)))
    specs, config = [sharding.spec for sharding in shardings], layout.config

    def of_device(leaves: list[jax.Array]) -> list[jax.Array]:
        return reduce_leaves([leaf[0] for leaf in leaves], config.reduce, BATCH_AXES, config.bucket_bytes)

    with jax.named_scope("reduce_gradients"):
        each = [P(BATCH_AXES, *spec) for spec in specs]
        mapped = jax.shard_map(of_device, mesh=layout.mesh, in_specs=(each,), out_specs=specs, check_vma=False)
        return structure.unflatten(mapped(leaves))
