"""One optimizer update: `step(state, batch) -> (state, metrics)`, whichever the layout.

With one microbatch a step is one program, and several steps may be one too: a loop on the device over their batches, for
models so small that the host could not dispatch single steps as fast as they run. With more, the host runs a gradient
program for each, adding into a donated accumulator, and then an update program: a convolution's gradient inside `lax.scan`
is 20-60 times slower on XLA:CPU (jax#12868), and the host's dispatch costs less than a millisecond.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.data.augment import train_inputs
from jaxtrain.models.layers import Context
from jaxtrain.optim import clip_by_global_norm, ema_update, global_norm
from jaxtrain.parallel.layout import Layout, over_steps, path_of
from jaxtrain.precision import LossScale, adjust_loss_scale, at_floor, scale_factor
from jaxtrain.state import AUGMENT, DROPOUT, TrainState, role_key
from jaxtrain.task import Batch, Resident, Task, select, wrapper

PyTree = Any


@flax.struct.dataclass
class Metrics:
    """What a step reports, or several: one array [..., names], since each one would be a transfer of its own."""

    numbers: jax.Array
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def __getitem__(self, name: str) -> jax.Array:
        """[...]: one of the numbers."""
        return self.numbers[..., self.names.index(name)]

    def rows(self) -> list[dict[str, float]]:
        """A row for each step, on the host; waits for them."""
        return [dict(zip(self.names, row, strict=True)) for row in np.atleast_2d(jax.device_get(self.numbers)).tolist()]


def pack(values: Mapping[str, Any]) -> Metrics:
    """Scalars by name, in the type of the loss; in the names' order, which is the same for all engines."""
    names = tuple(sorted(values))
    return Metrics(jnp.stack([jnp.asarray(values[name], values["loss"].dtype) for name in names]), names)


@dataclasses.dataclass(frozen=True)
class Step:
    """The compiled step.

    programs: its XLA programs by name, for the audit and for `memory_analysis`. after: where they leave the state.
    accumulator: where the gradients rest between microbatches, or `None` where there is no accumulator. per_call: how many
    updates the program `call` makes; 1 where there is no such program.
    """

    programs: Mapping[str, jax.stages.Compiled]
    after: TrainState
    accumulator: PyTree = None
    microbatches: tuple[jax.Array, ...] = ()
    per_call: int = 1

    def __call__(self, state: TrainState, batch: Batch, resident: Resident) -> tuple[TrainState, Metrics]:
        """Donates `state`. Asynchronous: the metrics are not there until they are read.

        batch: of one update, or of `per_call` of them, stacked (`batch.step` tells which); so are the metrics then.
        """
        if batch.step.ndim:
            return self.programs["call"](state, batch, resident)
        if "step" in self.programs:
            return self.programs["step"](state, batch, resident)
        sums = self.programs["zeros"]()
        for index in self.microbatches:
            sums = self.programs["gradients"](sums, state, batch, resident, index)
        return self.programs["update"](state, sums, batch.step)


def make_step(
    task: Task, layout: Layout, state: TrainState, batch: Batch, resident: Resident, per_call: int = 1
) -> Step:
    """Compiles the step for `state`, `batch` and `resident` (arrays, or shapes with shardings).

    per_call: how many updates one program should make; one where the host drives the microbatches, and where the loop
    would make each of them slower.
    """
    parts = layout.config.microbatches
    state_shardings = layout.shardings(state)
    gradient_shardings = like_params(layout, "gradients", state.params)
    zero = functools.partial(zero_sums, state.params, state.batch_stats, task.sums_dtype)
    sums_shapes = jax.eval_shape(zero)
    sums_shardings = dataclasses.replace(
        jax.tree.map(lambda _: layout.sharding(), sums_shapes), gradients=gradient_shardings
    )
    gradients = functools.partial(_gradients, task, layout, gradient_shardings)
    update = functools.partial(_update, task, state_shardings, like_params(layout, "opt_state", state.params))

    if parts == 1:

        def step(state: TrainState, batch: Batch, resident: Resident) -> tuple[TrainState, Metrics]:
            return update(state, gradients(state, batch, resident, 0), batch.step)

        def call(state: TrainState, batches: Batch, resident: Resident) -> tuple[TrainState, Metrics]:
            def one(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
                after, metrics = step(state, batch, resident)
                return jax.lax.with_sharding_constraint(after, state_shardings), metrics

            return jax.lax.scan(one, state, batches)

        compiling = functools.partial(jax.jit, out_shardings=(state_shardings, layout.sharding()), donate_argnums=0)
        lowered = compiling(step).lower(state, batch, resident)
        if per_call > 1 and _slow_in_a_loop(layout, lowered):
            per_call = 1
        programs = {"step": lowered.compile()}
        if per_call > 1:
            programs["call"] = compiling(call).lower(state, stacked(batch, per_call), resident).compile()
        return Step(programs, programs["step"].output_shardings[0], per_call=per_call)

    def accumulate(sums: Sums, state: TrainState, batch: Batch, resident: Resident, index: jax.Array) -> Sums:
        new = gradients(state, batch, resident, index)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, new)

    indices = tuple(jax.device_put(np.int32(i), layout.sharding()) for i in range(parts))
    sums = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), sums_shapes, sums_shardings
    )
    zeros = jax.jit(zero, out_shardings=sums_shardings)
    adding = jax.jit(accumulate, out_shardings=sums_shardings, donate_argnums=0)
    updating = jax.jit(update, out_shardings=(state_shardings, layout.sharding()), donate_argnums=0)
    lowered = {
        "zeros": zeros.lower(),
        "gradients": adding.lower(sums, state, batch, resident, indices[0]),
        "update": updating.lower(state, sums, batch.step),
    }
    programs = {name: program.compile() for name, program in lowered.items()}
    accumulator = programs["zeros"].output_shardings.gradients
    return Step(programs, programs["update"].output_shardings[0], accumulator, indices)


