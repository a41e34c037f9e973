"""Random numbers for augmentation: few, loop-free, and the same for every compute dtype.

`jax.random.uniform` and `beta` draw other values in float64 than in float32, and `beta` and `randint` compile to many
instructions, `beta` also to `while` loops that stall a GPU. Here one call gives 32-bit words, and the rest is
arithmetic on those.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

_BETA_BINS = 4096


def words(keys: jax.Array, count: int) -> jax.Array:
    """uint32 [B, count]: `count` random words for each of the keys [B]."""
    return jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32))(keys)


def below(bound: int | jax.Array, word: jax.Array) -> jax.Array:
    """int32 in 0 ... bound - 1 (bound < 2**16), uniform to within bound / 2**16, from the upper half of each word."""
    return (((word >> 16) * jnp.asarray(bound, jnp.uint32)) >> 16).astype(jnp.int32)


def uniform(word: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiples of 2**-24 in [0, 1), exact in float32 and float64 alike."""
    return (word >> 8).astype(dtype) / 2**24


def beta_quantile(alpha: float, share: jax.Array) -> jax.Array:
    """The `share`-quantile (in [0, 1]) of Beta(alpha, alpha), within 1e-3; of a uniform share, a sample."""
    table = jnp.asarray(_beta_table(alpha), share.dtype)
    place = jnp.minimum(share, 1 - share) * (2 * _BETA_BINS)
    bin_ = jnp.minimum(place.astype(jnp.int32), _BETA_BINS - 1)
    power = table[bin_] + (place - bin_.astype(place.dtype)) * (table[bin_ + 1] - table[bin_])
    smaller = power ** (1 / alpha)
    return jnp.where(share < 0.5, smaller, 1 - smaller)


@functools.cache
def _beta_table(alpha: float) -> np.ndarray:
    """t = x**alpha at the quantiles 0 ... 1/2 of Beta(alpha, alpha), in `_BETA_BINS` equal steps.

    Of t, because its density on this half, proportional to (1 - t**(1 / alpha))**(alpha - 1), has no pole at 0.
    """
    t = 0.5**alpha * np.linspace(0, 1, 2**16) ** 4  # finest near 0, where that density is steep for a large alpha
    density = (1 - t ** (1 / alpha)) ** (alpha - 1)
    mass = np.concatenate([[0.0], np.cumsum(np.diff(t) * (density[1:] + density[:-1]))])
    return np.interp(np.linspace(0, 1, _BETA_BINS + 1), mass / mass[-1], t)
