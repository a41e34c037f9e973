"""The model's chunks: which arrays each chunk has, and what it computes forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun

from jaxtrain.data.augment import train_images, train_targets
from jaxtrain.optim.param_groups import ParamGroups
from jaxtrain.parallel.arrays import view
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.batch import Batch, Resident, all_labels, select_from
from jaxtrain.step.gradients import scaled_loss, train_context
from jaxtrain.step.layer_wrap import layer_wrapper
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import TrainState
from jaxtrain.trees import PyTree


@dataclasses.dataclass(frozen=True)
class ModelChunk:
    """Contiguous layers of the model, all on one stage.

    Attributes:
      index: counted from 0, in the model's order.
      stage: where it lives.
      layers: the numbers of its layers.
      names: of its layers.
      first: whether it is the model's first chunk, which takes the images.
      last: whether it is the model's last chunk, which computes the loss.
      first_trained: the first chunk of the model that has trained parameters.
    """

    index: int
    stage: int
    layers: range
    names: tuple[str, ...]
    first: bool
    last: bool
    first_trained: int = 0

    @property
    def gets_gradient(self) -> bool:
        """Whether the gradient of its output is needed. Chunks below the first trained one have no backward pass."""
        return self.index >= self.first_trained

    @property
    def gives_gradient(self) -> bool:
        """Whether its backward pass computes the gradient of its input, for the chunk before."""
        return self.index > self.first_trained


def training_chunks(layout: Layout, groups: ParamGroups, params: PyTree) -> list[ModelChunk]:
    """`chunks_of`, with the first that is trained.

    Args:
      layout: of the run.
      groups: says which parameters are trained.
      params: of all layers, of arrays or shapes.
    """
    chunks = chunks_of(layout)
    by_chunk = (groups.trained({name: params.get(name, {}) for name in chunk.names}) for chunk in chunks)
    first = next(k for k, trained in enumerate(by_chunk) if jax.tree.leaves(trained))
    return [dataclasses.replace(chunk, first_trained=first) for chunk in chunks]


def chunks_of(layout: Layout) -> list[ModelChunk]:
    """The model's chunks, in the model's order."""
    begin, chunks = 0, []
    for k, names in enumerate(layout.chunks):
        layers = range(begin, begin := begin + len(names))
        last = k == len(layout.chunks) - 1
        chunks.append(ModelChunk(k, layout.stage_of_chunk(k), layers, names, first=k == 0, last=last))
    return chunks


def on_layers(tree: PyTree, names: Iterable[str], every: frozenset[str]) -> PyTree:
    """`tree` with only the layers `names`.

    Args:
      tree: of anything, such as the state.
      names: the layers to keep.
      every: all layers of the model. A dict whose keys are layers is cut; everything else stays.
    """
    wanted = set(names)

    def is_by_layer(node: Any) -> bool:
        return isinstance(node, dict) and bool(node) and every.issuperset(node)

    def cut(node: Any) -> Any:
        return {name: subtree for name, subtree in node.items() if name in wanted} if is_by_layer(node) else node

    return jax.tree.map(cut, tree, is_leaf=is_by_layer)


def weights_of(chunk: ModelChunk, params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters and the running statistics of a chunk's layers, from trees that are keyed by layer."""
    chunk_params, chunk_stats = (
        {name: tree[name] for name in chunk.names if name in tree} for tree in (params, batch_stats)
    )
    return chunk_params, chunk_stats


def on_stage(layout: Layout, stage: int, tree: PyTree) -> PyTree:
    """`tree` with each array that all stages have as an array on the devices of `stage`; other arrays stay as they are.

    Not to be called in a stage's thread: if two threads ask for the shards of one array at the same time, jaxlib 0.10.2
    may give each of them all shards twice.
    """

    def stage_view(leaf: jax.Array) -> jax.Array:
        sharding: Any = leaf.sharding
        return view(leaf, layout.sharding(sharding.spec, stage)) if sharding.mesh == layout.mesh else leaf

    return jax.tree.map(stage_view, tree)


