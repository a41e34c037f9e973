"""The train step: one optimizer update, `step(state, batch, resident) -> (state, metrics)`.

With one microbatch a step is one program. Several steps may be one program too: a loop on the device over their
batches. That helps models so small that the host cannot dispatch single steps as fast as they run.

With several microbatches the host runs a gradient program for each, which adds to a donated accumulator. Then it runs
an update program. A loop on the device would be slow: a convolution's gradient inside `lax.scan` takes 20-60 times
longer on XLA:CPU (jax#12868). The host needs less than a millisecond to dispatch a program.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxtrain.host.backend import on_cpu
from jaxtrain.parallel.layout import Layout, over_steps
from jaxtrain.step.batch import Batch, Hyperparams, Resident
from jaxtrain.step.exchange import exchange
from jaxtrain.step.gradients import GradientSums, add_sums, like_params, microbatch_gradients, sums_shapes, zero_sums
from jaxtrain.step.local_sgd import local_update
from jaxtrain.step.metrics import StepMetrics
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.step.update import update_state
from jaxtrain.trees import PyTree

NO_OPTIONS: Mapping[str, str] = types.MappingProxyType({})
NO_COMMAND_BUFFERS: Mapping[str, str] = types.MappingProxyType({"xla_gpu_enable_command_buffer": ""})
"""For XLA's compiler: a GPU gets each kernel by itself. In a command buffer (a CUDA graph) a profile does not see them."""


class TrainStep(Protocol):
    """A compiled training step, of any layout.

    Attributes:
      programs: its XLA programs by name, for the audit and for `memory_analysis`.
      after: where they leave the state: a sharding for each leaf.
      accumulator: where gradients rest between microbatches; `None` where nothing is accumulated.
      per_call: how many updates one call may make, of as many batches stacked.
    """

    @property
    def programs(self) -> Mapping[str, Any]: ...
    @property
    def after(self) -> TrainState: ...
    @property
    def accumulator(self) -> PyTree: ...
    @property
    def per_call(self) -> int: ...

    def __call__(self, state: TrainState, batch: Batch, resident: Resident) -> tuple[TrainState, StepMetrics]:
        """Makes the update of one batch, or of `per_call` batches stacked. Donates `state`.

        Asynchronous: the metrics are not there until they are read.
        """
        ...


@dataclasses.dataclass(frozen=True)
class MeshTrainStep:
    """The compiled step of a model without pipeline stages.

    Attributes:
      programs: the XLA programs by name: `step` and, for several steps in one, `call`; or `zeros`, `gradients` and
        `update`.
      after: the shardings of the state after a step.
      accumulator: the shardings of the gradients between microbatches, or `None` where there is no accumulator.
      layout: of the state and the batch.
      per_call: how many updates the program `call` makes; 1 where there is no such program.
    """

    programs: Mapping[str, jax.stages.Compiled]
    after: TrainState
    layout: Layout
    accumulator: PyTree = None
    per_call: int = 1

    @functools.cached_property
    def microbatches(self) -> list[jax.Array]:
        """The microbatches' indices, int32 [] each, put on the devices at the first step."""
        count, sharding = self.layout.config.microbatches, self.layout.sharding()
        return [jax.device_put(np.int32(index), sharding) for index in range(count)]

    def __call__(self, state: TrainState, batch: Batch, resident: Resident) -> tuple[TrainState, StepMetrics]:
        """Makes one update, or `per_call` updates. Does not wait for the devices.

        Args:
          state: is donated.
          batch: of one update; or of `per_call` updates, stacked along a new first dim. `batch.step` tells which: int32
            [] or int32 [per_call].
          resident: the data set, if it lives on the devices.

        Returns:
          The new state, and the metrics, stacked like the batches.
        """
        if batch.step.ndim:
            return self.programs["call"](state, batch, resident)
        if "step" in self.programs:
            return self.programs["step"](state, batch, resident)
        sums = self.programs["zeros"]()
        for index in self.microbatches:
            sums = self.programs["gradients"](sums, state, batch, resident, index)
        return self.programs["update"](state, sums, batch.step, batch.hyperparams)


def make_train_step(
    task: Task,
    layout: Layout,
    state: TrainState,
    batch: Batch,
    resident: Resident,
    per_call: int = 1,
    options: Mapping[str, str] = NO_OPTIONS,
) -> MeshTrainStep:
    """Compiles the train step.

    Args:
      task: what to compute.
      layout: of the state and the batch.
      state: arrays or shapes with shardings.
      batch: a global batch, or its shapes with shardings.
      resident: the data set, if it lives on the devices.
      per_call: how many updates one program should make. The result's `per_call` is 1 where that is not possible (the
        host drives the microbatches) or would be slower (`_slow_in_a_loop`).
      options: of XLA's compiler, by their names in `XLA_FLAGS`.
    """
    if layout.config.microbatches == 1:
        return _compile_whole_step(task, layout, state, batch, resident, per_call, options)
    return _compile_accumulating_step(task, layout, state, batch, resident, options)


