"""ResNet-18/34/50/101/152 (He et al. 2016), v1.5: a bottleneck's stride is on its 3x3 convolution, as in torchvision.

For small images the stem is one 3x3 convolution without stride or pooling (stem "cifar").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxtrain.config import ModelConfig
from jaxtrain.models import settings
from jaxtrain.models.classifier import Classifier
from jaxtrain.models.layers import (
    BatchNorm,
    Context,
    Dropout,
    DropPath,
    Layer,
    kaiming_normal,
    matmul,
    relu,
    torch_dense,
)
from jaxtrain.models.pooling import max_pool
from jaxtrain.precision import at_least_f32

VARIANTS = {  # name: (bottleneck blocks, blocks a stage)
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}
NAMES = tuple(VARIANTS)


class Stem(Layer):
    """7x7 convolution and 3x3 max-pool, both of stride 2; if `small`, a 3x3 convolution alone. BatchNorm and ReLU."""

    features: int
    small: bool

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> [B, H / 4, W / 4, features], or the same H and W if `small`."""
        size, stride = (3, 1) if self.small else (7, 2)
        x = _conv(self.features, size, stride, name="conv", **self.types)(x)
        x = BatchNorm(self.param_dtype, rectify=self.small, name="bn")(x, context)
        return x if self.small else max_pool(x, 3, 2, padding=1, rectify=True)


class Block(Layer):
    """A residual block of two 3x3 convolutions, or of 1x1, 3x3 and 1x1 to four times the channels (`bottleneck`)."""

    features: int
    stride: int
    bottleneck: bool
    drop_path: float

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> [B, H / stride, W / stride, features (x 4 for a bottleneck)]."""
        c, s = self.features, self.stride
        plan = ((1, c, 1), (3, c, s), (1, 4 * c, 1)) if self.bottleneck else ((3, c, s), (3, c, 1))
        y = x
        for i, (size, features, stride) in enumerate(plan, start=1):
            last = i == len(plan)
            # A zero scale makes the block the identity at first (Goyal et al. 2017, section 5.1).
            scale_init = nn.initializers.zeros if last else nn.initializers.ones
            y = _conv(features, size, stride, name=f"conv{i}", **self.types)(y)
            y = BatchNorm(self.param_dtype, scale_init, rectify=not last, name=f"bn{i}")(y, context)
        if x.shape[-1] != y.shape[-1] or s != 1:
            x = _conv(y.shape[-1], 1, s, name="shortcut_conv", **self.types)(x)
            x = BatchNorm(self.param_dtype, name="shortcut_bn")(x, context)
        return relu(x + DropPath(self.drop_path, name="drop_path")(y, context))


class Head(Layer):
    """Average over the map, dropout, and the last linear map, in at least f32."""

    num_classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> logits [B, num_classes]."""
        x = jnp.mean(x, (1, 2), dtype=at_least_f32(self.dtype))
        x = Dropout(self.dropout, name="dropout")(x, context)
        return torch_dense(self.num_classes, x.shape[-1], name="linear", **self.wide_types)(x)


def _conv(features: int, size: int, stride: int, **options: Any) -> nn.Conv:
    # Padding in numbers: "SAME" would pad a strided convolution on the other side than PyTorch does.
    options |= {"padding": size // 2, "use_bias": False, "kernel_init": kaiming_normal}
    if size == 1:
        options["conv_general_dilated"] = _pointwise
    return nn.Conv(features, (size, size), stride, **options)


def _pointwise(x: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Any, **_: Any) -> jax.Array:
    return _pointwise_strided(x, kernel, tuple(window_strides))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pointwise_strided(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """A convolution of 1x1 values.

    On XLA:CPU it is a product: that takes a seventh of the time for the weights' gradient (32 x 32, 64 to 256 channels). On
    a GPU it is a convolution: cuDNN adds the shortcut's gradient to that of its input, and XLA fuses what is around it
    into fewer kernels than around a product, whose operands are matrices.

    Args:
      x: [B, H, W, C].
      kernel: [1, 1, C, F].
      strides: of both directions.

    Returns:
      [B, H / stride, W / stride, F].
    """
    convolution, product = (functools.partial(form, strides=strides) for form in (_as_convolution, _as_product))
    return jax.lax.platform_dependent(x, kernel, cuda=convolution, default=product)


def _pointwise_forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> tuple[jax.Array, Any]:
    return _pointwise_strided(x, kernel, strides), (x, kernel)


def _pointwise_backward(strides: tuple[int, int], saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    def gradient(form: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
        return lambda x, kernel, g: jax.vjp(functools.partial(form, strides=strides), x, kernel)[1](g)

    return jax.lax.platform_dependent(*saved, g, cuda=gradient(_as_convolution), default=gradient(_as_product))


_pointwise_strided.defvjp(_pointwise_forward, _pointwise_backward)


def _as_product(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    return matmul(x[:, :: strides[0], :: strides[1]], kernel[0, 0])


def _as_convolution(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def build(
    config: ModelConfig,
    image_shape: settings.ImageShape,
    num_classes: int,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> Classifier:
    """ResNet `config.name` with `config.width` (64) channels in the first stage. Arguments as of `registry.build`."""
    settings.refuse(config, "patch", "window", "attention")
    bottleneck, default_depths = VARIANTS[config.name]
    small = settings.stem(config, image_shape) == "cifar"
    settings.require_side(config, image_shape, 8 if small else 32, "" if small else " or config.model.stem='cifar'")
    depths = settings.depths(config, default_depths)
    width = config.width or 64
    types = (dtype, param_dtype)

    layers: list[nn.Module] = [Stem(*types, width, small)]
    rates = iter(settings.drop_paths(config, 0.0, sum(depths)))
    for stage, depth in enumerate(depths):
        strides = [1 if stage == 0 else 2] + [1] * (depth - 1)
        layers += [Block(*types, width * 2**stage, stride, bottleneck, next(rates)) for stride in strides]
    return Classifier(
        (*layers, Head(*types, num_classes, settings.dropout(config, 0.0))),
        tensor_rules=(  # in a block, the first convolution is split by outputs, the second by inputs
            ("conv1/kernel$", (None, None, None, "tensor")),
            ("bn1/(scale|bias|mean|var)$", ("tensor",)),
            ("conv2/kernel$", (None, None, "tensor", None)),
        ),
    )
