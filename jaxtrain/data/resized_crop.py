"""RandomResizedCrop of torchvision, on the device: a random box of each image, resized with antialiasing as Pillow does it.

Boxes come from random words by integer arithmetic. Weights of pixels are multiples of 2**-15, so that sums of their products
with pixels are exact in f32, in any order. So the result is the same on every layout and in every precision.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.data import random_bits
from jaxtrain.data.filters import FILTERS

TRIES = 10
WORDS = TRIES + 2
"""Random words an example: one for the area and the ratio of each try, and two for the place of the box."""

_STEPS = 12  # bits of a word that choose a try's area, and as many that choose its ratio
_FACTOR_BITS = 14  # of roots of areas and ratios as fixed-point numbers; those of a ratio of 16 have 16 bits
_TABLE_BITS, _VALUE_BITS, _WEIGHT_BITS = 14, 15, 15


def random_boxes(
    shape: tuple[int, int], scale: tuple[float, ...], ratio: tuple[float, ...], words: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The boxes that torchvision's `RandomResizedCrop.get_params` draws, from ten tries; else the largest centre crop.

    A share of the area is uniform in `scale`, and the width over the height is log-uniform in `ratio`; each has 4,096
    values. Without a try that fits, the box is the whole image, cut at the centre to the nearest ratio that is allowed.

    Args:
      shape: height and width of the images.
      scale: the smallest and the largest share of the area.
      ratio: the smallest and the largest width over height.
      words: random, uint32 [B, WORDS].

    Returns:
      top, left, height, width: int32 [B, 1] each.
    """
    height, width = shape
    middles = (np.arange(1 << _STEPS) + 0.5) / (1 << _STEPS)
    # width = sqrt(area) sqrt(ratio), height = sqrt(area) / sqrt(ratio)
    roots = np.rint(np.sqrt(scale[0] + (scale[1] - scale[0]) * middles) * (1 << _FACTOR_BITS)).astype(np.uint32)
    log = np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * middles
    wide, high = (np.rint(np.exp(sign * log / 2) * (1 << _FACTOR_BITS)).astype(np.uint32) for sign in (1, -1))
    root = (height * width) ** 0.5
    root_bits = 15 - int(root).bit_length()  # as many as keep the product below within 32 bits
    side_of_square = np.uint32(round(root * (1 << root_bits)))
    tries = words[:, :TRIES]
    area = jnp.asarray(roots)[tries >> (32 - _STEPS)]

    def side(factors: np.ndarray) -> jax.Array:
        factor = jnp.asarray(factors)[(tries >> (32 - 2 * _STEPS)) & ((1 << _STEPS) - 1)]
        share = _rounded(area * factor, _FACTOR_BITS)
        return _rounded(share * side_of_square, _FACTOR_BITS + root_bits).astype(jnp.int32)

    widths, heights = side(wide), side(high)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    any_fits = fits.any(1, keepdims=True)
    whole_height, whole_width = _largest(shape, ratio)
    h = jnp.where(any_fits, jnp.take_along_axis(heights, first, axis=1), whole_height)
    w = jnp.where(any_fits, jnp.take_along_axis(widths, first, axis=1), whole_width)
    top = jnp.where(any_fits, random_bits.below(height - h + 1, words[:, TRIES : TRIES + 1]), (height - h) // 2)
    left = jnp.where(any_fits, random_bits.below(width - w + 1, words[:, TRIES + 1 :]), (width - w) // 2)
    return top, left, h, w


def _rounded(product: jax.Array, bits: int) -> jax.Array:
    """`product` / 2**bits, rounded."""
    return (product + jnp.uint32(1 << (bits - 1))) >> bits


def _largest(shape: tuple[int, int], ratio: tuple[float, ...]) -> tuple[int, int]:
    """Height and width of the largest box whose ratio is allowed."""
    height, width = shape
    if width / height < ratio[0]:
        return min(height, round(width / ratio[0])), width
    if width / height > ratio[1]:
        return height, min(width, round(height * ratio[1]))
    return height, width


def resize_boxes(
    images: jax.Array, boxes: tuple[jax.Array, jax.Array, jax.Array, jax.Array], size: int, interpolation: str
) -> jax.Array:
    """A box of each image, resized as `image.crop(box).resize((size, size), interpolation)` of Pillow, within a grey level.

    Two levels for a few pixels of noise under bicubic, where two roundings add up.

    Along the width first, then along the height, each rounded to whole numbers. (Pillow 13 takes the height first for some tall
    boxes; bicubic values beyond black and white are then cut off elsewhere.) Each is a matrix product: on a CPU a sum
    over the taps, which are others for each example, took longer.

    Args:
      images: uint8 [B, H, W, C].
      boxes: of `random_boxes`.
      size: height and width of the result, in pixels.
      interpolation: a name of `FILTERS`.

    Returns:
      uint8 [B, size, size, C].
    """
    top, left, height, width = boxes
    batch, rows, columns, channels = images.shape
    across = _weights(left, width, columns, size, interpolation)
    images = _product("bsw,bhwc->bhsc", across, images)
    down = _weights(top, height, rows, size, interpolation)
    flat = images.reshape(batch, rows, size * channels)
    return _product("bsh,bhk->bsk", down, flat).reshape(batch, size, size, channels)


def _product(indices: str, weights: jax.Array, pixels: jax.Array) -> jax.Array:
    """The weighted sums of uint8 pixels, rounded to uint8. All partial sums are whole numbers below 2**24, exact in f32."""
    total = jnp.einsum(indices, weights, pixels.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    rounded = (total.astype(jnp.int32) + (1 << (_WEIGHT_BITS - 1))) >> _WEIGHT_BITS
    return jnp.clip(rounded, 0, 255).astype(jnp.uint8)


def _weights(start: jax.Array, extent: jax.Array, source: int, size: int, interpolation: str) -> jax.Array:
    """float32 [B, size, source]: how much each pixel of a line counts for each pixel of its resized box, times 2**15.

    The filter is centred on the new pixel. It is as wide as in the source, or as in the result where that is coarser.

    Args:
      start: int32 [B, 1], of the boxes.
      extent: int32 [B, 1], of the boxes.
      source: pixels of a line of the image.
      size: pixels of a line of the result.
      interpolation: a name of `FILTERS`.
    """
    function, support = FILTERS[interpolation]
    table = np.rint(function(np.arange((support << _TABLE_BITS) + 1) / (1 << _TABLE_BITS)) * (1 << _VALUE_BITS))
    pixel = jnp.arange(source, dtype=jnp.int32)[None, None, :] - start[:, :, None]
    new = jnp.arange(size, dtype=jnp.int32)[None, :, None]
    extent = extent[:, :, None]
    # The distance of the centres in units of the filter's: |(pixel + 1/2) - (new + 1/2) extent / size|.
    distance = jnp.abs((2 * pixel + 1) * size - (2 * new + 1) * extent)
    unit = 2 * jnp.maximum(extent, size)
    inside = (pixel >= 0) & (pixel < extent) & (distance < support * unit)
    # An exact division of whole numbers below 2**24, so that rounding is the same everywhere.
    quotient = (jnp.where(inside, distance, 0) << _TABLE_BITS).astype(jnp.float32) / unit.astype(jnp.float32)
    value = jnp.where(inside, jnp.asarray(table, jnp.int32)[jnp.rint(quotient).astype(jnp.int32)], 0)
    total = jnp.sum(value, axis=-1, keepdims=True, dtype=jnp.int32)
    return ((value * (1 << _WEIGHT_BITS) + total // 2) // total).astype(jnp.float32)
