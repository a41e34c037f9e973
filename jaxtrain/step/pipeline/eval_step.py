"""The evaluation step of a model with pipeline stages: several batches are on their way at once, one in each chunk."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from jaxtrain.data.augment import eval_inputs
from jaxtrain.models.layers import Context
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.batch import EvalBatch, Resident, select_from
from jaxtrain.step.eval_step import IN_FLIGHT, EvalResult, add_to_sums, summarize, zero_sums_of
from jaxtrain.step.layer_wrap import layer_wrapper
from jaxtrain.step.pipeline.chunks import ModelChunk, chunks_of, on_stage, weights_of
from jaxtrain.step.pipeline.dispatch import TRANSFERS, StageExecutors, completed, local_stages, make_executors
from jaxtrain.step.pipeline.programs import activation_shapes, shapes_on_stage
from jaxtrain.step.pipeline.transfer import StageTransfer, make_transfers
from jaxtrain.step.task import Task
from jaxtrain.trees import PyTree, shapes_of


@dataclasses.dataclass(frozen=True)
class PipelineEvalStep:
    """The compiled evaluation step; called as `step.eval_step.EvalStep` is.

    Attributes:
      layout: of the run.
      chunks: of the model, in order.
      transfers: between neighbouring chunks, by (source, target).
      zeros: makes the sums of no example, on the last stage.
      programs: of the chunks on this process's stages, by the chunk's index. (params, batch_stats, x, inputs) ->
        activation; the last chunk's is (sums, params, batch_stats, x, inputs) -> sums.
      executors: who dispatches.
    """

    layout: Layout
    chunks: tuple[ModelChunk, ...]
    transfers: Mapping[tuple[int, int], StageTransfer]
    zeros: Callable[[], PyTree]
    programs: Mapping[int, Any]
    executors: StageExecutors

    def __call__(
        self, params: PyTree, batch_stats: PyTree, batches: Iterable[EvalBatch], resident: Resident
    ) -> EvalResult:
        """Evaluates weights on a split. The host is a few batches ahead of the devices, and waits for them at the end.

        Args:
          params: float arrays, keyed by layer, sharded as those that the step was compiled for.
          batch_stats: the running statistics, keyed by layer.
          batches: of the split, each with the same shapes.
          resident: the data set, if it lives on the devices.
        """
        weights = {k: weights_of(self.chunks[k], params, batch_stats) for k in self.programs}
        sums, in_flight = completed(self.zeros()), collections.deque()
        try:
            for batch in batches:
                x = completed(())
                for chunk in self.chunks:
                    k = chunk.index
                    if k in self.programs:
                        inputs = on_stage(self.layout, chunk.stage, _eval_inputs(chunk, batch, resident))
                        x = self.executors.submit(chunk.stage, self._run, chunk, weights[k], x, sums, inputs)
                        in_flight.append(x)
                    transfer = self.transfers.get((k, k + 1))
                    if transfer is not None and transfer.crosses and transfer.joins:
                        made = x if k in self.programs else completed(None)
                        x = self.executors.submit(TRANSFERS, _exchange, transfer, made)
                        in_flight.append(x)
                if self.chunks[-1].index in self.programs:
                    sums = x
                while len(in_flight) > (IN_FLIGHT + 1) * len(self.programs):
                    jax.block_until_ready(in_flight.popleft().result())
        finally:  # All processes must enqueue programs that span processes in one order: these before any other.
            for future in in_flight:
                future.result()
        return self._summarize_everywhere(sums.result())

    def _run(self, chunk: ModelChunk, weights: tuple[PyTree, PyTree], x: Any, sums: Any, inputs: Any) -> Any:
        """Runs a chunk's program on one batch. x, sums: futures. Returns the next chunk's `x`, or the new sums."""
        program = self.programs[chunk.index]
        if chunk.last:
            return program(sums.result(), *weights, x.result(), inputs)
        y, transfer = program(*weights, x.result(), inputs), self.transfers[chunk.index, chunk.index + 1]
        return y if transfer.crosses else transfer.copy(y)

    def _summarize_everywhere(self, sums: PyTree) -> EvalResult:
        """The result, on every process, from the last stage's sums."""
        last = self.chunks[-1]
        owners = sorted({device.process_index for device in self.layout.on_stage(last.stage).mesh.devices.flat})
        if len(owners) < jax.process_count():
            with jax.transfer_guard("allow"):
                is_source = jax.process_index() == owners[0]
                local = jax.device_get(sums) if last.index in self.programs else sums
                sums = multihost_utils.broadcast_one_to_all(local, is_source=is_source)
        return summarize(jax.device_get(sums))


