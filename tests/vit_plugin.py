"""A user's own model, outside jaxtrain: a small Vision Transformer, named as `vit_plugin:ViT` in the config."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.models.classifier import Classifier
from jaxtrain.models.layers import Dropout, DropPath, Layer, at_least_f32


class Embed(Layer):
    """Patches [B, H, W, C] -> tokens [B, N, width], with a learned table of positions."""

    width: int
    patch: int

    @nn.compact
    def __call__(self, x, context):
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, padding="VALID", name="conv", **self.types)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        table = self.param("position", nn.initializers.normal(0.02), x.shape[1:], self.param_dtype)
        return x + table.astype(x.dtype)


class Block(Layer):
    """Pre-norm self-attention and perceptron over tokens [B, N, width]."""

    dropout: float
    drop_path: float

    @nn.compact
    def __call__(self, x, context):
        y = nn.LayerNorm(name="norm1", **self.types)(x)
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attn", **self.types)(y)
        x = x + DropPath(self.drop_path, name="drop_path")(y, context)
        y = nn.LayerNorm(name="norm2", **self.types)(x)
        y = nn.gelu(nn.Dense(2 * x.shape[-1], name="fc1", **self.types)(y))
        y = nn.Dense(x.shape[-1], name="fc2", **self.types)(Dropout(self.dropout, name="dropout")(y, context))
        return x + y


class Head(Layer):
    """Tokens' mean -> logits."""

    num_classes: int

    @nn.compact
    def __call__(self, x, context):
        x = jnp.mean(x, 1, dtype=at_least_f32(self.dtype))
        return nn.Dense(self.num_classes, name="linear", **self.wide_types)(x)


class ViT(Classifier):
    """`width` channels (32), `depths[0]` blocks (2), patches of `patch` pixels (4)."""

    def __init__(self, config, *, image_shape, num_classes, dtype, param_dtype):
        types = (dtype, param_dtype)
        (depth,) = config.depths or (2,)
        rates = (max(config.dropout, 0.0), max(config.drop_path, 0.0))
        super().__init__(
            layers=(
                Embed(*types, config.width or 32, config.patch or 4),
                *(Block(*types, *rates) for _ in range(depth)),
                Head(*types, num_classes),
            ),
            tensor_rules=(
                ("fc1/kernel$", (None, "tensor")),
                ("fc1/bias$", ("tensor",)),
                ("fc2/kernel$", ("tensor", None)),
            ),
            no_decay=("position$",),
        )


def not_a_model(config, **_):
    """Returns what no model may be."""
    return config.name


not_callable = 3