def _compile_whole_step(
    task: Task,
    layout: Layout,
    state: TrainState,
    batch: Batch,
    resident: Resident,
    per_call: int,
    options: Mapping[str, str],
) -> MeshTrainStep:
    """One microbatch: the step is one program, and `per_call` steps are one more."""
    update, shardings = _update_function(task, layout, state)

    def step(state: TrainState, batch: Batch, resident: Resident) -> tuple[TrainState, StepMetrics]:
        sums = microbatch_gradients(task, layout, state, batch, resident, 0)
        return update(state, sums, batch.step, batch.hyperparams)

    def call(state: TrainState, batches: Batch, resident: Resident) -> tuple[TrainState, StepMetrics]:
        def one(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
            batch = dataclasses.replace(batch, hyperparams=batches.hyperparams)
            after, metrics = step(state, batch, resident)
            return jax.lax.with_sharding_constraint(after, shardings), metrics

        return jax.lax.scan(one, state, dataclasses.replace(batches, hyperparams=()))

    compiling = functools.partial(jax.jit, out_shardings=(shardings, layout.sharding()), donate_argnums=0)
    lowered = compiling(step).lower(state, batch, resident)
    if per_call > 1 and _slow_in_a_loop(layout, lowered):
        per_call = 1
    programs = {"step": lowered.compile(dict(options))}
    if per_call > 1:
        programs["call"] = compiling(call).lower(state, stacked(batch, per_call), resident).compile(dict(options))
    return MeshTrainStep(programs, programs["step"].output_shardings[0], layout, per_call=per_call)


def _compile_accumulating_step(
    task: Task, layout: Layout, state: TrainState, batch: Batch, resident: Resident, options: Mapping[str, str]
) -> MeshTrainStep:
    """Several microbatches: a program that adds a microbatch's gradients to the accumulators, and one for the update."""
    update, shardings = _update_function(task, layout, state)
    zero = functools.partial(zero_sums, task, layout, state.params, state.batch_stats)
    sums = sums_shapes(task, layout, state.params, state.batch_stats)
    sums_shardings = jax.tree.map(lambda leaf: leaf.sharding, sums)

    def accumulate(
        sums: GradientSums, state: TrainState, batch: Batch, resident: Resident, index: jax.Array
    ) -> GradientSums:
        return add_sums(sums, microbatch_gradients(task, layout, state, batch, resident, index))

    index = jax.ShapeDtypeStruct((), np.int32, sharding=layout.sharding())
    zeros = jax.jit(zero, out_shardings=sums_shardings)
    adding = jax.jit(accumulate, out_shardings=sums_shardings, donate_argnums=0)
    updating = jax.jit(update, out_shardings=(shardings, layout.sharding()), donate_argnums=0)
    lowered = {
        "zeros": zeros.lower(),
        "gradients": adding.lower(sums, state, batch, resident, index),
        "update": updating.lower(state, sums, batch.step, batch.hyperparams),
    }
    programs = {name: program.compile(dict(options)) for name, program in lowered.items()}
    accumulator = programs["zeros"].output_shardings.gradients
    return MeshTrainStep(programs, programs["update"].output_shardings[0], layout, accumulator)


def _update_function(task: Task, layout: Layout, state: TrainState) -> tuple[Callable[..., Any], TrainState]:
    """The update as a function (state, sums, step, hyperparams), and the shardings of the state."""
    shardings = layout.shardings(state)
    if layout.trains_by_device:
        return functools.partial(local_update, task, layout), shardings
    updating = like_params(layout, "opt_state", task.groups.trained(state.params))
    update = functools.partial(update_state, task, shardings, updating)

    def exchanging(
        state: TrainState, sums: GradientSums, step: jax.Array, hyperparams: Hyperparams
    ) -> tuple[TrainState, StepMetrics]:
        return update(state, exchange(task, layout, state, sums, hyperparams.seed), step, hyperparams)

    return exchanging if layout.accumulates_by_device else update, shardings


def stacked(batch: Batch, count: int) -> Batch:
    """The shapes and shardings of `count` batches in one: the arrays of `batch` with the steps as a new first dim."""

    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=over_steps(leaf.sharding))

    shapes = jax.tree.map(shape, dataclasses.replace(batch, hyperparams=()))
    return dataclasses.replace(shapes, hyperparams=batch.hyperparams)


def _slow_in_a_loop(layout: Layout, step: jax.stages.Lowered) -> bool:
    """Whether `step` has a convolution and runs on a CPU: XLA:CPU computes its gradient 20-60 times slower in a loop.

    See jax#12868. GPUs have no such problem.
    """
    return on_cpu(layout.mesh.devices.flat) and "stablehlo.convolution" in step.as_text()
