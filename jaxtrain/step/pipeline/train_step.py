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
from jaxtrain.step.gradients import GradientSums, like_params
from jaxtrain.step.metrics import StepMetrics, stack_metrics
from jaxtrain.step.pipeline import schedule as schedules
from jaxtrain.step.pipeline.chunks import ModelChunk, chunks_of, on_layers, on_stage, weights_of
from jaxtrain.step.pipeline.dispatch import StageExecutors, local_stages, make_executors
from jaxtrain.step.pipeline.programs import (
    ChunkPrograms,
    StagePrograms,
    activations,
    compile_chunk,
    compile_stage,
    compile_together,
    given_to,
    outputs_of,
    placed,
    shapes_of,
    shapes_on_stage,
)
from jaxtrain.step.pipeline.schedule import Op, PipelineSchedule
from jaxtrain.step.pipeline.timeline import Event
from jaxtrain.step.pipeline.transfer import StageTransfer, edge, make_transfers
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.step.update import UpdateDecision, decide_update, step_metrics
from jaxtrain.trees import PyTree


@dataclasses.dataclass(frozen=True)
class PipelineTrainStep:
    """`step.train_step.MeshTrainStep` for several stages: same call, same fields.

    order: of all operations; transfer_order: of what they send between processes. chunks, stages: those with devices of this
    process.
    """

    programs: Mapping[str, Any]
    after: TrainState
    accumulator: PyTree
    layout: Layout
    schedule: PipelineSchedule
    order: tuple[Op, ...]
    transfer_order: tuple[Op, ...]
    chunks: Mapping[int, ChunkPrograms]
    stages: Mapping[int, StagePrograms]
    transfers: Mapping[tuple[int, int], StageTransfer]
    decide: Any
    finish: Any
    microbatches: Mapping[int, tuple[jax.Array, ...]]
    executors: StageExecutors
    trace: Trace
    per_call: int = 1

    def __call__(self, state: TrainState, batch: Batch, resident: Resident) -> tuple[TrainState, StepMetrics]:
        """Donates `state`. Asynchronous: the metrics are not there until they are read."""
        leaves, structure = jax.tree.flatten(state)
        parts = {number: self._part(stage, leaves) for number, stage in self.stages.items()}
        execution = StepExecution(self, parts, batch, resident)
        measured = execution.run(self.executors if execution.events is None else self.trace.executors)
        if execution.events is not None:
            self.trace.write(execution.events)
        everywhere = self.layout.sharding(P("stage"))
        numbers = join(measured, (self.layout.stages, 3), everywhere)
        decision, metrics = self.decide(state.step, state.loss_scale, batch.step, numbers)
        decisions = {s: on_stage(self.layout, s, decision) for s in self.stages}
        done = self.executors.each(
            {s: functools.partial(self._update, execution, s, decisions[s]) for s in self.stages}
        )
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

    def _part(self, stage: StagePrograms, leaves: Sequence[jax.Array]) -> TrainState:
        own = [leaves[i] for i in stage.indices]
        return stage.structure.unflatten(on_stage(self.layout, stage.stage, own))

    def _update(self, execution: StepExecution, stage: int, decision: UpdateDecision) -> tuple[TrainState, jax.Array]:
        return self.stages[stage].update(execution.parts[stage], execution.sums_of(stage), decision)


@dataclasses.dataclass
class Trace:
    """Times each operation of one step, the `step`-th of this start (0: none), into a JSON file.

    That step waits for each operation, in a thread for each stage, also on an accelerator.
    """

    step: int
    path: Path
    executors: StageExecutors

    def is_due(self) -> bool:
        """To be called once a step."""
        self.step -= 1
        return self.step == 0

    def write(self, events: Sequence[Event]) -> None:
        """Writes what this process saw; times are seconds since 1970."""
        rows = [{**e.op._asdict(), "stage": e.stage, "start": e.start, "end": e.end} for e in events]
        atomic_write(self.path, json.dumps(rows) + "\n")


