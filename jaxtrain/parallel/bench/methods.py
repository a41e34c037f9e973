"""The ways to add up that are compared: each with its program, the bytes that it should send, and its messages.

To compare another one, add a `Method` to `METHODS`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxtrain.config import OptimConfig
from jaxtrain.errors import ConfigError
from jaxtrain.host.text import did_you_mean
from jaxtrain.parallel import reduce
from jaxtrain.parallel.collective_cost import wire_bytes
from jaxtrain.parallel.compressors import COMPRESSORS, compressed_sum
from jaxtrain.parallel.error_feedback import Leaves, chosen_count, powersgd, randomk, rank_of, topk
from jaxtrain.parallel.reduce import ALGORITHMS

AXES = ("replica", "data")
_ITEM = 4  # bytes of a number, f32
_ONE_BUCKET = 1 << 62


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to add up.

    Attributes:
      reduce: `layout.reduce` of a run that does it so.
      compress: `optim.compress`.
      add_up: (x f32 [k] of the device, PRNG key, the same on every device) -> the sum [k], inside `jax.shard_map` over `AXES`.
      wire: (k, replica, data) -> the bytes that the busiest device sends.
      messages: (replica, data) -> how many messages follow one another.
    """

    reduce: str
    compress: str
    add_up: Callable[[jax.Array, jax.Array], jax.Array]
    wire: Callable[[int, int, int], float]
    messages: Callable[[int, int], int]

    @property
    def name(self) -> str:
        """What of it is not at its default."""
        return self.reduce if self.compress == "none" else self.compress


def _own(algorithm: str) -> Method:
    """By `parallel.reduce`."""
    return Method(
        algorithm,
        "none",
        lambda x, key: ALGORITHMS[algorithm](x, AXES),
        lambda k, replica, data: reduce.sent_bytes(algorithm, _ITEM * k, data, replica)[0],
        lambda replica, data: reduce.messages(algorithm, data, replica),
    )


def _rounded(compressor: str) -> Method:
    """By `parallel.compressors`: an all-to-all and an all-gather of the rounded numbers."""
    return Method(
        "auto",
        compressor,
        lambda x, key: compressed_sum(x, compressor, AXES, key),
        functools.partial(_rounded_bytes, compressor),
        lambda replica, data: reduce.messages("ring", data, replica),
    )


def _rounded_bytes(compressor: str, k: int, replica: int, data: int) -> float:
    n = replica * data

    def payload(rows: int) -> int:
        """Bytes of so many rounded parts."""
        parts = jax.ShapeDtypeStruct((rows, k // n), jnp.float32)
        rounded = jax.eval_shape(COMPRESSORS[compressor][0], parts, jax.eval_shape(lambda: jax.random.key(0)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in rounded)

    return (n - 1) / n * payload(n) + (n - 1) * payload(1)


def _by_share(compressor: str) -> Method:
    """By `parallel.error_feedback`: a tenth of the numbers (the default of `optim.compress_ratio`)."""
    ratio = OptimConfig().compress_ratio

    def add_up(x: jax.Array, key: jax.Array) -> jax.Array:
        if compressor == "topk":
            return topk({"x": x}, ratio, AXES, _ONE_BUCKET)[0]["x"]
        return randomk({"x": x}, ratio, key, _psum, _ONE_BUCKET)[0]["x"]

    def wire(k: int, replica: int, data: int) -> float:
        n, size = replica * data, _ITEM * chosen_count(k, ratio)
        return 2 * (n - 1) * size if compressor == "topk" else wire_bytes("all-reduce", size, n)

    return Method("auto", compressor, add_up, wire, lambda replica, data: reduce.messages("ring", data, replica))


def _of_low_rank() -> Method:
    """By `parallel.error_feedback.powersgd`: the numbers as a matrix that is as square as a power of two makes it."""
    rank = OptimConfig().compress_rank

    def shape(k: int) -> tuple[int, int]:
        columns = math.gcd(k, 1 << (math.isqrt(k).bit_length() - 1))
        return k // columns, columns

    def add_up(x: jax.Array, key: jax.Array) -> jax.Array:
        rows, columns = shape(x.size)
        basis = jax.random.normal(key, (columns, rank_of((rows, columns), rank)))
        return powersgd({"x": x.reshape(rows, columns)}, {"x": basis}, _psum)[0]["x"].reshape(-1)

    def wire(k: int, replica: int, data: int) -> float:
        return wire_bytes("all-reduce", _ITEM * rank_of(shape(k), rank) * sum(shape(k)), replica * data)

    return Method("auto", "powersgd", add_up, wire, lambda replica, data: 2 * reduce.messages("ring", data, replica))


def _psum(leaves: Leaves) -> Leaves:
    return jax.lax.psum(leaves, AXES)


# XLA's own. What the carrier really sends does not stand in the program: the bytes and messages are those of a ring.
_AUTO = Method(
    "auto",
    "none",
    lambda x, key: jax.lax.psum(x, AXES),
    lambda k, replica, data: wire_bytes("all-reduce", _ITEM * k, replica * data),
    lambda replica, data: reduce.messages("ring", data, replica),
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _AUTO, *map(_own, ALGORITHMS), _rounded("bf16"), _rounded("int8"), _by_share("topk"), _by_share("randomk"),
        _of_low_rank(),
    )
}  # fmt: skip
"""By name: that of `layout.reduce`, or of `optim.compress` where the numbers are compressed."""


def choose(reduces: Sequence[str], compresses: Sequence[str]) -> list[Method]:
    """The methods with one of these values of `layout.reduce` and no compression, and those that compress in one of these ways.

    What is compressed is sent by XLA's own collectives here. So `none` among `compresses` is what goes with `reduces`.

    Args:
      reduces: values of `layout.reduce`; empty for all.
      compresses: values of `optim.compress`; empty for all.

    Raises:
      ConfigError: there is no such value.
    """
    plain = [method.reduce for method in METHODS.values() if method.compress == "none"]
    compressors = ["none", *(method.compress for method in METHODS.values() if method.compress != "none")]
    for option, values, known in (("reduce", reduces, plain), ("compress", compresses, compressors)):
        for value in values:
            if value not in known:
                hint = did_you_mean(value, known)
                raise ConfigError(f"--{option} {value}: must be among {', '.join(known)}.{hint}")
    return [
        method
        for method in METHODS.values()
        if method.compress in (compresses or compressors)
        and (method.compress != "none" or method.reduce in (reduces or plain))
    ]


def numbers(size: int, replica: int, data: int) -> int:
    """How many f32 numbers to add up for about `size` bytes: so many that no method has to pad them."""
    n = replica * data
    whole = math.lcm(n, 1 << (n.bit_length() - 1))
    return max(round(size / _ITEM / whole), 1) * whole
