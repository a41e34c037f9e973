"""The training step of a model in stages: the schedule's operations, then the update in two halves."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxtrain.host.files import atomic_write
from jaxtrain.parallel.arrays import join
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.batch import Batch, Resident
from jaxtrain.step.gradients import Sums, like_params
from jaxtrain.step.metrics import Metrics, pack
from jaxtrain.step.pipeline import schedule as schedules
from jaxtrain.step.pipeline.chunks import Slice, on_layers, on_stage, slices_of, weights_of
from jaxtrain.step.pipeline.dispatch import Lanes, local_stages, make_lanes
from jaxtrain.step.pipeline.programs import (
    SliceStep,
    StageStep,
    activations,
    compile_slice,
    compile_stage,
    compile_together,
    given_to,
    outputs_of,
    placed,
    shapes_of,
    shapes_on_stage,
)
from jaxtrain.step.pipeline.schedule import Op, Schedule
from jaxtrain.step.pipeline.timeline import Event
from jaxtrain.step.pipeline.transfer import Route, edge, make_routes
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.step.update import Verdict, judge, metrics_of
from jaxtrain.trees import PyTree


@dataclasses.dataclass(frozen=True)
class PipelineStep:
    """`jaxtrain.step.train_step.Step` for several stages: same call, same fields.

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
        flight = Flight(self, parts, batch, resident)
        measured = flight.run(self.lanes if flight.events is None else self.trace.lanes)
        if flight.events is not None:
            self.trace.write(flight.events)
        everywhere = self.layout.sharding(P("stage"))
        numbers = join(measured, (self.layout.stages, 3), everywhere)
        verdict, metrics = self.judge(state.step, state.loss_scale, batch.step, numbers)
        verdicts = {s: on_stage(self.layout, s, verdict) for s in self.stages}
        done = self.lanes.each({s: functools.partial(self._update, flight, s, verdicts[s]) for s in self.stages})
        norms = join([norm for _, norm in done], (self.layout.stages, 2), everywhere)
        found = collections.defaultdict(list)
        for stage, (part, _) in zip(self.stages.values(), done, strict=True):
            for i, leaf in zip(stage.indices, jax.tree.leaves(part), strict=True):
                found[i].append(leaf)
        for i, own in found.items():
            old, leaves[i] = leaves[i], own[0]
            if old.sharding.mesh == self.layout.mesh:
                leaves[i] = join(own, old.shape, old.sharding)
        return structure.unflatten(leaves), self.finish(norms, metrics)

    def _part(self, stage: StageStep, leaves: Sequence[jax.Array]) -> TrainState:
        own = [leaves[i] for i in stage.indices]
        return stage.structure.unflatten(on_stage(self.layout, stage.stage, own))

    def _update(self, flight: Flight, stage: int, verdict: Verdict) -> tuple[TrainState, jax.Array]:
        return self.stages[stage].update(flight.parts[stage], flight.sums_of(stage), verdict)


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


