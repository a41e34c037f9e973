"""Compiles the programs of a chunk (prepare, zeros, forward, backward) and of a stage (measure, update)."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxtrain.optim.param_groups import merge
from jaxtrain.optim.updates import global_norm
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.exchange import exchange
from jaxtrain.step.gradients import GradientSums, add_sums, constrain_gradients, like_params, sums_shapes, zero_sums
from jaxtrain.step.pipeline.by_device import ForwardBackwardByDevice
from jaxtrain.step.pipeline.chunks import ForwardBackward, ModelChunk, forward, linearized, weights_of
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.step.update import UpdateDecision, apply_update, unscale_gradients
from jaxtrain.trees import PyTree, shapes_of

T = TypeVar("T")

# A generator that yields lowered programs by name, is sent the compiled ones, and returns the result. See
# `compile_together`.
Compiling = Generator[dict[str, Any], dict[str, Any], T]


@dataclasses.dataclass(frozen=True)
class ChunkPrograms:
    """The compiled programs of one chunk.

    Attributes:
      chunk: whose programs.
      prepare: params -> params, cast and gathered, once a step; `None` where parameters are used as they are at rest.
      zeros: () -> the accumulators.
      forward: (params, batch_stats, x, inputs) -> (output, aux, residuals).
      backward: (sums, cotangent, residuals, output, aux, params, batch_stats, x, inputs) -> (sums, gradient of x); it
        donates `sums`.
      sums: the shapes and shardings of the accumulators.
    """

    chunk: ModelChunk
    prepare: Any
    zeros: Any
    forward: Any
    backward: Any
    sums: GradientSums

    @property
    def named(self) -> dict[str, Any]:
        """The programs by name, for the audit."""
        names = ("prepare", "forward", "zeros", "backward")
        programs = {name: getattr(self, name) for name in names}
        return {f"chunk {self.chunk.index}: {name}": program for name, program in programs.items() if program}


@dataclasses.dataclass(frozen=True)
class StagePrograms:
    """The compiled programs of one stage's update.

    Attributes:
      stage: whose programs.
      indices: which leaves of the whole state the stage has, in the order of its own leaves.
      structure: the tree structure of the stage's state.
      exchange: (state, sums of each chunk, seed) -> the sums of all chunks together, added up over the shards of the batch;
        `None` where the chunks' programs do that.
      measure: (state, sums of each chunk) -> float [1, 3]; see `compile_stage`.
      update: (state, sums of each chunk, decision) -> (state, float [1, 2]); it donates `state`.
    """

    stage: int
    indices: tuple[int, ...]
    structure: Any
    exchange: Any
    measure: Any
    update: Any

    @property
    def after(self) -> dict[int, Any]:
        """The shardings that the update leaves the stage's leaves with, by their number in the whole state."""
        return dict(zip(self.indices, jax.tree.leaves(self.update.output_shardings[0]), strict=True))

    @property
    def named(self) -> dict[str, Any]:
        """The programs by name, for the audit."""
        names = ("exchange", "measure", "update")
        programs = {name: getattr(self, name) for name in names}
        return {f"stage {self.stage}: {name}": program for name, program in programs.items() if program}


def outputs_of(program: Any, shapes: PyTree) -> PyTree:
    """`shapes`, the outputs of the compiled `program`, with the shardings that it gives them."""
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten(shapes_of(leaves, jax.tree.leaves(program.output_shardings)))


def shapes_on_stage(tree: PyTree, layout: Layout, stage: int) -> PyTree:
    """`tree` of shapes with shardings; what all stages have gets a sharding on the devices of `stage`."""

    def on_stage(sharding: Any) -> Any:
        return layout.sharding(sharding.spec, stage) if sharding.mesh == layout.mesh else sharding

    return shapes_of(tree, jax.tree.map(lambda leaf: on_stage(leaf.sharding), tree))


def named(function: Callable[..., T], name: str) -> Callable[..., T]:
    """`function` under another name: that of its program in a profile, where each chunk should have its own."""

    @functools.wraps(function)
    def renamed(*arguments: Any) -> T:
        return function(*arguments)

    renamed.__name__ = name
    return renamed


