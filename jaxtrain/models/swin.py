"""Swin Transformer T/S/B, version 1 (Liu et al. 2021, microsoft/Swin-Transformer).

Self-attention within windows of the map, shifted by half a window in every second block, with a learned bias by
relative position. On small images the patch is 2 and the window 4 instead of 4 and 7.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ConfigError
from jaxtrain.models import settings
from jaxtrain.models.classifier import Classifier
from jaxtrain.models.layers import (
    Context,
    Dense,
    DenseGeneral,
    Dropout,
    DropPath,
    Layer,
    LayerNorm,
    gelu,
    matmul,
    torch_bias,
    torch_kernel,
)
from jaxtrain.models.window_attention import LARGEST_WINDOW, Windows, region, window_attention
from jaxtrain.precision import at_least_f32

VARIANTS = {  # name: (width, blocks a stage, drop-path rate)
    "swin_tiny": (96, (2, 2, 6, 2), 0.2),
    "swin_small": (96, (2, 2, 18, 2), 0.3),
    "swin_base": (128, (2, 2, 18, 2), 0.5),
}
NAMES = tuple(VARIANTS)

HEAD_DIM = 32

# The reference's trunc_normal_(std=0.02) cuts at +-2, a hundred standard deviations. That is a normal distribution.
normal = nn.initializers.normal(0.02)


class PatchEmbed(Layer):
    """A linear map of each patch of pixels, LayerNorm, dropout. Pads with zeros, below and right, to whole patches."""

    features: int
    patch: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> [B, H / patch, W / patch, features], rounded up."""
        p = self.patch
        padding = [(0, -x.shape[1] % p), (0, -x.shape[2] % p)]
        init = {"kernel_init": torch_kernel, "bias_init": torch_bias(p * p * x.shape[-1])}
        x = nn.Conv(self.features, (p, p), p, padding, name="conv", **init, **self.types)(x)
        x = _norm("norm", self.types)(x)
        return Dropout(self.dropout, name="dropout")(x, context)


