"""The compiled programs of a chunk (forward, backward) and of a stage (measure, update)."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxtrain.optim.updates import global_norm
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.gradients import GradientSums, like_params, zero_sums
from jaxtrain.step.pipeline.chunks import ForwardBackward, ModelChunk, forward
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.step.update import UpdateDecision, apply_update, unscale_gradients
from jaxtrain.trees import PyTree

T = TypeVar("T")

# Yields lowered programs by name, is sent the compiled ones, and returns what it makes of them.
Compiling = Generator[dict[str, Any], dict[str, Any], T]


@dataclasses.dataclass(frozen=True)
class ChunkPrograms:
    """The compiled programs of one chunk. prepare: `None` where parameters are used as they rest. sums: shapes."""

    chunk: ModelChunk
    prepare: Any
    zeros: Any
    forward: Any
    backward: Any
    sums: GradientSums


@dataclasses.dataclass(frozen=True)
class StagePrograms:
    """The compiled programs of one stage's update.

    indices: which leaves of the state it has, in its order. after: where the update leaves those that are its own.
    """

    stage: int
    indices: tuple[int, ...]
    structure: Any
    measure: Any
    update: Any
    after: Mapping[int, Any]


def shapes_of(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def placed(shapes: PyTree, sharding: NamedSharding) -> PyTree:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def outputs_of(program: Any, shapes: PyTree) -> PyTree:
    """`shapes` where the compiled `program` leaves them."""
    placed = jax.tree.leaves(program.output_shardings)
    leaves, structure = jax.tree.flatten(shapes)
    both = zip(leaves, placed, strict=True)
    return structure.unflatten([jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for s, where in both])


def shapes_on_stage(tree: PyTree, layout: Layout, stage: int) -> PyTree:
    """Shapes of what every stage has, on one stage."""

    def placed(leaf: Any) -> Any:
        where = leaf.sharding
        if where.mesh == layout.mesh:
            where = layout.sharding(where.spec, stage)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(placed, tree)


def given_to(part: ModelChunk, state: TrainState, batch: Any, resident: Any, index: Any) -> dict[str, Any]:
    """What the forward function of a chunk gets beside parameters and activations."""
    given: dict[str, Any] = {"step": state.step, "index": index}
    if part.first or part.last:
        given["rows"] = batch.rows
    if part.first:
        given |= {"images": batch.images, "resident_images": resident.images}
    if part.last:
        labels = {"labels": batch.labels, "resident_labels": resident.labels}
        given |= labels | {"loss_scale": state.loss_scale}
    return given


def _cast_types(pullback: ForwardBackward, params: PyTree) -> PyTree:
    """For each parameter the narrower type that all of its uses cast it to, or its own."""
    jaxpr = pullback.jaxpr
    types = []
    for variable, leaf in zip(jaxpr.invars, jax.tree.leaves(params), strict=False):
        uses = [equation for equation in jaxpr.eqns if variable in equation.invars]
        wanted = {e.params["new_dtype"] if e.primitive.name == "convert_element_type" else None for e in uses}
        only = wanted.pop() if len(wanted) == 1 and variable not in jaxpr.outvars else None
        types.append(only if only is not None and only.itemsize < leaf.dtype.itemsize else leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(params), types)


def compile_together(makers: Sequence[Compiling[T]]) -> list[T]:
    """Runs `makers` side by side: XLA compiles all that they yield at once, in threads; tracing stays in this one."""
    found: dict[int, T] = {}
    sent: list[dict[str, Any] | None] = [None] * len(makers)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while len(found) < len(makers):
            jobs: dict[int, dict[str, concurrent.futures.Future[Any]]] = {}
            for number, maker in enumerate(makers):
                if number in found:
                    continue
                try:
                    lowered = maker.send(sent[number])  # type: ignore[arg-type]
                except StopIteration as done:
                    found[number] = done.value
                else:
                    jobs[number] = {name: pool.submit(each.compile) for name, each in lowered.items()}
            for number, futures in jobs.items():
                sent[number] = {name: future.result() for name, future in futures.items()}
    return [found[number] for number in range(len(makers))]


def compile_chunk(
    task: Task, layout: Layout, part: ModelChunk, state: TrainState, x: Any, given: dict[str, Any]
) -> Compiling[tuple[ChunkPrograms, dict[str, Any]]]:
    """state: shapes of the stage's part. x: the incoming activation's. Also returns the programs by name."""
    lay = layout.on_stage(part.stage)
    params = {name: state.params[name] for name in part.names if name in state.params}
    stats = {name: state.batch_stats[name] for name in part.names if name in state.batch_stats}

    def traced(params: PyTree, stats: PyTree, x: Any, given: Any) -> tuple[Any, Any, Any]:
        def function(params: PyTree, x: Any) -> tuple[Any, Any]:
            return forward(task, lay, part, params, stats, x, given)

        if part.first:
            output, closure, aux = jax.vjp(lambda params: function(params, ()), params, has_aux=True)
        else:
            output, closure, aux = jax.vjp(function, params, x, has_aux=True)
        return output, aux, closure

    pullback = ForwardBackward.trace(traced, params, stats, x, given)
    types = _cast_types(pullback, params)
    whole = like_params(lay, "computing", params)
    lowered, used = {}, params
    casts = any(t != leaf.dtype for t, leaf in zip(jax.tree.leaves(types), jax.tree.leaves(params), strict=True))
    gathers = lay.config.zero == 3 and lay.mesh.shape["data"] > 1
    if casts or gathers:

        def ready(params: PyTree) -> PyTree:
            return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, types)

        lowered["prepare"] = jax.jit(ready, out_shardings=whole).lower(params)
        used = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            jax.eval_shape(ready, params),
            whole,
        )
        pullback = ForwardBackward.trace(traced, used, stats, x, given)

    shapes = jax.eval_shape(pullback.forward, used, stats, x, given)
    aux_shardings = jax.tree.map(lambda _: lay.sharding(), shapes[1])
    output_sharding = lay.sharding() if part.last else lay.examples
    ran = jax.jit(pullback.forward, out_shardings=(output_sharding, aux_shardings, None))
    lowered["forward"] = ran.lower(used, stats, x, given)

    gradient_shardings = like_params(lay, "gradients", params)
    zero = functools.partial(zero_sums, params, stats, task.sums_dtype)
    sums_shapes = jax.eval_shape(zero)
    sums_shardings = dataclasses.replace(
        jax.tree.map(lambda _: lay.sharding(), sums_shapes), gradients=gradient_shardings
    )
    lowered["zeros"] = jax.jit(zero, out_shardings=sums_shardings).lower()
    programs = yield lowered
    output, aux, residuals = outputs_of(programs["forward"], shapes)

    def backward(
        sums: GradientSums,
        cotangent: Any,
        residuals: Any,
        output: Any,
        aux: Any,
        params: PyTree,
        stats: PyTree,
        x: Any,
        given: Any,
    ) -> tuple[GradientSums, Any]:
        if part.last:
            cotangent = jnp.ones(output.shape, output.dtype)
        found = pullback.backward(cotangent, residuals, output, params, stats, x, given)
        gradients = jax.lax.with_sharding_constraint(found[0], whole)
        gradients = jax.lax.with_sharding_constraint(gradients, gradient_shardings)
        new_stats, numbers = aux
        loss, correct = numbers or (jnp.zeros_like(sums.loss), jnp.zeros_like(sums.correct))
        new = GradientSums(gradients, new_stats, loss, correct)
        total = jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, new)
        return total, (() if part.first else found[1])

    back = jax.jit(backward, out_shardings=(sums_shardings, () if part.first else lay.examples), donate_argnums=0)
    sums = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), sums_shapes, sums_shardings)
    cotangent = () if part.last else output
    programs |= yield {"backward": back.lower(sums, cotangent, residuals, output, aux, used, stats, x, given)}
    step = ChunkPrograms(
        part, programs.get("prepare"), programs["zeros"], programs["forward"], programs["backward"], sums
    )
    return step, {f"chunk {part.index}: {name}": program for name, program in programs.items()}


def compile_stage(
    task: Task,
    layout: Layout,
    stage: int,
    indices: PyTree,
    shared: frozenset[int],
    state: TrainState,
    decision: UpdateDecision,
    sums: tuple[GradientSums, ...],
) -> Compiling[tuple[StagePrograms, dict[str, Any]]]:
    """state: shapes of the stage's part; indices: where its leaves are in the whole state; shared: those every stage has.

    sums: shapes of the accumulators of the stage's chunks.
    """
    lay = layout.on_stage(stage)
    updating = like_params(lay, "opt_state", state.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def merged(sums: tuple[GradientSums, ...]) -> tuple[PyTree, PyTree]:
        """Gradients and statistics of all of the stage's chunks."""
        gradients, batch_stats = {}, {}
        for part in sums:
            gradients |= part.gradients
            batch_stats |= part.batch_stats
        return gradients, batch_stats

    def measure(state: TrainState, sums: tuple[GradientSums, ...]) -> jax.Array:
        """[1, 3]: this stage's part of the loss, of the correct answers, and of the squared norm of the gradients."""
        gradients = unscale_gradients(state.loss_scale, merged(sums)[0], updating)
        loss, correct = sum(part.loss for part in sums), sum(part.correct for part in sums)
        return row(loss, correct, jnp.square(global_norm(gradients)))

    def row(*numbers: Any) -> jax.Array:
        return jnp.stack([jnp.asarray(number, sums[0].loss.dtype) for number in numbers])[None]

    def update(
        state: TrainState, sums: tuple[GradientSums, ...], decision: UpdateDecision
    ) -> tuple[TrainState, jax.Array]:
        """The stage after it, and [1, 2]: its part of the squared norms of the parameters and of what was added to them."""
        gradients, batch_stats = merged(sums)
        gradients = unscale_gradients(state.loss_scale, gradients, updating)
        after, norms = apply_update(task, shardings, updating, state, gradients, batch_stats, decision)
        return after, row(*map(jnp.square, norms))

    programs = yield {
        "measure": jax.jit(measure, out_shardings=lay.sharding()).lower(state, sums),
        "update": jax.jit(update, out_shardings=(shardings, lay.sharding()), donate_argnums=0).lower(
            state, sums, decision
        ),
    }
    measured, updated = programs["measure"], programs["update"]
    numbers = tuple(jax.tree.leaves(indices))
    placed = zip(numbers, jax.tree.leaves(updated.output_shardings[0]), strict=True)
    after = {i: where for i, where in placed if i not in shared}
    own = StagePrograms(stage, numbers, jax.tree.structure(state), measured, updated, after)
    return own, {f"stage {stage}: measure": measured, f"stage {stage}: update": updated}


def activations(
    task: Task,
    layout: Layout,
    chunks: Sequence[ModelChunk],
    parts: Sequence[TrainState],
    given: Callable[[ModelChunk], Any],
) -> list[Any]:
    """The shape of what comes into each chunk: () for the first, then [B/M, ...] on the chunk's stage."""
    found: list[Any] = [()]
    for part in chunks[:-1]:
        lay, state = layout.on_stage(part.stage), parts[part.stage]
        params = {name: state.params[name] for name in part.names if name in state.params}
        stats = {name: state.batch_stats[name] for name in part.names if name in state.batch_stats}
        y, _ = jax.eval_shape(functools.partial(forward, task, lay, part), params, stats, found[-1], given(part))
        where = layout.sharding(layout.examples.spec, chunks[part.index + 1].stage)
        found.append(jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=where))
    return found
