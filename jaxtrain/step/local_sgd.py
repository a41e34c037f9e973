"""Local SGD: between two syncs each shard of the batch trains weights of its own (`optim.sync_every`).

At a sync the weights are averaged (McDonald 2010, Stich 2019), or an outer update with momentum is made of their mean change
(DiLoCo, Douillard 2023). The running statistics are averaged too. Each shard keeps its own state of the optimizer.

The state holds the local weights in `communication`. Its other trees are their average, which is brought up to date by
`averages` where somebody looks at it: for an evaluation, and for a checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxtrain.config import OptimConfig
from jaxtrain.optim.param_groups import merge
from jaxtrain.optim.updates import clip_by_global_norm, ema_update, global_norm
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import BATCH_AXES, batch_ways
from jaxtrain.parallel.reduce import reduce_leaves
from jaxtrain.precision import at_least_f32, scale_factor
from jaxtrain.step.batch import Hyperparams
from jaxtrain.step.gradients import GradientSums, by_device
from jaxtrain.step.metrics import StepMetrics, stack_metrics
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.step.update import UpdateDecision, decide_update, is_count, step_metrics
from jaxtrain.trees import PyTree

_TREES = ("params", "batch_stats", "opt_state", "ema")


def initial_local(layout: Layout, optim: OptimConfig, trained: PyTree, state: TrainState) -> PyTree:
    """The weights of each shard of the batch at a sync.

    Args:
      layout: of the run.
      optim: the config's section.
      trained: the trained parameters of `state`.
      state: its trees are what all shards begin with.

    Returns:
      local: the trees of the state, each leaf [n, ...].
      outer: where the sync is more than a mean, `params`: the trained parameters after the last sync; and `momentum`.
    """
    ways = batch_ways(layout.mesh)
    trees = {name: getattr(state, name) for name in _TREES}
    local = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (ways, *leaf.shape)), trees)
    if not _has_outer_update(optim):
        return {"local": local}
    momentum = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, at_least_f32(leaf.dtype)), trained)
    return {"local": local, "outer": {"params": jax.tree.map(jnp.copy, trained), "momentum": momentum}}


def local_update(
    task: Task, layout: Layout, state: TrainState, sums: GradientSums, step: jax.Array, hyperparams: Hyperparams
) -> tuple[TrainState, StepMetrics]:
    """As `update.update_state`: each shard of the batch updates its own weights; all or none of them.

    The gradient norm in the metrics is the root of the mean square of the shards' own norms, by which each clips; so are the
    norms of the parameters and of the update.
    """
    ways = batch_ways(layout.mesh)
    scale = functools.partial(scale_factor, state.loss_scale)
    # A shard's part of the mean loss over the global batch, times n, is the mean loss over its own examples.
    gradients = jax.tree.map(lambda g: g * (ways / scale(g.dtype)).astype(g.dtype), sums.gradients)
    norm = _root_mean_square(_each(layout, lambda g: jnp.square(global_norm(g)), gradients))
    decision = decide_update(state.step, state.loss_scale, step, hyperparams, sums.loss, norm, skips=task.skips)
    local = state.communication["local"]
    function = functools.partial(_update_one, task)
    local, squares = _each(layout, function, (local, gradients, sums.batch_stats), (decision, state.step))
    communication = {**state.communication, "local": local}
    syncs = (decision.step != state.step) & (decision.step % task.optim.sync_every == 0)
    communication = jax.lax.cond(syncs, functools.partial(_sync, task, layout), lambda tree: tree, communication)
    after = dataclasses.replace(state, step=decision.step, loss_scale=decision.loss_scale, communication=communication)
    norms = map(_root_mean_square, squares)
    return after, stack_metrics(step_metrics(state.loss_scale, decision, sums.loss, sums.correct, *norms))


def averages(task: Task, layout: Layout, state: TrainState) -> dict[str, PyTree]:
    """The averages of the local weights, statistics, moments and moving averages, by the state's trees.

    What is frozen stays the state's own: a mean of equal numbers may be rounded.
    """
    local = state.communication["local"]
    means = _mean(layout, {**_changing(task, local), "opt_state": local["opt_state"]})
    return merge({name: getattr(state, name) for name in _TREES}, means)


def _changing(task: Task, trees: PyTree) -> dict[str, PyTree]:
    """The parts of the trees `params`, `batch_stats` and `ema` that training changes; for `merge`."""

    def of(weights: PyTree) -> dict[str, PyTree]:
        return {"params": task.groups.trained(weights["params"]), "batch_stats": task.moving(weights["batch_stats"])}

    return {**of(trees), "ema": of(trees["ema"]) if task.optim.ema else ()}


def _update_one(
    task: Task, own: tuple[PyTree, PyTree, PyTree], shared: tuple[UpdateDecision, jax.Array]
) -> tuple[PyTree, tuple[jax.Array, jax.Array]]:
    """The trees of one shard after `decision`; and the squared norms of its old parameters and of its update, float [] each.

    own: its trees, its gradients and its new statistics. shared: the decision, and the step before.
    """
    (local, gradients, batch_stats), (decision, step) = own, shared
    if task.optim.clip_norm:
        gradients = clip_by_global_norm(gradients, global_norm(gradients), task.optim.clip_norm)
    old = task.groups.trained(local["params"])
    optimizer = task.optimizer(decision.learning_rate, decision.weight_decay)
    updates, opt_state = optimizer.update(gradients, local["opt_state"], old)
    norms = jnp.square(global_norm(old)), jnp.square(global_norm(updates))
    new = (
        merge(local["params"], optax.apply_updates(old, updates)),
        merge(local["batch_stats"], task.moving(batch_stats)),
    )
    after = {"params": new[0], "batch_stats": new[1], "opt_state": opt_state, "ema": local["ema"]}
    if task.optim.ema:
        parts = _changing(task, after)
        weights = {name: parts[name] for name in parts["ema"]}
        after["ema"] = merge(local["ema"], ema_update(parts["ema"], weights, task.optim.ema, step))
    kept = jax.tree.map(lambda n, o: jnp.where(decision.accepted, n, o), after, local)
    # The optimizer counts a skipped step too, so that its learning rate stays the schedule's at `step`.
    kept["opt_state"] = jax.tree.map(
        lambda n, o: jnp.where(decision.skipped, n, o) if is_count(n) else o, opt_state, kept["opt_state"]
    )
    return kept, norms


def _sync(task: Task, layout: Layout, communication: PyTree) -> PyTree:
    """All shards get the mean, or what the outer update makes of it. Moments stay each shard's own."""
    local, optim = communication["local"], task.optim
    mean, found = _mean(layout, _changing(task, local)), dict(communication)
    if _has_outer_update(optim):
        outer = communication["outer"]
        change = jax.tree.map(
            lambda new, old: (new - old).astype(at_least_f32(old.dtype)), mean["params"], outer["params"]
        )
        momentum = jax.tree.map(lambda m, c: optim.outer_momentum * m + c, outer["momentum"], change)
        update = jax.tree.map(lambda m, c: optim.outer_rate * (optim.outer_momentum * m + c), momentum, change)
        params = jax.tree.map(lambda old, u: (old + u).astype(old.dtype), outer["params"], update)
        found["outer"] = {"params": params, "momentum": momentum}
        mean["params"] = params
    everywhere = _each(layout, lambda _, mean: mean, (local["params"],), mean)
    return {**found, "local": {**local, **merge({name: local[name] for name in mean}, everywhere)}}