def compile_together(makers: Sequence[Compiling[T]]) -> list[T]:
    """Runs all `makers` and returns their results.

    XLA compiles what they yield in parallel threads. Tracing stays in the caller's thread.
    """
    results: dict[int, T] = {}
    compiled: list[dict[str, Any] | None] = [None] * len(makers)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while len(results) < len(makers):
            jobs: dict[int, dict[str, concurrent.futures.Future[Any]]] = {}
            for number, maker in enumerate(makers):
                if number in results:
                    continue
                try:
                    lowered = maker.send(compiled[number])  # type: ignore[arg-type]
                except StopIteration as done:
                    results[number] = done.value
                else:
                    jobs[number] = {name: pool.submit(program.compile) for name, program in lowered.items()}
            for number, futures in jobs.items():
                compiled[number] = {name: future.result() for name, future in futures.items()}
    return [results[number] for number in range(len(makers))]


# -------------------------------------------------------------------------------------------------------------- chunks


def compile_chunk(
    task: Task, layout: Layout, chunk: ModelChunk, state: TrainState, x: Any, inputs: dict[str, Any]
) -> Compiling[ChunkPrograms]:
    """Compiles the programs of one chunk; for `compile_together`.

    The backward program is lowered after the forward program is compiled: its arguments have the shardings that the
    forward program gives its results.

    Args:
      task: what to compute.
      layout: of the run.
      chunk: which layers.
      state: shapes of the state of the chunk's stage.
      x: the shape of the activation that comes in; `()` for the first chunk.
      inputs: shapes, from `chunk_inputs`.
    """
    layout = layout.on_stage(chunk.stage)
    stored, batch_stats = weights_of(chunk, state.params, state.batch_stats)
    passes = _trace(task, layout, chunk, stored, batch_stats, x, inputs)
    prepare, params = _lower_prepare(layout, passes, stored)
    if prepare is not None:
        passes = _trace(task, layout, chunk, params, batch_stats, x, inputs)
    arguments = (params, batch_stats, x, inputs)
    sums = sums_shapes(task, layout, stored, batch_stats)
    zero = functools.partial(zero_sums, task, layout, stored, batch_stats)
    lowered = {} if prepare is None else {"prepare": prepare}
    lowered["forward"], results = _lower_forward(layout, chunk, passes, arguments)
    lowered["zeros"] = jax.jit(zero, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, sums)).lower()
    programs = yield lowered
    results = outputs_of(programs["forward"], results)
    programs |= yield {"backward": _lower_backward(layout, chunk, passes, sums, results, arguments)}
    return ChunkPrograms(
        chunk, programs.get("prepare"), programs["zeros"], programs["forward"], programs["backward"], sums
    )


def _trace(
    task: Task, layout: Layout, chunk: ModelChunk, params: PyTree, batch_stats: PyTree, x: Any, inputs: dict[str, Any]
) -> ForwardBackward | ForwardBackwardByDevice:
    """The forward and the backward function of a chunk, whose gradients are those of the trained parameters and of its input.

    The input has no gradient where no chunk before is trained, as the images have none.
    """
    if layout.by_device:
        return ForwardBackwardByDevice.trace(task, layout, chunk, params, batch_stats, x, inputs)

    def traced(params: PyTree, batch_stats: PyTree, x: Any, inputs: Any) -> tuple[Any, Any, Any]:
        def function(trained: PyTree, x: Any) -> tuple[Any, Any]:
            return forward(task, layout, chunk, merge(params, trained), batch_stats, x, inputs)

        return linearized(chunk, function, task.groups.trained(params), x)

    return ForwardBackward.trace(traced, params, batch_stats, x, inputs)


