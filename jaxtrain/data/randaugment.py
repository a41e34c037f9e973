"""RandAugment (Cubuk 2020, arXiv:1909.13719) and colour jitter for a batch of uint8 images, on the device.

Every image of a batch gets another random operation, and `lax.switch` under `vmap` would compute all fourteen. So they are
grouped: one warp (shear, translate, rotate), one blend with a degenerate image (brightness, colour, contrast, sharpness),
and one table of 256 levels (posterize, solarize, autocontrast, equalize). Every image goes once through each group. A
group does not change an image whose operation is in another group.

All of it is integer arithmetic on 0 ... 255, as in Pillow, whose operations torchvision's `RandAugment` applies. So images
depend neither on the compute dtype nor on how XLA orders or fuses float operations.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.data import random_bits

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
_STRENGTH = 9 / 30  # magnitude 9 on the scale of 0 ... 30

# The largest value of each operation (magnitude 30), as in torchvision; those of the first two lines get a random sign.
_SHEAR, _ROTATION = 0.3 * _STRENGTH, 30.0 * _STRENGTH  # slope; degrees, positive is counter-clockwise
_TRANSLATION, _ENHANCEMENT = 150 / 331 * _STRENGTH, 0.9 * _STRENGTH  # share of the side; blend factor minus 1
_POSTERIZED_BITS = round(4 * _STRENGTH)  # low bits set to zero
_SOLARIZE_FROM = math.ceil(255 * (1 - _STRENGTH))  # levels from here on are inverted

_JITTER = 0.4  # factors of brightness, contrast and saturation are uniform in [1 - _JITTER, 1 + _JITTER]
_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)
_JITTER_ORDERS = np.array(list(itertools.permutations((_BRIGHTNESS, _CONTRAST, _SATURATION))), np.int32)

_BLEND_BITS = 16  # blend factors are fixed-point


def rand_augment(images: jax.Array, words: jax.Array) -> jax.Array:
    """Random operations of magnitude 9 on each image, one after the other.

    Args:
        images: uint8 [B, S, S, C], C 1 or 3.
        words: random, uint32 [B, N], for N operations (2 in `heavy`).

    Returns:
        uint8 [B, S, S, C].
    """
    turns = random_bits.below(2 * len(OPERATIONS), words)

    def step(state: tuple[jax.Array, jax.Array], turn: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        return _operate(_look_up(*state), turn >> 1, (turn & 1) == 1), None

    # A loop, because XLA:CPU would fuse too much: it would compute a table again for every pixel that it maps, and the
    # first operation several times for the second. What a loop carries is computed once: a third of the time at 224 px.
    unchanged = jnp.broadcast_to(jnp.arange(256, dtype=jnp.uint8), (images.shape[0], images.shape[-1], 256))
    return _look_up(*lax.scan(step, (images, unchanged), turns.T)[0])


def apply_operation(images: jax.Array, operation: jax.Array, negative: jax.Array) -> jax.Array:
    """Applies one operation of magnitude 9 to each image.

    Equal to Pillow's, pixel for pixel, with nearest-neighbour sampling and black outside. There is one exception: where
    the exact result of an enhancement or of autocontrast is a whole number, one of the two may be a level below it. In an
    enhancement it is this one, whose factor is rounded to 16 bits. In autocontrast it is Pillow's, which computes in
    floating point and cuts off the fraction.

    Args:
        images: uint8 [B, S, S, C]. Greyscale (C = 1) has no colour: `color` does not change it.
        operation: int32 [B], indices into `OPERATIONS`.
        negative: bool [B], the sign of shear, translate, rotate, and of the enhancements (darker, paler, ...). The
            other operations have no sign.

    Returns:
        uint8 [B, S, S, C].
    """
    return _look_up(*_operate(images, operation, negative))


def _operate(images: jax.Array, operation: jax.Array, negative: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`apply_operation` without its last part: images, uint8 [B, S, S, C], and the tables for `_look_up`."""
    row = 2 * operation + negative
    images = _warp(images, jnp.asarray(_inverse_maps(images.shape[1]))[row])
    images = _enhance(images, operation, jnp.asarray(_blend_factors())[row])
    return images, _level_tables(images, operation)


def color_jitter(images: jax.Array, words: jax.Array) -> jax.Array:
    """Brightness, contrast and saturation by factors uniform in [0.6, 1.4], in random order, as in torchvision.

    The hue stays. images and result: uint8 [B, S, S, C], C 1 or 3. words: random, uint32 [B, 4].
    """
    span = _fixed_point(1 + _JITTER) - _fixed_point(1 - _JITTER) + 1
    factors = _fixed_point(1 - _JITTER) + random_bits.below(span, words[:, :3])
    turns = jnp.asarray(_JITTER_ORDERS)[random_bits.below(len(_JITTER_ORDERS), words[:, 3])]

    def step(images: jax.Array, turn: jax.Array) -> tuple[jax.Array, None]:
        grey = _luminance(images)
        lacking = {_BRIGHTNESS: jnp.int32(0), _CONTRAST: _mean_level(grey)}
        factor = jnp.take_along_axis(factors, turn[:, None], axis=1, mode="promise_in_bounds")[:, 0]
        return _blend(_choose(turn, lacking, grey), images, factor), None

    return lax.scan(step, images, turns.T)[0]


