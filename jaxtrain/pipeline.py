"""The step and the evaluation of a model in pipeline stages: ordinary programs, each on its stage's devices, run by a schedule.

A stage's forward program returns what its backward program needs, so that nothing is computed twice. What crosses from one
to the other holds no parameter, neither whole nor cast: a microbatch in flight costs its activations alone.

The host only dispatches. On a CPU each stage has a dispatching thread of its own, since XLA:CPU runs a program of several
devices in the thread that calls it; on an accelerator one thread dispatches everything in the schedule's total order.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.core import Literal, jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.data.augment import eval_inputs, train_images, train_targets
from jaxtrain.evaluator import IN_FLIGHT, EvalBatch, EvalResult, EvalSums, add_to_sums, summarize, zero_sums_of
from jaxtrain.models.layers import Context
from jaxtrain.optim import global_norm
from jaxtrain.parallel import schedule as schedules
from jaxtrain.parallel.arrays import join, view
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import BATCH_AXES
from jaxtrain.parallel.schedule import Op, Schedule
from jaxtrain.parallel.timeline import Event
from jaxtrain.precision import scale_factor
from jaxtrain.state import AUGMENT, DROPOUT, TrainState, role_key
from jaxtrain.step import Metrics, Sums, Verdict, advance, judge, like_params, metrics_of, unscaled, zero_sums
from jaxtrain.task import Batch, Resident, Task, select_from, wrapper
from jaxtrain.workdir import atomic_write

PyTree = Any
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------- between the stages


class Route:
    """How activations get from one stage's devices to another's.

    Where both stages touch the same processes, each shard is copied to its counterpart. Otherwise the two stages' buffers are
    taken for the halves of one array, and a program that both run moves the first half (`ppermute`; NCCL or gloo).
    """

    def __init__(self, layout: Layout, source: int, target: int, shape: jax.ShapeDtypeStruct):
        self.sharding = layout.sharding(layout.examples.spec, target)
        here, there = (layout.on_stage(stage).mesh.devices.ravel().tolist() for stage in (source, target))
        self._counterpart = dict(zip(here, there, strict=True))
        self.crosses = any(a.process_index != b.process_index for a, b in self._counterpart.items())
        self.joins = any(d.process_index == jax.process_index() for d in (*here, *there))
        self._program: Any = None
        if not (self.crosses and self.joins):
            return
        pair = Mesh(np.stack([layout.mesh.devices[source], layout.mesh.devices[target]]), layout.mesh.axis_names)
        halves = NamedSharding(pair, P(("stage", *BATCH_AXES)))

        @functools.partial(jax.shard_map, mesh=pair, in_specs=halves.spec, out_specs=halves.spec, check_vma=False)
        def shift(x: jax.Array) -> jax.Array:
            return jax.lax.ppermute(x, "stage", [(0, 1)])

        self._both = (2 * shape.shape[0], *shape.shape[1:])
        both = jax.ShapeDtypeStruct(self._both, shape.dtype, sharding=halves)
        self._halves, self._program = halves, jax.jit(shift, out_shardings=halves).lower(both).compile()
        blank = np.zeros(self.sharding.shard_shape(shape.shape), shape.dtype)
        mine = [d for d in there if d.process_index == jax.process_index()]
        self._blank = jax.device_put([blank] * len(mine), mine)

    def copy(self, array: jax.Array) -> jax.Array:
        """`array` on the target's devices, in the same processes."""
        if array.is_fully_addressable:
            return jax.device_put(array, self.sharding)
        shards = array.addressable_shards
        moved = jax.device_put([shard.data for shard in shards], [self._counterpart[shard.device] for shard in shards])
        return jax.make_array_from_single_device_arrays(array.shape, self.sharding, moved)

    def exchange(self, array: jax.Array | None) -> jax.Array | None:
        """`array` from the source's processes (elsewhere `None`) on the target's (elsewhere `None`). A collective."""
        own = [shard.data for shard in array.addressable_shards] if array is not None else []
        whole = jax.make_array_from_single_device_arrays(self._both, self._halves, own + self._blank)
        arrived = self._program(whole)
        there = self.sharding.device_set
        shards = [shard.data for shard in arrived.addressable_shards if shard.device in there]
        if not shards:
            return None
        shape = (self._both[0] // 2, *self._both[1:])
        return jax.make_array_from_single_device_arrays(shape, self.sharding, shards)


def on_layers(tree: PyTree, names: Iterable[str], every: frozenset[str]) -> PyTree:
    """The part of `tree` that belongs to the layers `names`: each dict that is keyed by layers (`every`) is cut."""
    wanted = set(names)

    def is_by_layer(node: Any) -> bool:
        return isinstance(node, dict) and bool(node) and every.issuperset(node)

    def cut(node: Any) -> Any:
        return {name: part for name, part in node.items() if name in wanted} if is_by_layer(node) else node

    return jax.tree.map(cut, tree, is_leaf=is_by_layer)


# ------------------------------------------------------------------------------------------------------ one slice's work


@dataclasses.dataclass(frozen=True)
class Slice:
    """Slice `index` of the model: its layers, by number and by name, its stage, and whether it is the first or the last."""

    index: int
    stage: int
    layers: range
    names: tuple[str, ...]
    first: bool
    last: bool


def slices_of(layout: Layout) -> list[Slice]:
    """The model's slices, in the model's order."""
    count, begin, found = len(layout.slices), 0, []
    for k, names in enumerate(layout.slices):
        layers = range(begin, begin := begin + len(names))
        found.append(Slice(k, k % layout.stages, layers, names, k == 0, k == count - 1))
    return found


def forward(
    task: Task, layout: Layout, part: Slice, params: PyTree, batch_stats: PyTree, x: Any, given: Mapping[str, Any]
) -> tuple[jax.Array, tuple[PyTree, Any]]:
    """The activation that a slice hands on, or the last one's scaled loss; with the new statistics and (loss, correct).

    x: the activation of the slice before; unused by the first, which makes its input from the images in `given`.
    given: `step`, `index` (the microbatch); for the first and the last slice `rows`, `images`, `labels` and the like.
    layout: of the stage.
    """
    parts, step, index = layout.config.microbatches, given["step"], given["index"]
    key = jax.random.fold_in(role_key(task.seed, AUGMENT), step)
    if part.first:
        images = select_from(given["images"], given["rows"], given["resident_images"], index, layout)
        size = images.shape[0]
    else:
        size = x.shape[0]
    # A random number belongs to an example of the global batch, whichever microbatch, stage or device it is on.
    example = index * size + jnp.arange(size, dtype=jnp.int32)
    if part.first:
        x = train_images(task.preprocess, images, example, key)
    context = Context(example=example, train=True, bn_groups=max(task.bn_groups // parts, 1))
    dropout = jax.random.fold_in(role_key(task.seed, DROPOUT), step)
    wrap = wrapper(layout, params, task.remat, gathered=True)
    y, new_stats = task.model.apply(params, batch_stats, x, context, dropout, wrap=wrap, layers=part.layers)
    new_stats = jax.tree.map(lambda s: s / parts, new_stats)
    if not part.last:
        return jax.lax.with_sharding_constraint(y, layout.examples), (new_stats, ())
    labels = select_from(given["labels"], given["rows"], given["resident_labels"], index, layout)
    loss = jnp.sum(task.loss(y, train_targets(task.preprocess, labels, key))) / (size * parts)
    correct = jnp.sum(jnp.argmax(y, -1) == labels)
    return loss * scale_factor(given["loss_scale"], loss.dtype), (new_stats, (loss, correct.astype(loss.dtype)))


@dataclasses.dataclass(frozen=True)
class Pullback:
    """The forward and the backward function of one slice, made from one trace of `jax.vjp`.

    Of the closure's leaves, what is an argument or the output of the forward function is not returned again (it would be
    copied), and what depends on the parameters alone (a cast, a reshape) is computed again: only the rest is `kept`.

    sources: for each leaf of the closure ("kept", i), ("argument", i), ("output", 0) or ("weights", i).
    """

    jaxpr: Any
    traced: Callable[..., list[Any]]
    outputs: Any
    closure: Any
    sources: tuple[tuple[str, int], ...]

    @classmethod
    def trace(cls, function: Callable[..., tuple[Any, Any, Any]], *arguments: Any) -> Pullback:
        """function: of (params, *more), returns (output, aux, `jax.vjp`'s closure). arguments: shapes with shardings."""
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        jaxpr, (output, aux, closure) = closed.jaxpr, shapes
        weights = {*jaxpr.invars[: len(jax.tree.leaves(arguments[0]))], *jaxpr.constvars}
        for equation in jaxpr.eqns:
            inputs = [v for v in equation.invars if not isinstance(v, Literal)]
            if all(v in weights for v in inputs) and not equation.effects:
                weights.update(equation.outvars)
        leaves, structure = jax.tree.flatten(closure)
        first = len(jaxpr.outvars) - len(leaves)
        sources, kept = [], {}
        for number, variable in enumerate(jaxpr.outvars[first:], first):
            if isinstance(variable, Literal):
                sources.append(("weights", number))
            elif variable in jaxpr.invars:
                sources.append(("argument", jaxpr.invars.index(variable)))
            elif variable is jaxpr.outvars[0]:
                sources.append(("output", 0))
            elif variable in weights:
                sources.append(("weights", number))
            else:
                kept.setdefault(variable, number)
                sources.append(("kept", list(kept).index(variable)))
        return cls(jaxpr, jaxpr_as_fun(closed), jax.tree.structure((output, aux)), structure, tuple(sources))

    def forward(self, *arguments: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        """(output, aux, kept)."""
        found = self.traced(*jax.tree.leaves(arguments))
        first = len(found) - len(self.sources)
        kept: dict[int, Any] = {}
        for (kind, i), leaf in zip(self.sources, found[first:], strict=True):
            if kind == "kept":
                kept[i] = leaf
        output, aux = jax.tree.unflatten(self.outputs, found[:first])
        return output, aux, tuple(kept[i] for i in range(len(kept)))

    def backward(self, cotangent: Any, kept: Sequence[Any], output: Any, *arguments: Any) -> tuple[Any, ...]:
        """The cotangents of what the closure was made for. arguments: as `forward`'s."""
        flat = jax.tree.leaves(arguments)
        again = []
        if any(kind == "weights" for kind, _ in self.sources):
            again = self.traced(*flat)  # XLA drops all that these few do not need
        find = {
            "kept": lambda i: kept[i],
            "argument": lambda i: flat[i],
            "output": lambda _: output,
            "weights": lambda i: again[i],
        }
        return jax.tree.unflatten(self.closure, [find[kind](i) for kind, i in self.sources])(cotangent)


# -------------------------------------------------------------------------------------------------------- the programs


@dataclasses.dataclass(frozen=True)
class SliceStep:
    """The compiled programs of one slice. prepare: `None` where parameters are used as they rest. sums: shapes."""

    part: Slice
    prepare: Any
    zeros: Any
    forward: Any
    backward: Any
    sums: Sums


@dataclasses.dataclass(frozen=True)
class StageStep:
    """The compiled programs of one stage's update.

    indices: which leaves of the state it has, in its order. after: where the update leaves those that are its own.
    """

    stage: int
    indices: tuple[int, ...]
    structure: Any
    measure: Any
    update: Any
    after: Mapping[int, Any]


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def _placed(shapes: PyTree, sharding: NamedSharding) -> PyTree:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def _outputs(program: Any, shapes: PyTree) -> PyTree:
    """`shapes` where the compiled `program` leaves them."""
    placed = jax.tree.leaves(program.output_shardings)
    leaves, structure = jax.tree.flatten(shapes)
    both = zip(leaves, placed, strict=True)
    return structure.unflatten([jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for s, where in both])


def _on_stage(tree: PyTree, layout: Layout, stage: int) -> PyTree:
    """Shapes of what every stage has, on one stage."""

    def placed(leaf: Any) -> Any:
        where = leaf.sharding
        if where.mesh == layout.mesh:
            where = layout.sharding(where.spec, stage)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(placed, tree)


def _given(part: Slice, state: TrainState, batch: Any, resident: Any, index: Any) -> dict[str, Any]:
    """What the forward function of a slice gets beside parameters and activations."""
    given: dict[str, Any] = {"step": state.step, "index": index}
    if part.first or part.last:
        given["rows"] = batch.rows
    if part.first:
        given |= {"images": batch.images, "resident_images": resident.images}
    if part.last:
        labels = {"labels": batch.labels, "resident_labels": resident.labels}
        given |= labels | {"loss_scale": state.loss_scale}
    return given


def _cast_types(pullback: Pullback, params: PyTree) -> PyTree:
    """For each parameter the narrower type that all of its uses cast it to, or its own."""
    jaxpr = pullback.jaxpr
    types = []
    for variable, leaf in zip(jaxpr.invars, jax.tree.leaves(params), strict=False):
        uses = [equation for equation in jaxpr.eqns if variable in equation.invars]
        wanted = {e.params["new_dtype"] if e.primitive.name == "convert_element_type" else None for e in uses}
        only = wanted.pop() if len(wanted) == 1 and variable not in jaxpr.outvars else None
        types.append(only if only is not None and only.itemsize < leaf.dtype.itemsize else leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(params), types)


# Yields lowered programs by name, is sent the compiled ones, and returns what it makes of them.
Compiling = Generator[dict[str, Any], dict[str, Any], T]


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


def _compile_slice(
    task: Task, layout: Layout, part: Slice, state: TrainState, x: Any, given: dict[str, Any]
) -> Compiling[tuple[SliceStep, dict[str, Any]]]:
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

    pullback = Pullback.trace(traced, params, stats, x, given)
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
        pullback = Pullback.trace(traced, used, stats, x, given)

    shapes = jax.eval_shape(pullback.forward, used, stats, x, given)
    aux_shardings = jax.tree.map(lambda _: lay.sharding(), shapes[1])
    output_sharding = lay.sharding() if part.last else lay.examples
    ran = jax.jit(pullback.forward, out_shardings=(output_sharding, aux_shardings, None))
    lowered["forward"] = ran.lower(used, stats, x, given)

    gradient_shardings = like_params(lay, "gradients", params)
    zero = functools.partial(zero_sums, params, stats)
    sums_shapes = jax.eval_shape(zero)
    sums_shardings = dataclasses.replace(
        jax.tree.map(lambda _: lay.sharding(), sums_shapes), gradients=gradient_shardings
    )
    lowered["zeros"] = jax.jit(zero, out_shardings=sums_shardings).lower()
    programs = yield lowered
    output, aux, kept = _outputs(programs["forward"], shapes)

    def backward(
        sums: Sums, cotangent: Any, kept: Any, output: Any, aux: Any, params: PyTree, stats: PyTree, x: Any, given: Any
    ) -> tuple[Sums, Any]:
        if part.last:
            cotangent = jnp.ones(output.shape, output.dtype)
        found = pullback.backward(cotangent, kept, output, params, stats, x, given)
        gradients = jax.lax.with_sharding_constraint(found[0], whole)
        gradients = jax.lax.with_sharding_constraint(gradients, gradient_shardings)
        new_stats, numbers = aux
        loss, correct = numbers or (jnp.zeros_like(sums.loss), jnp.zeros_like(sums.correct))
        new = Sums(gradients, new_stats, loss, correct)
        total = jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, new)
        return total, (() if part.first else found[1])

    back = jax.jit(backward, out_shardings=(sums_shardings, () if part.first else lay.examples), donate_argnums=0)
    sums = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), sums_shapes, sums_shardings)
    cotangent = () if part.last else output
    programs |= yield {"backward": back.lower(sums, cotangent, kept, output, aux, used, stats, x, given)}
    step = SliceStep(part, programs.get("prepare"), programs["zeros"], programs["forward"], programs["backward"], sums)
    return step, {f"slice {part.index}: {name}": program for name, program in programs.items()}


def _compile_stage(
    task: Task,
    layout: Layout,
    stage: int,
    indices: PyTree,
    shared: frozenset[int],
    state: TrainState,
    verdict: Verdict,
    sums: tuple[Sums, ...],
) -> Compiling[tuple[StageStep, dict[str, Any]]]:
    """state: shapes of the stage's part; indices: where its leaves are in the whole state; shared: those every stage has.

    sums: shapes of the accumulators of the stage's slices.
    """
    lay = layout.on_stage(stage)
    updating = like_params(lay, "opt_state", state.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def merged(sums: tuple[Sums, ...]) -> tuple[PyTree, PyTree]:
        """Gradients and statistics of all of the stage's slices."""
        gradients, batch_stats = {}, {}
        for part in sums:
            gradients |= part.gradients
            batch_stats |= part.batch_stats
        return gradients, batch_stats

    def measure(state: TrainState, sums: tuple[Sums, ...]) -> jax.Array:
        """[1, 4]: this stage's part of the loss, the correct answers, and the squared norms of gradients and parameters."""
        gradients = unscaled(state.loss_scale, merged(sums)[0], updating)
        params = jax.lax.with_sharding_constraint(state.params, updating)
        norms = [jnp.square(global_norm(tree)) if jax.tree.leaves(tree) else 0.0 for tree in (gradients, params)]
        loss, correct = sum(part.loss for part in sums), sum(part.correct for part in sums)
        return jnp.stack([jnp.asarray(x, sums[0].loss.dtype) for x in (loss, correct, *norms)])[None]

    def update(state: TrainState, sums: tuple[Sums, ...], verdict: Verdict) -> tuple[TrainState, jax.Array]:
        gradients, batch_stats = merged(sums)
        gradients = unscaled(state.loss_scale, gradients, updating)
        after, updates = advance(task, shardings, updating, state, gradients, batch_stats, verdict)
        norm = jnp.square(global_norm(updates)) if jax.tree.leaves(updates) else jnp.zeros((), sums[0].loss.dtype)
        return after, norm.astype(sums[0].loss.dtype)[None]

    programs = yield {
        "measure": jax.jit(measure, out_shardings=lay.sharding()).lower(state, sums),
        "update": jax.jit(update, out_shardings=(shardings, lay.sharding()), donate_argnums=0).lower(
            state, sums, verdict
        ),
    }
    measured, updated = programs["measure"], programs["update"]
    numbers = tuple(jax.tree.leaves(indices))
    placed = zip(numbers, jax.tree.leaves(updated.output_shardings[0]), strict=True)
    after = {i: where for i, where in placed if i not in shared}
    own = StageStep(stage, numbers, jax.tree.structure(state), measured, updated, after)
    return own, {f"stage {stage}: measure": measured, f"stage {stage}: update": updated}


# ------------------------------------------------------------------------------------------------------------- the step


@dataclasses.dataclass(frozen=True)
class PipelineStep:
    """`jaxtrain.step.Step` for several stages: same call, same fields.

    order: of all operations; transfers: of what they send between processes. slices, stages: those with devices of this
    process.
    """

    programs: Mapping[str, Any]
    after: TrainState
    accumulator: PyTree
    layout: Layout
    schedule: Schedule
    order: tuple[Op, ...]
    transfers: tuple[Op, ...]
    slices: Mapping[int, SliceStep]
    stages: Mapping[int, StageStep]
    routes: Mapping[tuple[int, int], Route]
    judge: Any
    finish: Any
    microbatches: Mapping[int, tuple[jax.Array, ...]]
    lanes: Lanes
    trace: Trace

    def __call__(self, state: TrainState, batch: Batch, resident: Resident) -> tuple[TrainState, Metrics]:
        """Donates `state`. Asynchronous: the metrics are not there until they are read."""
        leaves, structure = jax.tree.flatten(state)
        parts = {number: self._part(stage, leaves) for number, stage in self.stages.items()}
        flight = _Flight(self, parts, batch, resident)
        measured = (self.lanes if flight.events is None else self.trace.lanes).run(flight)
        if flight.events is not None:
            self.trace.write(flight.events)
        everywhere = self.layout.sharding(P("stage"))
        numbers = join(measured, (self.layout.stages, 4), everywhere)
        verdict, metrics = self.judge(state.step, state.loss_scale, batch.step, numbers)
        done = self.lanes.each({s: functools.partial(self._update, flight, s, verdict) for s in self.stages})
        norms = join([norm for _, norm in done], (self.layout.stages,), everywhere)
        found = collections.defaultdict(list)
        for stage, (part, _) in zip(self.stages.values(), done, strict=True):
            for i, leaf in zip(stage.indices, jax.tree.leaves(part), strict=True):
                found[i].append(leaf)
        for i, own in found.items():
            old, leaves[i] = leaves[i], own[0]
            if old.sharding.mesh == self.layout.mesh:
                leaves[i] = join(own, old.shape, old.sharding)
        return structure.unflatten(leaves), metrics | {"update_norm": self.finish(norms)}

    def _part(self, stage: StageStep, leaves: Sequence[jax.Array]) -> TrainState:
        own = [leaves[i] for i in stage.indices]
        return stage.structure.unflatten(_on_its_stage(self.layout, stage.stage, own))

    def _update(self, flight: _Flight, stage: int, verdict: Verdict) -> tuple[TrainState, jax.Array]:
        mine = _on_its_stage(self.layout, stage, verdict)
        return self.stages[stage].update(flight.parts[stage], flight.sums_of(stage), mine)


@dataclasses.dataclass
class Trace:
    """Times each operation of one step, the `step`-th of this start (0: none), into a JSON file.

    That step waits for each operation, in a thread for each stage, also on an accelerator.
    """

    step: int
    path: Path
    lanes: Lanes

    def is_due(self) -> bool:
        """To be called once a step."""
        self.step -= 1
        return self.step == 0

    def write(self, events: Sequence[Event]) -> None:
        """Writes what this process saw; times are seconds since 1970."""
        rows = [{**e.op._asdict(), "stage": e.stage, "start": e.start, "end": e.end} for e in events]
        atomic_write(self.path, json.dumps(rows) + "\n")


def _on_its_stage(layout: Layout, stage: int, tree: PyTree) -> PyTree:
    """Arrays that every stage has, as `stage` sees them; others as they are."""

    def seen(leaf: jax.Array) -> jax.Array:
        where: Any = leaf.sharding
        return view(leaf, layout.sharding(where.spec, stage)) if where.mesh == layout.mesh else leaf

    return jax.tree.map(seen, tree)


class _Flight:
    """One step on its way: what each slice holds, and what waits to be fetched.

    Only its own stage's thread touches what a slice holds; activations and cotangents pass as futures: `made` until a
    transfer between processes takes them, `arrived` once they are where they are needed.
    """

    def __init__(self, step: PipelineStep, parts: Mapping[int, TrainState], batch: Batch, resident: Resident):
        self.step, self.parts = step, parts
        self._data = batch, resident
        self._params: dict[int, PyTree] = {}
        self._stats: dict[int, PyTree] = {}
        self._given: dict[int, dict[str, Any]] = {}
        self._sums: dict[int, Sums] = {}
        self._kept: dict[tuple[int, int], tuple[Any, ...]] = {}
        ops = [op for ops in step.schedule.ops for op in ops]
        self._made = {op: concurrent.futures.Future() for op in ops}
        self._arrived = {op: concurrent.futures.Future() for op in ops}
        self.events: list[Event] | None = [] if step.trace.is_due() else None

    def begin(self, stage: int) -> None:
        """Makes the parameters of a stage ready, and its accumulators zero."""
        state = self.parts[stage]
        batch, resident = _on_its_stage(self.step.layout, stage, self._data)
        for k, each in self.step.slices.items():
            part = each.part
            if part.stage != stage:
                continue
            params, self._stats[k] = _weights(part, state.params, state.batch_stats)
            self._params[k] = each.prepare(params) if each.prepare else params
            self._given[k] = _given(part, state, batch, resident, ())
            self._sums[k] = each.zeros()

    def do(self, op: Op) -> Any:
        """Dispatches one operation, once what it needs has been dispatched; returns what it makes."""
        each = self.step.slices[op.chunk]
        part, k = each.part, op.chunk
        given = self._given[k] | {"index": self.step.microbatches[part.stage][op.microbatch]}
        needs_none = part.first if op.kind == "F" else part.last
        before = op.chunk - 1 if op.kind == "F" else op.chunk + 1
        arrived = () if needs_none else _take(self._arrived, Op(op.kind, before, op.microbatch))
        began = time.time()
        if op.kind == "F":
            result, aux, kept = each.forward(self._params[k], self._stats[k], arrived, given)
            self._kept[k, op.microbatch] = (kept, result, aux, arrived)
        else:
            kept, output, aux, x = self._kept.pop((k, op.microbatch))
            self._sums[k], result = each.backward(
                self._sums[k], arrived, kept, output, aux, self._params[k], self._stats[k], x, given
            )
        if self.events is not None:
            jax.block_until_ready((self._sums[k], result))
            self.events.append(Event(op, part.stage, began, time.time()))
        self._send(op, result)
        return self._sums[k], result

    def _send(self, op: Op, array: Any) -> None:
        route = self.step.routes.get(edge(op))
        if route is None:
            return  # the loss, or the gradient of the images
        if route.crosses:
            self._made[op].set_result(array)
        else:
            self._arrived[op].set_result(route.copy(array))

    def transfer(self, op: Op) -> None:
        """This process's part in bringing what `op` made to another process; all take part in the same order."""
        route = self.step.routes.get(edge(op))
        if route is None or not (route.crosses and route.joins):
            return
        makes = op.chunk in self.step.slices
        array = route.exchange(_take(self._made, op) if makes else None)
        if array is not None:
            self._arrived[op].set_result(array)

    def end(self, stage: int) -> jax.Array:
        """What the update needs to know of a stage."""
        return self.step.stages[stage].measure(self.parts[stage], self.sums_of(stage))

    def sums_of(self, stage: int) -> tuple[Sums, ...]:
        """The accumulators of a stage's slices."""
        return tuple(self._sums[k] for k, each in self.step.slices.items() if each.part.stage == stage)

    def fail(self, error: BaseException) -> None:
        """Tells whoever still waits for a message."""
        for future in [*self._made.values(), *self._arrived.values()]:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(error)


def _take(mailbox: dict[Op, concurrent.futures.Future[Any]], op: Op) -> Any:
    """Waits for a message and forgets it: an activation lives no longer than it is needed."""
    value = mailbox[op].result()
    del mailbox[op]
    return value


def edge(op: Op) -> tuple[int, int]:
    """From which slice to which the result of `op` goes."""
    return op.chunk, op.chunk + (1 if op.kind == "F" else -1)


class Lanes:
    """Who dispatches: a thread for each of this process's stages and one for transfers; or the caller, with `threads=False`."""

    def __init__(self, stages: Iterable[int], *, threads: bool):
        self._stages = list(stages)
        lanes = [*self._stages, "transfers"] if threads else []
        self._threads = {
            lane: concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f"stage {lane}") for lane in lanes
        }

    def run(self, flight: _Flight) -> list[jax.Array]:
        """Runs the schedule from its first operation to the measurement of each stage."""
        schedule = flight.step.schedule
        if not self._threads:
            for stage in self._stages:
                flight.begin(stage)
            for op in flight.step.order:
                if op.chunk in flight.step.slices:
                    flight.do(op)
                flight.transfer(op)
            return [flight.end(stage) for stage in self._stages]

        def guarded(work: Callable[[], Any]) -> Any:
            try:
                return work()
            except BaseException as error:
                flight.fail(error)
                raise

        def work(stage: int) -> jax.Array:
            flight.begin(stage)
            for op in schedule.ops[stage]:
                # One operation of a stage at a time: XLA:CPU has few threads, and programs that hold them while they
                # wait for another process would keep those from running that it waits for.
                jax.block_until_ready(flight.do(op))
            return jax.block_until_ready(flight.end(stage))

        def transfers() -> None:
            for op in flight.step.transfers:
                flight.transfer(op)

        futures = [self._threads[s].submit(guarded, functools.partial(work, s)) for s in self._stages]
        futures.append(self._threads["transfers"].submit(guarded, transfers))
        return [future.result() for future in futures][:-1]

    def each(self, jobs: Mapping[int, Callable[[], Any]]) -> list[Any]:
        """Runs a job for each stage, all at once; returns what they return, in their order."""
        return [future.result() for future in [self.submit(stage, job) for stage, job in jobs.items()]]

    def submit(self, lane: int | str, job: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future[Any]:
        """Queues `job` behind what a stage's lane, or that of the `transfers`, does already."""
        if self._threads:
            return self._threads[lane].submit(lambda: jax.block_until_ready(job(*arguments)))
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(job(*arguments))
        return future


def local_stages(layout: Layout) -> list[int]:
    """The stages that have devices of this process."""
    return [stage for stage in range(layout.stages) if layout.on_stage(stage).mesh.local_devices]


def make_lanes(layout: Layout) -> Lanes:
    """Threads on a CPU, none on an accelerator."""
    return Lanes(local_stages(layout), threads=layout.mesh.devices.flat[0].platform == "cpu")


def make_routes(layout: Layout, slices: Sequence[Slice], inputs: Sequence[Any], *, back: bool) -> dict[Any, Route]:
    """A route for each edge between slices, forward and, with `back`, backward. inputs: what comes into each slice."""
    routes: dict[tuple[int, int], Route] = {}
    for before, after in itertools.pairwise(slices):
        for source, target in ((before, after), (after, before))[: 2 if back else 1]:
            routes[source.index, target.index] = Route(layout, source.stage, target.stage, inputs[after.index])
    return routes


def make_pipeline(
    task: Task, layout: Layout, state: TrainState, batch: Batch, resident: Resident, trace: Path
) -> PipelineStep:
    """Compiles all stages' programs, in parallel; `state`, `batch` and `resident` as for `jaxtrain.step.make_step`.

    trace: the file for `layout.trace_step`.
    """
    config, stages, here = layout.config, range(layout.stages), local_stages(layout)
    schedule = schedules.make(config.schedule, config.stages, config.microbatches, config.chunks)
    slices, every = slices_of(layout), frozenset(layout.stage_of)
    state, data = _shapes(state), _shapes((batch, resident))
    leaves, structure = jax.tree.flatten(state)
    numbered = structure.unflatten(range(len(leaves)))
    names = [[name for part in slices if part.stage == s for name in part.names] for s in stages]
    indices = [on_layers(numbered, names[s], every) for s in stages]
    parts = [_on_stage(on_layers(state, names[s], every), layout, s) for s in stages]
    shared = frozenset(i for i, leaf in enumerate(leaves) if leaf.sharding.mesh == layout.mesh)
    scalar = jax.ShapeDtypeStruct((), np.int32)

    def number(i: int, stage: int) -> jax.Array:
        return jax.make_array_from_callback((), layout.sharding(P(), stage), lambda _: np.int32(i), dtype=np.int32)

    numbers = {s: tuple(number(i, s) for i in range(config.microbatches)) for s in here}

    def given(part: Slice) -> dict[str, Any]:
        batch, resident = _on_stage(data, layout, part.stage)
        return _given(part, parts[part.stage], batch, resident, _placed(scalar, layout.sharding(P(), part.stage)))

    inputs = activations(task, layout, slices, parts, given)
    own_slices = [part for part in slices if part.stage in here]
    compiled = compile_together(
        [_compile_slice(task, layout, p, parts[p.stage], inputs[p.index], given(p)) for p in own_slices]
    )
    steps = {step.part.index: step for step, _ in compiled}
    routes = make_routes(layout, slices, inputs, back=True)
    dtype = next(iter(steps.values())).sums.loss.dtype
    everywhere = layout.sharding()
    numbers_of_all = jax.ShapeDtypeStruct((layout.stages, 4), dtype, sharding=layout.sharding(P("stage")))
    judging, asked = functools.partial(_judge, task), (state.step, state.loss_scale, data[0].step, numbers_of_all)
    judged = jax.jit(judging, out_shardings=everywhere).lower(*asked).compile()
    verdict, _ = _outputs(judged, jax.eval_shape(judging, *asked))
    sums = {s: tuple(each.sums for each in steps.values() if each.part.stage == s) for s in here}
    updates = compile_together(
        [
            _compile_stage(task, layout, s, indices[s], shared, parts[s], _on_stage(verdict, layout, s), sums[s])
            for s in here
        ]
    )
    norms = jax.ShapeDtypeStruct((layout.stages,), dtype, sharding=layout.sharding(P("stage")))
    finish = jax.jit(lambda squares: jnp.sqrt(jnp.sum(squares)), out_shardings=everywhere).lower(norms).compile()
    programs = {"judge": judged, "finish": finish}
    for _, more in (*compiled, *updates):
        programs |= more
    accumulators: dict[str, Any] = {}
    for s, part in enumerate(parts):
        accumulators |= like_params(layout.on_stage(s), "gradients", part.params)
    for each in steps.values():
        accumulators |= each.zeros.output_shardings.gradients
    placed = {i: where for step, _ in updates for i, where in step.after.items()}
    after = [
        placed.get(i, leaf.sharding) for i, leaf in enumerate(leaves)
    ]  # of other processes' stages: as they should be
    return PipelineStep(
        programs=programs,
        after=structure.unflatten(after),
        accumulator=accumulators,
        layout=layout,
        schedule=schedule,
        order=schedules.total_order(schedule),
        transfers=schedules.transfer_order(schedule),
        slices=steps,
        stages={step.stage: step for step, _ in updates},
        routes=routes,
        judge=judged,
        finish=finish,
        microbatches=numbers,
        lanes=make_lanes(layout),
        trace=Trace(config.trace_step, trace, Lanes(here, threads=config.trace_step > 0)),
    )


def _judge(
    task: Task, step: jax.Array, loss_scale: PyTree, batch_step: jax.Array, numbers: jax.Array
) -> tuple[Verdict, Metrics]:
    loss, correct, gradients, params = jnp.sum(numbers, 0)
    verdict = judge(step, loss_scale, batch_step, loss, jnp.sqrt(gradients))
    norms = (verdict.norm, jnp.sqrt(params), jnp.zeros((), numbers.dtype))
    return verdict, metrics_of(task, step, loss_scale, verdict, loss, correct, *norms)


def activations(
    task: Task, layout: Layout, slices: Sequence[Slice], parts: Sequence[TrainState], given: Callable[[Slice], Any]
) -> list[Any]:
    """The shape of what comes into each slice: () for the first, then [B/M, ...] on the slice's stage."""
    found: list[Any] = [()]
    for part in slices[:-1]:
        lay, state = layout.on_stage(part.stage), parts[part.stage]
        params = {name: state.params[name] for name in part.names if name in state.params}
        stats = {name: state.batch_stats[name] for name in part.names if name in state.batch_stats}
        y, _ = jax.eval_shape(functools.partial(forward, task, lay, part), params, stats, found[-1], given(part))
        where = layout.sharding(layout.examples.spec, slices[part.index + 1].stage)
        found.append(jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=where))
    return found


# ---------------------------------------------------------------------------------------------------------- evaluation


@dataclasses.dataclass(frozen=True)
class PipelineEvaluator:
    """`jaxtrain.evaluator.Evaluator` for several stages: several batches are on their way at once, one in each slice."""

    layout: Layout
    slices: tuple[Slice, ...]
    routes: Mapping[tuple[int, int], Route]
    zeros: Callable[[], EvalSums]
    programs: Mapping[int, Any]
    lanes: Lanes

    def __call__(
        self, params: PyTree, batch_stats: PyTree, batches: Iterable[EvalBatch], resident: Resident
    ) -> EvalResult:
        """Reads the result once, at the end; the host stays a few batches ahead of the devices."""
        weights = {k: _weights(self.slices[k], params, batch_stats) for k in self.programs}
        sums, in_flight = _done(self.zeros()), collections.deque()
        for batch in batches:
            x = _done(())
            for part in self.slices:
                k = part.index
                if k in self.programs:
                    x = self.lanes.submit(part.stage, self._run, part, weights[k], x, sums, batch, resident)
                    in_flight.append(x)
                route = self.routes.get((k, k + 1))
                if route is not None and route.crosses and route.joins:
                    made = x if k in self.programs else _done(None)
                    x = self.lanes.submit("transfers", lambda route=route, made=made: route.exchange(made.result()))
                    in_flight.append(x)
            if self.slices[-1].index in self.programs:
                sums = x
            while len(in_flight) > (IN_FLIGHT + 1) * len(self.programs):
                jax.block_until_ready(in_flight.popleft().result())
        for each in in_flight:  # before another program that spans processes: all enqueue those in the same order
            each.result()
        return self._everywhere(sums.result())

    def _run(self, part: Slice, own: Any, x: Any, sums: Any, batch: EvalBatch, resident: Resident) -> Any:
        given = _on_its_stage(self.layout, part.stage, _eval_given(part, batch, resident))
        if part.last:
            return self.programs[part.index](sums.result(), *own, x.result(), given)
        y, route = self.programs[part.index](*own, x.result(), given), self.routes[part.index, part.index + 1]
        return y if route.crosses else route.copy(y)

    def _everywhere(self, sums: EvalSums) -> EvalResult:
        """The last stage's sums, on every process."""
        owners = sorted(
            {device.process_index for device in self.layout.on_stage(self.slices[-1].stage).mesh.devices.flat}
        )
        if len(owners) < jax.process_count():
            with jax.transfer_guard("allow"):
                source = jax.process_index() == owners[0]
                here = jax.device_get(sums) if self.slices[-1].index in self.programs else sums
                sums = multihost_utils.broadcast_one_to_all(here, is_source=source)
        return summarize(jax.device_get(sums))


def _done(value: Any) -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result(value)
    return future


def _weights(part: Slice, params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    own, stats = ({name: tree[name] for name in part.names if name in tree} for tree in (params, batch_stats))
    return own, stats


def _eval_given(part: Slice, batch: EvalBatch, resident: Resident) -> dict[str, Any]:
    if part.first:
        return {"rows": batch.batch.rows, "images": batch.batch.images, "resident": resident.images}
    if part.last:
        labels = {"labels": batch.batch.labels, "resident": resident.labels}
        return {"rows": batch.batch.rows, "mask": batch.mask} | labels
    return {}


def make_pipeline_evaluator(
    task: Task, layout: Layout, params: PyTree, batch_stats: PyTree, batch: EvalBatch, resident: Resident
) -> PipelineEvaluator:
    """Compiles the evaluation of one batch, as `jaxtrain.evaluator.make_evaluator` does."""
    slices, here = slices_of(layout), local_stages(layout)
    params, batch_stats, batch, resident = _shapes((params, batch_stats, batch, resident))
    zero = functools.partial(zero_sums_of, task.preprocess.num_classes, params)
    lowered: dict[int, Any] = {}
    inputs: list[Any] = [()]
    for part in slices:
        lay, x = layout.on_stage(part.stage), inputs[-1]
        own, stats = _weights(part, params, batch_stats)
        given = _on_stage(_eval_given(part, batch, resident), layout, part.stage)
        run = functools.partial(_evaluate_slice, task, lay, part)
        if not part.last:
            y = jax.eval_shape(run, own, stats, x, given)
            where = layout.sharding(layout.examples.spec, slices[part.index + 1].stage)
            inputs.append(jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=where))
        if part.stage not in here:
            continue
        if part.last:
            sums = _placed(jax.eval_shape(zero), lay.sharding())
            adding = functools.partial(_add_slice, task, lay, run)
            lowered[part.index] = jax.jit(adding, out_shardings=lay.sharding()).lower(sums, own, stats, x, given)
        else:
            lowered[part.index] = jax.jit(run, out_shardings=lay.examples).lower(own, stats, x, given)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(lowered, pool.map(lambda each: each.compile(), lowered.values()), strict=True))
    zeros: Any = jax.jit(zero, out_shardings=layout.sharding(P(), slices[-1].stage))
    if slices[-1].stage not in here:
        zeros = functools.partial(jax.tree.map, lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(zero))
    routes = make_routes(layout, slices, inputs, back=False)
    return PipelineEvaluator(layout, tuple(slices), routes, zeros, programs, make_lanes(layout))


def _evaluate_slice(
    task: Task, layout: Layout, part: Slice, params: PyTree, batch_stats: PyTree, x: Any, given: Mapping[str, Any]
) -> jax.Array:
    if part.first:
        x = eval_inputs(task.preprocess, select_from(given["images"], given["rows"], given["resident"], 0, layout))
    context = Context(example=jnp.arange(x.shape[0], dtype=jnp.int32))
    wrap = wrapper(layout, params, "none")
    y, _ = task.model.apply(params, batch_stats, x, context, wrap=wrap, layers=part.layers)
    return jax.lax.with_sharding_constraint(y, layout.examples)


def _add_slice(
    task: Task,
    layout: Layout,
    run: Callable[..., jax.Array],
    sums: EvalSums,
    params: PyTree,
    batch_stats: PyTree,
    x: Any,
    given: Any,
) -> EvalSums:
    labels = select_from(given["labels"], given["rows"], given["resident"], 0, layout)
    return add_to_sums(task, sums, run(params, batch_stats, x, given), labels, given["mask"][0])