def _mean(layout: Layout, trees: PyTree) -> PyTree:
    """The mean over the shards of the batch, leaf by leaf: [...] of [n, ...]. Of counts, which are equal, one."""
    config, ways = layout.config, batch_ways(layout.mesh)

    def of_device(trees: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf[0], trees))
        floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        some = [leaves[i] for i in floats]
        if config.reduce == "auto":
            sums = jax.lax.psum(some, BATCH_AXES)
        else:
            sums = reduce_leaves(some, config.reduce, BATCH_AXES, config.bucket_bytes)
        for i, total in zip(floats, sums, strict=True):
            leaves[i] = (total / ways).astype(leaves[i].dtype)
        return structure.unflatten(leaves)

    return by_device(layout, of_device, (P(BATCH_AXES),), P())(trees)


def _each(layout: Layout, function: Any, own: PyTree, shared: PyTree = None) -> PyTree:
    """`function(own[, shared])` of each shard of the batch; its results [n, ...].

    Args:
      layout: of the run.
      function: of one shard's leaves [...].
      own: leaves [n, ...].
      shared: leaves that all shards have.
    """
    more = () if shared is None else (shared,)

    def of_device(own: PyTree, *more: PyTree) -> PyTree:
        result = function(jax.tree.map(lambda leaf: leaf[0], own), *more)
        return jax.tree.map(lambda leaf: leaf[None], result)

    mapped = by_device(layout, of_device, (P(BATCH_AXES), *(P() for _ in more)), P(BATCH_AXES))
    return mapped(own, *more)


def _root_mean_square(squares: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(squares))


def _has_outer_update(optim: OptimConfig) -> bool:
    return (optim.outer_rate, optim.outer_momentum) != (1.0, 0.0)