def _exchange(transfer: StageTransfer, made: concurrent.futures.Future[Any]) -> Any:
    return transfer.exchange(made.result())


def _eval_inputs(chunk: ModelChunk, batch: EvalBatch, resident: Resident) -> dict[str, Any]:
    """What a chunk's program takes of a batch: the first chunk images, the last chunk labels and the mask."""
    if chunk.first:
        return {"rows": batch.batch.rows, "images": batch.batch.images, "resident": resident.images}
    if chunk.last:
        labels = {"labels": batch.batch.labels, "resident": resident.labels}
        return {"rows": batch.batch.rows, "mask": batch.mask} | labels
    return {}


def make_pipeline_eval_step(
    task: Task, layout: Layout, params: PyTree, batch_stats: PyTree, batch: EvalBatch, resident: Resident
) -> PipelineEvalStep:
    """Compiles the evaluation step; the arguments are those of `step.eval_step.make_eval_step`."""
    chunks, local = chunks_of(layout), local_stages(layout)
    params, batch_stats, batch, resident = shapes_of((params, batch_stats, batch, resident))
    zero = functools.partial(zero_sums_of, task)

    def chunk_function(chunk: ModelChunk) -> Callable[..., jax.Array]:
        return functools.partial(_evaluate_chunk, task, layout.on_stage(chunk.stage), chunk)

    def arguments(chunk: ModelChunk, x: Any) -> tuple[Any, ...]:
        inputs = shapes_on_stage(_eval_inputs(chunk, batch, resident), layout, chunk.stage)
        return (*weights_of(chunk, params, batch_stats), x, inputs)

    activations = activation_shapes(
        layout, chunks, lambda chunk, x: jax.eval_shape(chunk_function(chunk), *arguments(chunk, x))
    )
    lowered: dict[int, jax.stages.Lowered] = {}
    for chunk, x in zip(chunks, activations, strict=True):
        if chunk.stage not in local:
            continue
        stage_layout, function = layout.on_stage(chunk.stage), chunk_function(chunk)
        if chunk.last:
            sums = shapes_of(jax.eval_shape(zero), stage_layout.sharding())
            function = functools.partial(_add_chunk, task, stage_layout, function)
            program = jax.jit(function, out_shardings=stage_layout.sharding())
            lowered[chunk.index] = program.lower(sums, *arguments(chunk, x))
        else:
            program = jax.jit(function, out_shardings=stage_layout.examples)
            lowered[chunk.index] = program.lower(*arguments(chunk, x))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values()), strict=True))
    zeros: Any = jax.jit(zero, out_shardings=layout.sharding(P(), chunks[-1].stage))
    if chunks[-1].stage not in local:
        zeros = functools.partial(jax.tree.map, lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(zero))
    transfers = make_transfers(layout, chunks, activations, back=False)
    return PipelineEvalStep(layout, tuple(chunks), transfers, zeros, programs, make_executors(layout))


def _evaluate_chunk(
    task: Task,
    layout: Layout,
    chunk: ModelChunk,
    params: PyTree,
    batch_stats: PyTree,
    x: Any,
    inputs: Mapping[str, Any],
) -> jax.Array:
    """The activation, or the last chunk's logits, float [B, ...]. x: of the chunk before; the first takes the images."""
    if chunk.first:
        x = eval_inputs(task.preprocess, select_from(inputs["images"], inputs["rows"], inputs["resident"], 0, layout))
    context = Context(example=jnp.arange(x.shape[0], dtype=jnp.int32))
    wrap = layer_wrapper(layout, params, "none")
    y, _ = task.model.apply(params, batch_stats, x, context, wrap=wrap, layers=chunk.layers)
    return jax.lax.with_sharding_constraint(y, layout.examples)


def _add_chunk(
    task: Task,
    layout: Layout,
    function: Callable[..., jax.Array],
    sums: PyTree,
    params: PyTree,
    batch_stats: PyTree,
    x: Any,
    inputs: Any,
) -> PyTree:
    """The sums with one more batch. function: makes the logits."""
    labels = select_from(inputs["labels"], inputs["rows"], inputs["resident"], 0, layout)
    return add_to_sums(task, sums, function(params, batch_stats, x, inputs), labels, inputs["mask"][0])
