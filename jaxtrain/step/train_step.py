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
from typing import Any, Protocol

import jax
import numpy as np

from jaxtrain.host.backend import on_cpu
from jaxtrain.parallel.layout import Layout, over_steps
from jaxtrain.step.batch import Batch, Resident
from jaxtrain.step.gradients import GradientSums, like_params, microbatch_gradients, zero_sums
from jaxtrain.step.metrics import StepMetrics
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.step.update import update_state
from jaxtrain.trees import PyTree


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

    programs: its XLA programs by name, for the audit and for `memory_analysis`. after: where they leave the state.
    accumulator: where the gradients rest between microbatches, or `None` where there is no accumulator. per_call: how many
    updates the program `call` makes; 1 where there is no such program.
    """

    programs: Mapping[str, jax.stages.Compiled]
    after: TrainState
    accumulator: PyTree = None
    microbatches: tuple[jax.Array, ...] = ()
    per_call: int = 1

    def __call__(self, state: TrainState, batch: Batch, resident: Resident) -> tuple[TrainState, StepMetrics]:
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


def make_train_step(
    task: Task, layout: Layout, state: TrainState, batch: Batch, resident: Resident, per_call: int = 1
) -> MeshTrainStep:
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
    gradients = functools.partial(microbatch_gradients, task, layout, gradient_shardings)
    update = functools.partial(update_state, task, state_shardings, like_params(layout, "opt_state", state.params))

    if parts == 1:

        def step(state: TrainState, batch: Batch, resident: Resident) -> tuple[TrainState, StepMetrics]:
            return update(state, gradients(state, batch, resident, 0), batch.step)

        def call(state: TrainState, batches: Batch, resident: Resident) -> tuple[TrainState, StepMetrics]:
            def one(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
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
        return MeshTrainStep(programs, programs["step"].output_shardings[0], per_call=per_call)

    def accumulate(
        sums: GradientSums, state: TrainState, batch: Batch, resident: Resident, index: jax.Array
    ) -> GradientSums:
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
    return MeshTrainStep(programs, programs["update"].output_shardings[0], accumulator, indices)


def stacked(batch: Batch, count: int) -> Batch:
    """The shapes and shardings of `count` such batches as one, with the steps as their first dim."""

    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=over_steps(leaf.sharding))

    return jax.tree.map(shape, batch)


def _slow_in_a_loop(layout: Layout, step: jax.stages.Lowered) -> bool:
    """XLA:CPU computes a convolution's gradient 20-60 times slower in a loop (jax#12868); GPUs do not."""
    return on_cpu(layout.mesh.devices.flat) and "stablehlo.convolution" in step.as_text()