class StepExecution:
    """One step on its way: what each chunk holds, and what waits to be fetched.

    Only its own stage's thread touches what a chunk holds; activations and cotangents pass as futures: `made` until a
    transfer between processes takes them, `arrived` once they are where they are needed.
    """

    def __init__(self, step: PipelineTrainStep, parts: Mapping[int, TrainState], batch: Batch, resident: Resident):
        self.step, self.parts = step, parts
        self._data = {stage: on_stage(step.layout, stage, (batch, resident)) for stage in step.stages}
        self._params: dict[int, PyTree] = {}
        self._stats: dict[int, PyTree] = {}
        self._given: dict[int, dict[str, Any]] = {}
        self._sums: dict[int, GradientSums] = {}
        self._residuals: dict[tuple[int, int], tuple[Any, ...]] = {}
        ops = [op for ops in step.schedule.ops for op in ops]
        self._made = {op: concurrent.futures.Future() for op in ops}
        self._arrived = {op: concurrent.futures.Future() for op in ops}
        self.events: list[Event] | None = [] if step.trace.is_due() else None

    def run(self, executors: StageExecutors) -> list[jax.Array]:
        """Runs the schedule from its first operation to the measurement of each stage."""
        if not executors.threads:
            for stage in executors.stages:
                self.begin(stage)
            for op in self.step.order:
                if op.chunk in self.step.chunks:
                    self.do(op)
                self.transfer(op)
            return [self.end(stage) for stage in executors.stages]

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

        def transfer_all() -> None:
            for op in self.step.transfer_order:
                self.transfer(op)

        futures = [executors.submit(stage, guarded, work, stage) for stage in executors.stages]
        futures.append(executors.submit("transfers", guarded, transfer_all))
        return [future.result() for future in futures][:-1]

    def begin(self, stage: int) -> None:
        """Makes the parameters of a stage ready, and its accumulators zero."""
        state = self.parts[stage]
        batch, resident = self._data[stage]
        for k, each in self.step.chunks.items():
            part = each.chunk
            if part.stage != stage:
                continue
            params, self._stats[k] = weights_of(part, state.params, state.batch_stats)
            self._params[k] = each.prepare(params) if each.prepare else params
            self._given[k] = given_to(part, state, batch, resident, ())
            self._sums[k] = each.zeros()

    def do(self, op: Op) -> Any:
        """Dispatches one operation, once what it needs has been dispatched; returns what it makes."""
        each = self.step.chunks[op.chunk]
        part, k = each.chunk, op.chunk
        given = self._given[k] | {"index": self.step.microbatches[part.stage][op.microbatch]}
        needs_none = part.first if op.kind == "F" else part.last
        before = op.chunk - 1 if op.kind == "F" else op.chunk + 1
        arrived = () if needs_none else take(self._arrived, Op(op.kind, before, op.microbatch))
        began = time.time()
        if op.kind == "F":
            result, aux, residuals = each.forward(self._params[k], self._stats[k], arrived, given)
            self._residuals[k, op.microbatch] = (residuals, result, aux, arrived)
        else:
            residuals, output, aux, x = self._residuals.pop((k, op.microbatch))
            self._sums[k], result = each.backward(
                self._sums[k], arrived, residuals, output, aux, self._params[k], self._stats[k], x, given
            )
        if self.events is not None:
            jax.block_until_ready((self._sums[k], result))
            self.events.append(Event(op, part.stage, began, time.time()))
        self._send(op, result)
        return self._sums[k], result

    def _send(self, op: Op, array: Any) -> None:
        transfer = self.step.transfers.get(edge(op))
        if transfer is None:
            return  # the loss, or the gradient of the images
        if transfer.crosses:
            self._made[op].set_result(array)
        else:
            self._arrived[op].set_result(transfer.copy(array))

    def transfer(self, op: Op) -> None:
        """This process's part in bringing what `op` made to another process; all take part in the same order."""
        transfer = self.step.transfers.get(edge(op))
        if transfer is None or not (transfer.crosses and transfer.joins):
            return
        makes = op.chunk in self.step.chunks
        array = transfer.exchange(take(self._made, op) if makes else None)
        if array is not None:
            self._arrived[op].set_result(array)

    def end(self, stage: int) -> jax.Array:
        """What the update needs to know of a stage."""
        return self.step.stages[stage].measure(self.parts[stage], self.sums_of(stage))

    def sums_of(self, stage: int) -> tuple[GradientSums, ...]:
        """The accumulators of a stage's chunks."""
        return tuple(self._sums[k] for k, each in self.step.chunks.items() if each.chunk.stage == stage)

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