class Flight:
    """One step on its way: what each slice holds, and what waits to be fetched.

    Only its own stage's thread touches what a slice holds; activations and cotangents pass as futures: `made` until a
    transfer between processes takes them, `arrived` once they are where they are needed.
    """

    def __init__(self, step: PipelineStep, parts: Mapping[int, TrainState], batch: Batch, resident: Resident):
        self.step, self.parts = step, parts
        self._data = {stage: on_stage(step.layout, stage, (batch, resident)) for stage in step.stages}
        self._params: dict[int, PyTree] = {}
        self._stats: dict[int, PyTree] = {}
        self._given: dict[int, dict[str, Any]] = {}
        self._sums: dict[int, Sums] = {}
        self._kept: dict[tuple[int, int], tuple[Any, ...]] = {}
        ops = [op for ops in step.schedule.ops for op in ops]
        self._made = {op: concurrent.futures.Future() for op in ops}
        self._arrived = {op: concurrent.futures.Future() for op in ops}
        self.events: list[Event] | None = [] if step.trace.is_due() else None

    def run(self, lanes: Lanes) -> list[jax.Array]:
        """Runs the schedule from its first operation to the measurement of each stage."""
        if not lanes.threads:
            for stage in lanes.stages:
                self.begin(stage)
            for op in self.step.order:
                if op.chunk in self.step.slices:
                    self.do(op)
                self.transfer(op)
            return [self.end(stage) for stage in lanes.stages]

        def guarded(work: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return work(*arguments)
            except BaseException as error:
                self.fail(error)
                raise

        def work(stage: int) -> jax.Array:
            self.begin(stage)
            for op in self.step.schedule.ops[stage]:
                # One operation of a stage at a time: XLA:CPU has few threads, and programs that hold them while they
                # wait for another process would keep those from running that it waits for.
                jax.block_until_ready(self.do(op))
            return self.end(stage)

        def transfers() -> None:
            for op in self.step.transfers:
                self.transfer(op)

        futures = [lanes.submit(stage, guarded, work, stage) for stage in lanes.stages]
        futures.append(lanes.submit("transfers", guarded, transfers))
        return [future.result() for future in futures][:-1]

    def begin(self, stage: int) -> None:
        """Makes the parameters of a stage ready, and its accumulators zero."""
        state = self.parts[stage]
        batch, resident = self._data[stage]
        for k, each in self.step.slices.items():
            part = each.part
            if part.stage != stage:
                continue
            params, self._stats[k] = weights_of(part, state.params, state.batch_stats)
            self._params[k] = each.prepare(params) if each.prepare else params
            self._given[k] = given_to(part, state, batch, resident, ())
            self._sums[k] = each.zeros()

    def do(self, op: Op) -> Any:
        """Dispatches one operation, once what it needs has been dispatched; returns what it makes."""
        each = self.step.slices[op.chunk]
        part, k = each.part, op.chunk
        given = self._given[k] | {"index": self.step.microbatches[part.stage][op.microbatch]}
        needs_none = part.first if op.kind == "F" else part.last
        before = op.chunk - 1 if op.kind == "F" else op.chunk + 1
        arrived = () if needs_none else take(self._arrived, Op(op.kind, before, op.microbatch))
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
        array = route.exchange(take(self._made, op) if makes else None)
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


def take(mailbox: dict[Op, concurrent.futures.Future[Any]], op: Op) -> Any:
    """Waits for a message and forgets it: an activation lives no longer than it is needed."""
    value = mailbox[op].result()
    del mailbox[op]
    return value


def make_pipeline(
    task: Task, layout: Layout, state: TrainState, batch: Batch, resident: Resident, trace: Path
) -> PipelineStep:
    """Compiles all stages' programs, in parallel; `state`, `batch` and `resident` as for `jaxtrain.step.train_step.make_step`.

    trace: the file for `layout.trace_step`.
    """
    config, stages, here = layout.config, range(layout.stages), local_stages(layout)
    schedule = schedules.make(config.schedule, config.stages, config.microbatches, config.chunks)
    slices, every = slices_of(layout), frozenset(layout.stage_of)
    state, data = shapes_of(state), shapes_of((batch, resident))
    leaves, structure = jax.tree.flatten(state)
    numbered = structure.unflatten(range(len(leaves)))
    names = [[name for part in slices if part.stage == s for name in part.names] for s in stages]
    indices = [on_layers(numbered, names[s], every) for s in stages]
    parts = [shapes_on_stage(on_layers(state, names[s], every), layout, s) for s in stages]
    shared = frozenset(i for i, leaf in enumerate(leaves) if leaf.sharding.mesh == layout.mesh)
    scalar = jax.ShapeDtypeStruct((), np.int32)

    def number(i: int, stage: int) -> jax.Array:
        return jax.make_array_from_callback((), layout.sharding(P(), stage), lambda _: np.int32(i), dtype=np.int32)

    numbers = {s: tuple(number(i, s) for i in range(config.microbatches)) for s in here}

    def given(part: Slice) -> dict[str, Any]:
        batch, resident = shapes_on_stage(data, layout, part.stage)
        return given_to(part, parts[part.stage], batch, resident, placed(scalar, layout.sharding(P(), part.stage)))

    inputs = activations(task, layout, slices, parts, given)
    own_slices = [part for part in slices if part.stage in here]
    compiled = compile_together(
        [compile_slice(task, layout, p, parts[p.stage], inputs[p.index], given(p)) for p in own_slices]
    )
    steps = {step.part.index: step for step, _ in compiled}
    routes = make_routes(layout, slices, inputs, back=True)
    everywhere = layout.sharding()
    numbers_of_all = jax.ShapeDtypeStruct((layout.stages, 3), task.sums_dtype, sharding=layout.sharding(P("stage")))
    judging, asked = functools.partial(_judge, task), (state.step, state.loss_scale, data[0].step, numbers_of_all)
    judged = jax.jit(judging, out_shardings=everywhere).lower(*asked).compile()
    verdict, metrics = outputs_of(judged, jax.eval_shape(judging, *asked))
    sums = {s: tuple(each.sums for each in steps.values() if each.part.stage == s) for s in here}
    updates = compile_together(
        [
            compile_stage(task, layout, s, indices[s], shared, parts[s], shapes_on_stage(verdict, layout, s), sums[s])
            for s in here
        ]
    )
    norms = jax.ShapeDtypeStruct((layout.stages, 2), task.sums_dtype, sharding=layout.sharding(P("stage")))
    finish = jax.jit(_finish, out_shardings=everywhere).lower(norms, metrics).compile()
    programs = {"judge": judged, "finish": finish}
    for _, more in (*compiled, *updates):
        programs |= more
    accumulators: dict[str, Any] = {}
    for s, part in enumerate(parts):
        accumulators |= like_params(layout.on_stage(s), "gradients", part.params)
    for each in steps.values():
        accumulators |= each.zeros.output_shardings.gradients
    # Of what lies in other processes the update is not known here: it lies as it should.
    own = {i: where for step, _ in updates for i, where in step.after.items()}
    after = [own.get(i, leaf.sharding) for i, leaf in enumerate(leaves)]
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
) -> tuple[Verdict, dict[str, Any]]:
    loss, correct, gradients = jnp.sum(numbers, 0)
    verdict = judge(step, loss_scale, batch_step, loss, jnp.sqrt(gradients), skips=task.skips)
    later = jnp.zeros((), numbers.dtype)  # `_finish` knows the norms
    return verdict, metrics_of(task, step, loss_scale, verdict, loss, correct, later, later)


def _finish(squares: jax.Array, metrics: dict[str, Any]) -> Metrics:
    params, updates = jnp.sqrt(jnp.sum(squares, 0))
    return pack(metrics | {"param_norm": params, "update_norm": updates})
