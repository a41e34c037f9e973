"""The update: whether it is accepted, and the state after it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from jaxtrain.optim.param_groups import merge
from jaxtrain.optim.updates import clip_by_global_norm, ema_update, global_norm
from jaxtrain.precision import LossScale, adjust_loss_scale, at_floor, scale_factor
from jaxtrain.step.batch import Hyperparams
from jaxtrain.step.gradients import GradientSums
from jaxtrain.step.metrics import StepMetrics, stack_metrics
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.trees import PyTree


@flax.struct.dataclass
class UpdateDecision:
    """Whether an update is accepted, decided from numbers of the whole tree; and the optimizer's numbers for it.

    Attributes:
      step: int32 [], updates done afterwards.
      loss_scale: `LossScale` afterwards, or ().
      accepted: bool [], the new state replaces the old one.
      skipped: bool [], the update is refused, the step is counted, and the run goes on without this batch.
      overflowed: bool [], it is skipped because fp16 overflowed, and the loss scale shrinks.
      norm: float [], the global norm of the gradients.
      learning_rate: float [], of the step that the batch is for.
      weight_decay: float [].
    """

    step: jax.Array
    loss_scale: PyTree
    accepted: jax.Array
    skipped: jax.Array
    overflowed: jax.Array
    norm: jax.Array
    learning_rate: jax.Array
    weight_decay: jax.Array


def decide_update(
    step: jax.Array,
    loss_scale: PyTree,
    batch_step: jax.Array,
    hyperparams: Hyperparams,
    loss: jax.Array,
    norm: jax.Array,
    *,
    skips: bool,
) -> UpdateDecision:
    """Accepts an update whose loss and gradient norm are finite.

    Args:
      step: int32 [], updates done so far.
      loss_scale: `LossScale`, or ().
      batch_step: int32 [], the step that the batch is for. A state at another step does not change: when an update is
        refused, the updates that were already dispatched after it are refused too.
      hyperparams: of the run.
      loss: float [], the mean over the global batch.
      norm: float [], the global norm of the gradients.
      skips: whether the run goes on after an update that is not finite (`Task.skips`).
    """
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    on_time = step == batch_step
    accepted = finite & on_time
    # With fp16 an overflow is normal: the batch is skipped, and the run goes on with a smaller loss scale.
    can_shrink = isinstance(loss_scale, LossScale) & ~at_floor(loss_scale)
    overflowed = on_time & ~finite & can_shrink
    skipped = overflowed | (on_time & ~finite & skips)
    new_scale = _select(on_time, adjust_loss_scale(loss_scale, finite), loss_scale)
    return UpdateDecision(
        step=step + accepted + skipped,
        loss_scale=new_scale,
        accepted=accepted,
        skipped=skipped,
        overflowed=overflowed,
        norm=norm,
        learning_rate=hyperparams.learning_rate(batch_step),
        weight_decay=hyperparams.weight_decay,
    )


def unscale_gradients(loss_scale: PyTree, gradients: PyTree, updating: PyTree) -> PyTree:
    """The gradients of the loss, without the loss scale, sharded as the optimizer's state: each device updates its shard.

    Args:
      loss_scale: `LossScale`, or ().
      gradients: float arrays, like the trained parameters.
      updating: shardings, like them: those of the optimizer's state.
    """
    gradients = jax.tree.map(lambda g: g / scale_factor(loss_scale, g.dtype), gradients)
    gradients = jax.lax.with_sharding_constraint(gradients, updating)
    in_order = functools.partial(_in_order, shardings=updating)
    return jax.lax.platform_dependent(gradients, cpu=lambda tree: tree, default=in_order)


def _in_order(gradients: PyTree, shardings: PyTree) -> PyTree:
    """`gradients`, each in memory in the order of its dims, as the parameters are.

    cuDNN leaves a kernel's gradient as [O, H, W, I]. Without the constraint XLA:GPU brings the parameter and its momentum
    into that order, and the update back; so they are not updated in place, but copied first.
    """

    def of_device(shards: PyTree) -> PyTree:
        return jax.tree.map(lambda g: with_layout_constraint(g, Layout(tuple(range(g.ndim)))), shards)

    return _on_each_device(of_device, shardings, gradients)


def _on_each_device(function: Callable[..., PyTree], shardings: PyTree, *trees: PyTree, whole: Any = ()) -> PyTree:
    """`function(*trees, *whole)` of each device's shards: what XLA cannot split it would gather.

    Args:
      function: from shards of the trees, and `whole`, to a tree of shards.
      shardings: `NamedSharding`s, of each tree and of the result.
      *trees: arrays.
      whole: arrays that every device has.
    """
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    if not (leaves := jax.tree.leaves(shardings)):
        return trees[0]
    places = {"in_specs": (*(specs for _ in trees), *(P() for _ in whole)), "out_specs": specs}
    return jax.shard_map(function, mesh=leaves[0].mesh, **places, check_vma=False)(*trees, *whole)


@jax.named_scope("update")
def apply_update(
    task: Task,
    shardings: TrainState,
    updating: PyTree,
    state: TrainState,
    gradients: PyTree,
    batch_stats: PyTree,
    communication: PyTree,
    decision: UpdateDecision,
) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
    """Applies `decision` to the state of the whole model, or of some of its layers.

    Args:
      task: gives the kind of optimizer, clipping and the EMA.
      shardings: of the state.
      updating: shardings like the trained parameters: those of the optimizer's state.
      state: before the update.
      gradients: float arrays, sharded as `updating`.
      batch_stats: the new running statistics.
      communication: what the exchange of the gradients keeps now.
      decision: from the whole tree.

    Returns:
      The state after `decision`; and the global norms, float [] each, of the old trained parameters and of the update, which
      is computed even where it is refused.
    """
    if task.optim.clip_norm:
        gradients = clip_by_global_norm(gradients, decision.norm, task.optim.clip_norm)
    trained, moving = task.groups.trained, task.moving
    old_params = jax.lax.with_sharding_constraint(trained(state.params), updating)
    optimizer = task.optimizer(decision.learning_rate, decision.weight_decay)
    updates, opt_state = optimizer.update(gradients, state.opt_state, old_params)
    norms = (global_norm(old_params, updating), global_norm(updates, updating))
    accepted = _after_norms(decision.accepted, norms)
    new = optax.apply_updates(old_params, updates)
    new = jax.lax.with_sharding_constraint(new, trained(shardings.params)), moving(batch_stats)
    params, batch_stats = merge(state.params, new[0]), merge(state.batch_stats, new[1])
    ema = state.ema
    if task.optim.ema:
        old = trained(ema["params"]), moving(ema["batch_stats"])
        averages = ema_update(old, new, task.optim.ema, state.step)
        ema = {name: merge(ema[name], part) for name, part in zip(("params", "batch_stats"), averages, strict=True)}
    updated = TrainState(state.step, params, batch_stats, opt_state, ema, state.loss_scale, communication)
    together = functools.partial(_select_together, shardings=shardings)
    after = jax.lax.platform_dependent(accepted, updated, state, cpu=_select, default=together)
    # The optimizer counts a skipped step too, so that its learning rate stays the schedule's at `step`.
    counted = jax.tree.map(
        lambda new, old: jnp.where(decision.skipped & is_count(new), new, old), opt_state, after.opt_state
    )
    return dataclasses.replace(after, step=decision.step, loss_scale=decision.loss_scale, opt_state=counted), norms


def _after_norms(accepted: jax.Array, norms: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`accepted` (bool []), and on a CPU only if both norms are finite as well: the new state then waits for the norms.

    XLA updates a leaf in place only where everything that reads the old leaf surely runs before. On a CPU the norms and
    the new parameters are computed by separate kernels, and all leaves were copied at each step (benchmarks/NOTES.md).
    On a GPU one kernel should read and write a leaf, and waiting would split it in two.

    Safe: the loop stops or rolls back at a norm that is not finite in any case.
    """
    finite = jnp.isfinite(norms[0]) & jnp.isfinite(norms[1])
    return jax.lax.platform_dependent(accepted, finite, cpu=jnp.logical_and, default=lambda accepted, _: accepted)


