"""Random numbers for augmentation: few, without loops, and the same for every compute dtype.

`jax.random.uniform` and `beta` draw other values in float64 than in float32. `beta` and `randint` compile to many
instructions, `beta` also to `while` loops that stall a GPU. Here one call gives 32-bit words. The rest is arithmetic on
them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

_BETA_BINS = 4096


def words(keys: jax.Array, count: int) -> jax.Array:
    """uint32 [B, count]: `count` random words for each of the PRNG keys [B]."""
    return jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32))(keys)


def below(bound: int | jax.Array, word: jax.Array) -> jax.Array:
    """int32 in 0 ... bound - 1 (bound < 2**16), shaped like `word` (uint32), from the upper half of each word.

    Uniform to within bound / 2**16.
    """
    return (((word >> 16) * jnp.asarray(bound, jnp.uint32)) >> 16).astype(jnp.int32)


def uniform(word: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiples of 2**-24 in [0, 1), shaped like `word` (uint32); exact in float32 and in float64."""
    return (word >> 8).astype(dtype) / 2**24


def beta_quantile(alpha: float, share: jax.Array) -> jax.Array:
    """The quantiles of Beta(alpha, alpha) at `share` (in [0, 1]; any shape), within 1e-3.

    At uniform random shares they are samples.
    """
    table = jnp.asarray(_beta_table(alpha), share.dtype)
    position = jnp.minimum(share, 1 - share) * (2 * _BETA_BINS)
    bin_ = jnp.minimum(position.astype(jnp.int32), _BETA_BINS - 1)
    power = table[bin_] + (position - bin_.astype(position.dtype)) * (table[bin_ + 1] - table[bin_])
    smaller = power ** (1 / alpha)
    return jnp.where(share < 0.5, smaller, 1 - smaller)


@functools.cache
def _beta_table(alpha: float) -> np.ndarray:
    """float64 [_BETA_BINS + 1]: t = x**alpha at the quantiles 0 ... 1/2 of Beta(alpha, alpha), in equal steps.

    The table has t and not x, because the density of t on this half has no pole at 0. It is proportional to
    (1 - t**(1 / alpha))**(alpha - 1).
    """
    t = 0.5**alpha * np.linspace(0, 1, 2**16) ** 4  # finest near 0, where that density is steep for a large alpha
    density = (1 - t ** (1 / alpha)) ** (alpha - 1)
    mass = np.concatenate([[0.0], np.cumsum(np.diff(t) * (density[1:] + density[:-1]))])
    return np.interp(np.linspace(0, 1, _BETA_BINS + 1), mass / mass[-1], t)
