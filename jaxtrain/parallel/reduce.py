"""Sums over the devices of a mesh axis, from messages between pairs of devices (`ppermute`): what `psum` does, spelled out.

All functions are for the inside of `jax.shard_map`. They give every device the same bits, since each part of a sum is
added up on one device and then copied. Among n devices, for S bytes on each:

- `ring`: a reduce-scatter and an all-gather (Patarasuk and Yuan 2009). 2 (n - 1) messages one after the other, of S / n each.
- `tree`: recursive halving, then recursive doubling (Thakur, Rabenseifner and Gropp 2005). 2 log2(n) messages, of S / 2, S / 4
  and so on: where n is a power of two the bytes are those of a ring. Otherwise, with p the power of two below n, the first
  n - p devices take part for two: there is a message of S to each before, and one of S back afterwards.
- `hierarchical`: a reduce-scatter over the i devices inside, a ring across over the a groups with what each device has, and an
  all-gather inside. 2 (i - 1) messages of S / i inside, and 2 (a - 1) of S / i / a across.

So among 3 devices `tree` folds the third onto the first, adds up between the first two, and copies the result to the third.
Among 6 it folds the last two onto the first two, and adds up among the first four. The copies double what the busiest device
sends: there `ring` is the better choice for large sums.

No reduce-scatter of XLA is used: that of gloo gives wrong sums of large arrays (jax#40830).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Axis = str | tuple[str, ...]


def ring(x: jax.Array, axis: Axis) -> jax.Array:
    """The sum of x [k] over the devices of `axis`."""
    return ring_all_gather(ring_reduce_scatter(x, axis), axis)[: x.size]


def ring_reduce_scatter(x: jax.Array, axis: Axis) -> jax.Array:
    """Adds up x [k] over the n devices of `axis`, and leaves a part of the sum on each: [ceil(k / n)].

    Device i has part i + 1, modulo n. The last part is padded with zeros.
    """
    n = jax.lax.axis_size(axis)
    parts, here = padded(x, n).reshape(n, -1), jax.lax.axis_index(axis)
    sums = parts[here]
    for step in range(1, n):
        sums = jax.lax.ppermute(sums, axis, _ring(n)) + parts[(here - step) % n]
    return sums


def ring_all_gather(part: jax.Array, axis: Axis) -> jax.Array:
    """The whole [n c] of the parts [c] that `ring_reduce_scatter` left on the n devices."""
    n = jax.lax.axis_size(axis)
    found = [part]
    for _ in range(1, n):
        found.append(jax.lax.ppermute(found[-1], axis, _ring(n)))
    # found[step] is part `here + 1 - step`; backwards they are in order, and turned so that part 0 comes first
    return jnp.roll(jnp.stack(found[::-1]), jax.lax.axis_index(axis) + 2, 0).reshape(-1)


def tree(x: jax.Array, axis: Axis) -> jax.Array:
    """The sum of x [k] over the devices of `axis`."""
    n, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    power = 1 << (n.bit_length() - 1)
    rest = range(power, n)
    sums = padded(x, power)
    if rest:  # who receives nothing receives zeros
        sums = sums + jax.lax.ppermute(sums, axis, [(device, device - power) for device in rest])
    distances = [1 << bit for bit in range(power.bit_length() - 1)]
    for distance in reversed(distances):
        first, second = jnp.split(sums, 2)
        is_second = (here & distance) > 0
        sent, kept = jnp.where(is_second, first, second), jnp.where(is_second, second, first)
        sums = kept + jax.lax.ppermute(sent, axis, _pairs(power, distance))
    for distance in distances:
        other = jax.lax.ppermute(sums, axis, _pairs(power, distance))
        is_second = (here & distance) > 0
        sums = jnp.where(is_second, jnp.concatenate([other, sums]), jnp.concatenate([sums, other]))
    if rest:
        copied = jax.lax.ppermute(sums, axis, [(device - power, device) for device in rest])
        sums = jnp.where(here >= power, copied, sums)
    return sums[: x.size]


def hierarchical(x: jax.Array, axis: Axis) -> jax.Array:
    """The sum of x [k] over the devices of `axis`: the first name is the slow axis, across; the others are inside."""
    across, *inside = axis
    part = ring_reduce_scatter(x, tuple(inside))
    return ring_all_gather(ring(part, across), tuple(inside))[: x.size]


ALGORITHMS: dict[str, Callable[[jax.Array, Axis], jax.Array]] = {
    "ring": ring,
    "tree": tree,
    "hierarchical": hierarchical,
}
"""By `layout.reduce`: (x [k], axis) -> the sum [k]."""


def reduce_leaves(leaves: Sequence[jax.Array], algorithm: str, axis: Axis, bucket_bytes: int) -> list[jax.Array]:
    """The sum of each leaf over the devices of `axis`, in its shape and dtype.

    Args:
      leaves: arrays of any shapes and dtypes.
      algorithm: a key of `ALGORITHMS`.
      axis: of the mesh.
      bucket_bytes: leaves are sent together as long as they have no more bytes than this.
    """
    return each_bucket(leaves, bucket_bytes, lambda packed, _: ALGORITHMS[algorithm](packed, axis))


def each_bucket(
    leaves: Sequence[jax.Array], bucket_bytes: int, add_up: Callable[[jax.Array, int], jax.Array]
) -> list[jax.Array]:
    """`add_up` of each bucket of leaves; the leaves that it gives, in their shapes.

    Args:
      leaves: arrays of any shapes and dtypes.
      bucket_bytes: of `buckets`.
      add_up: (a bucket's values [k], the bucket's number) -> the same many values.
    """
    # A result for each leaf without elements too: jaxlib 0.11.2 crashes on a CPU if it is handed through as it came.
    found = [leaf if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
    for number, bucket in enumerate(buckets(leaves, bucket_bytes)):
        packed = jnp.concatenate([leaves[i].reshape(-1) for i in bucket])
        sums = add_up(packed, number)
        ends = [sum(leaves[j].size for j in bucket[: k + 1]) for k in range(len(bucket))]
        for i, part in zip(bucket, jnp.split(sums, ends[:-1]), strict=True):
            found[i] = part.reshape(leaves[i].shape)
    return found


def buckets(leaves: Sequence[jax.Array], bucket_bytes: int) -> list[list[int]]:
    """Which leaves are sent together, by their numbers: neighbours among those of one dtype.

    A bucket has at most `bucket_bytes`, or a single leaf. Leaves without elements are in none.
    """
    found: list[list[int]] = []
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        held = math.inf
        for i, leaf in enumerate(leaves):
            if leaf.dtype != dtype or not leaf.size:
                continue
            size = leaf.size * dtype.itemsize
            if held + size > bucket_bytes:
                found.append([])
                held = 0
            found[-1].append(i)
            held += size
    return found


def messages(algorithm: str, inside: int, across: int = 1) -> int:
    """How many messages, one after the other, a sum among `inside` x `across` devices takes (the table above)."""
    n = inside * across
    if algorithm == "hierarchical":
        return 2 * (inside - 1) + 2 * (across - 1)
    power = 1 << (n.bit_length() - 1)
    return 2 * (n - 1) if algorithm == "ring" else 2 * (power.bit_length() - 1) + 2 * (power < n)


def sent_bytes(algorithm: str, size: float, inside: int, across: int = 1) -> tuple[float, float]:
    """The bytes that the busiest device sends, for a sum of `size` bytes among `inside` x `across` devices.

    Returns:
      All bytes, and those of them that go across: between devices with another coordinate on the slow axis. Of `ring` and
      `tree` these are the bytes of the device at the end of its group, whose every message goes across.
    """
    n = inside * across
    if n == 1:
        return 0.0, 0.0
    if algorithm == "hierarchical":
        far = 2 * (across - 1) / across * size / inside
        return 2 * (inside - 1) / inside * size + far, far
    power = 1 << (n.bit_length() - 1)
    parts = power if algorithm == "tree" else n
    sent = 2 * (parts - 1) / parts * size + (n - parts > 0) * size
    return sent, sent if across > 1 else 0.0


def _ring(n: int) -> list[tuple[int, int]]:
    return [(device, (device + 1) % n) for device in range(n)]


def _pairs(n: int, distance: int) -> list[tuple[int, int]]:
    return [(device, device ^ distance) for device in range(n)]


def padded(x: jax.Array, parts: int) -> jax.Array:
    """x [k] with zeros behind it, so that its length divides by `parts`."""
    return jnp.pad(x, (0, -x.size % parts))
