"""Evaluation: every example counts exactly once, on any number of devices."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.data.augment import eval_inputs
from jaxtrain.models.layers import Context
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.batch import EvalBatch, Resident, select_microbatch
from jaxtrain.step.layer_wrap import layer_wrapper
from jaxtrain.step.task import Task
from jaxtrain.trees import PyTree

# Enough to keep the devices busy. Without a bound, streamed batches would pile up in the devices' memory, and on simulated
# devices the threads of XLA:CPU run out: executions of one program that wait for each other's collectives never end.
IN_FLIGHT = 2


@flax.struct.dataclass
class EvalSums:
    """loss: sum over examples. top5: how many labels are among the five largest logits. correct, count: [num_classes]."""

    loss: jax.Array
    top5: jax.Array
    correct: jax.Array
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Means over every example of a split. per_class: accuracy of each class (NaN where the split has none of it)."""

    loss: float
    accuracy: float
    top5: float
    examples: int
    per_class: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class EvalStep:
    """The compiled evaluation. Call it with weights, statistics and the batches of a split."""

    zeros: Callable[[], EvalSums]
    add: jax.stages.Compiled

    def __call__(
        self, params: PyTree, batch_stats: PyTree, batches: Iterable[EvalBatch], resident: Resident
    ) -> EvalResult:
        """Reads the result once, at the end. The host stays `IN_FLIGHT` batches ahead of the devices, and no more."""
        sums = self.zeros()
        in_flight: collections.deque[EvalSums] = collections.deque()
        for batch in batches:
            sums = self.add(sums, params, batch_stats, batch, resident)
            in_flight.append(sums)
            if len(in_flight) > IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
        return summarize(jax.device_get(sums))


def summarize(sums: EvalSums) -> EvalResult:
    """Means from sums that are on the host."""
    count = float(np.sum(sums.count))
    with np.errstate(invalid="ignore"):
        per_class = np.asarray(sums.correct) / np.asarray(sums.count)
    return EvalResult(
        loss=float(sums.loss) / count,
        accuracy=float(np.sum(sums.correct)) / count,
        top5=float(sums.top5) / count,
        examples=int(count),
        per_class=tuple(float(x) for x in per_class),
    )


def make_eval_step(
    task: Task, layout: Layout, params: PyTree, batch_stats: PyTree, batch: EvalBatch, resident: Resident
) -> EvalStep:
    """Compiles the evaluation of one batch, for weights that lie as `params` do."""
    zeros = jax.jit(functools.partial(zero_sums_of, task), out_shardings=layout.sharding())
    add = jax.jit(functools.partial(_add, task, layout), out_shardings=layout.sharding())
    sums = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding()), jax.eval_shape(zeros)
    )
    return EvalStep(zeros.lower().compile(), add.lower(sums, params, batch_stats, batch, resident).compile())


def zero_sums_of(task: Task) -> EvalSums:
    """The sums of no example."""
    dtype = task.sums_dtype
    classes = jnp.zeros(task.preprocess.num_classes, dtype)
    return EvalSums(jnp.zeros((), dtype), jnp.zeros((), dtype), classes, classes)


def _add(
    task: Task,
    layout: Layout,
    sums: EvalSums,
    params: PyTree,
    batch_stats: PyTree,
    batch: EvalBatch,
    resident: Resident,
) -> EvalSums:
    images, labels = select_microbatch(batch.batch, resident, 0, layout)
    inputs = eval_inputs(task.preprocess, images)
    context = Context(example=jnp.arange(labels.shape[0], dtype=jnp.int32))
    logits, _ = task.model.apply(params, batch_stats, inputs, context, wrap=layer_wrapper(layout, params, "none"))
    return add_to_sums(task, sums, logits, labels, batch.mask[0])


def add_to_sums(task: Task, sums: EvalSums, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> EvalSums:
    """The sums with a batch: logits [B, C], labels int32 [B], mask bool [B]."""
    mask = mask.astype(sums.loss.dtype)
    classes = jax.nn.one_hot(labels, logits.shape[-1], dtype=sums.loss.dtype)
    losses = task.loss(logits, classes.astype(logits.dtype)).astype(sums.loss.dtype)
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    correct = (best[:, 0] == labels) * mask
    return EvalSums(
        # A padded row repeats a real example; its loss may be anything but must not turn the sum into NaN.
        loss=sums.loss + jnp.sum(jnp.where(mask > 0, losses, 0)),
        top5=sums.top5 + jnp.sum(jnp.any(best == labels[:, None], -1) * mask),
        correct=sums.correct + correct @ classes,
        count=sums.count + mask @ classes,
    )
