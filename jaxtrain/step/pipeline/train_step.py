"""The train step of a model with pipeline stages: the schedule's operations, then the update in two halves.

Each stage measures its share of the loss and of the squared gradient norm. One program over all devices adds these up
and decides whether the update is accepted. Then each stage applies that decision to its layers.
"""

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
from jaxtrain.step.batch import Batch, Hyperparams, Resident
from jaxtrain.step.gradients import GradientSums, like_params
from jaxtrain.step.metrics import StepMetrics, stack_metrics
from jaxtrain.step.pipeline import schedule as schedules
from jaxtrain.step.pipeline.chunks import (
    ModelChunk,
    chunk_inputs,
    forward,
    on_layers,
    on_stage,
    training_chunks,
    weights_of,
)
from jaxtrain.step.pipeline.dispatch import TRANSFERS, StageExecutors, local_stages, make_executors
from jaxtrain.step.pipeline.programs import (
    ChunkPrograms,
    StagePrograms,
    activation_shapes,
    compile_chunk,
    compile_stage,
    compile_together,
    outputs_of,
    shapes_on_stage,
)
from jaxtrain.step.pipeline.schedule import Op, PipelineSchedule
from jaxtrain.step.pipeline.timeline import Event
from jaxtrain.step.pipeline.transfer import StageTransfer, edge, make_transfers
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.step.update import UpdateDecision, decide_update, step_metrics
from jaxtrain.trees import PyTree, shapes_of


@dataclasses.dataclass(frozen=True)
class PipelineTrainStep:
    """The compiled train step; called as `step.train_step.MeshTrainStep` is.

    Attributes:
      programs: all XLA programs of this process by name, for the audit and for `memory_analysis`.
      after: the shardings of the state after a step.
      accumulator: the shardings of the gradients between microbatches.
      layout: of the run.
      schedule: which operations each stage runs, in order.
      order: all stages' operations in one order, for a process with one dispatching thread.
      transfer_order: the order in which the operations' results are sent between processes.
      chunks: the programs of the chunks on this process's stages, by the chunk's index.
      stages: the programs of this process's stages, by stage.
      transfers: between neighbouring chunks, by (source, target).
      decide: (step, loss_scale, batch's step, hyperparams, float [stages, 3]) -> (`UpdateDecision`, metrics).
      finish: (float [stages, 2], metrics) -> `StepMetrics`.
      executors: who dispatches.
      trace: whether and where to record the operations' times.
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
    executors: StageExecutors
    trace: Trace
    per_call: int = 1

    @functools.cached_property
    def microbatches(self) -> dict[int, tuple[jax.Array, ...]]:
        """For each stage the indices of the microbatches, int32 [] each, put on its devices at the first step."""
        return {stage: _microbatch_indices(self.layout, stage) for stage in self.stages}

    def __call__(self, state: TrainState, batch: Batch, resident: Resident) -> tuple[TrainState, StepMetrics]:
        """Makes one update. Does not wait for the devices.

        Args:
          state: is donated.
          batch: of this update.
          resident: the data set, if it lives on the devices.

        Returns:
          The new state, and the metrics.
        """
        leaves, structure = jax.tree.flatten(state)
        states = {stage: self.state_of(stage, leaves) for stage in self.stages}
        execution = StepExecution(self, states, batch, resident)
        measured = execution.run(self.executors if execution.events is None else self.trace.executors)
        if execution.events is not None:
            self.trace.write(execution.events)
        sharding = self.layout.sharding(P("stage"))
        numbers = join(measured, (self.layout.stages, 3), sharding)
        decision, metrics = self.decide(state.step, state.loss_scale, batch.step, batch.hyperparams, numbers)
        decisions = {stage: on_stage(self.layout, stage, decision) for stage in self.stages}
        updated = self.executors.run_all(
            {stage: functools.partial(self._update, execution, stage, decisions[stage]) for stage in self.stages}
        )
        norms = join([stage_norms for _, stage_norms in updated], (self.layout.stages, 2), sharding)
        after = self._joined(leaves, [stage_state for stage_state, _ in updated])
        return structure.unflatten(after), self.finish(norms, metrics)

    def state_of(self, stage: int, leaves: Sequence[jax.Array]) -> TrainState:
        """The state of one stage, on its devices, from the leaves of the whole state."""
        programs = self.stages[stage]
        return programs.structure.unflatten(on_stage(self.layout, stage, [leaves[i] for i in programs.indices]))

    def _update(self, execution: StepExecution, stage: int, decision: UpdateDecision) -> tuple[TrainState, jax.Array]:
        return self.stages[stage].update(execution.states[stage], execution.sums_of(stage), decision)

    def _joined(self, leaves: Sequence[jax.Array], states: Sequence[TrainState]) -> list[jax.Array]:
        """The leaves of the whole state, those of this process's stages replaced by those of `states`."""
        replacements = collections.defaultdict(list)
        for programs, state in zip(self.stages.values(), states, strict=True):
            for i, leaf in zip(programs.indices, jax.tree.leaves(state), strict=True):
                replacements[i].append(leaf)
        after = list(leaves)
        for i, copies in replacements.items():
            old, after[i] = leaves[i], copies[0]
            if old.sharding.mesh == self.layout.mesh:  # every stage has it
                after[i] = join(copies, old.shape, old.sharding)
        return after


