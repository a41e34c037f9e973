"""The train state: one tree, the same under every layout."""

import os
import types
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.host.backend import on_cpu
from jaxtrain.parallel.layout import Layout
from jaxtrain.precision import Policy, initial_loss_scale
from jaxtrain.step.task import Task
from jaxtrain.trees import PyTree, path_of, shapes_of

# The roles of random keys: fold_in(key(seed), role), then fold_in(step). A key never depends on what was drawn before.
INIT, AUGMENT, DROPOUT, COMPRESS = range(4)


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 [], updates done so far.
      params: float arrays, keyed by layer ('layers_03').
      batch_stats: running statistics, float arrays, keyed by layer.
      opt_state: optax's, of the trained parameters of all layers.
      ema: the moving averages {'params', 'batch_stats'}, or () if `optim.ema` is off.
      loss_scale: `LossScale` for fp16, otherwise ().
      communication: what `optim.compress` and `optim.sync_every` keep from step to step (`step.communication`), otherwise ().
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree
    loss_scale: PyTree
    communication: PyTree = ()


def role_key(seed: int | jax.Array, role: int) -> jax.Array:
    """The random key of one role (`INIT`, `AUGMENT`, `DROPOUT`, `COMPRESS`): a typed threefry key []."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), role)


def initial_state(
    seed: int | jax.Array,
    given: Mapping[str, jax.Array] = types.MappingProxyType({}),
    *,
    task: Task,
    policy: Policy,
    input_shape: tuple[int, ...],
) -> TrainState:
    """The state of a new run. Pure, for `jax.jit` and `jax.eval_shape`.

    Args:
      seed: of the run; a Python int or an integer [].
      given: parameters and running statistics that are not drawn, by their paths (`params/...`, `batch_stats/...`).
      task: gives the layers, the optimizer, and whether there is a moving average.
      policy: the dtypes.
      input_shape: (H, W, C) of one example.
    """
    params, batch_stats = task.model.init(role_key(seed, INIT), (1, *input_shape), policy.compute_dtype)
    drawn = {"params": params, "batch_stats": batch_stats}
    weights = jax.tree.map_with_path(lambda path, leaf: given.get(path_of(path), leaf), drawn)
    params, batch_stats = weights["params"], weights["batch_stats"]
    # The average starts at the weights. It is a copy, because a step donates both.
    average = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if task.optim.ema else ()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=task.optimizer().init(task.groups.trained(params)),
        ema=average,
        loss_scale=initial_loss_scale(policy),
    )


def state_shapes(init: Any, layout: Layout) -> TrainState:
    """The shape, dtype and sharding of every leaf of the state that `init(seed)` makes. Computes nothing."""
    shapes = jax.eval_shape(init, 0)
    return shapes_of(shapes, layout.shardings(shapes))


def create_state(
    init: Any, layout: Layout, seed: int, given: Mapping[str, jax.Array] = types.MappingProxyType({})
) -> TrainState:
    """Runs `init(seed, given)` under jit. Every leaf is created on the devices where the layout places it.

    The values do not depend on the layout: JAX's threefry keys are partitionable. The seed is an argument of the
    program, so that another seed finds it in the compile cache.

    Args:
      init: makes the state.
      layout: places it.
      seed: of the run.
      given: leaves of the weights that are there already, with the layout's shardings. They are donated: they become the
        state's own.
    """
    shardings, structure = jax.tree.flatten(layout.shardings(jax.eval_shape(init, 0)))
    leaves: list[Any] = [None] * len(shardings)
    # One program for each set of devices: it creates all leaves of one pipeline stage.
    for mesh in dict.fromkeys(sharding.mesh for sharding in shardings):
        wanted = [i for i, sharding in enumerate(shardings) if sharding.mesh == mesh]

        def some(seed: jax.Array, given: dict[str, jax.Array], wanted: list[int] = wanted) -> list[jax.Array]:
            values = jax.tree.leaves(init(seed, given))
            return [values[i] for i in wanted]

        here = {path: leaf for path, leaf in given.items() if leaf.sharding.mesh == mesh}  # type: ignore[union-attr]
        out_shardings = [shardings[i] for i in wanted]
        options = _run_once_options(layout)
        program = jax.jit(some, out_shardings=out_shardings, donate_argnums=1, compiler_options=options)
        for i, leaf in zip(wanted, program(np.int32(seed), here), strict=True):
            leaves[i] = leaf
    return structure.unflatten(leaves)


def _run_once_options(layout: Layout) -> dict[str, Any] | None:
    """Compiler options for a program that runs once: on a CPU, LLVM's first level of optimization.

    It gives the same bits and takes a third to a half of the time to compile (benchmarks/NOTES.md). Level 0 gives other
    bits: it does not contract a product and a sum. A level in $XLA_FLAGS is left alone.
    """
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {"xla_backend_optimization_level": 1} if on_cpu(layout.mesh.devices.flat) and not chosen else None