def _lower_prepare(
    layout: Layout, passes: ForwardBackward | ForwardBackwardByDevice, params: PyTree
) -> tuple[jax.stages.Lowered | None, PyTree]:
    """The program that casts and gathers parameters, once a step, and the shapes of its results.

    Without it, each microbatch would cast and gather them again. `None` if it would change neither a dtype nor a sharding.
    """
    dtypes = _cast_dtypes(passes, params)

    def prepare(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, dtypes)

    gathered = like_params(layout, "computing", params)
    prepared = shapes_of(jax.eval_shape(prepare, params), gathered)
    if jax.tree.leaves(prepared) == jax.tree.leaves(params):
        return None, params
    return jax.jit(prepare, out_shardings=gathered).lower(params), prepared


def _cast_dtypes(passes: ForwardBackward | ForwardBackwardByDevice, params: PyTree) -> PyTree:
    """For each parameter the narrower dtype that all of its uses cast it to, or else its own dtype."""
    jaxpr = passes.jaxpr
    dtypes = []
    for variable, leaf in zip(jaxpr.invars, jax.tree.leaves(params), strict=False):
        uses = [equation for equation in jaxpr.eqns if variable in equation.invars]
        wanted = {e.params["new_dtype"] if e.primitive.name == "convert_element_type" else None for e in uses}
        only = wanted.pop() if len(wanted) == 1 and variable not in jaxpr.outvars else None
        dtypes.append(only if only is not None and only.itemsize < leaf.dtype.itemsize else leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(params), dtypes)


def _lower_forward(
    layout: Layout, chunk: ModelChunk, passes: ForwardBackward | ForwardBackwardByDevice, arguments: tuple[Any, ...]
) -> tuple[jax.stages.Lowered, PyTree]:
    """The forward program, and the shapes of its results (output, aux, residuals)."""
    shapes = jax.eval_shape(passes.forward, *arguments)
    output = layout.sharding() if shapes[0].ndim == 0 else layout.examples
    aux = jax.tree.map(lambda _: layout.sharding(), shapes[1])
    program = jax.jit(named(passes.forward, f"chunk_{chunk.index}_forward"), out_shardings=(output, aux, None))
    return program.lower(*arguments), shapes


def _lower_backward(
    layout: Layout,
    chunk: ModelChunk,
    passes: ForwardBackward | ForwardBackwardByDevice,
    sums: GradientSums,
    results: tuple[Any, Any, Any],
    arguments: tuple[Any, ...],
) -> jax.stages.Lowered:
    """The backward program. results: shapes of what the forward program returns. arguments: shapes of what it takes."""

    def backward(
        sums: GradientSums,
        cotangent: Any,
        residuals: Any,
        output: Any,
        aux: Any,
        params: PyTree,
        batch_stats: PyTree,
        x: Any,
        inputs: Any,
    ) -> tuple[GradientSums, Any]:
        if chunk.last or not chunk.gets_gradient:
            cotangent = jnp.full(output.shape, chunk.last, output.dtype)
        gradients, *x_gradient = passes.backward(cotangent, residuals, output, params, batch_stats, x, inputs)
        new_stats, metrics = aux
        loss, correct = metrics or (jnp.zeros_like(sums.loss), jnp.zeros_like(sums.correct))
        new = GradientSums(constrain_gradients(layout, gradients), new_stats, loss, correct)
        return add_sums(sums, new), (x_gradient[0] if chunk.gives_gradient else ())

    output, aux, residuals = results
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, sums), layout.examples if chunk.gives_gradient else ())
    cotangent = () if chunk.last or not chunk.gets_gradient else output
    program = jax.jit(named(backward, f"chunk_{chunk.index}_backward"), out_shardings=shardings, donate_argnums=0)
    return program.lower(sums, cotangent, residuals, output, aux, *arguments)


def activation_shapes(
    layout: Layout, chunks: Sequence[ModelChunk], run_chunk: Callable[[ModelChunk, Any], Any]
) -> list[Any]:
    """The shape of what comes into each chunk: `()` for the first, then float [B/M, ...] on the chunk's stage.

    Args:
      layout: of the run.
      chunks: of the model, in order.
      run_chunk: (chunk, the shape of what comes in) -> the shape of its output.
    """
    shapes: list[Any] = [()]
    for chunk, following in itertools.pairwise(chunks):
        sharding = layout.sharding(layout.examples.spec, following.stage)
        shapes.append(shapes_of(run_chunk(chunk, shapes[-1]), sharding))
    return shapes