@dataclasses.dataclass
class Trace:
    """Measures the time of each operation of one step, and writes the times to a JSON file.

    That step waits for each operation. It runs in a thread for each stage, also on an accelerator.

    Attributes:
      step: how many calls of `is_due` are left until that step; it is never due from 0 on.
      path: of the JSON file.
      executors: for that step.
    """

    step: int
    path: Path
    executors: StageExecutors

    def is_due(self) -> bool:
        """Whether the coming step is to be measured. Must be called once a step."""
        self.step -= 1
        return self.step == 0

    def write(self, events: Sequence[Event]) -> None:
        """Writes the operations of this process. Times are in seconds since 1970."""
        rows = [{**e.op._asdict(), "stage": e.stage, "start": e.start, "end": e.end} for e in events]
        atomic_write(self.path, json.dumps(rows) + "\n")


class StepExecution:
    """One step while it runs: what each chunk holds, and the activations and gradients between chunks.

    What a chunk holds is touched only by its stage's thread. Activations and gradients are futures: in `_made` until a
    transfer between processes takes them, in `_arrived` once they are on the devices that need them.

    Attributes:
      step: whose programs run.
      states: for each stage of this process, the state before the update.
      events: the times of the operations, if they are to be measured; otherwise `None`.
    """

    def __init__(self, step: PipelineTrainStep, states: Mapping[int, TrainState], batch: Batch, resident: Resident):
        self.step, self.states = step, states
        self._data = {stage: on_stage(step.layout, stage, (batch, resident)) for stage in step.stages}
        self._params: dict[int, PyTree] = {}
        self._stats: dict[int, PyTree] = {}
        self._inputs: dict[int, dict[str, Any]] = {}
        self._sums: dict[int, GradientSums] = {}
        self._sums_of_stage: dict[int, tuple[GradientSums, ...]] = {}
        self._residuals: dict[tuple[int, int], tuple[Any, ...]] = {}
        ops = [op for ops in step.schedule.ops for op in ops]
        self._made = {op: concurrent.futures.Future() for op in ops}
        self._arrived = {op: concurrent.futures.Future() for op in ops}
        self.events: list[Event] | None = [] if step.trace.is_due() else None

    def run(self, executors: StageExecutors) -> list[jax.Array]:
        """Runs the whole schedule. Returns the result of `StagePrograms.measure` for each stage: float [1, 3]."""
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
                # A stage runs one operation at a time. XLA:CPU has few threads: programs that wait for another process
                # could hold all of them, and the programs that this process waits for would never run.
                jax.block_until_ready(self.do(op))
            return self.end(stage)

        def transfer_all() -> None:
            for op in self.step.transfer_order:
                self.transfer(op)

        futures = [executors.submit(stage, guarded, work, stage) for stage in executors.stages]
        futures.append(executors.submit(TRANSFERS, guarded, transfer_all))
        return [future.result() for future in futures][:-1]

    def begin(self, stage: int) -> None:
        """Prepares the parameters of a stage's chunks, and sets their accumulators to zero."""
        state = self.states[stage]
        batch, resident = self._data[stage]
        for k, programs in self.step.chunks.items():
            chunk = programs.chunk
            if chunk.stage != stage:
                continue
            params, self._stats[k] = weights_of(chunk, state.params, state.batch_stats)
            self._params[k] = programs.prepare(params) if programs.prepare else params
            self._inputs[k] = chunk_inputs(chunk, state, batch, resident, ())
            self._sums[k] = programs.zeros()

    def do(self, op: Op) -> Any:
        """Waits until the operations that `op` needs are dispatched, and dispatches it.

        Returns:
          The chunk's accumulators and the operation's result: an activation or a gradient.
        """
        programs, k = self.step.chunks[op.chunk], op.chunk
        chunk = programs.chunk
        inputs = self._inputs[k] | {"index": self.step.microbatches[chunk.stage][op.microbatch]}
        needs_none = chunk.first if op.kind == "F" else chunk.last or not chunk.gets_gradient
        before = op.chunk - 1 if op.kind == "F" else op.chunk + 1
        arrived = () if needs_none else take(self._arrived, Op(op.kind, before, op.microbatch))
        began = time.time()
        if op.kind == "F":
            result, aux, residuals = programs.forward(self._params[k], self._stats[k], arrived, inputs)
            self._residuals[k, op.microbatch] = (residuals, result, aux, arrived)
        else:
            residuals, output, aux, x = self._residuals.pop((k, op.microbatch))
            self._sums[k], result = programs.backward(
                self._sums[k], arrived, residuals, output, aux, self._params[k], self._stats[k], x, inputs
            )
        if self.events is not None:
            jax.block_until_ready((self._sums[k], result))
            self.events.append(Event(op, chunk.stage, began, time.time()))
        self._send(op, result)
        return self._sums[k], result

    def _send(self, op: Op, array: Any) -> None:
        transfer = self.step.transfers.get(edge(op))
        if transfer is None:
            return  # the loss; or the chunk before needs no gradient
        if transfer.crosses:
            self._made[op].set_result(array)
        else:
            self._arrived[op].set_result(transfer.copy(array))

    def transfer(self, op: Op) -> None:
        """Sends the result of `op` to another process, if it must go there. All processes call this in the same order."""
        transfer = self.step.transfers.get(edge(op))
        if transfer is None or not (transfer.crosses and transfer.joins):
            return
        makes = op.chunk in self.step.chunks
        array = transfer.exchange(take(self._made, op) if makes else None)
        if array is not None:
            self._arrived[op].set_result(array)

    def end(self, stage: int) -> jax.Array:
        """float [1, 3]: what the decision on the update needs to know of a stage."""
        programs, chunks = self.step.stages[stage], [k for k, p in self.step.chunks.items() if p.chunk.stage == stage]
        sums = tuple(self._sums.pop(k) for k in chunks)
        if programs.exchange is not None:
            sums = programs.exchange(self.states[stage], sums, self._inputs[chunks[0]]["seed"])
        self._sums_of_stage[stage] = sums
        return programs.measure(self.states[stage], sums)

    def sums_of(self, stage: int) -> tuple[GradientSums, ...]:
        """What the update of a stage is made of: the accumulators of its chunks, or their exchange."""
        return self._sums_of_stage[stage]

    def fail(self, error: BaseException) -> None:
        """Raises `error` in every thread that waits for an activation or a gradient."""
        for future in [*self._made.values(), *self._arrived.values()]:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(error)


