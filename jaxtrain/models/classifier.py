"""A model: a tuple of layers, each with its own entry in the trees of parameters and statistics.

This is the seam between Linen and the rest of the program: only here are a module's `init` and `apply` called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.models.layers import Context

Tree = dict[str, Any]

# (layer_params, layer_stats, x, context, key) -> (y, new_layer_stats)
LayerFn = Callable[[Tree, Tree, jax.Array, Context, jax.Array | None], tuple[jax.Array, Tree]]


def layer_name(index: int) -> str:
    """The key of layer `index` in every tree: 3 -> "layers_03"."""
    return f"layers_{index:02d}"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A sequence of layers from images to logits, with what the layout and the optimizer need to know about its leaves.

    layers: stem, blocks, head; each a Linen module called as `layer(x, context) -> y`. The head gives logits
        [B, num_classes] in at least f32.
    tensor_rules: ((regex, spec), ...), how leaves may be split over devices; they change no number. The regex is
        searched in a leaf's path, "layers_03/attn/qkv/kernel"; the spec has "tensor" or None for each dim of the leaf.
    no_decay: regexes of leaves without weight decay, beside all leaves of at most one dim (biases, norms).
    """

    layers: tuple[nn.Module, ...]
    tensor_rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    no_decay: tuple[str, ...] = ()

    def init(self, key: jax.Array, x_shape: tuple[int, ...], x_dtype: Any) -> tuple[Tree, Tree]:
        """New parameters and running statistics, `{"layers_00": {...}, ...}` with the layers that own some.

        To be called inside jit: the forward pass that it traces for the shapes is dead code there.

        Args:
          key: layer i draws from `fold_in(key, i)`, and each parameter from that and its path.
          x_shape: [B, H, W, C] of a batch of images, for any B.
          x_dtype: their type.
        """
        params, batch_stats = {}, {}
        x = jnp.zeros(x_shape, x_dtype)
        context = Context(example=jnp.arange(x_shape[0], dtype=jnp.int32))
        for index, layer in enumerate(self.layers):
            x, variables = layer.init_with_output({"params": jax.random.fold_in(key, index)}, x, context)
            for tree, collection in ((params, "params"), (batch_stats, "batch_stats")):
                if collection in variables:
                    tree[layer_name(index)] = variables[collection]
        return params, batch_stats

    def apply(
        self,
        params: Tree,
        batch_stats: Tree,
        x: jax.Array,
        context: Context,
        key: jax.Array | None = None,
        *,
        wrap: Callable[[LayerFn, str], LayerFn] | None = None,
        layers: range | None = None,
    ) -> tuple[jax.Array, Tree]:
        """Logits [B, num_classes] of x [B, H, W, C], and the new running statistics (the old ones in evaluation).

        Args:
          layers: only these, from the first one's input to the last one's output, as a pipeline stage does.
          key: for dropout and drop-path, needed in training where a rate is above 0; layer i uses `fold_in(key, i)`.
          wrap: `(layer's function, its name) -> function`, applied to each layer: rematerialization, gathering.
        """
        new_stats = {}
        for index in layers if layers is not None else range(len(self.layers)):
            name = layer_name(index)
            function = layer_function(self.layers[index])
            if wrap is not None:
                function = wrap(function, name)
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, stats = function(params.get(name, {}), batch_stats.get(name, {}), x, context, layer_key)
            if stats:
                new_stats[name] = stats
        return x, new_stats


def layer_function(layer: nn.Module) -> LayerFn:
    """`layer` as a pure function of its parameters, statistics, input and key."""

    def function(
        params: Tree, stats: Tree, x: jax.Array, context: Context, key: jax.Array | None
    ) -> tuple[jax.Array, Tree]:
        variables = {"params": params, "batch_stats": stats}
        rngs = None if key is None else {"dropout": key}
        mutable = ["batch_stats"] if stats and context.train else []
        y, updated = layer.apply(variables, x, context, rngs=rngs, mutable=mutable)
        return y, dict(updated["batch_stats"]) if mutable else stats

    return function