def chunk_inputs(chunk: ModelChunk, state: TrainState, batch: Batch, resident: Resident, index: Any) -> dict[str, Any]:
    """What `forward` takes as `inputs`. Only the first and the last chunk need the batch.

    Args:
      chunk: whose inputs.
      state: of the chunk's stage.
      batch: the global batch, on the stage's devices.
      resident: the data set, on the stage's devices.
      index: int32 [], the microbatch.
    """
    inputs: dict[str, Any] = {"seed": batch.hyperparams.seed, "step": state.step, "index": index}
    if chunk.first or chunk.last:
        inputs["rows"] = batch.rows
    if chunk.first:
        inputs |= {"images": batch.images, "resident_images": resident.images}
    if chunk.last:
        inputs |= {"labels": batch.labels, "resident_labels": resident.labels, "loss_scale": state.loss_scale}
    return inputs


def forward(
    task: Task,
    layout: Layout,
    chunk: ModelChunk,
    params: PyTree,
    batch_stats: PyTree,
    x: Any,
    inputs: Mapping[str, Any],
) -> tuple[jax.Array, tuple[PyTree, Any]]:
    """The forward pass of a chunk on one microbatch.

    Args:
      task: what to compute.
      layout: of the chunk's stage.
      chunk: which layers.
      params: of these layers, gathered.
      batch_stats: of these layers.
      x: float [B/M, ...], the activation of the chunk before. The first chunk does not use it: it takes the images.
      inputs: from `chunk_inputs`.

    Returns:
      The activation for the next chunk, float [B/M, ...], sharded over the batch axes; or the last chunk's scaled loss,
      []. Then the new running statistics, and the last chunk's (loss, correct), scalars [] (otherwise `()`).
    """
    examples, shared = select_inputs(task, layout, chunk, x, inputs)
    y, aux = apply_chunk(task, layout, chunk, (params, batch_stats), examples, shared)
    return (y if chunk.last else jax.lax.with_sharding_constraint(y, layout.examples)), aux


