"""The state of training: one tree, the same under every layout."""

import os
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxtrain.host.backend import on_cpu
from jaxtrain.models.classifier import Classifier
from jaxtrain.parallel.layout import Layout
from jaxtrain.precision import Policy, initial_loss_scale
from jaxtrain.trees import PyTree

# Random streams are fold_in(key(seed), role), then fold_in(step): a key never depends on what was drawn before it.
INIT, AUGMENT, DROPOUT = range(3)


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    step: int32, updates done so far. params, batch_stats: keyed by layer ('layers_03'). opt_state: optax's, of the whole
    tree. ema: {'params', 'batch_stats'} averages, or () when `optim.ema` is off. loss_scale: fp16's, or ().
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree
    loss_scale: PyTree


def role_key(seed: int | jax.Array, role: int) -> jax.Array:
    """The root key of one random stream."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), role)


def initial_state(
    seed: int | jax.Array,
    model: Classifier,
    optimizer: optax.GradientTransformation,
    policy: Policy,
    input_shape: tuple[int, ...],
    *,
    ema: bool,
) -> TrainState:
    """A fresh state; pure, for `jax.jit` and `jax.eval_shape`. `input_shape`: [H, W, C] of one example."""
    params, batch_stats = model.init(role_key(seed, INIT), (1, *input_shape), policy.compute_dtype)
    # The average starts at the weights themselves; a copy of its own, because both are donated.
    average = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema else ()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=average,
        loss_scale=initial_loss_scale(policy),
    )


def state_shapes(init: Any, layout: Layout) -> TrainState:
    """The shape, type and sharding of every leaf of the state that `init` makes; computes nothing."""
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        layout.shardings(shapes),
    )


def create_state(init: Any, layout: Layout) -> TrainState:
    """Runs `init` (a function of nothing) under jit, every leaf born where the layout puts it.

    The values do not depend on the layout: JAX's threefry keys are partitionable.
    """
    leaves, structure = jax.tree.flatten(layout.shardings(jax.eval_shape(init)))
    found: list[Any] = [None] * len(leaves)
    # One program for each set of devices: all leaves of a pipeline stage are born there, and nowhere else.
    for mesh in dict.fromkeys(sharding.mesh for sharding in leaves):
        wanted = [i for i, sharding in enumerate(leaves) if sharding.mesh == mesh]

        def some(wanted: list[int] = wanted) -> list[jax.Array]:
            values = jax.tree.leaves(init())
            return [values[i] for i in wanted]

        where = [leaves[i] for i in wanted]
        program = jax.jit(some, out_shardings=where, compiler_options=_once_only(layout))
        for i, leaf in zip(wanted, program(), strict=True):
            found[i] = leaf
    return structure.unflatten(found)


def _once_only(layout: Layout) -> dict[str, Any] | None:
    """Options for a program that runs once: on a CPU, LLVM's first level of optimization.

    The same bits, and a third to a half of the time to compile (benchmarks/NOTES.md). Level 0 gives other bits: it does not
    contract a product and a sum. What $XLA_FLAGS says comes first.
    """
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {"xla_backend_optimization_level": 1} if on_cpu(layout.mesh.devices.flat) and not chosen else None
