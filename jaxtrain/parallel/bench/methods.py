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

from jaxtrain.errors import ConfigError
from jaxtrain.host.text import did_you_mean
from jaxtrain.parallel import reduce
from jaxtrain.parallel.collective_cost import wire_bytes
from jaxtrain.parallel.compressors import COMPRESSORS, compressed_sum
from jaxtrain.parallel.reduce import ALGORITHMS

AXES = ("replica", "data")
_ITEM = 4  # bytes of a number, f32


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


# XLA's own. What the carrier really sends does not stand in the program: the bytes and messages are those of a ring.
_AUTO = Method(
    "auto",
    "none",
    lambda x, key: jax.lax.psum(x, AXES),
    lambda k, replica, data: wire_bytes("all-reduce", _ITEM * k, replica * data),
    lambda replica, data: reduce.messages("ring", data, replica),
)

METHODS: dict[str, Method] = {
    method.name: method for method in (_AUTO, *map(_own, ALGORITHMS), _rounded("bf16"), _rounded("int8"))
}
"""By name: that of `layout.reduce`, or of `optim.compress` where the numbers are rounded."""


def choose(reduces: Sequence[str], compresses: Sequence[str]) -> list[Method]:
    """The methods with one of these values of `layout.reduce` and no rounding, and those that round in one of these ways.

    A run has one or the other: what rounds has exchanges of its own. So `none` among `compresses` is what goes with `reduces`.

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