def make_pipeline_train_step(
    task: Task, layout: Layout, state: TrainState, batch: Batch, resident: Resident, trace: Path
) -> PipelineTrainStep:
    """Compiles all stages' programs, in parallel; `state`, `batch` and `resident` as for `step.train_step.make_train_step`.

    trace: the file for `layout.trace_step`.
    """
    config, stages, here = layout.config, range(layout.stages), local_stages(layout)
    schedule = schedules.make_pipeline_schedule(config.schedule, config.stages, config.microbatches, config.chunks)
    chunks, every = chunks_of(layout), frozenset(layout.stage_of)
    state, data = shapes_of(state), shapes_of((batch, resident))
    leaves, structure = jax.tree.flatten(state)
    numbered = structure.unflatten(range(len(leaves)))
    names = [[name for part in chunks if part.stage == s for name in part.names] for s in stages]
    indices = [on_layers(numbered, names[s], every) for s in stages]
    parts = [shapes_on_stage(on_layers(state, names[s], every), layout, s) for s in stages]
    shared = frozenset(i for i, leaf in enumerate(leaves) if leaf.sharding.mesh == layout.mesh)
    scalar = jax.ShapeDtypeStruct((), np.int32)

    def number(i: int, stage: int) -> jax.Array:
        return jax.make_array_from_callback((), layout.sharding(P(), stage), lambda _: np.int32(i), dtype=np.int32)

    numbers = {s: tuple(number(i, s) for i in range(config.microbatches)) for s in here}

    def given(part: ModelChunk) -> dict[str, Any]:
        batch, resident = shapes_on_stage(data, layout, part.stage)
        return given_to(part, parts[part.stage], batch, resident, placed(scalar, layout.sharding(P(), part.stage)))

    inputs = activations(task, layout, chunks, parts, given)
    own_chunks = [part for part in chunks if part.stage in here]
    compiled = compile_together(
        [compile_chunk(task, layout, p, parts[p.stage], inputs[p.index], given(p)) for p in own_chunks]
    )
    steps = {step.chunk.index: step for step, _ in compiled}
    transfers = make_transfers(layout, chunks, inputs, back=True)
    everywhere = layout.sharding()
    numbers_of_all = jax.ShapeDtypeStruct((layout.stages, 3), task.sums_dtype, sharding=layout.sharding(P("stage")))
    deciding, asked = functools.partial(_decide, task), (state.step, state.loss_scale, data[0].step, numbers_of_all)
    decided = jax.jit(deciding, out_shardings=everywhere).lower(*asked).compile()
    decision, metrics = outputs_of(decided, jax.eval_shape(deciding, *asked))
    sums = {s: tuple(each.sums for each in steps.values() if each.chunk.stage == s) for s in here}
    updates = compile_together(
        [
            compile_stage(task, layout, s, indices[s], shared, parts[s], shapes_on_stage(decision, layout, s), sums[s])
            for s in here
        ]
    )
    norms = jax.ShapeDtypeStruct((layout.stages, 2), task.sums_dtype, sharding=layout.sharding(P("stage")))
    finish = jax.jit(_finish, out_shardings=everywhere).lower(norms, metrics).compile()
    programs = {"decide": decided, "finish": finish}
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
    return PipelineTrainStep(
        programs=programs,
        after=structure.unflatten(after),
        accumulator=accumulators,
        layout=layout,
        schedule=schedule,
        order=schedules.total_order(schedule),
        transfer_order=schedules.transfer_order(schedule),
        chunks=steps,
        stages={step.stage: step for step, _ in updates},
        transfers=transfers,
        decide=decided,
        finish=finish,
        microbatches=numbers,
        executors=make_executors(layout),
        trace=Trace(config.trace_step, trace, StageExecutors(here, threads=config.trace_step > 0)),
    )


def _decide(
    task: Task, step: jax.Array, loss_scale: PyTree, batch_step: jax.Array, numbers: jax.Array
) -> tuple[UpdateDecision, dict[str, Any]]:
    loss, correct, gradients = jnp.sum(numbers, 0)
    decision = decide_update(step, loss_scale, batch_step, loss, jnp.sqrt(gradients), skips=task.skips)
    later = jnp.zeros((), numbers.dtype)  # `_finish` knows the norms
    return decision, step_metrics(task, step, loss_scale, decision, loss, correct, later, later)


def _finish(squares: jax.Array, metrics: dict[str, Any]) -> StepMetrics:
    params, updates = jnp.sqrt(jnp.sum(squares, 0))
    return stack_metrics(metrics | {"param_norm": params, "update_norm": updates})
