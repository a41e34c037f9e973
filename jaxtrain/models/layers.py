"""What every model is built from: the context of a call, BatchNorm over groups, per-example dropout, initialisers.

All of it gives the same numbers on any layout: statistics are taken over groups of the global batch, and every random
mask is a function of the key, the module's path and the example's index in the global batch, not of its neighbours.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxtrain.errors import ConfigError


@flax.struct.dataclass
class Context:
    """The second argument of every layer: all that a layer may know beside its input.

    example: int32 [B], the index of each example of this microbatch in the global batch.
    train: batch statistics and random masks (True), or running statistics and none (False).
    bn_groups: the groups of consecutive examples in this microbatch that BatchNorm normalizes separately.
    """

    example: jax.Array
    train: bool = flax.struct.field(pytree_node=False, default=False)
    bn_groups: int = flax.struct.field(pytree_node=False, default=1)


def at_least_f32(dtype: DTypeLike) -> jnp.dtype:
    """The type for statistics, softmax and logits: f32 for bf16, fp16 and f32; f64 stays f64."""
    return jnp.promote_types(dtype, jnp.float32)


# -------------------------------------------------------------------------------------------------------- initialisers

# He et al. 2015 for ReLU, in `fan_out` mode: normal with variance 2 / (kernel area * output channels).
kaiming_normal: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

# The kernel of torch.nn.Linear and Conv2d: uniform within 1 / sqrt(fan_in).
torch_kernel: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> Initializer:
    """The bias of torch.nn.Linear and Conv2d: uniform within 1 / sqrt(fan_in)."""

    def init(key, shape, dtype=None, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5, out_sharding=out_sharding)

    return init


def torch_dense(features: int, fan_in: int, **options: Any) -> nn.Dense:
    """A linear map from `fan_in` values, initialised as torch.nn.Linear is."""
    return nn.Dense(features, kernel_init=torch_kernel, bias_init=torch_bias(fan_in), **options)


# -------------------------------------------------------------------------------------------------------------- layers


class Layer(nn.Module):
    """A module with a type to compute in, and one for its parameters; its other fields come after these two."""

    dtype: DTypeLike
    param_dtype: DTypeLike

    @property
    def types(self) -> dict[str, Any]:
        """Both, as arguments of Linen's modules."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def wide_types(self) -> dict[str, Any]:
        """The same with at least f32 to compute in: for heads."""
        return {"dtype": at_least_f32(self.dtype), "param_dtype": self.param_dtype}


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe and Szegedy 2015) over each of `context.bn_groups` groups of consecutive examples.

    In training, x [B, ..., C] is normalized by its group's mean and biased variance, and the running statistics move
    towards the mean over the groups of (group mean, unbiased group variance). That update is linear in the batch's
    statistics, so the average of the microbatches' new running statistics is the whole batch's.

    scale_init: None leaves the scale out.
    """

    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer | None = nn.initializers.ones
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, ..., C] -> the same shape and type. Raises `ConfigError` when a group has one value a channel."""
        channels, stats_dtype = x.shape[-1:], at_least_f32(self.param_dtype)
        scale = jnp.ones((), self.param_dtype)
        if self.scale_init is not None:
            scale = self.param("scale", self.scale_init, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, stats_dtype)

        wide = x.astype(at_least_f32(x.dtype))  # fused into its readers: no wide copy of the activations is stored
        if not context.train:
            y = _normalize(wide, running_mean.value, jax.lax.rsqrt(running_var.value + self.epsilon), scale, bias)
            return y.astype(x.dtype)

        groups = context.bn_groups
        wide = wide.reshape(groups, x.shape[0] // groups, *x.shape[1:])
        axes = tuple(range(1, wide.ndim - 1))
        count = wide.size // (groups * x.shape[-1])
        if count < 2:
            raise ConfigError(
                f"config.model.bn_groups: BatchNorm {'/'.join(self.path)} would take its statistics over a single "
                "value a channel, which leaves nothing of the input; use fewer groups or larger images."
            )
        # One pass over the activations, E[x^2] - E[x]^2: BatchNorm is bound by memory traffic.
        mean = jnp.mean(wide, axes, keepdims=True)
        var = jnp.mean(jnp.square(wide), axes, keepdims=True) - jnp.square(mean)
        var = jnp.where(var > 0, var, 0)  # rounding can make it negative
        y = _normalize(wide, mean, jax.lax.rsqrt(var + self.epsilon), scale, bias)
        if not self.is_initializing():
            unbiased = var * (count / (count - 1))
            for running, batch in ((running_mean, mean), (running_var, unbiased)):
                new = jnp.mean(batch.reshape(groups, -1), 0).astype(stats_dtype)
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        return y.reshape(x.shape).astype(x.dtype)


def _normalize(x: jax.Array, mean: jax.Array, inverse_std: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    mean, inverse_std, scale, bias = (a.astype(x.dtype) for a in (mean, inverse_std, scale, bias))
    return (x - mean) * (inverse_std * scale) + bias


class Dropout(nn.Module):
    """Zeroes each value with probability `rate` and scales the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    In training it needs the rng stream "dropout"; Linen folds this module's path into it.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, ...] -> the same shape and type."""
        if not context.train or self.rate == 0:
            return x
        return _drop(x, self.make_rng("dropout"), context.example, self.rate, x.shape[1:])


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a residual branch for whole examples, with probability `rate`.

    What is kept is scaled by 1 / (1 - rate). In training it needs the rng stream "dropout".
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, ...], a residual branch before its addition -> the same shape and type."""
        if not context.train or self.rate == 0:
            return x
        return _drop(x, self.make_rng("dropout"), context.example, self.rate, (1,) * (x.ndim - 1))


def _drop(x: jax.Array, key: jax.Array, example: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    # Scaled in f32: rounded to bf16, 1 - 0.3 is 0.1 % off, and would shift the mean of every output.
    kept = (x.astype(at_least_f32(x.dtype)) / (1 - rate)).astype(x.dtype)
    return jnp.where(keep_mask(key, example, rate, shape), kept, 0)


def keep_mask(key: jax.Array, example: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool [B, *shape], False with probability `rate`; row i is a function of `key` and `example[i]` alone.

    Compares raw bits with a threshold, so a run drops the same values in every precision.
    """
    threshold = min(round((1 - rate) * 2**32), 2**32 - 1)

    def one(index: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, index), shape, jnp.uint32) < jnp.uint32(threshold)

    return jax.vmap(one)(example)