def stacked(batch: Batch, count: int) -> Batch:
    """The shapes and shardings of `count` such batches as one, with the steps as their first dim."""

    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=over_steps(leaf.sharding))

    return jax.tree.map(shape, batch)


def _slow_in_a_loop(layout: Layout, step: jax.stages.Lowered) -> bool:
    """XLA:CPU computes a convolution's gradient 20-60 times slower in a loop (jax#12868); GPUs do not."""
    return layout.mesh.devices.flat[0].platform == "cpu" and "stablehlo.convolution" in step.as_text()


# ---------------------------------------------------------------------------------------------------------- gradients


@flax.struct.dataclass
class Sums:
    """What microbatches add up to: gradients of the mean loss over the global batch, new running statistics, metrics."""

    gradients: PyTree
    batch_stats: PyTree
    loss: jax.Array
    correct: jax.Array


def zero_sums(params: PyTree, batch_stats: PyTree, dtype: Any) -> Sums:
    """The sums of no microbatch. dtype: of the loss and the correct answers; gradients have their parameters'."""
    zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
    return Sums(zeros(params), zeros(batch_stats), jnp.zeros((), dtype), jnp.zeros((), dtype))


def like_params(layout: Layout, tree: str, params: PyTree) -> PyTree:
    """A tree like `params` with the shardings at rest that its leaves would have in the state's `tree`."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    places = [layout.place(tree, path_of(path), leaf.shape, leaf.dtype) for path, leaf in leaves]
    return structure.unflatten([layout.sharding(place.spec) for place in places])


def _gradients(
    task: Task, layout: Layout, shardings: PyTree, state: TrainState, batch: Batch, resident: Resident, index: Any
) -> Sums:
    """The part of microbatch `index` in the mean loss, its gradients and its statistics."""
    parts = layout.config.microbatches
    images, labels = select(batch, resident, index, layout)
    size = labels.shape[0]
    # A random number belongs to an example of the global batch, whichever microbatch or device it is on.
    example = index * size + jnp.arange(size, dtype=jnp.int32)
    key = jax.random.fold_in(role_key(task.seed, AUGMENT), state.step)
    inputs, targets = train_inputs(task.preprocess, images, labels, example, key)
    context = Context(example=example, train=True, bn_groups=max(task.bn_groups // parts, 1))
    dropout = jax.random.fold_in(role_key(task.seed, DROPOUT), state.step)

    def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array, PyTree]]:
        logits, batch_stats = task.model.apply(
            params, state.batch_stats, inputs, context, dropout, wrap=wrapper(layout, state.params, task.remat)
        )
        loss = jnp.sum(task.loss(logits, targets)) / (size * parts)
        correct = jnp.sum(jnp.argmax(logits, -1) == labels)
        return loss * scale_factor(state.loss_scale, loss.dtype), (loss, correct, batch_stats)

    gradients, (loss, correct, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    # Pinned here, or XLA shards the gradients as it likes: 531 all-gathers instead of 160 for a ResNet-50 under ZeRO-1.
    # First as they were computed with, then as they rest: all-reduce and slice, which XLA:GPU makes a reduce-scatter.
    # (Pinned at once to where they rest, XLA:CPU gathers activations: 84 all-gathers instead of 0 for a ResNet-18.)
    whole = like_params(layout, "computing", state.params)
    gradients = jax.lax.with_sharding_constraint(gradients, whole)
    gradients = jax.lax.with_sharding_constraint(gradients, shardings)
    batch_stats = jax.tree.map(lambda s: s / parts, batch_stats)
    batch_stats = jax.lax.with_sharding_constraint(batch_stats, like_params(layout, "batch_stats", batch_stats))
    return Sums(gradients, batch_stats, loss, correct.astype(loss.dtype))


# ------------------------------------------------------------------------------------------------------------- update


@flax.struct.dataclass
class Verdict:
    """What becomes of an update, decided from the numbers of the whole tree.

    step, loss_scale: as they are afterwards. accepted: the new state is taken. skipped: fp16 overflowed, and the run goes on
    without this batch. norm: of the gradients.
    """

    step: jax.Array
    loss_scale: PyTree
    accepted: jax.Array
    skipped: jax.Array
    norm: jax.Array


def judge(
    step: jax.Array, loss_scale: PyTree, batch_step: jax.Array, loss: jax.Array, norm: jax.Array, *, skips: bool
) -> Verdict:
    """Accepts an update whose loss and gradient norm are finite. skips: the run goes on without one that is not.

    A state that is not at `batch_step` stays as it is: when an update is refused, so are those already dispatched behind it.
    """
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    on_time = step == batch_step
    accepted = finite & on_time
    # fp16 overflows by design now and then: that batch is skipped and the run goes on with a smaller scale.
    can_shrink = isinstance(loss_scale, LossScale) & ~at_floor(loss_scale)
    skipped = on_time & ~finite & (can_shrink | skips)
    new_scale = _select(on_time, adjust_loss_scale(loss_scale, finite), loss_scale)
    return Verdict(step + accepted + skipped, new_scale, accepted, skipped, norm)


def unscaled(loss_scale: PyTree, gradients: PyTree, updating: PyTree) -> PyTree:
    """Gradients of the loss itself, where the optimizer's state lives: under ZeRO each device updates its own part."""
    gradients = jax.tree.map(lambda g: g / scale_factor(loss_scale, g.dtype), gradients)
    return jax.lax.with_sharding_constraint(gradients, updating)


