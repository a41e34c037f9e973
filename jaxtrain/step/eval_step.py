"""The evaluation step. Every example counts exactly once, on any number of devices."""

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
from jaxtrain.models.classifier import Classifier
from jaxtrain.models.layers import Context
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.batch import EvalBatch, Resident, select_microbatch
from jaxtrain.step.layer_wrap import layer_wrapper
from jaxtrain.step.task import Task
from jaxtrain.trees import PyTree, shapes_of

# How many batches the host dispatches ahead of the devices: enough to keep them busy. Without a bound, streamed batches
# would fill the devices' memory. On simulated devices, XLA:CPU would also run out of threads, and programs that wait
# for each other's collectives would wait forever.
IN_FLIGHT = 2


@flax.struct.dataclass
class PerClass(Average):
    """The mean over the examples of each class.

    Attributes:
      total: float [num_classes], correct answers.
      count: float [num_classes], examples.
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def from_model_output(cls, *, correct: jax.Array, classes: jax.Array, mask: jax.Array, **_: Any) -> PerClass:
        """Of one batch.

        Args:
          correct: bool [B].
          classes: float [B, num_classes], the labels, one-hot.
          mask: bool [B], false where an example is padding.
        """
        counted = mask.astype(classes.dtype)
        return cls(total=(correct * counted) @ classes, count=counted @ classes)


# The metrics, as sums over the examples so far: `merge` adds those of a batch, `compute` gives the means. The mask
# leaves out padding, also where its loss is NaN.
EvalMetrics = Collection.create(
    loss=Average.from_output("loss"),
    accuracy=Average.from_output("correct"),
    top5=Average.from_output("top5"),
    per_class=PerClass,
)


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Means over all examples of a split.

    Attributes:
      loss: mean.
      accuracy: in [0, 1].
      top5: the share of examples whose label is among the five largest logits, in [0, 1].
      examples: how many there are.
      per_class: accuracy of each class; NaN for a class without examples.
    """

    loss: float
    accuracy: float
    top5: float
    examples: int
    per_class: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class EvalStep:
    """The compiled evaluation step.

    Attributes:
      zeros: makes the sums of no example.
      add: the program (sums, params, batch_stats, batch, resident) -> sums.
    """

    zeros: Callable[[], Collection]
    add: jax.stages.Compiled

    def __call__(
        self, params: PyTree, batch_stats: PyTree, batches: Iterable[EvalBatch], resident: Resident
    ) -> EvalResult:
        """Evaluates weights on a split. The host waits for the devices where it is `IN_FLIGHT` batches ahead, and at the end.

        Args:
          params: float arrays, keyed by layer, sharded as those that the step was compiled for.
          batch_stats: the running statistics, keyed by layer.
          batches: of the split, each with the same shapes.
          resident: the data set, if it lives on the devices.
        """
        sums = self.zeros()
        in_flight: collections.deque[Collection] = collections.deque()
        for batch in batches:
            sums = self.add(sums, params, batch_stats, batch, resident)
            in_flight.append(sums)
            if len(in_flight) > IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
        return summarize(jax.device_get(sums))


def summarize(sums: PyTree) -> EvalResult:
    """The means. sums: an `EvalMetrics` of NumPy arrays."""
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
    """Compiles the evaluation step.

    Args:
      task: what to compute.
      layout: of the run.
      params: float arrays or shapes with shardings, keyed by layer.
      batch_stats: likewise.
      batch: a batch, or its shapes with shardings.
      resident: the data set, if it lives on the devices.
    """
    zeros = jax.jit(functools.partial(zero_sums_of, task), out_shardings=layout.sharding())
    add = jax.jit(functools.partial(_add, task, layout), out_shardings=layout.sharding())
    sums = shapes_of(jax.eval_shape(zeros), layout.sharding())
    return EvalStep(zeros.lower().compile(), add.lower(sums, params, batch_stats, batch, resident).compile())


def zero_sums_of(task: Task) -> Collection:
    """The sums of no example: an `EvalMetrics` of zeros, [] or [num_classes], with the dtypes that a batch's sums have."""
    logits = jnp.zeros((1, task.preprocess.num_classes), task.sums_dtype)
    shapes = jax.eval_shape(functools.partial(_sums_of, task), logits, jnp.zeros(1, jnp.int32), jnp.ones(1, bool))
    return jax.tree.map(jnp.zeros_like, shapes)


def _add(
    task: Task,
    layout: Layout,
    sums: Collection,
    params: PyTree,
    batch_stats: PyTree,
    batch: EvalBatch,
    resident: Resident,
) -> Collection:
    """`add_to_sums` of the model's logits for `batch`."""
    images, labels = select_microbatch(batch.batch, resident, 0, layout)
    logits = logits_of(task.model, layout, params, batch_stats, eval_inputs(task.preprocess, images))
    return add_to_sums(task, sums, logits, labels, batch.mask[0])


def logits_of(model: Classifier, layout: Layout, params: PyTree, batch_stats: PyTree, inputs: jax.Array) -> jax.Array:
    """The logits, float [B, C], of the model's inputs, float [B, S, S, channels], by the running statistics.

    Args:
      model: the layers.
      layout: of the weights.
      params: float arrays, keyed by layer.
      batch_stats: the running statistics, keyed by layer.
      inputs: as `eval_inputs` gives them.
    """
    context = Context(example=jnp.arange(inputs.shape[0], dtype=jnp.int32))
    logits, _ = model.apply(params, batch_stats, inputs, context, wrap=layer_wrapper(layout, params, "none"))
    return logits


def add_to_sums(task: Task, sums: Collection, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Collection:
    """The sums with one more batch.

    Args:
      task: what to compute.
      sums: an `EvalMetrics`, over the examples so far.
      logits: float [B, C].
      labels: int32 [B].
      mask: bool [B], false where an example is padding.
    """
    return sums.merge(_sums_of(task, logits, labels, mask))


def _sums_of(task: Task, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Collection:
    """The sums of one batch; for the arguments see `add_to_sums`."""
    classes = jax.nn.one_hot(labels, logits.shape[-1], dtype=task.sums_dtype)
    # How many classes come before the label: of equal logits the lower class. Not `top_k`: over several devices XLA gathers
    # the whole batch for it.
    own = jnp.max(logits, -1, keepdims=True, where=classes > 0, initial=-jnp.inf)
    lower = jnp.arange(logits.shape[-1]) < labels[:, None]
    before = jnp.sum(~(logits <= own) | (lower & (logits == own)), -1)
    return EvalMetrics.single_from_model_output(
        loss=task.loss(logits, classes.astype(logits.dtype)).astype(task.sums_dtype),
        correct=before == 0,
        top5=before < min(5, logits.shape[-1]),
        classes=classes,
        mask=mask,
    )