class QKV(Layer):
    """The linear map to queries, keys and values, as `DenseGeneral` makes it, but its bias is yet to be added.

    XLA:GPU would write a bias of several dims as large as the product, to add it.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., C] -> the product [..., 3, heads, head_dim], and the bias [3, heads, head_dim]."""
        channels = x.shape[-1]
        shape = (3, self.heads, channels // self.heads)
        kernel = self.param("kernel", normal, (channels, *shape), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        return matmul(x, kernel.astype(self.dtype)), bias


class WindowAttention(Layer):
    """Multi-head self-attention within windows, with a bias by relative position (Liu et al. 2021, equation 4).

    The map is rolled up and to the left by `shift` before it is cut into windows. A value attends only to values of the same
    region in its window. So parts of the map that only the roll has put side by side do not mix.

    Heads are a separate dim of the kernels, so that they can be split over devices: qkv [C, 3, heads, head_dim],
    proj [heads, head_dim, C], bias_table [(2 * window - 1)^2, heads].
    """

    heads: int
    window: int
    shift: int
    how: str
    """`model.attention`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C], whose H and W are multiples of the window -> the same shape."""
        height, width, channels = x.shape[1:]
        plain = self.how == "plain"
        if plain:
            x = split_windows(jnp.roll(x, (-self.shift, -self.shift), (1, 2)), self.window)
        qkv, offset = QKV(**self.types, heads=self.heads, name="qkv")(x)
        table = self.param("bias_table", normal, ((2 * self.window - 1) ** 2, self.heads), self.param_dtype)
        bias = relative_position_bias(table.astype(at_least_f32(self.dtype)), self.window)
        if plain:
            y = self._attend(
                qkv + offset.astype(qkv.dtype), bias, shift_regions(height, width, self.window, self.shift)
            )
        else:
            y = window_attention(qkv, offset, bias, Windows(self.window, self.shift))
        y = DenseGeneral(channels, axis=(-2, -1), kernel_init=normal, name="proj", **self.types)(y)
        return jnp.roll(join_windows(y, height, width), (self.shift, self.shift), (1, 2)) if plain else y

    def _attend(self, qkv: jax.Array, bias: jax.Array, regions: np.ndarray) -> jax.Array:
        """The plain operations.

        Args:
          qkv: [B, windows, N, 3, heads, head_dim].
          bias: [heads, N, N].
          regions: int [H, W].

        Returns:
          [B, windows, N, heads, head_dim].
        """
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        if self.shift:
            in_window = split_windows(regions[None, :, :, None], self.window)[0, :, :, 0]
            apart = in_window[:, None, :, None] != in_window[:, None, None, :]
            # [windows, heads, N, N]; -100 as in the reference
            bias = bias + jnp.where(apart, -100.0, 0.0).astype(bias.dtype)
        scores = jnp.einsum("bwnhd,bwmhd->bwhnm", q, k)
        attention = softmax_to(scores.astype(bias.dtype) * q.shape[-1] ** -0.5 + bias, self.dtype)
        return jnp.einsum("bwhnm,bwmhd->bwnhd", attention, v)


def relative_position_bias(table: jax.Array, window: int) -> jax.Array:
    """table [(2 * window - 1)^2, heads] -> bias [heads, N, N], with N = window^2.

    The bias from row i, column k to row j, column l is in the table at row i - j, column k - l, both counted from
    1 - window. It is made of slices. The gradient of a gather would be a scatter: slow on a GPU, and summed in any order.
    """
    side = 2 * window - 1
    table = jnp.flip(table.reshape(side, side, -1), (0, 1))
    rows = jnp.stack([table[window - 1 - i : side - i] for i in range(window)])  # [i, j, side, heads]
    bias = jnp.stack([rows[:, :, window - 1 - k : side - k] for k in range(window)])  # [k, i, j, l, heads]
    return bias.transpose(4, 1, 0, 2, 3).reshape(-1, window**2, window**2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Softmax over the last dim of x [..., N], computed in x's type (at least f32) and rounded to `dtype`.

    Its gradient is computed in x's type too, but from the rounded result. So a bf16 run does not store its attention in
    f32 as well.
    """
    return jax.nn.softmax(x, -1).astype(dtype)


def _softmax_forward(x: jax.Array, dtype: DTypeLike) -> tuple[Any, Any]:
    y = softmax_to(x, dtype)
    return y, y


def _softmax_backward(dtype: DTypeLike, y: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    y, gradient = (a.astype(at_least_f32(dtype)) for a in (y, gradient))
    return (y * (gradient - jnp.sum(y * gradient, -1, keepdims=True)),)


softmax_to.defvjp(_softmax_forward, _softmax_backward)


class Block(Layer):
    """Two residual branches with LayerNorm: attention in windows, and a two-layer perceptron with GELU.

    A map that is not larger than the window is one window of the map's size, without a shift. A map that does not divide
    into windows is padded below and right with zeros after the norm. The zeros are attended to, as in the reference.
    """

    heads: int
    window: int
    shifted: bool
    dropout: float
    drop_path: float
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> the same shape."""
        height, width, channels = x.shape[1:]
        window = min(self.window, height, width)
        shift = window // 2 if self.shifted and window < min(height, width) else 0
        padded = (height + -height % window, width + -width % window)

        y = _norm("norm1", self.types)(x)
        y = jnp.pad(y, ((0, 0), (0, padded[0] - height), (0, padded[1] - width), (0, 0)))
        attn = WindowAttention(
            **self.types, heads=self.heads, window=window, shift=shift, how=self.attention, name="attn"
        )
        y = attn(y)[:, :height, :width]
        y = Dropout(self.dropout, name="dropout1")(y, context)
        x = x + DropPath(self.drop_path, name="drop_path1")(y, context)

        y = _norm("norm2", self.types)(x)
        y = gelu(Dense(4 * channels, kernel_init=normal, name="fc1", **self.types)(y))
        y = Dropout(self.dropout, name="dropout2")(y, context)
        y = Dense(channels, kernel_init=normal, name="fc2", **self.types)(y)
        y = Dropout(self.dropout, name="dropout3")(y, context)
        return x + DropPath(self.drop_path, name="drop_path2")(y, context)


def split_windows(x: Any, window: int) -> Any:
    """x [B, H, W, C], of JAX or NumPy -> [B, windows, window^2, C]. Windows and their values are in row-major order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c)
    return x.swapaxes(2, 3).reshape(b, -1, window**2, c)


def join_windows(x: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of `split_windows`: x [B, windows, window^2, C] -> [B, height, width, C]."""
    b, _, tokens, c = x.shape
    window = round(tokens**0.5)
    x = x.reshape(b, height // window, width // window, window, window, c)
    return x.swapaxes(2, 3).reshape(b, height, width, c)


def shift_regions(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """To which region of the unshifted map each value of the shifted one belongs.

    There are three regions in each direction: before the last window, and in it before and after the wrapped end.

    Args:
      height: of the padded map.
      width: of the padded map.
      window: side of a window.
      shift: by how much the map was rolled; 0 means one region.

    Returns:
      int [height, width], the number of the region.
    """

    if not shift:
        return np.zeros((height, width), int)
    rows, columns = (region(np.arange(length), length, window, shift) for length in (height, width))
    return rows[:, None] * 3 + columns


class PatchMerging(Layer):
    """Concatenates the channels of each 2x2 square, LayerNorm, a linear map to half of them. Pads an odd map with zeros."""

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> [B, H / 2, W / 2, 2 * C], rounded up."""
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        b, h, w, c = x.shape
        # The four pixels of a square in the reference's order: down the columns first.
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)
        x = _norm("norm", self.types)(x)
        return Dense(2 * c, use_bias=False, kernel_init=normal, name="linear", **self.types)(x)


class Head(Layer):
    """LayerNorm, average over the map, and the last linear map, in at least f32."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, H, W, C] -> logits [B, num_classes]."""
        x = jnp.mean(_norm("norm", self.wide_types)(x), (1, 2))
        return Dense(self.num_classes, kernel_init=normal, name="linear", **self.wide_types)(x)


def _heads(channels: int) -> int:
    return max(1, channels // HEAD_DIM)


def _divides_into_heads(width: int, stages: Iterable[int]) -> bool:
    return all(width * 2**stage % _heads(width * 2**stage) == 0 for stage in stages)


def _norm(name: str, types: dict[str, Any]) -> LayerNorm:
    return LayerNorm(name=name, **types)


def _require_kernel(config: ModelConfig, window: int, head_dims: Iterable[int], dtype: DTypeLike) -> None:
    """Refuses a Swin that `window_attention` has no kernel for."""
    problem = ""
    if jnp.dtype(dtype) == jnp.float64:
        problem = "computes in at most f32, and config.train.precision is 'f64'"
    elif window > LARGEST_WINDOW:
        problem = f"takes windows of at most {LARGEST_WINDOW} x {LARGEST_WINDOW}, and config.model.window is {window}"
    elif odd := [n for n in head_dims if n < 16 or n & (n - 1)]:
        problem = (
            f"takes heads of a power of two of channels, at least 16, and config.model.width makes heads of {odd[0]}"
        )
    if problem:
        raise ConfigError(f"config.model.attention='pallas': {problem}; use --config.model.attention=plain.")


def build(
    config: ModelConfig,
    image_shape: settings.ImageShape,
    num_classes: int,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> Classifier:
    """Swin `config.name` with `config.width` channels in the first stage and heads of 32 channels.

    Arguments as of `registry.build`.
    """
    settings.refuse(config, "stem")
    default_width, default_depths, default_drop_path = VARIANTS[config.name]
    width, depths = config.width or default_width, settings.depths(config, default_depths)
    small = settings.is_small(image_shape)
    patch, window = config.patch or (2 if small else 4), config.window or (4 if small else 7)
    settings.require_side(config, image_shape, patch * 8, ", or a smaller config.model.patch")
    stages = range(len(depths))
    if not _divides_into_heads(width, stages):
        low = next(w for w in itertools.count(width // 8 * 8, -8) if _divides_into_heads(w, stages))
        high = next(w for w in itertools.count(width // 8 * 8 + 8, 8) if _divides_into_heads(w, stages))
        raise ConfigError(
            f"config.model.width={width}: does not divide into heads of about {HEAD_DIM} channels in every stage; "
            f"{low} and {high} do."
        )
    if config.attention == "pallas":
        _require_kernel(config, window, {width * 2**stage // _heads(width * 2**stage) for stage in stages}, dtype)
    dropout = settings.dropout(config, 0.0)
    types = (dtype, param_dtype)

    layers: list[nn.Module] = [PatchEmbed(*types, width, patch, dropout)]
    rates = iter(settings.drop_paths(config, default_drop_path, sum(depths)))
    for stage, depth in enumerate(depths):
        if stage > 0:
            layers.append(PatchMerging(*types))
        layers += [
            Block(*types, _heads(width * 2**stage), window, i % 2 == 1, dropout, next(rates), config.attention)
            for i in range(depth)
        ]
    return Classifier(
        layers=(*layers, Head(*types, num_classes)),
        tensor_rules=(
            ("attn/qkv/kernel$", (None, None, "tensor", None)),
            ("attn/qkv/bias$", (None, "tensor", None)),
            ("attn/bias_table$", (None, "tensor")),
            ("attn/proj/kernel$", ("tensor", None, None)),
            ("fc1/kernel$", (None, "tensor")),
            ("fc1/bias$", ("tensor",)),
            ("fc2/kernel$", ("tensor", None)),
        ),
        no_decay=("attn/bias_table$", "attn/qkv/bias$"),
    )
