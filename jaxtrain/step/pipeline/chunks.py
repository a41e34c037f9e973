"""The model's chunks: what each computes forward and backward, and which arrays it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun

from jaxtrain.data.augment import train_images, train_targets
from jaxtrain.models.layers import Context
from jaxtrain.parallel.arrays import view
from jaxtrain.parallel.layout import Layout
from jaxtrain.precision import scale_factor
from jaxtrain.step.batch import select_from
from jaxtrain.step.layer_wrap import layer_wrapper
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import AUGMENT, DROPOUT, role_key
from jaxtrain.trees import PyTree


@dataclasses.dataclass(frozen=True)
class ModelChunk:
    """Chunk `index` of the model: its layers, by number and by name, its stage, and whether it is the first or the last."""

    index: int
    stage: int
    layers: range
    names: tuple[str, ...]
    first: bool
    last: bool


def chunks_of(layout: Layout) -> list[ModelChunk]:
    """The model's chunks, in the model's order."""
    count, begin, found = len(layout.chunks), 0, []
    for k, names in enumerate(layout.chunks):
        layers = range(begin, begin := begin + len(names))
        found.append(ModelChunk(k, k % layout.stages, layers, names, k == 0, k == count - 1))
    return found


def on_layers(tree: PyTree, names: Iterable[str], every: frozenset[str]) -> PyTree:
    """The part of `tree` that belongs to the layers `names`: each dict that is keyed by layers (`every`) is cut."""
    wanted = set(names)

    def is_by_layer(node: Any) -> bool:
        return isinstance(node, dict) and bool(node) and every.issuperset(node)

    def cut(node: Any) -> Any:
        return {name: part for name, part in node.items() if name in wanted} if is_by_layer(node) else node

    return jax.tree.map(cut, tree, is_leaf=is_by_layer)


def weights_of(part: ModelChunk, params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    own, stats = ({name: tree[name] for name in part.names if name in tree} for tree in (params, batch_stats))
    return own, stats


def on_stage(layout: Layout, stage: int, tree: PyTree) -> PyTree:
    """Arrays that every stage has, as `stage` sees them; others as they are.

    Not for a stage's own thread: jaxlib 0.10.2 may give two threads that ask for the shards of one array all of them twice.
    """

    def seen(leaf: jax.Array) -> jax.Array:
        where: Any = leaf.sharding
        return view(leaf, layout.sharding(where.spec, stage)) if where.mesh == layout.mesh else leaf

    return jax.tree.map(seen, tree)


def forward(
    task: Task, layout: Layout, part: ModelChunk, params: PyTree, batch_stats: PyTree, x: Any, given: Mapping[str, Any]
) -> tuple[jax.Array, tuple[PyTree, Any]]:
    """The activation that a chunk hands on, or the last one's scaled loss; with the new statistics and (loss, correct).

    x: the activation of the chunk before; unused by the first, which makes its input from the images in `given`.
    given: `step`, `index` (the microbatch); for the first and the last chunk `rows`, `images`, `labels` and the like.
    layout: of the stage.
    """
    parts, step, index = layout.config.microbatches, given["step"], given["index"]
    key = jax.random.fold_in(role_key(task.seed, AUGMENT), step)
    if part.first:
        images = select_from(given["images"], given["rows"], given["resident_images"], index, layout)
        size = images.shape[0]
    else:
        size = x.shape[0]
    # A random number belongs to an example of the global batch, whichever microbatch, stage or device it is on.
    example = index * size + jnp.arange(size, dtype=jnp.int32)
    if part.first:
        x = train_images(task.preprocess, images, example, key)
    context = Context(example=example, train=True, bn_groups=max(task.bn_groups // parts, 1))
    dropout = jax.random.fold_in(role_key(task.seed, DROPOUT), step)
    wrap = layer_wrapper(layout, params, task.remat, gathered=True)
    y, new_stats = task.model.apply(params, batch_stats, x, context, dropout, wrap=wrap, layers=part.layers)
    new_stats = jax.tree.map(lambda s: s / parts, new_stats)
    if not part.last:
        return jax.lax.with_sharding_constraint(y, layout.examples), (new_stats, ())
    labels = select_from(given["labels"], given["rows"], given["resident_labels"], index, layout)
    loss = jnp.sum(task.loss(y, train_targets(task.preprocess, labels, key))) / (size * parts)
    correct = jnp.sum(jnp.argmax(y, -1) == labels)
    return loss * scale_factor(given["loss_scale"], loss.dtype), (new_stats, (loss, correct.astype(loss.dtype)))


@dataclasses.dataclass(frozen=True)
class ForwardBackward:
    """The forward and the backward function of one chunk, made from one trace of `jax.vjp`.

    Of the closure's leaves, what is an argument or the output of the forward function is not returned again (it would be
    copied), and what depends on the parameters alone (a cast, a reshape) is computed again: only the rest is `residuals`.

    sources: for each leaf of the closure ("residuals", i), ("argument", i), ("output", 0) or ("weights", i).
    """

    jaxpr: Any
    traced: Callable[..., list[Any]]
    outputs: Any
    closure: Any
    sources: tuple[tuple[str, int], ...]

    @classmethod
    def trace(cls, function: Callable[..., tuple[Any, Any, Any]], *arguments: Any) -> ForwardBackward:
        """function: of (params, *more), returns (output, aux, `jax.vjp`'s closure). arguments: shapes with shardings."""
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
        """(output, aux, residuals)."""
        found = self.traced(*jax.tree.leaves(arguments))
        first = len(found) - len(self.sources)
        residuals: dict[int, Any] = {}
        for (kind, i), leaf in zip(self.sources, found[first:], strict=True):
            if kind == "residuals":
                residuals[i] = leaf
        output, aux = jax.tree.unflatten(self.outputs, found[:first])
        return output, aux, tuple(residuals[i] for i in range(len(residuals)))

    def backward(self, cotangent: Any, residuals: Sequence[Any], output: Any, *arguments: Any) -> tuple[Any, ...]:
        """The cotangents of what the closure was made for. arguments: as `forward`'s."""
        flat = jax.tree.leaves(arguments)
        again = []
        if any(kind == "weights" for kind, _ in self.sources):
            again = self.traced(*flat)  # XLA drops all that these few do not need
        find = {
            "residuals": lambda i: residuals[i],
            "argument": lambda i: flat[i],
            "output": lambda _: output,
            "weights": lambda i: again[i],
        }
        return jax.tree.unflatten(self.closure, [find[kind](i) for kind, i in self.sources])(cotangent)