def take(futures: dict[Op, concurrent.futures.Future[Any]], op: Op) -> Any:
    """Waits for the result of `op` and removes it, so that an activation lives no longer than it is needed."""
    value = futures[op].result()
    del futures[op]
    return value


# ----------------------------------------------------------------------------------------------------------- compiling


@dataclasses.dataclass(frozen=True)
class StageShapes:
    """What each stage has of the state, the batch and the data set, as shapes with shardings.

    Attributes:
      layout: of the run.
      whole: the whole state.
      states: for each stage, its part of the state, on its devices.
      indices: for each stage, which leaves of the whole state these are.
      batch: the global batch.
      resident: the data set.
    """

    layout: Layout
    whole: TrainState
    states: tuple[TrainState, ...]
    indices: tuple[tuple[int, ...], ...]
    batch: Batch
    resident: Resident

    @classmethod
    def of(
        cls, layout: Layout, chunks: Sequence[ModelChunk], state: TrainState, batch: Batch, resident: Resident
    ) -> StageShapes:
        """The shapes of `state`, `batch` and `resident`, and of their parts on each stage."""
        state, batch, resident = shapes_of((state, batch, resident))
        leaves, structure = jax.tree.flatten(state)
        numbered, every = structure.unflatten(range(len(leaves))), frozenset(layout.stage_of)
        states, indices = [], []
        for stage in range(layout.stages):
            names = [name for chunk in chunks if chunk.stage == stage for name in chunk.names]
            states.append(shapes_on_stage(on_layers(state, names, every), layout, stage))
            indices.append(tuple(jax.tree.leaves(on_layers(numbered, names, every))))
        return cls(layout, state, tuple(states), tuple(indices), batch, resident)

    def inputs_of(self, chunk: ModelChunk) -> dict[str, Any]:
        """The shapes of the `inputs` of `forward`, for one chunk."""
        batch, resident = shapes_on_stage((self.batch, self.resident), self.layout, chunk.stage)
        index = jax.ShapeDtypeStruct((), np.int32, sharding=self.layout.sharding(P(), chunk.stage))
        return chunk_inputs(chunk, self.states[chunk.stage], batch, resident, index)

    def run_chunk(self, task: Task, chunk: ModelChunk, x: Any) -> jax.ShapeDtypeStruct:
        """The shape of what a chunk makes of an activation of shape `x`."""
        state = self.states[chunk.stage]
        weights = weights_of(chunk, state.params, state.batch_stats)
        function = functools.partial(forward, task, self.layout.on_stage(chunk.stage), chunk)
        return jax.eval_shape(function, *weights, x, self.inputs_of(chunk))[0]

    def after(self, stages: Sequence[StagePrograms]) -> TrainState:
        """The shardings of the state after an update by the programs of `stages`.

        What every stage has is joined with its old sharding. How other processes' programs leave their stages' leaves
        is not known here; they are assumed to be where the layout places them.
        """
        leaves, structure = jax.tree.flatten(self.whole)
        shardings = {i: sharding for programs in stages for i, sharding in programs.after.items()}
        return structure.unflatten(
            [
                leaf.sharding if leaf.sharding.mesh == self.layout.mesh else shardings.get(i, leaf.sharding)
                for i, leaf in enumerate(leaves)
            ]
        )

    def accumulator(self, task: Task, chunks: Sequence[ChunkPrograms]) -> PyTree:
        """The shardings of the gradients between microbatches: those of the programs of `chunks`, else the layout's."""
        shardings: dict[str, Any] = {}
        for stage, state in enumerate(self.states):
            shardings |= like_params(self.layout.on_stage(stage), "gradients", task.groups.trained(state.params))
        for programs in chunks:
            shardings |= programs.zeros.output_shardings.gradients
        return shardings


