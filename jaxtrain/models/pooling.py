"""Max-pooling with a gradient of its own."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.precision import at_least_f32


class _Window(NamedTuple):
    """The arguments of `max_pool`, and the shape of its x [B, height, width, C]."""

    size: int
    stride: int
    padding: int
    rectify: bool
    height: int
    width: int


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0, *, rectify: bool = False) -> jax.Array:
    """The largest value of each window. Among equal values the first, row by row, gets the gradient, as in PyTorch.

    For the gradient it keeps which value of each window was taken, one byte, and not x. That of `nn.max_pool` looks for the
    value again, and adds with a scatter: slow on XLA:CPU, and on a GPU in an order that differs from run to run.

    Args:
      x: [B, H, W, C].
      size: of a window, in both directions; at most 15.
      stride: from one window to the next.
      padding: rows and columns of -inf around x.
      rectify: whether ReLU precedes or follows, which is the same.

    Returns:
      [B, 1 + (H + 2 * padding - size) // stride, the same of W, C].
    """
    return _max_pool(x, _Window(size, stride, padding, rectify, *x.shape[1:3]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, window: _Window) -> jax.Array:
    return _max_pool_forward(x, window)[0]


def _max_pool_forward(x: jax.Array, window: _Window) -> tuple[jax.Array, jax.Array]:
    size, stride, padding, rectify, *sides = window
    height, width = (1 + (side + 2 * padding - size) // stride for side in sides)
    x = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), ((0, 0, 0), *[(padding, padding, 0)] * 2, (0, 0, 0)))
    values = [
        x[:, row : row + stride * height : stride, column : column + stride * width : stride]
        for row, column in np.ndindex(size, size)
    ]
    y, taken = values[0], jnp.zeros(values[0].shape, jnp.uint8)
    for number, value in enumerate(values[1:], start=1):
        larger = (y < value) | jnp.isnan(value)
        y, taken = jnp.where(larger, value, y), jnp.where(larger, jnp.uint8(number), taken)
    if rectify:
        y, taken = jnp.maximum(y, 0), jnp.where(y > 0, taken, jnp.uint8(size * size))  # none is taken
    return y, taken


def _max_pool_backward(window: _Window, taken: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    # The padded x in blocks of stride x stride. The windows that reach into a block begin there, or up to `reach` blocks
    # before. Row r of a block is row r + stride * n of the window that begins n blocks before.
    size, stride, padding, _, height, width = window
    rows, columns = (-(-(side + padding) // stride) for side in (height, width))
    reach = (size - 1) // stride
    total = jnp.zeros((), at_least_f32(g.dtype))
    for up, left in np.ndindex(reach + 1, reach + 1):
        row, column = np.arange(stride)[:, None] + stride * up, np.arange(stride) + stride * left
        number = np.where((row < size) & (column < size), row * size + column, 255).astype(np.uint8)
        blocks = ((0, 0, 0), (up, rows - up - g.shape[1], 0), (left, columns - left - g.shape[2], 0), (0, 0, 0))
        its, gradient = (jax.lax.pad(a, jnp.zeros((), a.dtype), blocks)[:, :, None, :, None] for a in (taken, g))
        total += jnp.where(its == number[:, None, :, None], gradient, 0).astype(total.dtype)
    dx = total.reshape(g.shape[0], rows * stride, columns * stride, g.shape[-1])
    return (dx[:, padding : padding + height, padding : padding + width].astype(g.dtype),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
