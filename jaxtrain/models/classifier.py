"""A model: a tuple of layers. Each has an entry in the trees of parameters and of BatchNorm's running statistics.

This is the border between Linen and the rest of the program: a module's `init` and `apply` are called only here.
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
    """A sequence of layers from images to logits, with what the layout and the optimizer need to know about its leaves."""

    layers: tuple[nn.Module, ...]
    """Stem, blocks, head: Linen modules that are called as `layer(x, context) -> y`. The head gives logits [B, num_classes]
    in at least f32."""
    tensor_rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    """((regex, spec), ...): how leaves may be split over devices. They change no number. The regex is searched in a leaf's
    path, such as "layers_03/attn/qkv/kernel". The spec has "tensor" or None for each dim of the leaf."""
    no_decay: tuple[str, ...] = ()
    """Regexes of leaves without weight decay, beside all leaves of at most one dim (biases, norms)."""

    def init(self, key: jax.Array, x_shape: tuple[int, ...], x_dtype: Any) -> tuple[Tree, Tree]:
        """New parameters and running statistics.

        Call it inside jit: the forward pass that it traces for the shapes is dead code there.

        Args:
          key: PRNG key. Layer i uses `fold_in(key, i)`, and each parameter folds in its path.
          x_shape: [B, H, W, C] of a batch of images, for any B.
          x_dtype: their type.

        Returns:
          Two trees `{"layers_00": {...}, ...}`. A layer without parameters or statistics has no entry there.
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
        """The forward pass.

        Args:
          params: as `init` returns them.
          batch_stats: running statistics, as `init` returns them.
          x: [B, H, W, C], or the input of the first of `layers`.
          context: of the call.
          key: PRNG key for dropout and drop-path, needed in training if a rate is above 0. Layer i uses `fold_in(key, i)`.
          wrap: `(layer's function, its name) -> function`, applied to each layer: rematerialization, gathering.
          layers: only these layers, as a pipeline stage computes them; None: all.

        Returns:
          Logits [B, num_classes] (or the output of the last of `layers`), and the new running statistics of these layers.
          In evaluation the statistics are the old ones.
        """
        new_stats = {}
        for index in layers if layers is not None else range(len(self.layers)):
            name = layer_name(index)
            function = layer_function(self.layers[index])
            if wrap is not None:
                function = wrap(function, name)
            layer_key = None if key is None else jax.random.fold_in(key, index)
            with jax.named_scope(name):  # for profiles, and for what `jaxtrain compile` says of kernels
                weights = params.get(name, {}), batch_stats.get(name, {})
                x, stats = function(*weights, x, context.of_layer(name), layer_key)
            if stats:
                new_stats[name] = stats
        return x, new_stats

    def embed(
        self,
        params: Tree,
        batch_stats: Tree,
        x: jax.Array,
        context: Context,
        *,
        wrap: Callable[[LayerFn, str], LayerFn] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [B, num_classes] and features [B, D]: what the head's last linear map takes (its input, if it has none).

        The arguments are those of `apply`.
        """
        last = len(self.layers) - 1
        x, _ = self.apply(params, batch_stats, x, context, wrap=wrap, layers=range(last))
        logits, _ = self.apply(params, batch_stats, x, context, wrap=wrap, layers=range(last, last + 1))
        name, function = layer_name(last), _head_input(self.layers[last])
        wrapped = function if wrap is None else wrap(function, name)
        features, _ = wrapped(params.get(name, {}), batch_stats.get(name, {}), x, context, None)
        return logits, features


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


def _head_input(head: nn.Module) -> LayerFn:
    """As `layer_function`, but in place of the logits the input of the last linear map, [B, D]."""

    def function(
        params: Tree, stats: Tree, x: jax.Array, context: Context, key: jax.Array | None
    ) -> tuple[jax.Array, Tree]:
        seen = [x]

        def look(call: Callable[..., Any], args: Any, kwargs: Any, of: nn.module.InterceptorContext) -> Any:
            if isinstance(of.module, nn.Dense) and of.method_name == "__call__":
                seen.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(look):
            layer_function(head)(params, stats, x, context, key)
        return seen[-1].reshape(x.shape[0], -1), stats

    return function