def make_pipeline_train_step(
    task: Task, layout: Layout, state: TrainState, batch: Batch, resident: Resident, trace: Path
) -> PipelineTrainStep:
    """Compiles the programs of this process's stages, in parallel threads.

    Args:
      task: what to compute.
      layout: of the state and the batch; with several stages.
      state: arrays or shapes with shardings.
      batch: a global batch, or its shapes with shardings.
      resident: the data set, if it lives on the devices.
      trace: the file for `layout.trace_step`.
    """
    config, local = layout.config, local_stages(layout)
    schedule = schedules.make_pipeline_schedule(config.schedule, config.stages, config.microbatches, config.chunks)
    chunks = training_chunks(layout, task.groups, state.params)
    shapes = StageShapes.of(layout, chunks, state, batch, resident)
    activations = activation_shapes(layout, chunks, functools.partial(shapes.run_chunk, task))
    chunk_programs = compile_together(
        [
            compile_chunk(
                task, layout, chunk, shapes.states[chunk.stage], activations[chunk.index], shapes.inputs_of(chunk)
            )
            for chunk in chunks
            if chunk.stage in local
        ]
    )
    decide, finish, decision = _compile_decision(task, shapes)
    stage_programs = _compile_stages(task, shapes, local, chunk_programs, decision)
    programs = {"decide": decide, "finish": finish}
    for compiled in (*chunk_programs, *stage_programs):
        programs |= compiled.named
    return PipelineTrainStep(
        programs=programs,
        after=shapes.after(stage_programs),
        accumulator=shapes.accumulator(task, chunk_programs),
        layout=layout,
        schedule=schedule,
        order=schedules.total_order(schedule),
        transfer_order=schedules.transfer_order(schedule),
        chunks={compiled.chunk.index: compiled for compiled in chunk_programs},
        stages={compiled.stage: compiled for compiled in stage_programs},
        transfers=make_transfers(layout, chunks, activations, back=True),
        decide=decide,
        finish=finish,
        executors=make_executors(layout),
        trace=Trace(config.trace_step, trace, StageExecutors(local, threads=config.trace_step > 0)),
    )