def advance(
    task: Task,
    shardings: TrainState,
    updating: PyTree,
    state: TrainState,
    gradients: PyTree,
    batch_stats: PyTree,
    verdict: Verdict,
) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
    """The state (of the whole model or of some of its layers) after `verdict`; the norms of the old parameters and of what
    `verdict` was about to add to them.
    """
    if task.optim.clip_norm:
        gradients = clip_by_global_norm(gradients, verdict.norm, task.optim.clip_norm)
    params_part = jax.lax.with_sharding_constraint(state.params, updating)
    updates, opt_state = task.optimizer.update(gradients, state.opt_state, params_part)
    norms = (global_norm(params_part), global_norm(updates))
    accepted = _once_known(verdict.accepted, norms)
    params = jax.lax.with_sharding_constraint(optax.apply_updates(params_part, updates), shardings.params)
    ema = state.ema
    if task.optim.ema:
        new = {"params": params, "batch_stats": batch_stats}
        ema = ema_update(state.ema, new, task.optim.ema, state.step)
    updated = TrainState(state.step, params, batch_stats, opt_state, ema, state.loss_scale)
    after = _select(accepted, updated, state)
    # The optimizer counts a skipped step too, so that its learning rate stays the schedule's at `step`.
    counted = jax.tree.map(
        lambda new, old: jnp.where(verdict.skipped & _is_count(new), new, old), opt_state, after.opt_state
    )
    return dataclasses.replace(after, step=verdict.step, loss_scale=verdict.loss_scale, opt_state=counted), norms


def _once_known(accepted: jax.Array, norms: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`accepted`, and on a CPU only if both norms are finite: the new state then waits for them.

    XLA writes a leaf in place only where whatever reads the old one is sure to come before. On a CPU the norms and the new
    parameters read it in programs of their own, and all leaves were copied at each step: benchmarks/NOTES.md. On a GPU one
    program should read and write a leaf, which waiting would part. Who is told of a norm that is not finite goes back anyway.
    """
    finite = jnp.isfinite(norms[0]) & jnp.isfinite(norms[1])
    return jax.lax.platform_dependent(accepted, finite, cpu=jnp.logical_and, default=lambda accepted, _: accepted)


def _update(
    task: Task, shardings: TrainState, updating: PyTree, state: TrainState, sums: Sums, step: jax.Array
) -> tuple[TrainState, Metrics]:
    """The state after the update, or the same state where the loss or the gradient norm is not finite."""
    gradients = unscaled(state.loss_scale, sums.gradients, updating)
    verdict = judge(state.step, state.loss_scale, step, sums.loss, global_norm(gradients), skips=task.skips)
    after, norms = advance(task, shardings, updating, state, gradients, sums.batch_stats, verdict)
    return after, pack(metrics_of(task, state.step, state.loss_scale, verdict, sums.loss, sums.correct, *norms))


def metrics_of(
    task: Task,
    step: jax.Array,
    loss_scale: PyTree,
    verdict: Verdict,
    loss: jax.Array,
    correct: jax.Array,
    param_norm: jax.Array,
    update_norm: jax.Array,
) -> dict[str, Any]:
    """What a step reports; `step` and `loss_scale` are those before it. made: the step counts, its batch is used up."""
    return {
        "made": verdict.accepted | verdict.skipped,
        "loss": loss,
        "correct": correct,
        "learning_rate": task.schedule(step),
        "grad_norm": verdict.norm,
        "param_norm": param_norm,
        "update_norm": update_norm,
        "loss_scale": scale_factor(loss_scale, loss.dtype),
        "skipped": verdict.skipped,
    }


def _select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _is_count(leaf: jax.Array) -> bool:
    return leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)
