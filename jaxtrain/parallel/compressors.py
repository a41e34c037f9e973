"""Sums over the devices of a mesh axis whose messages are rounded to fewer bits, at random and without bias.

Each value is rounded up or down so that its expectation is the value (stochastic rounding, as in QSGD: Alistarh 2017). So
nothing has to be held back for the next step, and there is no state. A sum takes two exchanges, as in the ring's halves: each
device gets its part of every other device's numbers (`all_to_all`), adds them up in f32, rounds the sum, and sends it to all
(`all_gather`). Among n devices each sends 2 (n - 1) / n of the bytes that its numbers have when rounded.

All functions are for the inside of `jax.shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxtrain.parallel.reduce import Axis, each_bucket, padded

Payload = tuple[jax.Array, ...]


def to_bf16(x: jax.Array, key: jax.Array) -> Payload:
    """x f32 [n, c] as the upper 16 bits of each number, uint16. What is not finite stays so.

    (As bf16 itself, some backends would send it in f32.)
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jnp.where(jnp.isfinite(x), bits + noise, bits)
    return ((rounded >> 16).astype(jnp.uint16),)


def from_bf16(payload: Payload) -> jax.Array:
    """f32 [n, c]."""
    return jax.lax.bitcast_convert_type(payload[0].astype(jnp.uint32) << 16, jnp.float32)


def to_int8(x: jax.Array, key: jax.Array) -> Payload:
    """x f32 [n, c] as int8 in units of a 127th of each row's largest value, and these units f32 [n, 1].

    A row with a value that is not finite has a unit that is not.
    """
    unit = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    steps = x / jnp.where(unit > 0, unit, 1)
    rounded = jnp.floor(steps + jax.random.uniform(key, x.shape))
    return jnp.clip(rounded, -127, 127).astype(jnp.int8), unit


def from_int8(payload: Payload) -> jax.Array:
    """f32 [n, c]; not a number where the unit is not finite."""
    steps, unit = payload
    return jnp.where(jnp.isfinite(unit), steps.astype(jnp.float32) * unit, jnp.nan)


COMPRESSORS: dict[str, tuple[Callable[[jax.Array, jax.Array], Payload], Callable[[Payload], jax.Array]]] = {
    "bf16": (to_bf16, from_bf16),
    "int8": (to_int8, from_int8),
}
"""By `optim.compress`: what rounds, and what reads the rounded numbers."""


def compressed_sum(x: jax.Array, compressor: str, axis: Axis, key: jax.Array) -> jax.Array:
    """The sum of x [k] over the devices of `axis`, rounded; the same bits on every device.

    Args:
      x: floats, of the device.
      compressor: a key of `COMPRESSORS`.
      axis: of the mesh.
      key: PRNG key, the same on every device.
    """
    encode, decode = COMPRESSORS[compressor]
    n, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    parts = padded(x.astype(jnp.float32), n).reshape(n, -1)
    sent = encode(parts, jax.random.fold_in(key, 2 * here))
    received = tuple(jax.lax.all_to_all(leaf, axis, 0, 0, tiled=True) for leaf in sent)
    total = jnp.sum(decode(received), 0, keepdims=True)
    mine = encode(total, jax.random.fold_in(key, 2 * here + 1))
    whole = tuple(jax.lax.all_gather(leaf, axis, axis=0, tiled=True) for leaf in mine)
    return decode(whole).reshape(-1)[: x.size].astype(x.dtype)


def compressed_leaves(
    leaves: Sequence[jax.Array], compressor: str, axis: Axis, bucket_bytes: int, key: jax.Array
) -> list[jax.Array]:
    """As `reduce_leaves`, by `compressed_sum`.

    Args:
      leaves: floats of any shapes.
      compressor: a key of `COMPRESSORS`.
      axis: of the mesh.
      bucket_bytes: leaves are sent together as long as they have no more bytes than this.
      key: PRNG key, the same on every device. Each bucket folds in its number.
    """

    def add_up(packed: jax.Array, number: int) -> jax.Array:
        return compressed_sum(packed, compressor, axis, jax.random.fold_in(key, number))

    return each_bucket(leaves, bucket_bytes, add_up)
