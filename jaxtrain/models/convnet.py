"""A small network for small images that learns fast: six 3x3 convolutions after fixed whitening filters.

Its shape is that of cifar10-airbench (Jordan 2024, arXiv:2404.00498), after Page's ResNet-9 and tysam-code/hlb-CIFAR10. The
first layer decorrelates 2x2 patches. In airbench its filters are eigenvectors computed from training images. Here they are
constants, so that the state is a function of the seed alone. The eigenvectors of patches of natural images are nearly a
product: the Haar basis in space, times light, red against blue, and green against both in colour. Measured on 10,000
normalized CIFAR-10 images: outputs of these filters correlate by 0.07 (root mean square; at most 0.27), the values of a
patch by 0.84.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jaxtrain.config import ModelConfig
from jaxtrain.models import settings
from jaxtrain.models.classifier import Classifier, layer_name
from jaxtrain.models.layers import BatchNorm, Context, Dense, Dropout, Layer, torch_kernel
from jaxtrain.models.pooling import max_pool

NAMES = ("convnet_fast",)

_HAAR = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])  # of the pixels 00, 01, 10, 11
_COLORS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]])
# Variance of each output of Haar x color, both of length 1, on the normalized training images of CIFAR-10.
_VARIANCES = np.array(
    [[10.146, 0.8165, 0.1855], [0.3965, 0.01650, 0.00495], [0.3314, 0.01407, 0.00449], [0.05543, 0.00161, 0.00062]]
)
_LEAST_VARIANCE = 5e-4  # added, so that outputs with almost no variance are not blown up


def whitening_filters(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Patterns of whole numbers, int [2, 2, channels, 8 * channels], and their scales, float64 [8 * channels].

    Every pattern is there with its negative. Scaled outputs have a variance of about 1. Images that are not RGB have no
    color basis: each channel is whitened alone.
    """
    colors, variances = (
        (_COLORS, _VARIANCES) if channels == 3 else (np.eye(channels, dtype=int), np.tile(_VARIANCES[:, :1], channels))
    )
    patterns = np.einsum("sp,kc->skpc", _HAAR, colors).reshape(-1, 2, 2, channels)
    patterns = np.moveaxis(np.concatenate([patterns, -patterns]), 0, -1)
    deviations = np.sqrt(np.concatenate([variances, variances]).reshape(-1) + _LEAST_VARIANCE)
    return patterns, 1 / (np.sqrt(np.square(patterns).sum((0, 1, 2))) * deviations)


class Stem(Layer):
    """Whitening filters, a learned bias, GELU."""

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> [B, H - 1, W - 1, 8 C]."""
        patterns, scales = (jnp.asarray(array, self.dtype) for array in whitening_filters(x.shape[-1]))
        # Scaled after the sum: in f64 a sum of whole multiples of x is exact (`augment.normalize`). So patches of equal
        # differences give equal bits. Otherwise the order of the sum, which depends on the layout, would decide which of
        # them is larger and gets a max-pool's gradient.
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype), patterns, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return nn.gelu(x * scales + bias.astype(x.dtype))


class Conv(Layer):
    """3x3 convolution, a 2x2 max-pool if `pool`, BatchNorm without a scale, GELU."""

    features: int
    pool: bool

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, features], or half of H and W, rounded down."""
        types = {"use_bias": False, "kernel_init": identity_first, "name": "conv", **self.types}
        x = nn.Conv(self.features, (3, 3), padding=1, **types)(x)
        x = max_pool(x, 2, 2) if self.pool else x
        # A low momentum: the statistics must follow the weights closely, which a short run changes to its last step.
        return nn.gelu(BatchNorm(self.param_dtype, scale_init=None, momentum=0.6, name="bn")(x, context))


class Head(Layer):
    """The largest value over the map, dropout, and a linear map without bias, in at least f32, divided by its inputs."""

    num_classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> logits [B, num_classes]."""
        x = nn.max_pool(x, x.shape[1:3]).reshape(x.shape[0], -1)
        x = Dropout(self.dropout, name="dropout")(x, context)
        options = {"use_bias": False, "kernel_init": nn.initializers.normal(1.0), "name": "linear", **self.wide_types}
        return Dense(self.num_classes, **options)(x) / x.shape[-1]


def identity_first(key: Any, shape: Any, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
    """An initialiser: the first outputs pass the inputs on unchanged, the others are as in PyTorch.

    Returns a kernel [height, width, in, out] of that `shape`. The arguments are those of JAX's initialisers.
    """
    kernel = torch_kernel(key, shape, dtype, out_sharding)
    height, width, inputs, outputs = shape
    passed = min(inputs, outputs)
    identity = jnp.zeros((*shape[:3], passed), kernel.dtype)
    identity = identity.at[height // 2, width // 2].set(jnp.eye(inputs, passed, dtype=kernel.dtype))
    return jnp.concatenate([identity, kernel[..., passed:]], -1)


def build(
    config: ModelConfig,
    image_shape: settings.ImageShape,
    num_classes: int,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> Classifier:
    """Three groups of `config.depths` (2, 2, 2) convolutions, of `config.width` (64), 4 and 4 times as many channels.

    Arguments as of `registry.build`.
    """
    settings.refuse(config, "stem", "patch", "window", "attention", "drop_path")
    settings.require_side(config, image_shape, 9)
    width, types = config.width or 64, (dtype, param_dtype)
    layers: list[nn.Module] = [Stem(*types)]
    for features, depth in zip((width, 4 * width, 4 * width), settings.depths(config, (2, 2, 2)), strict=True):
        layers += [Conv(*types, features, pool=i == 0) for i in range(depth)]
    rules: list[tuple[str, tuple[str | None, ...]]] = []
    for index in range(1, len(layers) - 1, 2):  # of two layers, the first is split by outputs, the second by inputs
        first, second = layer_name(index), layer_name(index + 1)
        rules.append((f"{first}/conv/kernel$", (None, None, None, "tensor")))
        rules.append((f"{first}/bn/(bias|mean|var)$", ("tensor",)))
        rules.append((f"{second}/conv/kernel$", (None, None, "tensor", None)))
    head = Head(*types, num_classes, settings.dropout(config, 0.0))
    return Classifier((*layers, head), tensor_rules=tuple(rules))
