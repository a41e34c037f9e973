"""Evaluation through the stages: several batches on their way at once, one in each chunk."""

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
from jaxtrain.step.pipeline.dispatch import StageExecutors, local_stages, make_executors
from jaxtrain.step.pipeline.programs import placed, shapes_of, shapes_on_stage
from jaxtrain.step.pipeline.transfer import StageTransfer, make_transfers
from jaxtrain.step.task import Task
from jaxtrain.trees import PyTree


@dataclasses.dataclass(frozen=True)
class PipelineEvalStep:
    """`step.eval_step.EvalStep` for several stages: several batches are on their way at once, one in each chunk."""

    layout: Layout
    chunks: tuple[ModelChunk, ...]
    transfers: Mapping[tuple[int, int], StageTransfer]
    zeros: Callable[[], PyTree]
    programs: Mapping[int, Any]
    executors: StageExecutors

    def __call__(
        self, params: PyTree, batch_stats: PyTree, batches: Iterable[EvalBatch], resident: Resident
    ) -> EvalResult:
        """Reads the result once, at the end; the host stays a few batches ahead of the devices."""
        weights = {k: weights_of(self.chunks[k], params, batch_stats) for k in self.programs}
        sums, in_flight = _done(self.zeros()), collections.deque()
        try:
            for batch in batches:
                x = _done(())
                for part in self.chunks:
                    k = part.index
                    if k in self.programs:
                        given = on_stage(self.layout, part.stage, _eval_given(part, batch, resident))
                        x = self.executors.submit(part.stage, self._run, part, weights[k], x, sums, given)
                        in_flight.append(x)
                    transfer = self.transfers.get((k, k + 1))
                    if transfer is not None and transfer.crosses and transfer.joins:
                        made = x if k in self.programs else _done(None)
                        x = self.executors.submit("transfers", _exchange, transfer, made)
                        in_flight.append(x)
                if self.chunks[-1].index in self.programs:
                    sums = x
                while len(in_flight) > (IN_FLIGHT + 1) * len(self.programs):
                    jax.block_until_ready(in_flight.popleft().result())
        finally:  # before another program that spans processes: all enqueue those in the same order
            for each in in_flight:
                each.result()
        return self._everywhere(sums.result())

    def _run(self, part: ModelChunk, own: Any, x: Any, sums: Any, given: Any) -> Any:
        if part.last:
            return self.programs[part.index](sums.result(), *own, x.result(), given)
        y, transfer = self.programs[part.index](*own, x.result(), given), self.transfers[part.index, part.index + 1]
        return y if transfer.crosses else transfer.copy(y)

    def _everywhere(self, sums: PyTree) -> EvalResult:
        """The last stage's sums, on every process."""
        owners = sorted(
            {device.process_index for device in self.layout.on_stage(self.chunks[-1].stage).mesh.devices.flat}
        )
        if len(owners) < jax.process_count():
            with jax.transfer_guard("allow"):
                source = jax.process_index() == owners[0]
                here = jax.device_get(sums) if self.chunks[-1].index in self.programs else sums
                sums = multihost_utils.broadcast_one_to_all(here, is_source=source)
        return summarize(jax.device_get(sums))


def _exchange(transfer: StageTransfer, made: concurrent.futures.Future[Any]) -> Any:
    return transfer.exchange(made.result())


def _done(value: Any) -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result(value)
    return future


def _eval_given(part: ModelChunk, batch: EvalBatch, resident: Resident) -> dict[str, Any]:
    if part.first:
        return {"rows": batch.batch.rows, "images": batch.batch.images, "resident": resident.images}
    if part.last:
        labels = {"labels": batch.batch.labels, "resident": resident.labels}
        return {"rows": batch.batch.rows, "mask": batch.mask} | labels
    return {}


def make_pipeline_eval_step(
    task: Task, layout: Layout, params: PyTree, batch_stats: PyTree, batch: EvalBatch, resident: Resident
) -> PipelineEvalStep:
    """Compiles the evaluation of one batch, as `step.eval_step.make_eval_step` does."""
    chunks, here = chunks_of(layout), local_stages(layout)
    params, batch_stats, batch, resident = shapes_of((params, batch_stats, batch, resident))
    zero = functools.partial(zero_sums_of, task)
    lowered: dict[int, Any] = {}
    inputs: list[Any] = [()]
    for part in chunks:
        lay, x = layout.on_stage(part.stage), inputs[-1]
        own, stats = weights_of(part, params, batch_stats)
        given = shapes_on_stage(_eval_given(part, batch, resident), layout, part.stage)
        run = functools.partial(_evaluate_chunk, task, lay, part)
        if not part.last:
            y = jax.eval_shape(run, own, stats, x, given)
            where = layout.sharding(layout.examples.spec, chunks[part.index + 1].stage)
            inputs.append(jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=where))
        if part.stage not in here:
            continue
        if part.last:
            sums = placed(jax.eval_shape(zero), lay.sharding())
            adding = functools.partial(_add_chunk, task, lay, run)
            lowered[part.index] = jax.jit(adding, out_shardings=lay.sharding()).lower(sums, own, stats, x, given)
        else:
            lowered[part.index] = jax.jit(run, out_shardings=lay.examples).lower(own, stats, x, given)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(lowered, pool.map(lambda each: each.compile(), lowered.values()), strict=True))
    zeros: Any = jax.jit(zero, out_shardings=layout.sharding(P(), chunks[-1].stage))
    if chunks[-1].stage not in here:
        zeros = functools.partial(jax.tree.map, lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(zero))
    transfers = make_transfers(layout, chunks, inputs, back=False)
    return PipelineEvalStep(layout, tuple(chunks), transfers, zeros, programs, make_executors(layout))


def _evaluate_chunk(
    task: Task, layout: Layout, part: ModelChunk, params: PyTree, batch_stats: PyTree, x: Any, given: Mapping[str, Any]
) -> jax.Array:
    if part.first:
        x = eval_inputs(task.preprocess, select_from(given["images"], given["rows"], given["resident"], 0, layout))
    context = Context(example=jnp.arange(x.shape[0], dtype=jnp.int32))
    wrap = layer_wrapper(layout, params, "none")
    y, _ = task.model.apply(params, batch_stats, x, context, wrap=wrap, layers=part.layers)
    return jax.lax.with_sharding_constraint(y, layout.examples)


def _add_chunk(
    task: Task,
    layout: Layout,
    run: Callable[..., jax.Array],
    sums: PyTree,
    params: PyTree,
    batch_stats: PyTree,
    x: Any,
    given: Any,
) -> PyTree:
    labels = select_from(given["labels"], given["rows"], given["resident"], 0, layout)
    return add_to_sums(task, sums, run(params, batch_stats, x, given), labels, given["mask"][0])
