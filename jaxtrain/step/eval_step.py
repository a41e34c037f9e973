"""Evaluation: every example counts exactly once, on any number of devices."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average, Collection

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
class PerClass(Average):
    """The mean over the examples of each class. total, count: [num_classes]."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def from_model_output(cls, *, correct: jax.Array, classes: jax.Array, mask: jax.Array, **_: Any) -> PerClass:
        """correct: bool [B]. classes: one-hot [B, num_classes]."""
        counted = mask.astype(classes.dtype)
        return cls(total=(correct * counted) @ classes, count=counted @ classes)


# What is measured. Sums over the examples so far: `merge` adds those of a batch, `compute` gives the means. A padded row
# repeats a real example; its loss may be anything, and the mask keeps even NaN out.
EvalMetrics = Collection.create(
    loss=Average.from_output("loss"),
    accuracy=Average.from_output("correct"),
    top5=Average.from_output("top5"),
    per_class=PerClass,
)


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

    zeros: Callable[[], Collection]
    add: jax.stages.Compiled

    def __call__(
        self, params: PyTree, batch_stats: PyTree, batches: Iterable[EvalBatch], resident: Resident
    ) -> EvalResult:
        """Reads the result once, at the end. The host stays `IN_FLIGHT` batches ahead of the devices, and no more."""
        sums = self.zeros()
        in_flight: collections.deque[Collection] = collections.deque()
        for batch in batches:
            sums = self.add(sums, params, batch_stats, batch, resident)
            in_flight.append(sums)
            if len(in_flight) > IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
        return summarize(jax.device_get(sums))


def summarize(sums: PyTree) -> EvalResult:
    """Means from sums that are on the host."""
    with np.errstate(invalid="ignore"):  # a class without examples
        means = sums.compute()
    return EvalResult(
        loss=float(means["loss"]),
        accuracy=float(means["accuracy"]),
        top5=float(means["top5"]),
        examples=int(sums.accuracy.count),
        per_class=tuple(means["per_class"].tolist()),
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


def zero_sums_of(task: Task) -> Collection:
    """The sums of no example: zeros, in the types of one's."""
    logits = jnp.zeros((1, task.preprocess.num_classes), task.sums_dtype)
    of_one = jax.eval_shape(functools.partial(_sums_of, task), logits, jnp.zeros(1, jnp.int32), jnp.ones(1, bool))
    return jax.tree.map(jnp.zeros_like, of_one)


def _add(
    task: Task,
    layout: Layout,
    sums: Collection,
    params: PyTree,
    batch_stats: PyTree,
    batch: EvalBatch,
    resident: Resident,
) -> Collection:
    images, labels = select_microbatch(batch.batch, resident, 0, layout)
    inputs = eval_inputs(task.preprocess, images)
    context = Context(example=jnp.arange(labels.shape[0], dtype=jnp.int32))
    logits, _ = task.model.apply(params, batch_stats, inputs, context, wrap=layer_wrapper(layout, params, "none"))
    return add_to_sums(task, sums, logits, labels, batch.mask[0])


def add_to_sums(task: Task, sums: Collection, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Collection:
    """The sums with a batch: logits [B, C], labels int32 [B], mask bool [B]."""
    return sums.merge(_sums_of(task, logits, labels, mask))


def _sums_of(task: Task, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Collection:
    classes = jax.nn.one_hot(labels, logits.shape[-1], dtype=task.sums_dtype)
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    return EvalMetrics.single_from_model_output(
        loss=task.loss(logits, classes.astype(logits.dtype)).astype(task.sums_dtype),
        correct=best[:, 0] == labels,
        top5=jnp.any(best == labels[:, None], -1),
        classes=classes,
        mask=mask,
    )
