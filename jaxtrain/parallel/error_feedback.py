"""Compressed sums over the devices of a mesh axis that send a part of what there is, and say what they have sent.

What a device has and does not send is its *residual*. It adds that to the next thing that it compresses: error feedback (Seide
2014, Karimireddy 2019). So the sums of all steps miss no more than what the devices hold at the end.

All functions are for the inside of `jax.shard_map`, and give every device the same bits of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.parallel.reduce import Axis, buckets

Leaves = dict[str, jax.Array]
Sum = Callable[[Leaves], Leaves]
"""Of each leaf over the devices."""


def topk(values: Leaves, ratio: float, axis: Axis, bucket_bytes: int) -> tuple[Leaves, Leaves]:
    """The sums of what is largest: of each leaf, the share `ratio` of its values (Aji and Heafield 2017, Stich 2018).

    Each device sends its own choice, values and int32 positions, to all others (`all_gather`). They are added up in the order
    of the devices: positions may coincide, and a scatter in any order would give each device other bits.

    Args:
      values: floats of any shapes, by path.
      ratio: of the values of a leaf that are sent; at least one is.
      axis: of the mesh.
      bucket_bytes: of `reduce.buckets`: leaves whose choices are sent together.

    Returns:
      The sums over the devices, and what this device has sent; both like `values`.
    """
    paths, sums, sent = list(values), {}, {}
    for bucket in buckets(list(values.values()), bucket_bytes):
        some = {paths[i]: values[paths[i]] for i in bucket}
        packed = pack(some)
        # the bits of floats from 0 on are in their order
        bits = jax.lax.bitcast_convert_type(jnp.abs(packed.astype(jnp.float32)), jnp.uint32)
        places = largest(bits, [leaf.size for leaf in some.values()], ratio)
        found = packed[places]
        sent |= unpack(jnp.zeros_like(packed).at[places].set(found, unique_indices=True), some)
        all_found, all_places = jax.lax.all_gather(found, axis), jax.lax.all_gather(places, axis)

        def add(
            i: jax.Array, total: jax.Array, found: jax.Array = all_found, places: jax.Array = all_places
        ) -> jax.Array:
            return total.at[places[i]].add(found[i], unique_indices=True)

        sums |= unpack(jax.lax.fori_loop(0, all_found.shape[0], add, jnp.zeros_like(packed)), some)
    return sums, sent


def randomk(values: Leaves, ratio: float, key: jax.Array, add_up: Sum, bucket_bytes: int) -> tuple[Leaves, Leaves]:
    """The sums of values that are drawn at random: of each leaf, the share `ratio`, in the same places on each device.

    So positions need not be sent, and any reduction adds up the values (Stich 2018, Vogels 2019 appendix).

    Args:
      values: floats of any shapes, by path.
      ratio: of the values of a leaf that are sent; at least one is.
      key: PRNG key, the same on every device.
      add_up: sums leaves over the devices.
      bucket_bytes: of `reduce.buckets`: leaves whose values are sent together.

    Returns:
      As `topk`.
    """
    paths, sums, sent = list(values), {}, {}
    for number, bucket in enumerate(buckets(list(values.values()), bucket_bytes)):
        some = {paths[i]: values[paths[i]] for i in bucket}
        packed = pack(some)
        bits = jax.random.bits(jax.random.fold_in(key, number), packed.shape, jnp.uint32)
        places = largest(bits, [leaf.size for leaf in some.values()], ratio)
        found = packed[places]
        whole = jnp.zeros_like(packed).at
        sent |= unpack(whole[places].set(found, unique_indices=True), some)
        sums |= unpack(whole[places].set(add_up({"found": found})["found"], unique_indices=True), some)
    return sums, sent


def powersgd(values: Leaves, basis: Leaves, add_up: Sum) -> tuple[Leaves, Leaves, Leaves]:
    """Sums of low rank: one step of the power iteration, from the last step's basis (Vogels 2019, algorithm 1).

    A leaf [..., c] is the matrix M [rows, c]. P = M Q is added up over the devices and made orthonormal, then Q = M^T P is
    added up. The sum is P Q^T, and a device has sent P P^T M of its own M.

    Args:
      values: floats [..., c] of at least two dims, by path.
      basis: Q [c, r] of each, of the last step (a warm start), the same on every device.
      add_up: sums leaves over the devices.

    Returns:
      The sums, what this device has sent, and the new basis.
    """
    matrices = {path: leaf.reshape(-1, leaf.shape[-1]) for path, leaf in values.items()}
    left = add_up({path: _product(matrix, basis[path]) for path, matrix in matrices.items()})
    left = {path: jnp.linalg.qr(leaf)[0] for path, leaf in left.items()}
    mine = {path: _product(matrix.T, left[path]) for path, matrix in matrices.items()}
    right = add_up(mine)
    products = (
        {path: _product(left[path], q[path].T).reshape(values[path].shape) for path in values} for q in (right, mine)
    )
    sums, sent = products
    return sums, sent, right


def largest(values: jax.Array, sizes: Sequence[int], ratio: float) -> jax.Array:
    """The positions, int32 and rising, of the largest values of each part: the share `ratio` of them. Of equal ones, the first.

    The smallest value that is chosen of a part is found bit by bit, in a loop that counts what is larger. A sort would take
    XLA:CPU a second to compile, for each part, and reads and writes a large part more often.

    Args:
      values: uint32 [k].
      sizes: of the parts, which together are k.
      ratio: above 0 and at most 1.
    """
    counts = [chosen_count(size, ratio) for size in sizes]
    ends = np.cumsum(sizes)[:-1]

    def in_parts(numbers: jax.Array) -> jax.Array:
        """[k], from a number for each part."""
        return jnp.concatenate([jnp.broadcast_to(numbers[i], (size,)) for i, size in enumerate(sizes)])

    def count(chosen: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sum(part, dtype=jnp.int32) for part in jnp.split(chosen, ends)])

    def next_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        tried = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(count(values >= in_parts(tried)) >= np.array(counts), tried, least)

    least = jax.lax.fori_loop(0, 32, next_bit, jnp.zeros(len(sizes), jnp.uint32))
    larger, equal = values > in_parts(least), values == in_parts(least)
    room = np.array(counts) - count(larger)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count(equal), dtype=jnp.int32)[:-1]])
    chosen = larger | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= in_parts(before + room)))
    index = jnp.where(chosen, jnp.cumsum(chosen, dtype=jnp.int32) - 1, sum(counts))
    return jnp.zeros(sum(counts), jnp.int32).at[index].set(jnp.arange(values.size, dtype=jnp.int32), mode="drop")


def chosen_count(size: int, ratio: float) -> int:
    """How many of `size` values the share `ratio` is: at least one."""
    return max(1, round(ratio * size))


def rank_of(shape: tuple[int, ...], rank: int) -> int:
    """The rank of `powersgd` for a leaf [..., c]: no more than its matrix has."""
    return min(rank, math.prod(shape[:-1]), shape[-1])


def compression_rate(compressor: str, shape: tuple[int, ...], ratio: float, rank: int) -> float:
    """By which factor a leaf of f32 shrinks, in the bytes that a device hands to the exchange. 1 where it cannot.

    Args:
      compressor: of `optim.compress`.
      shape: of the leaf.
      ratio: `optim.compress_ratio`.
      rank: `optim.compress_rank`.
    """
    size = math.prod(shape)
    if size == 0 or compressor == "none" or (compressor == "powersgd" and len(shape) < 2):
        return 1.0
    if compressor in ("bf16", "int8"):
        return {"bf16": 2.0, "int8": 4.0}[compressor]
    if compressor == "powersgd":
        rows = size // shape[-1]
        return size / (rank_of(shape, rank) * (rows + shape[-1]))
    return size / chosen_count(size, ratio) / {"topk": 2, "randomk": 1}[compressor]  # topk: positions too


def unless_not_finite(sums: Leaves, values: Leaves, axis: Axis) -> Leaves:
    """`sums`, all of them not a number where any device's `values` are not finite: what was not chosen would not show it."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in values.values()]
    bad = jax.lax.psum(jnp.float32(1) - jnp.all(jnp.stack(finite)), axis)
    return {path: jnp.where(bad > 0, jnp.nan, leaf) for path, leaf in sums.items()}


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def pack(leaves: Leaves) -> jax.Array:
    """All values in one array [k]."""
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves.values()])


def unpack(packed: jax.Array, like: Leaves) -> Leaves:
    """The parts of packed [k], in the shapes of `like`."""
    ends = np.cumsum([leaf.size for leaf in like.values()])[:-1]
    parts = zip(like.items(), jnp.split(packed, ends), strict=True)
    return {path: part.reshape(leaf.shape) for (path, leaf), part in parts}
