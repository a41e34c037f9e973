"""The update: whether it is accepted, and the state after it."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxtrain.optim.updates import clip_by_global_norm, ema_update, global_norm
from jaxtrain.precision import LossScale, adjust_loss_scale, at_floor, scale_factor
from jaxtrain.step.gradients import GradientSums
from jaxtrain.step.metrics import StepMetrics, stack_metrics
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.trees import PyTree


@flax.struct.dataclass
class UpdateDecision:
    """What becomes of an update, decided from the numbers of the whole tree.

    step, loss_scale: as they are afterwards. accepted: the new state is taken. skipped: the run goes on without this batch.
    overflowed: it does so because fp16 overflowed, and its loss scale shrinks. norm: of the gradients.
    """

    step: jax.Array
    loss_scale: PyTree
    accepted: jax.Array
    skipped: jax.Array
    overflowed: jax.Array
    norm: jax.Array


def decide_update(
    step: jax.Array, loss_scale: PyTree, batch_step: jax.Array, loss: jax.Array, norm: jax.Array, *, skips: bool
) -> UpdateDecision:
    """Accepts an update whose loss and gradient norm are finite. skips: the run goes on without one that is not.

    A state that is not at `batch_step` stays as it is: when an update is refused, so are those already dispatched behind it.
    """
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    on_time = step == batch_step
    accepted = finite & on_time
    # fp16 overflows by design now and then: that batch is skipped and the run goes on with a smaller scale.
    can_shrink = isinstance(loss_scale, LossScale) & ~at_floor(loss_scale)
    overflowed = on_time & ~finite & can_shrink
    skipped = overflowed | (on_time & ~finite & skips)
    new_scale = _select(on_time, adjust_loss_scale(loss_scale, finite), loss_scale)
    return UpdateDecision(step + accepted + skipped, new_scale, accepted, skipped, overflowed, norm)


def unscale_gradients(loss_scale: PyTree, gradients: PyTree, updating: PyTree) -> PyTree:
    """Gradients of the loss itself, where the optimizer's state lives: under ZeRO each device updates its own part."""
    gradients = jax.tree.map(lambda g: g / scale_factor(loss_scale, g.dtype), gradients)
    return jax.lax.with_sharding_constraint(gradients, updating)


def apply_update(
    task: Task,
    shardings: TrainState,
    updating: PyTree,
    state: TrainState,
    gradients: PyTree,
    batch_stats: PyTree,
    decision: UpdateDecision,
) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
    """The state (of the whole model or of some of its layers) after `decision`; the norms of the old parameters and of what
    `decision` was about to add to them.
    """
    if task.optim.clip_norm:
        gradients = clip_by_global_norm(gradients, decision.norm, task.optim.clip_norm)
    params_part = jax.lax.with_sharding_constraint(state.params, updating)
    updates, opt_state = task.optimizer.update(gradients, state.opt_state, params_part)
    norms = (global_norm(params_part), global_norm(updates))
    accepted = _once_known(decision.accepted, norms)
    params = jax.lax.with_sharding_constraint(optax.apply_updates(params_part, updates), shardings.params)
    ema = state.ema
    if task.optim.ema:
        new = {"params": params, "batch_stats": batch_stats}
        ema = ema_update(state.ema, new, task.optim.ema, state.step)
    updated = TrainState(state.step, params, batch_stats, opt_state, ema, state.loss_scale)
    after = _select(accepted, updated, state)
    # The optimizer counts a skipped step too, so that its learning rate stays the schedule's at `step`.
    counted = jax.tree.map(
        lambda new, old: jnp.where(decision.skipped & _is_count(new), new, old), opt_state, after.opt_state
    )
    return dataclasses.replace(after, step=decision.step, loss_scale=decision.loss_scale, opt_state=counted), norms


def _once_known(accepted: jax.Array, norms: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`accepted`, and on a CPU only if both norms are finite: the new state then waits for them.

    XLA writes a leaf in place only where whatever reads the old one is sure to come before. On a CPU the norms and the new
    parameters read it in programs of their own, and all leaves were copied at each step: benchmarks/NOTES.md. On a GPU one
    program should read and write a leaf, which waiting would part. Who is told of a norm that is not finite goes back anyway.
    """
    finite = jnp.isfinite(norms[0]) & jnp.isfinite(norms[1])
    return jax.lax.platform_dependent(accepted, finite, cpu=jnp.logical_and, default=lambda accepted, _: accepted)


def update_state(
    task: Task, shardings: TrainState, updating: PyTree, state: TrainState, sums: GradientSums, step: jax.Array
) -> tuple[TrainState, StepMetrics]:
    """The state after the update, or the same state where the loss or the gradient norm is not finite."""
    gradients = unscale_gradients(state.loss_scale, sums.gradients, updating)
    decision = decide_update(state.step, state.loss_scale, step, sums.loss, global_norm(gradients), skips=task.skips)
    after, norms = apply_update(task, shardings, updating, state, gradients, sums.batch_stats, decision)
    return after, stack_metrics(
        step_metrics(task, state.step, state.loss_scale, decision, sums.loss, sums.correct, *norms)
    )


def step_metrics(
    task: Task,
    step: jax.Array,
    loss_scale: PyTree,
    decision: UpdateDecision,
    loss: jax.Array,
    correct: jax.Array,
    param_norm: jax.Array,
    update_norm: jax.Array,
) -> dict[str, Any]:
    """What a step reports; `step` and `loss_scale` are those before it. made: the step counts, its batch is used up."""
    return {
        "made": decision.accepted | decision.skipped,
        "loss": loss,
        "correct": correct,
        "learning_rate": task.schedule(step),
        "grad_norm": decision.norm,
        "param_norm": param_norm,
        "update_norm": update_norm,
        "loss_scale": scale_factor(loss_scale, loss.dtype),
        "skipped": decision.skipped,
        "overflowed": decision.overflowed,
    }


def _select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _is_count(leaf: jax.Array) -> bool:
    return leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)