# -------------------------------------------------------------------------------------------------------------- stages


def compile_stage(
    task: Task,
    layout: Layout,
    stage: int,
    indices: Sequence[int],
    state: TrainState,
    decision: UpdateDecision,
    sums: tuple[GradientSums, ...],
) -> Compiling[StagePrograms]:
    """Compiles the programs of one stage's update; for `compile_together`.

    Args:
      task: what to compute.
      layout: of the run.
      stage: whose programs.
      indices: which leaves of the whole state the stage has.
      state: shapes of the stage's state.
      decision: shapes, on the stage's devices.
      sums: shapes of the accumulators of each of the stage's chunks.
    """
    layout = layout.on_stage(stage)
    updating = like_params(layout, "opt_state", task.groups.trained(state.params))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def row(*numbers: Any) -> jax.Array:
        return jnp.stack([jnp.asarray(number, sums[0].loss.dtype) for number in numbers])[None]

    def measure(state: TrainState, sums: tuple[GradientSums, ...]) -> jax.Array:
        """float [1, 3]: what this stage adds to the loss, the correct answers, and the squared norm of the gradients."""
        whole = _merged(sums)
        gradients = unscale_gradients(state.loss_scale, whole.gradients, updating)
        return row(whole.loss, whole.correct, jnp.square(global_norm(gradients, updating)))

    def update(
        state: TrainState, sums: tuple[GradientSums, ...], decision: UpdateDecision
    ) -> tuple[TrainState, jax.Array]:
        """The state after `decision`, and float [1, 2]: what it adds to the squared norms of the parameters and the update."""
        whole = _merged(sums)
        gradients = unscale_gradients(state.loss_scale, whole.gradients, updating)
        new = gradients, whole.batch_stats, whole.communication
        after, norms = apply_update(task, shardings, updating, state, *new, decision)
        return after, row(*map(jnp.square, norms))

    exchanger = None
    if layout.accumulates_by_device:
        lowered, shapes = _lower_exchange(task, layout, stage, state, sums)
        exchanger = (yield {"exchange": lowered})["exchange"]
        sums = outputs_of(exchanger, shapes)
    updater = jax.jit(
        named(update, f"stage_{stage}_update"), out_shardings=(shardings, layout.sharding()), donate_argnums=0
    )
    programs = yield {
        "measure": jax.jit(measure, out_shardings=layout.sharding()).lower(state, sums),
        "update": updater.lower(state, sums, decision),
    }
    structure = jax.tree.structure(state)
    return StagePrograms(stage, tuple(indices), structure, exchanger, programs["measure"], programs["update"])


def _lower_exchange(
    task: Task, layout: Layout, stage: int, state: TrainState, sums: tuple[GradientSums, ...]
) -> tuple[jax.stages.Lowered, tuple[GradientSums, ...]]:
    """The program `StagePrograms.exchange`, and the shapes of its results. The arguments are those of `compile_stage`."""

    def exchanged(state: TrainState, sums: tuple[GradientSums, ...], seed: jax.Array) -> tuple[GradientSums, ...]:
        return (exchange(task, layout, state, _merged(sums), seed),)

    arguments = state, sums, jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.sharding())
    program = jax.jit(named(exchanged, f"stage_{stage}_exchange"))
    return program.lower(*arguments), jax.eval_shape(exchanged, *arguments)


def _merged(sums: tuple[GradientSums, ...]) -> GradientSums:
    """Those of all of a stage's chunks together."""
    gradients, batch_stats = {}, {}
    for chunk_sums in sums:
        gradients |= chunk_sums.gradients
        batch_stats |= chunk_sums.batch_stats
    loss, correct = (
        functools.reduce(jnp.add, numbers) for numbers in zip(*((s.loss, s.correct) for s in sums), strict=True)
    )
    return GradientSums(gradients, batch_stats, loss, correct, sums[0].communication)