# --------------------------------------------------------------------------------------------------------------- warps


def _inverse_maps(side: int) -> np.ndarray:
    """int32 [2 * operations, 6], rows as in `apply_operation`: the affine maps from output to input, 16.16 fixed-point.

    A row (a, b, c, d, e, f) reads output pixel (x, y) from (a x + b y + c, d x + e y + f) >> 16. Fixed-point as in
    Pillow's `affine_fixed`: a rotation in floats would pick other neighbours at ties.
    """
    maps = np.tile(np.array([1, 0, 0, 0, 1, 0], np.float64), (2 * len(OPERATIONS), 1))
    for row in range(len(maps)):
        operation, sign = OPERATIONS[row // 2], -1 if row % 2 else 1
        match operation:
            case "shear_x":
                maps[row, 1] = sign * _SHEAR
            case "shear_y":
                maps[row, 3] = sign * _SHEAR
            case "translate_x":
                maps[row, 2] = -sign * int(_TRANSLATION * side)
            case "translate_y":
                maps[row, 5] = -sign * int(_TRANSLATION * side)
            case "rotate":
                cos, sin = math.cos(math.radians(_ROTATION)), math.sin(-sign * math.radians(_ROTATION))
                center = side / 2
                maps[row] = cos, sin, center * (1 - cos - sin), -sin, cos, center * (1 - cos + sin)
    maps[:, 2] += (maps[:, 0] + maps[:, 1]) / 2  # from coordinates to pixel centres
    maps[:, 5] += (maps[:, 3] + maps[:, 4]) / 2
    return np.floor(maps * 2**16 + 0.5).astype(np.int32)


def _warp(images: jax.Array, maps: jax.Array) -> jax.Array:
    """Samples each image [B, S, S, C] through its map, [B, 6] of `_inverse_maps`; black outside."""
    batch, side, _, channels = images.shape
    x = jnp.arange(side, dtype=jnp.int32)
    y = x[:, None]
    a, b, c, d, e, f = (maps[:, i, None, None] for i in range(6))
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16  # [B, S, S]
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    source = jnp.where(inside, row * side + column, 0).reshape(batch, -1, 1)
    flat = images.reshape(batch, side * side, channels)
    warped = jnp.take_along_axis(flat, source, axis=1, mode="promise_in_bounds").reshape(images.shape)
    return jnp.where(inside[..., None], warped, 0)


# -------------------------------------------------------------------------------------------------------------- blends


def _fixed_point(factor: float) -> int:
    return round(factor * 2**_BLEND_BITS)


def _blend_factors() -> np.ndarray:
    """int32 [2 * operations], rows as in `apply_operation`: fixed-point factors of the enhancements, 1 elsewhere."""
    enhancements = {"brightness", "color", "contrast", "sharpness"}
    return np.array(
        [
            _fixed_point(1 + sign * _ENHANCEMENT if operation in enhancements else 1)
            for operation in OPERATIONS
            for sign in (1, -1)
        ],
        np.int32,
    )


def _enhance(images: jax.Array, operation: jax.Array, factor: jax.Array) -> jax.Array:
    """Pillow's ImageEnhance: blends an image with one that lacks light, colour, contrast or edges."""
    pixels, grey = images.astype(jnp.int32), _luminance(images)
    lacking = {
        OPERATIONS.index("brightness"): jnp.int32(0),
        OPERATIONS.index("color"): grey,
        OPERATIONS.index("contrast"): _mean_level(grey),
        OPERATIONS.index("sharpness"): _smooth(images),
    }
    return _blend(_choose(operation, lacking, pixels), images, factor)


def _blend(degenerate: jax.Array, images: jax.Array, factor: jax.Array) -> jax.Array:
    """degenerate + factor * (images - degenerate) in uint8; int32 degenerate [B, ...], fixed-point factor [B]."""
    change = factor[:, None, None, None] * (images.astype(jnp.int32) - degenerate)
    return jnp.clip(degenerate + (change >> _BLEND_BITS), 0, 255).astype(jnp.uint8)


def _luminance(images: jax.Array) -> jax.Array:
    """int32 [B, S, S, 1]: ITU-R 601-2 luma with Pillow's fixed-point weights; greyscale is its own."""
    pixels = images.astype(jnp.int32)
    if images.shape[-1] == 1:
        return pixels
    red, green, blue = pixels[..., 0:1], pixels[..., 1:2], pixels[..., 2:3]
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16


def _mean_level(grey: jax.Array) -> jax.Array:
    """int32 [B, 1, 1, 1]: the mean over the pixels of grey [B, S, S, 1], rounded half up. Exact up to S = 2900."""
    pixels = grey.shape[1] * grey.shape[2]
    return _divide(grey.sum((1, 2), keepdims=True, dtype=jnp.int32) + pixels // 2, pixels)


def _smooth(images: jax.Array) -> jax.Array:
    """int32 [B, S, S, C]: Pillow's SMOOTH, the 3x3 mean with weight 5 in the middle; the border pixels are copied."""
    side, pixels = images.shape[1], images.astype(jnp.int32)
    padded = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = _divide(2 * (box + 4 * pixels) + 13, 26)  # rounds the quotient by 13; it is never half-way
    line = np.arange(side)
    edge = (line == 0) | (line == side - 1)
    return jnp.where((edge[:, None] | edge)[:, :, None], pixels, smooth)


# -------------------------------------------------------------------------------------------------------------- levels


def _table_entries(images: jax.Array) -> jax.Array:
    """int32 [B, S * S * C]: for every value of [B, S, S, C] the index of its entry in its image's tables [C * 256]."""
    batch, *_, channels = images.shape
    entries = images.reshape(batch, -1, channels).astype(jnp.int32) + 256 * jnp.arange(channels, dtype=jnp.int32)
    return entries.reshape(batch, -1)


def _look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Maps every pixel of [B, S, S, C] through its image's and channel's table of 256 levels, uint8 [B, C, 256]."""
    tables = tables.reshape(len(images), -1)
    mapped = jnp.take_along_axis(tables, _table_entries(images), axis=1, mode="promise_in_bounds")
    return mapped.reshape(images.shape)


def _level_tables(images: jax.Array, operation: jax.Array) -> jax.Array:
    """uint8 [B, C, 256]: what each level 0 ... 255 becomes."""
    batch, *_, channels = images.shape

    def histograms(entries: jax.Array) -> jax.Array:
        return jnp.zeros(channels * 256, jnp.int32).at[entries].add(1, mode="promise_in_bounds")

    counts = jax.vmap(histograms)(_table_entries(images)).reshape(batch, channels, 256)
    levels = jnp.arange(256, dtype=jnp.int32)
    low = jnp.where(counts > 0, levels, 255).min(2, keepdims=True)
    high = jnp.where(counts > 0, levels, 0).max(2, keepdims=True)
    tables = {
        OPERATIONS.index("posterize"): levels & (256 - 2**_POSTERIZED_BITS),
        OPERATIONS.index("solarize"): jnp.where(levels < _SOLARIZE_FROM, levels, 255 - levels),
        OPERATIONS.index("autocontrast"): _autocontrast_table(low, high),
        OPERATIONS.index("equalize"): _equalize_table(counts, high),
    }
    return _choose(operation, tables, levels).astype(jnp.uint8)


def _autocontrast_table(low: jax.Array, high: jax.Array) -> jax.Array:
    """int32 [B, C, 256]: stretches each channel's levels, low to high [B, C, 1], to 0 ... 255; a single level stays."""
    levels = jnp.arange(256, dtype=jnp.int32)
    stretched = _divide(255 * (jnp.clip(levels, low, high) - low), jnp.maximum(high - low, 1))
    return jnp.where(high > low, stretched, levels)


def _equalize_table(counts: jax.Array, high: jax.Array) -> jax.Array:
    """int32 [B, C, 256]: evens out each channel's histogram, counts [B, C, 256], by Pillow's rule.

    A step is 1/255 of the pixels that are not of the highest level; a level becomes the number of steps, rounded, in
    the pixels below it. A channel with less than one pixel a step stays as it is.
    """
    levels = jnp.arange(256, dtype=jnp.int32)
    through = jnp.cumsum(counts, axis=2, dtype=jnp.int32)
    step = _divide(jnp.where(levels < high, counts, 0).sum(2, keepdims=True, dtype=jnp.int32), 255)
    equalized = _divide(through - counts + (step >> 1), jnp.maximum(step, 1))
    return jnp.where(step > 0, jnp.minimum(equalized, 255), levels)


def _divide(a: jax.Array, b: jax.Array | int) -> jax.Array:
    """a // b for whole numbers that are not negative. `//` handles signs too, for a second division and a fusion."""
    return lax.div(a, jnp.broadcast_to(jnp.asarray(b, a.dtype), a.shape))


def _choose(index: jax.Array, cases: dict[int, jax.Array], default: jax.Array) -> jax.Array:
    """For each image of the batch, the case of its index, int32 [B]. Cases and default broadcast against each other."""
    rank = max(case.ndim for case in (default, *cases.values()))
    index = index.reshape(-1, *(1,) * (rank - 1))
    chosen = default
    for number, case in cases.items():
        chosen = jnp.where(index == number, case, chosen)
    return chosen