def update_state(
    task: Task,
    shardings: TrainState,
    updating: PyTree,
    state: TrainState,
    sums: GradientSums,
    step: jax.Array,
    hyperparams: Hyperparams,
) -> tuple[TrainState, StepMetrics]:
    """Decides and applies the update of a model without pipeline stages.

    Args:
      task: what to compute.
      shardings: of the state.
      updating: shardings like the trained parameters: those of the optimizer's state.
      state: before the update.
      sums: over all microbatches.
      step: int32 [], the step that the batch is for.
      hyperparams: of the run.

    Returns:
      The state after the update, or the same state where the update is refused; and the step's metrics.
    """
    gradients = unscale_gradients(state.loss_scale, sums.gradients, updating)
    norm = global_norm(gradients, updating)
    decision = decide_update(state.step, state.loss_scale, step, hyperparams, sums.loss, norm, skips=task.skips)
    new = gradients, sums.batch_stats, sums.communication
    after, norms = apply_update(task, shardings, updating, state, *new, decision)
    return after, stack_metrics(step_metrics(state.loss_scale, decision, sums.loss, sums.correct, *norms))


def step_metrics(
    loss_scale: PyTree,
    decision: UpdateDecision,
    loss: jax.Array,
    correct: jax.Array,
    param_norm: jax.Array,
    update_norm: jax.Array,
) -> dict[str, Any]:
    """The metrics of a step, by name: scalars [].

    `made` says whether the step counts: its batch is used up.

    Args:
      loss_scale: `LossScale` before the update, or ().
      decision: the update's.
      loss: float [], the mean over the global batch.
      correct: float [], how many examples were classified correctly.
      param_norm: float [], the global norm of the trained parameters before the update.
      update_norm: float [], the global norm of the update.
    """
    return {
        "made": decision.accepted | decision.skipped,
        "loss": loss,
        "correct": correct,
        "learning_rate": decision.learning_rate,
        "grad_norm": decision.norm,
        "param_norm": param_norm,
        "update_norm": update_norm,
        "loss_scale": scale_factor(loss_scale, loss.dtype),
        "skipped": decision.skipped,
        "overflowed": decision.overflowed,
    }


def _select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where `condition` (bool []) holds, otherwise `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _select_together(condition: jax.Array, new: TrainState, old: TrainState, shardings: TrainState) -> TrainState:
    """As `_select`, for a GPU: all leaves read the condition from one vector.

    XLA:GPU makes one kernel of leaves of one shape if they read an array in common, and a scalar does not count as one.

    Args:
      condition: bool [].
      new: arrays.
      old: arrays like `new`.
      shardings: of both.
    """

    def of_device(new: PyTree, old: PyTree, condition: jax.Array) -> PyTree:
        width = max((leaf.shape[-1] for leaf in jax.tree.leaves(old) if leaf.ndim), default=0)
        vector = jax.lax.optimization_barrier(jnp.broadcast_to(condition, (width,)))
        return jax.tree.map(lambda n, o: jnp.where(vector[: o.shape[-1]] if o.ndim else condition, n, o), new, old)

    return _on_each_device(of_device, shardings, new, old, whole=(condition,))


def is_count(leaf: jax.Array) -> bool:
    """Whether a leaf of the optimizer's state is a step counter."""
    return leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)
