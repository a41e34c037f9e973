"""A perceptron with dropout: 784-512-256-10 on 28 x 28 grey images (535,818 parameters), deeper with `model.depths`."""

from __future__ import annotations

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ConfigError
from jaxtrain.models import settings
from jaxtrain.models.classifier import Classifier, layer_name
from jaxtrain.models.layers import Context, Dropout, Layer, relu, torch_dense

NAMES = ("mlp",)


class Hidden(Layer):
    """Flatten, linear, ReLU, dropout."""

    features: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, ...] -> [B, features]."""
        x = x.reshape(x.shape[0], -1)
        x = torch_dense(self.features, x.shape[-1], **self.types, name="linear")(x)
        return Dropout(self.dropout, name="dropout")(relu(x), context)


class Head(Layer):
    """The last linear map, in at least f32."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, C] -> logits [B, num_classes]."""
        return torch_dense(self.num_classes, x.shape[-1], **self.wide_types, name="linear")(x)


def build(
    config: ModelConfig,
    image_shape: settings.ImageShape,
    num_classes: int,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> Classifier:
    """A perceptron for images of any shape: one hidden layer of `config.width` (512) units, then layers of half as many.

    `config.depths=(n,)` means n hidden layers; 2 by default. Arguments as of `registry.build`.
    """
    settings.refuse(config, "stem", "patch", "window", "attention", "drop_path")
    width = config.width or 512
    if width < 2:
        raise ConfigError(
            f"config.model.width={width}: mlp's second hidden layer has half as many units; set at least 2."
        )
    rate = settings.dropout(config, 0.3)
    (hidden,) = settings.depths(config, (2,))
    first, second = layer_name(0), layer_name(1)
    return Classifier(
        layers=(
            Hidden(dtype, param_dtype, width, rate),
            *[Hidden(dtype, param_dtype, width // 2, rate)] * (hidden - 1),
            Head(dtype, param_dtype, num_classes),
        ),
        tensor_rules=(  # split: the first layer's outputs and the second's inputs, so that both need one reduction
            (f"{first}/linear/kernel$", (None, "tensor")),
            (f"{first}/linear/bias$", ("tensor",)),
            (f"{second}/linear/kernel$", ("tensor", None)),
        ),
    )
