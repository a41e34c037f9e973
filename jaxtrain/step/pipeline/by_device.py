"""The forward and the backward function of a chunk where each device computes its own examples (`layout.reduce`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxtrain.optim.param_groups import merge
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import BATCH_AXES
from jaxtrain.step.gradients import add_over_batch, by_device, of_one_device, reduce_gradients
from jaxtrain.step.pipeline.chunks import ForwardBackward, ModelChunk, apply_chunk, linearized, select_inputs
from jaxtrain.step.task import Task
from jaxtrain.trees import PyTree

_BATCH = P(BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class ForwardBackwardByDevice:
    """As `ForwardBackward`, with gradients that are added up over the batch axes by `parallel.reduce`.

    Inputs are selected and augmented as always. What comes then is traced for one device.

    Attributes:
      task: what to compute.
      layout: of the chunk's stage.
      chunk: which layers.
      passes: of one device: from (params, batch_stats, examples, shared); see `apply_chunk`.
    """

    task: Task
    layout: Layout
    chunk: ModelChunk
    passes: ForwardBackward

    @classmethod
    def trace(
        cls, task: Task, layout: Layout, chunk: ModelChunk, params: PyTree, batch_stats: PyTree, x: Any, inputs: Any
    ) -> ForwardBackwardByDevice:
        """Traces the chunk once, from shapes."""

        def traced(params: PyTree, batch_stats: PyTree, examples: tuple[Any, ...], shared: Any) -> tuple[Any, Any, Any]:
            first, *others = of_one_device(examples)

            def function(trained: PyTree, x: Any) -> tuple[Any, Any]:
                weights = merge(params, trained), batch_stats
                output, (stats, metrics) = apply_chunk(task, layout, chunk, weights, (x, *others), shared)
                return output, add_over_batch(stats, metrics)

            return linearized(chunk, function, task.groups.trained(params), first)

        found: list[ForwardBackward] = []

        def of_device(params: PyTree, batch_stats: PyTree, examples: Any, shared: Any) -> None:
            found.append(ForwardBackward.trace(traced, params, batch_stats, examples, shared))

        def whole(params: PyTree, batch_stats: PyTree, x: Any, inputs: Any) -> None:
            selected = select_inputs(task, layout, chunk, x, inputs)
            by_device(layout, of_device, (P(), P(), _BATCH, P()), None)(params, batch_stats, *selected)

        jax.eval_shape(whole, params, batch_stats, x, inputs)
        return cls(task, layout, chunk, found[0])

    @property
    def jaxpr(self) -> Any:
        """Of the traced function."""
        return self.passes.jaxpr

    def forward(self, params: PyTree, batch_stats: PyTree, x: Any, inputs: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        """(output, aux, residuals). Each residual, and the loss, has a first dim for the device that has it."""
        examples, shared = select_inputs(self.task, self.layout, self.chunk, x, inputs)

        def of_device(*arguments: Any) -> tuple[Any, Any, Any]:
            output, aux, residuals = self.passes.forward(*arguments)
            return (output[None] if self.chunk.last else output), aux, [leaf[None] for leaf in residuals]

        mapped = by_device(self.layout, of_device, (P(), P(), _BATCH, P()), (_BATCH, P(), _BATCH))
        output, aux, residuals = mapped(params, batch_stats, examples, shared)
        selected = (*(examples if self.chunk.first else ((), *examples[1:])),), shared
        return output, aux, (selected, residuals)

    def backward(
        self,
        cotangent: Any,
        residuals: Sequence[Any],
        output: Any,
        params: PyTree,
        batch_stats: PyTree,
        x: Any,
        inputs: Any,
    ) -> tuple[Any, ...]:
        """The gradients of the trained parameters, added up over the batch axes; and of `x` where a chunk before is trained.

        The arguments are those of `ForwardBackward.backward`.
        """
        ((first, *others), shared), saved = residuals
        examples = (first if self.chunk.first else x, *others)

        def of_device(cotangent: Any, saved: Any, output: Any, *arguments: Any) -> tuple[Any, ...]:
            if self.chunk.last:
                cotangent, output = cotangent[0], output[0]
            gradients, *more = self.passes.backward(cotangent, [leaf[0] for leaf in saved], output, *arguments)
            return (jax.tree.map(lambda g: g[None], gradients), *more)

        outputs = (_BATCH, _BATCH) if self.chunk.gives_gradient else (_BATCH,)
        mapped = by_device(self.layout, of_device, (_BATCH, _BATCH, _BATCH, P(), P(), _BATCH, P()), outputs)
        gradients, *more = mapped(cotangent, saved, output, params, batch_stats, examples, shared)
        return (reduce_gradients(self.layout, gradients), *more)