def select_inputs(
    task: Task, layout: Layout, chunk: ModelChunk, x: Any, inputs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What a chunk computes a microbatch from. The arguments are those of `forward`.

    Returns:
      Of each example: the chunk's input float [B/M, ...], labels int32 [B/M] and targets float [B/M, C] (`()` but in the last
      chunk), and the layers' `Context`. And of all: the key of dropout; in the last chunk the labels of all microbatches,
      int32 [M, B/M], and the loss scale.
    """
    if chunk.first:
        images = select_from(inputs["images"], inputs["rows"], inputs["resident_images"], inputs["index"], layout)
    size = images.shape[0] if chunk.first else x.shape[0]
    context, augment, dropout = train_context(task, layout, inputs["seed"], inputs["step"], inputs["index"], size)
    if chunk.first:
        with jax.named_scope("augmentation"):
            x = train_images(task.preprocess, images, context.example, augment)
    if not chunk.last:
        return (x, (), (), context), (dropout,)
    whole = inputs["labels"], inputs["rows"], inputs["resident_labels"]
    labels = select_from(*whole, inputs["index"], layout)
    targets = train_targets(task.preprocess, labels, augment)
    return (x, labels, targets, context), (dropout, all_labels(*whole), inputs["loss_scale"])


def apply_chunk(
    task: Task,
    layout: Layout,
    chunk: ModelChunk,
    weights: tuple[PyTree, PyTree],
    examples: tuple[Any, ...],
    shared: tuple[Any, ...],
) -> tuple[jax.Array, tuple[PyTree, Any]]:
    """`forward` from what `select_inputs` returns.

    Args:
      task: what to compute.
      layout: of the chunk's stage.
      chunk: which layers.
      weights: their parameters, gathered, and running statistics.
      examples: of `select_inputs`; or one device's part of them.
      shared: of `select_inputs`.
    """
    (params, batch_stats), (x, labels, targets, context), (dropout, *of_loss) = weights, examples, shared
    wrap = layer_wrapper(layout, params, task.remat, gathered=True)
    y, new_stats = task.model.apply(params, batch_stats, x, context, dropout, wrap=wrap, layers=chunk.layers)
    new_stats = jax.tree.map(lambda s: s / layout.config.microbatches, new_stats)
    if not chunk.last:
        return y, (new_stats, ())
    scaled, metrics = scaled_loss(task, y, targets, labels, *of_loss)
    return scaled, (new_stats, metrics)


def linearized(
    chunk: ModelChunk, function: Callable[[PyTree, Any], tuple[Any, Any]], trained: PyTree, x: Any
) -> tuple[Any, Any, Any]:
    """(output, aux, the function of the backward pass) of a chunk; with a gradient of `x` where a chunk before is trained.

    function: (trained, x) -> (output, aux).
    """
    if chunk.gives_gradient:
        output, closure, aux = jax.vjp(function, trained, x, has_aux=True)
    else:
        output, closure, aux = jax.vjp(lambda trained: function(trained, x), trained, has_aux=True)
    return output, aux, closure


@dataclasses.dataclass(frozen=True)
class ForwardBackward:
    """The forward and the backward function of one chunk, made from one trace of `jax.vjp`.

    The backward function needs what the closure of `jax.vjp` holds. If the forward function returned all of that,
    weights would be copied for each microbatch. So of the closure's leaves, an argument or the output of the forward
    function is not returned again. What depends only on the parameters (a cast, a reshape) is computed again. The rest
    are the `residuals`.

    Attributes:
      jaxpr: of the traced function.
      traced: the same as a function of flat arguments, which returns output, aux and the closure's leaves in one list.
      outputs: the tree structure of (output, aux).
      closure: the tree structure of the closure.
      sources: where each leaf of the closure comes from: ("residuals", i), ("argument", i), ("output", 0) or
        ("weights", i).
    """

    jaxpr: Any
    traced: Callable[..., list[Any]]
    outputs: Any
    closure: Any
    sources: tuple[tuple[str, int], ...]

    @classmethod
    def trace(cls, function: Callable[..., tuple[Any, Any, Any]], *arguments: Any) -> ForwardBackward:
        """Traces `function` once.

        Args:
          function: (params, *more) -> (output, aux, the closure of `jax.vjp`).
          *arguments: its arguments, as shapes with shardings.
        """
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        jaxpr, (output, aux, closure) = closed.jaxpr, shapes
        weights = {*jaxpr.invars[: len(jax.tree.leaves(arguments[0]))], *jaxpr.constvars}
        for equation in jaxpr.eqns:
            inputs = [v for v in equation.invars if not isinstance(v, Literal)]
            if all(v in weights for v in inputs) and not equation.effects:
                weights.update(equation.outvars)
        leaves, structure = jax.tree.flatten(closure)
        first = len(jaxpr.outvars) - len(leaves)
        sources, residuals = [], {}
        for number, variable in enumerate(jaxpr.outvars[first:], first):
            if isinstance(variable, Literal):
                sources.append(("weights", number))
            elif variable in jaxpr.invars:
                sources.append(("argument", jaxpr.invars.index(variable)))
            elif variable is jaxpr.outvars[0]:
                sources.append(("output", 0))
            elif variable in weights:
                sources.append(("weights", number))
            else:
                residuals.setdefault(variable, number)
                sources.append(("residuals", list(residuals).index(variable)))
        return cls(jaxpr, jaxpr_as_fun(closed), jax.tree.structure((output, aux)), structure, tuple(sources))

    def forward(self, *arguments: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        """(output, aux, residuals) of the traced function."""
        results = self.traced(*jax.tree.leaves(arguments))
        first = len(results) - len(self.sources)
        residuals: dict[int, Any] = {}
        for (kind, i), leaf in zip(self.sources, results[first:], strict=True):
            if kind == "residuals":
                residuals[i] = leaf
        output, aux = jax.tree.unflatten(self.outputs, results[:first])
        return output, aux, tuple(residuals[i] for i in range(len(residuals)))

    def backward(self, cotangent: Any, residuals: Sequence[Any], output: Any, *arguments: Any) -> tuple[Any, ...]:
        """The gradients with respect to what `jax.vjp` was asked for.

        Args:
          cotangent: the gradient with respect to the output.
          residuals: from `forward`.
          output: from `forward`.
          *arguments: those of `forward`.
        """
        flat = jax.tree.leaves(arguments)
        recomputed = []
        if any(kind == "weights" for kind, _ in self.sources):
            recomputed = self.traced(*flat)  # XLA drops everything but the few results that are used
        leaf_from = {
            "residuals": lambda i: residuals[i],
            "argument": lambda i: flat[i],
            "output": lambda _: output,
            "weights": lambda i: recomputed[i],
        }
        return jax.tree.unflatten(self.closure, [leaf_from[kind](i) for kind, i in self.sources])(cotangent)
