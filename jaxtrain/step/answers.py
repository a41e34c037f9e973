"""The evaluation that keeps what the model answered to each example, and may look at each image's mirror image too."""

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

from jaxtrain.data.augment import eval_inputs
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.batch import EvalBatch, Resident, select_microbatch
from jaxtrain.step.eval_step import IN_FLIGHT, EvalResult, add_to_sums, logits_of, summarize, zero_sums_of
from jaxtrain.step.task import Task
from jaxtrain.trees import PyTree, shapes_of


@flax.struct.dataclass
class Answers:
    """What the model answered to N examples.

    Attributes:
      label: int32 [N], the class that is right.
      predicted: int32 [N], the class of the largest logit; of equal ones the lowest.
      confidence: float [N], that class's probability.
      loss: float [N].
      counted: bool [N], false where an example is padding.
    """

    label: Any
    predicted: Any
    confidence: Any
    loss: Any
    counted: Any


@dataclasses.dataclass(frozen=True)
class AnswerStep:
    """The compiled step.

    Attributes:
      zeros: makes the sums of no example.
      add: the program (sums, params, batch_stats, batch, resident) -> (sums, answers of this batch).
    """

    zeros: Callable[[], PyTree]
    add: jax.stages.Compiled

    def __call__(
        self, params: PyTree, batch_stats: PyTree, batches: Iterable[EvalBatch], resident: Resident
    ) -> tuple[EvalResult, Answers]:
        """Evaluates weights on a split: the result, and the answers in the split's order, NumPy arrays [N], on every process.

        Args:
          params: float arrays, keyed by layer, sharded as those that the step was compiled for.
          batch_stats: the running statistics, keyed by layer.
          batches: of the split, each with the same shapes.
          resident: the data set, if it lives on the devices.
        """
        sums, found = self.zeros(), []
        in_flight: collections.deque[Answers] = collections.deque()
        for batch in batches:
            sums, answers = self.add(sums, params, batch_stats, batch, resident)
            in_flight.append(answers)
            if len(in_flight) > IN_FLIGHT:
                found.append(jax.device_get(in_flight.popleft()))
        found += jax.device_get(list(in_flight))
        counted = [answers.counted for answers in found]
        kept = jax.tree.map(lambda *parts: np.concatenate([p[c] for p, c in zip(parts, counted, strict=True)]), *found)
        return summarize(jax.device_get(sums)), kept


def make_answer_step(
    task: Task,
    layout: Layout,
    params: PyTree,
    batch_stats: PyTree,
    batch: EvalBatch,
    resident: Resident,
    *,
    flip: bool = False,
) -> AnswerStep:
    """Compiles the step.

    Args:
      task: what to compute.
      layout: of the run; one pipeline stage.
      params: float arrays or shapes with shardings, keyed by layer.
      batch_stats: likewise.
      batch: a batch, or its shapes with shardings.
      resident: the data set, if it lives on the devices.
      flip: take the mean of the probabilities of each image and of its mirror image.
    """
    zeros = jax.jit(functools.partial(zero_sums_of, task), out_shardings=layout.sharding())
    add = jax.jit(functools.partial(_add, task, layout, flip), out_shardings=layout.sharding())
    sums = shapes_of(jax.eval_shape(zeros), layout.sharding())
    return AnswerStep(zeros.lower().compile(), add.lower(sums, params, batch_stats, batch, resident).compile())


def _add(
    task: Task,
    layout: Layout,
    flip: bool,
    sums: PyTree,
    params: PyTree,
    batch_stats: PyTree,
    batch: EvalBatch,
    resident: Resident,
) -> tuple[PyTree, Answers]:
    """The sums with one more batch, as `eval_step` adds them, and the answers to its examples."""
    images, labels = select_microbatch(batch.batch, resident, 0, layout)
    inputs = eval_inputs(task.preprocess, images)
    logits = logits_of(task.model, layout, params, batch_stats, inputs)
    if flip:
        mirrored = logits_of(task.model, layout, params, batch_stats, inputs[:, :, ::-1])
        logits = log_of_mean_probability(logits, mirrored)
    sums = add_to_sums(task, sums, logits, labels, batch.mask[0])
    answers = Answers(
        label=labels,
        predicted=jnp.argmax(logits, -1).astype(jnp.int32),
        confidence=jnp.max(jax.nn.softmax(logits), -1),
        loss=task.loss(logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)),
        counted=batch.mask[0],
    )
    return sums, answers


def log_of_mean_probability(*logits: jax.Array) -> jax.Array:
    """Logits whose softmax is the mean of the softmaxes of `logits`, each float [B, C]."""
    log_probabilities = jnp.stack([jax.nn.log_softmax(each) for each in logits])
    return jax.nn.logsumexp(log_probabilities, 0) - jnp.log(jnp.asarray(len(logits), logits[0].dtype))
