"""VGG-11/13/16/19, with and without BatchNorm (Simonyan and Zisserman 2015), as torchvision builds them.

On small images (stem "cifar") the classifier sees the map after five poolings, 512 values at 32 px. It keeps its two hidden
layers of 4096: 39.3M parameters for VGG-19-BN on CIFAR-100, as in chenyaofo/pytorch-cifar-models. On large images (stem
"imagenet") the map is first averaged to 7 x 7.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jaxtrain.config import ModelConfig
from jaxtrain.models import settings
from jaxtrain.models.classifier import Classifier, layer_name
from jaxtrain.models.layers import BatchNorm, Context, Dense, Dropout, Layer, add_bias, kaiming_normal, relu
from jaxtrain.models.pooling import max_pool

DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
NAMES = tuple(name + suffix for name in DEPTHS for suffix in ("", "_bn"))

linear_init = nn.initializers.normal(0.01)


class Conv(Layer):
    """3x3 convolution, BatchNorm if `batch_norm`, ReLU, and a 2x2 max-pool if `pool`."""

    features: int
    batch_norm: bool
    pool: bool

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, features], or half of H and W, rounded down."""
        x = _BiasedConv(**self.types, features=self.features, name="conv")(x)
        if self.batch_norm:
            x = BatchNorm(self.param_dtype, rectify=not self.pool, name="bn")(x, context)
        if self.pool:
            return max_pool(x, 2, 2, rectify=True)
        return x if self.batch_norm else relu(x)


class _BiasedConv(Layer):
    """A 3x3 convolution as that of Linen, but for the gradient of its bias: `add_bias`."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, features]."""
        kernel = self.param("kernel", kaiming_normal, (3, 3, x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel.astype(self.dtype), (1, 1), "SAME", dimension_numbers=numbers
        )
        return add_bias(x, bias)


class Hidden(Layer):
    """Linear, ReLU and dropout over the flattened map, which is first averaged to `pool_to` x `pool_to` unless that is 0."""

    features: int
    dropout: float
    pool_to: int

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] or [B, C] -> [B, features]."""
        if self.pool_to:
            x = adaptive_average_pool(x, self.pool_to)
        x = x.reshape(x.shape[0], -1)
        x = relu(Dense(self.features, kernel_init=linear_init, name="linear", **self.types)(x))
        return Dropout(self.dropout, name="dropout")(x, context)


class Head(Layer):
    """The last linear map, in at least f32."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, C] -> logits [B, num_classes]."""
        return Dense(self.num_classes, kernel_init=linear_init, name="linear", **self.wide_types)(x)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """x [B, H, W, C] -> [B, size, size, C], as torch.nn.AdaptiveAvgPool2d: bins overlap if `size` does not divide a side."""
    for axis in (1, 2):
        length = x.shape[axis]
        if length != size:
            weights = np.zeros((length, size))
            for i in range(size):
                start, end = i * length // size, -(-(i + 1) * length // size)
                weights[start:end, i] = 1 / (end - start)
            x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(weights, x.dtype), (axis, 0)), -1, axis)
    return x


def build(
    config: ModelConfig,
    image_shape: settings.ImageShape,
    num_classes: int,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> Classifier:
    """VGG `config.name`: `config.width` (64) channels at first, 8 times as many at last, 64 times in the classifier.

    Arguments as of `registry.build`.
    """
    settings.refuse(config, "patch", "window", "attention", "drop_path")
    settings.require_side(config, image_shape, 32)
    base, _, batch_norm = config.name.partition("_")
    width = config.width or 64
    types = (dtype, param_dtype)

    layers: list[nn.Module] = []
    for stage, depth in enumerate(settings.depths(config, DEPTHS[base])):
        features = width * min(2**stage, 8)
        layers += [Conv(*types, features, bool(batch_norm), pool=i == depth - 1) for i in range(depth)]
    first, second = layer_name(len(layers)), layer_name(len(layers) + 1)
    pool_to = 7 if settings.stem(config, image_shape) == "imagenet" else 0
    rate = settings.dropout(config, 0.5)
    layers.append(Hidden(*types, 64 * width, rate, pool_to))
    layers.append(Hidden(*types, 64 * width, rate, pool_to=0))
    return Classifier(
        layers=(*layers, Head(*types, num_classes)),
        tensor_rules=(  # split: the first layer's outputs and the second's inputs, so that both need one reduction
            (f"{first}/linear/kernel$", (None, "tensor")),
            (f"{first}/linear/bias$", ("tensor",)),
            (f"{second}/linear/kernel$", ("tensor", None)),
        ),
    )
