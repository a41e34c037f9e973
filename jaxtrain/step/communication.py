"""What the communication between the shards of the batch keeps from step to step: `TrainState.communication`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.parallel.layout import Layout
from jaxtrain.step.exchange import initial_exchange
from jaxtrain.step.local_sgd import initial_local
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.trees import PyTree, by_path


def initial_communication(task: Task, layout: Layout, state: TrainState, seed: int | jax.Array) -> PyTree:
    """That of a run that begins, or goes on, with the other trees of `state`; () where there is nothing to keep."""
    trained = task.groups.trained(state.params)
    if layout.trains_by_device:
        return initial_local(layout, task.optim, trained, state)
    return initial_exchange(layout, task.optim, trained, seed)


def shared_out(
    task: Task, layout: Layout, state: TrainState, fresh: PyTree, read: Callable[[str, Any], jax.Array | None]
) -> PyTree:
    """The communication of a run that goes on with another number of shards of the batch than its checkpoint is of.

    Gradients that were held back are added up, and each shard gets as much of them. Local weights begin at their average.

    Args:
      task: what to compute.
      layout: of the run.
      state: its other trees are restored.
      fresh: arrays, the communication of a new run.
      read: (path in the communication, shape or None for the stored one) -> what the checkpoint has there on the devices of
        the leaf of `fresh`; None where it has no such leaf.
    """
    if layout.trains_by_device:
        shardings = layout.shardings(dataclasses.replace(state, communication=fresh)).communication
        begin = jax.jit(lambda state: initial_communication(task, layout, state, 0), out_shardings=shardings)
        fresh = begin(dataclasses.replace(state, communication=()))
    found: dict[str, jax.Array] = {}
    for path, leaf in by_path(fresh).items():
        kind, stored = path.split("/", 1)[0], None
        if kind != "local":
            stored = read(path, None if kind == "residual" else leaf.shape)
        if stored is not None and kind == "residual":
            share = jax.jit(_share, static_argnums=1, out_shardings=leaf.sharding)
            stored = share(stored, leaf.shape[0])
        found[path] = leaf if stored is None else stored
    return jax.tree.unflatten(jax.tree.structure(fresh), found.values())


def _share(residuals: jax.Array, ways: int) -> jax.Array:
    """[ways, ...], of the same sum as residuals [n, ...]."""
    return jnp.broadcast_to(jnp.sum(residuals, 0) / ways, (ways, *residuals.shape[1:]))


@dataclasses.dataclass(frozen=True)
class InitialState:
    """`init(seed, given)`, the state of a new run; see `train_state.initial_state`.

    Attributes:
      init: makes all of it but the communication.
      task: what to compute.
      layout: of the run.
    """

    init: Any
    task: Task
    layout: Layout

    def __call__(self, seed: int | jax.Array, given: Mapping[str, jax.Array] | None = None) -> TrainState:
        """Pure, for `jax.jit` and `jax.eval_shape`."""
        state = self.init(seed, given or {})
        communication = initial_communication(self.task, self.layout, state, seed)
        return dataclasses.replace(state, communication=communication)