def _compile_stages(
    task: Task, shapes: StageShapes, stages: Sequence[int], chunks: Sequence[ChunkPrograms], decision: UpdateDecision
) -> list[StagePrograms]:
    """The programs of the stages' updates. decision: shapes."""
    makers = []
    for stage in stages:
        sums = tuple(programs.sums for programs in chunks if programs.chunk.stage == stage)
        on_its_devices = shapes_on_stage(decision, shapes.layout, stage)
        indices, state = shapes.indices[stage], shapes.states[stage]
        makers.append(compile_stage(task, shapes.layout, stage, indices, state, on_its_devices, sums))
    return compile_together(makers)


def _compile_decision(task: Task, shapes: StageShapes) -> tuple[Any, Any, UpdateDecision]:
    """The programs `decide` and `finish`, which run on all devices, and the shapes of the decision."""
    layout, state = shapes.layout, shapes.whole
    row = functools.partial(jax.ShapeDtypeStruct, dtype=task.sums_dtype, sharding=layout.sharding(P("stage")))
    batch = shapes.batch
    arguments = (state.step, state.loss_scale, batch.step, batch.hyperparams, row((layout.stages, 3)))
    function = functools.partial(_decide, task)
    decide = jax.jit(function, out_shardings=layout.sharding()).lower(*arguments).compile()
    decision, metrics = outputs_of(decide, jax.eval_shape(function, *arguments))
    finish = jax.jit(_finish, out_shardings=layout.sharding()).lower(row((layout.stages, 2)), metrics).compile()
    return decide, finish, decision


def _microbatch_indices(layout: Layout, stage: int) -> tuple[jax.Array, ...]:
    """int32 [] each, on the devices of `stage`."""

    def on_devices(index: int) -> jax.Array:
        sharding = layout.sharding(P(), stage)
        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_callback((), sharding, lambda _: np.int32(index), dtype=np.int32)

    return tuple(on_devices(index) for index in range(layout.config.microbatches))


def _decide(
    task: Task,
    step: jax.Array,
    loss_scale: PyTree,
    batch_step: jax.Array,
    hyperparams: Hyperparams,
    numbers: jax.Array,
) -> tuple[UpdateDecision, dict[str, Any]]:
    """Whether the update is accepted, and the step's metrics.

    numbers: float [stages, 3], each stage's loss, correct answers, and squared norm of the gradients.
    """
    loss, correct, gradients = jnp.sum(numbers, 0)
    norm = jnp.sqrt(gradients)
    decision = decide_update(step, loss_scale, batch_step, hyperparams, loss, norm, skips=task.skips)
    unknown = jnp.zeros((), numbers.dtype)  # `_finish` fills in the norms
    return decision, step_metrics(loss_scale, decision, loss, correct, unknown, unknown)


def _finish(squares: jax.Array, metrics: dict[str, Any]) -> StepMetrics:
    """`metrics` with the norms. squares: float [stages, 2], each stage's squared norms of the parameters and the update."""
    params, updates = jnp.sqrt(jnp.sum(squares, 0))
    return stack_metrics(metrics | {"param_norm": params, "update_norm": updates})
