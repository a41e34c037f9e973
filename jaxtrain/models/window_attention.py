"""Attention within windows of a map as one kernel, for NVIDIA GPUs (Pallas, which is compiled by Triton).

Its scores and weights never leave the chip, as in FlashAttention (Dao 2022), and the kernel itself finds a window's tokens
on the map, so nothing is rolled, cut into windows or transposed. A window is padded to a power of two, from 7 x 7 tokens to
8 x 8. The backward pass computes the weights again and keeps queries, keys and values alone. `swin.WindowAttention` has the
same in plain operations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

LARGEST_WINDOW = 8
"""Side of the largest window whose scores fit the registers."""

_MASKED = -1e30  # finite: what is padded has a softmax too
_PROGRAMS = 1024  # enough for every GPU's processors; each writes a sum of its own for the gradients of offset and bias


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a map is cut into windows.

    Attributes:
      window: side of a window, in tokens, at most `LARGEST_WINDOW`. Height and width of the map are multiples of it.
      shift: by how much the map is rolled up and to the left before it is cut.
    """

    window: int
    shift: int

    @property
    def side(self) -> int:
        """Side of a padded window: a power of two. The smallest product of Triton is of 16 x 16."""
        return max(4, 1 << (self.window - 1).bit_length())

    @property
    def tokens(self) -> int:
        """Tokens in a padded window."""
        return self.side**2

    def of_map(self, shape: Sequence[int]) -> int:
        """How many there are on a map of [B, H, W, ...]."""
        return (shape[1] // self.window) * (shape[2] // self.window)


def region(position: Any, length: int, window: int, shift: int) -> Any:
    """Which of the three parts of a rolled map a position is in, in one direction.

    Args:
      position: int array, of NumPy or JAX: on the rolled map.
      length: of the map.
      window: side of a window.
      shift: by how much the map was rolled, above 0.

    Returns:
      0 before the last window, and in it 1 before and 2 after the wrapped end.
    """
    return (position >= length - window) * 1 + (position >= length - shift) * 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def window_attention(qkv: jax.Array, offset: jax.Array, bias: jax.Array, windows: Windows) -> jax.Array:
    """Attention of each token to those of its window that were in the same region before the roll.

    Args:
      qkv: [B, H, W, 3, heads, head_dim], queries, keys and values; head_dim is a power of two, at least 16.
      offset: [3, heads, head_dim], added to them.
      bias: f32 [heads, window^2, window^2], added to the scores.
      windows: how the map is cut.

    Returns:
      [B, H, W, heads, head_dim], of qkv's type.
    """
    return _partitioned_forward(qkv, offset, _padded(bias, windows), windows)


def _vjp_forward(qkv: jax.Array, offset: jax.Array, bias: jax.Array, windows: Windows) -> tuple[jax.Array, Any]:
    return window_attention(qkv, offset, bias, windows), (qkv, offset, bias)


def _vjp_backward(windows: Windows, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    qkv, offset, bias = saved
    padded, unpad = jax.vjp(lambda b: _padded(b, windows), bias)
    dqkv, doffset, dbias = _partitioned_backward(qkv, offset, padded, g, windows)
    return dqkv, doffset.astype(offset.dtype), *unpad(dbias)


window_attention.defvjp(_vjp_forward, _vjp_backward)


def _padded(bias: jax.Array, windows: Windows) -> jax.Array:
    """bias [heads, window^2, window^2] -> [heads, tokens, tokens], with nothing to attend to in what is added."""
    more = (0, windows.side - windows.window)
    split = bias.reshape(-1, *(windows.window,) * 4)
    return jnp.pad(split, ((0, 0), *(more,) * 4), constant_values=_MASKED).reshape(-1, windows.tokens, windows.tokens)


# -------------------------------------------------------------------------------------------------------- on one device


def _forward(qkv: jax.Array, offset: jax.Array, bias: jax.Array, windows: Windows) -> jax.Array:
    heads, batch = qkv.shape[4], qkv.shape[0]
    out = jax.ShapeDtypeStruct((*qkv.shape[:3], heads, qkv.shape[5]), qkv.dtype)
    return _call(
        functools.partial(_forward_kernel, windows=windows),
        (qkv, offset, bias),
        grid=(heads, batch * windows.of_map(qkv.shape)),
        in_specs=[_of_head(qkv, 4), _of_head(offset, 1), _of_head(bias, 0)],
        out_specs=_of_head(out, 3),
        out_shape=out,
    )


def _backward(
    qkv: jax.Array, offset: jax.Array, bias: jax.Array, g: jax.Array, windows: Windows
) -> tuple[jax.Array, jax.Array, jax.Array]:
    heads, count = qkv.shape[4], qkv.shape[0] * windows.of_map(qkv.shape)
    each = next(n for n in range(max(count * heads // _PROGRAMS, 1), 0, -1) if count % n == 0)
    dqkv = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)
    parts = [jax.ShapeDtypeStruct((count // each, *array.shape), jnp.float32) for array in (offset, bias)]
    dqkv, doffset, dbias = _call(
        functools.partial(_backward_kernel, windows=windows, each=each),
        (qkv, offset, bias, g),
        grid=(heads, count // each),
        in_specs=[_of_head(qkv, 4), _of_head(offset, 1), _of_head(bias, 0), _of_head(g, 3)],
        out_specs=[_of_head(dqkv, 4), _of_head(parts[0], 2, grouped=True), _of_head(parts[1], 1, grouped=True)],
        out_shape=[dqkv, *parts],
    )
    return dqkv, jnp.sum(doffset, 0), jnp.sum(dbias, 0)


def _call(kernel: Any, operands: Sequence[jax.Array], **options: Any) -> Any:
    """The kernel, compiled; on what is no NVIDIA GPU run by JAX step by step, slowly: for tests, and to count operations."""
    compiled, interpreted = (
        pl.pallas_call(
            kernel, compiler_params=triton.CompilerParams(num_warps=4, num_stages=1), interpret=interpret, **options
        )
        for interpret in (False, True)
    )
    return jax.lax.platform_dependent(*operands, cuda=compiled, default=interpreted)


def _of_head(array: Any, dim: int, *, grouped: bool = False) -> pl.BlockSpec:
    """What a program sees of an array with the heads in `dim`: its head's part; of parts of a sum its own."""
    shape = [None if i == dim or (grouped and i == 0) else size for i, size in enumerate(array.shape)]

    def index(head: Any, group: Any) -> tuple[Any, ...]:
        return tuple(head if i == dim else group if grouped and i == 0 else 0 for i in range(len(shape)))

    return pl.BlockSpec(tuple(shape), index)


class _Window:
    """A window's tokens: where they lie on the map, whether they are padding, which of them attend to each other."""

    def __init__(self, number: Any, shape: Sequence[int], windows: Windows) -> None:
        (_, height, width), window = shape[:3], windows.window
        down, across = height // window, width // window
        token = jnp.arange(windows.tokens)
        row, column = token // windows.side, token % windows.side
        self._inside = (row < window) & (column < window)
        rows = number // across % down * window + row
        columns = number % across * window + column
        on_map = jnp.where(self._inside, (rows + windows.shift) % height, height)  # padding lies below it
        self._at = (number // (down * across), on_map, (columns + windows.shift) % width)
        self._region = None
        if windows.shift:
            parts = (region(at, n, window, windows.shift) for at, n in ((rows, height), (columns, width)))
            self._region = next(parts) * 3 + next(parts)

    def load(self, ref: Any, *index: int) -> jax.Array:
        """[tokens, head_dim]; 0 for padding."""
        return triton.load(self._view(ref, *index), mask=self._mask(ref), other=0)

    def store(self, ref: Any, value: jax.Array, *index: int) -> None:
        """value [tokens, head_dim]."""
        triton.store(self._view(ref, *index), value.astype(ref.dtype), mask=self._mask(ref))

    def queries_keys_values(self, qkv_ref: Any, offset_ref: Any) -> list[jax.Array]:
        """Three times [tokens, head_dim]."""
        offsets = [offset_ref[i][None, :] for i in range(3)]
        return [(self.load(qkv_ref, i) + offset).astype(qkv_ref.dtype) for i, offset in enumerate(offsets)]

    def _view(self, ref: Any, *index: int) -> Any:
        image, rows, columns = self._at
        return ref.at[(image, rows[:, None], columns[:, None], *index, jnp.arange(ref.shape[-1])[None, :])]

    def _mask(self, ref: Any) -> jax.Array:
        return jnp.broadcast_to(self._inside[:, None], (self._inside.size, ref.shape[-1]))

    def weights(self, q: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
        """f32 [tokens, tokens], the softmax of the scores over the last dim."""
        scores = triton.dot(q, k, trans_b=True) * q.shape[-1] ** -0.5 + bias
        if self._region is not None:
            scores = jnp.where(self._region[:, None] == self._region[None, :], scores, scores - 100.0)
        exponentials = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
        return exponentials / jnp.sum(exponentials, -1, keepdims=True)


def _forward_kernel(qkv_ref: Any, offset_ref: Any, bias_ref: Any, out_ref: Any, *, windows: Windows) -> None:
    tokens = _Window(pl.program_id(1), qkv_ref.shape, windows)
    q, k, v = tokens.queries_keys_values(qkv_ref, offset_ref)
    weights = tokens.weights(q, k, bias_ref[...])
    tokens.store(out_ref, triton.dot(weights.astype(v.dtype), v))


def _backward_kernel(
    qkv_ref: Any,
    offset_ref: Any,
    bias_ref: Any,
    g_ref: Any,
    dqkv_ref: Any,
    doffset_ref: Any,
    dbias_ref: Any,
    *,
    windows: Windows,
    each: int,
) -> None:
    first = pl.program_id(1) * each

    def one(i: Any, sums: Any) -> Any:
        tokens = _Window(first + i, qkv_ref.shape, windows)
        q, k, v = tokens.queries_keys_values(qkv_ref, offset_ref)
        g = tokens.load(g_ref)
        weights = tokens.weights(q, k, bias_ref[...])
        dweights = triton.dot(g, v, trans_b=True)
        dscores = weights * (dweights - jnp.sum(weights * dweights, -1, keepdims=True))
        scaled = (dscores * q.shape[-1] ** -0.5).astype(q.dtype)
        gradients = (
            triton.dot(scaled, k),
            triton.dot(scaled, q, trans_a=True),
            triton.dot(weights.astype(g.dtype), g, trans_a=True),
        )
        for j, gradient in enumerate(gradients):
            tokens.store(dqkv_ref, gradient, j)
        doffsets, dbias = sums
        return [total + jnp.sum(new, 0) for total, new in zip(doffsets, gradients, strict=True)], dbias + dscores

    zeros = [jnp.zeros(doffset_ref.shape[-1:], jnp.float32)] * 3, jnp.zeros(dbias_ref.shape, jnp.float32)
    doffsets, dbias_ref[...] = jax.lax.fori_loop(0, each, one, zeros)
    for j, doffset in enumerate(doffsets):
        doffset_ref[j] = doffset


# ------------------------------------------------------------------------------------------------------ on many devices
# XLA cannot split a kernel. So it is told that each device computes its own images and heads.


def _shardings(mesh: Any, arguments: Any) -> tuple[dict[str, NamedSharding], Any]:
    """Of each array, and the mesh axes over which the images are split."""
    spec = (*arguments[0].sharding.spec, *(None,) * 6)
    batch, heads = spec[0], spec[4]
    specs = {
        "qkv": P(batch, None, None, None, heads, None),
        "offset": P(None, heads, None),
        "bias": P(heads, None, None),
        "out": P(batch, None, None, heads, None),
    }
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}, batch


def _partition_forward(windows: Windows, mesh: Any, arguments: Any, result: Any) -> Any:
    del result
    at, _ = _shardings(mesh, arguments)
    return mesh, functools.partial(_forward, windows=windows), at["out"], (at["qkv"], at["offset"], at["bias"])


def _partition_backward(windows: Windows, mesh: Any, arguments: Any, result: Any) -> Any:
    del result
    at, batch = _shardings(mesh, arguments)

    def lowered(*operands: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        dqkv, doffset, dbias = _backward(*operands, windows=windows)
        if batch:
            doffset, dbias = jax.lax.psum((doffset, dbias), batch)
        return dqkv, doffset, dbias

    gradients = (at["qkv"], at["offset"], at["bias"])
    return mesh, lowered, gradients, (*gradients, at["out"])


_partitioned_forward = custom_partitioning(_forward, static_argnums=(3,))
_partitioned_forward.def_partition(
    partition=_partition_forward,
    sharding_rule="b h w t n d, t n d, n q k -> b h w n d",
    need_replication_factors=("h", "w", "t", "d", "q", "k"),
)
_partitioned_backward = custom_partitioning(_backward, static_argnums=(4,))
_partitioned_backward.def_partition(
    partition=_partition_backward,
    sharding_rule="b h w t n d, t n d, n q k, b h w n d -> b h w t n d, t n d, n q k",
    need_replication_factors=("h", "w", "t", "d", "q", "k"),
)
