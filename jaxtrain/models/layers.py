"""The parts of every model: the context of a call, BatchNorm over groups, per-example dropout, initialisers.

They give the same numbers on every layout. Statistics are taken over groups of the global batch. A random mask is a
function of the key, the module's path and the example's index in the global batch, not of other examples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxtrain.errors import ConfigError
from jaxtrain.precision import at_least_f32


@flax.struct.dataclass
class Context:
    """The second argument of every layer: all that a layer may know beside its input."""

    example: jax.Array
    """int32 [B], the index of each example of this microbatch in the global batch."""
    train: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether to use batch statistics and random masks, or running statistics and no masks."""
    bn_groups: int = flax.struct.field(pytree_node=False, default=1)
    """How many groups of consecutive examples in this microbatch BatchNorm normalizes separately."""
    frozen_stats: frozenset[str] = flax.struct.field(pytree_node=False, default=frozenset())
    """The paths of the BatchNorms that use their running statistics in training too: of the model ('layers_03/bn1') where the
    model is called, and of the layer ('bn1') where a layer is."""
    batch_axes: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    """Mesh axes that the microbatch is split over, inside a `jax.shard_map` where a layer sees its own device's examples
    alone; () where it sees the whole microbatch."""

    def of_layer(self, name: str) -> Context:
        """The context of the layer `name`."""
        paths = (path.partition("/") for path in self.frozen_stats)
        return self.replace(frozen_stats=frozenset(own for layer, _, own in paths if layer == name))  # type: ignore[attr-defined]


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


def _product(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: None = None) -> jax.Array:
    (axes, _), _ = dimension_numbers
    return matmul(x, kernel, len(axes))


# Linen's linear maps, computed by `matmul`.
Dense = functools.partial(nn.Dense, dot_general=_product)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=_product)


def torch_dense(features: int, fan_in: int, **options: Any) -> nn.Dense:
    """A linear map from `fan_in` values, initialised as torch.nn.Linear is."""
    return Dense(features, kernel_init=torch_kernel, bias_init=torch_bias(fan_in), **options)


# -------------------------------------------------------------------------------------------- layers and normalization


class Layer(nn.Module):
    """A module with a type to compute in and one for its parameters. Fields of subclasses come after these two."""

    dtype: DTypeLike
    param_dtype: DTypeLike

    @property
    def types(self) -> dict[str, Any]:
        """Both types, as arguments of Linen's modules."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def wide_types(self) -> dict[str, Any]:
        """As `types`, with at least f32 to compute in: for heads."""
        return {"dtype": at_least_f32(self.dtype), "param_dtype": self.param_dtype}


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of BatchNorm that a layer sees, whole or in part.

    Attributes:
      here: how many there are here: contiguous examples, equally many of each group.
      share: the examples of a whole group, divided by those of it that are here together; 1 where groups are whole.
      total: groups of the microbatch.
      axes: `Context.batch_axes`.
    """

    here: int
    share: int
    total: int
    axes: tuple[str, ...] = ()

    @classmethod
    def of(cls, context: Context, examples: int) -> Groups:
        """The groups in the `examples` that are here: those of a device where `context.batch_axes` are named, else all."""
        ways = jax.lax.axis_size(context.batch_axes) if context.batch_axes else 1
        whole = examples * ways // context.bn_groups
        together = math.gcd(examples, whole)  # a device may have parts of several groups
        return cls(examples // together, whole // together, context.bn_groups, context.batch_axes)

    def sums(self, *totals: jax.Array) -> tuple[jax.Array, ...]:
        """The sums over whole groups of `totals` [here, ...], the sums over the examples that are here."""
        if self.share == 1:
            return totals
        first = jax.lax.axis_index(self.axes) * self.here
        group = (first + jnp.arange(self.here)) // self.share
        rows = (jnp.zeros((self.total, *total.shape[1:]), total.dtype).at[group].add(total) for total in totals)
        return tuple(rows[group] for rows in jax.lax.psum(tuple(rows), self.axes))


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe and Szegedy 2015) over each of `context.bn_groups` groups of consecutive examples.

    In training, x [B, ..., C] is normalized by the mean and biased variance of its group. The running statistics move
    towards the mean over the groups of (group mean, unbiased group variance). This update is linear in the batch's
    statistics, so the average of the microbatches' new running statistics is that of the whole batch.
    """

    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer | None = nn.initializers.ones
    """None: no scale."""
    momentum: float = 0.9
    epsilon: float = 1e-5
    rectify: bool = False
    """Whether ReLU follows."""

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, ..., C] -> the same shape and type. Raises `ConfigError` if a group has only one value a channel."""
        channels, stats_dtype = x.shape[-1:], at_least_f32(self.param_dtype)
        scale = jnp.ones(channels, self.param_dtype)
        if self.scale_init is not None:
            scale = self.param("scale", self.scale_init, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, stats_dtype)

        if not context.train or "/".join(self.path) in context.frozen_stats:
            wide = x.astype(at_least_f32(x.dtype))  # XLA fuses it into its readers, so no wide copy is stored
            inverse_std = jax.lax.rsqrt(running_var.value + self.epsilon)
            y = _affine(wide, running_mean.value, inverse_std, scale, bias).astype(x.dtype)
            return relu(y) if self.rectify else y

        groups = Groups.of(context, x.shape[0])
        grouped = x.reshape(groups.here, -1, *x.shape[1:])
        count = groups.share * x.size // (groups.here * x.shape[-1])
        if count < 2:
            raise ConfigError(
                f"config.model.bn_groups: BatchNorm {'/'.join(self.path)} would take its statistics over a single "
                "value a channel, which leaves nothing of the input; use fewer groups or larger images."
            )
        y, mean, var = normalize(grouped, scale, bias, self.epsilon, rectify=self.rectify, groups=groups)
        if not self.is_initializing():
            unbiased = var * (count / (count - 1))
            for running, batch in ((running_mean, mean), (running_var, unbiased)):
                new = jax.lax.stop_gradient(jnp.mean(batch.reshape(groups.here, -1), 0).astype(stats_dtype))
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        return y.reshape(x.shape)


def normalize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    *,
    rectify: bool = False,
    groups: Groups | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes each group of x, then applies scale and bias, and ReLU if `rectify`.

    BatchNorm is bound by memory traffic, so both directions take two passes over the activations. The backward pass keeps x
    in its type (a bf16 run stores no copy in f32). With h = (x - mean) / std it gives
    scale / std * (g - mean(g) - h * mean(g * h)), which is section 3 of Ioffe and Szegedy, rearranged. It finds ReLU's mask
    from x, which it reads anyway, and not from y.

    Args:
      x: [groups, n, ..., C].
      scale: [C].
      bias: [C].
      epsilon: added to the variance.
      rectify: whether y is max(y, 0).
      groups: where x has parts of groups, the rest of which other devices have; `None`: x has whole groups.

    Returns:
      y, of x's shape and type; mean and biased variance [groups, 1, ..., C], in at least f32, without gradient.
    """
    return _normalize(x, scale, bias, epsilon, rectify, groups or Groups(x.shape[0], 1, x.shape[0]))


def _normalize_primal(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, rectify: bool, groups: Groups
) -> Any:
    return _normalize_forward(x, scale, bias, epsilon, rectify, groups)[0]


def _normalize_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, rectify: bool, groups: Groups
) -> tuple[Any, Any]:
    wide = x.astype(at_least_f32(x.dtype))
    count = groups.share * math.prod(x.shape[1:-1])
    mean, mean_square = (total / count for total in groups.sums(*_sums(wide, jnp.square(wide))))
    var = mean_square - jnp.square(mean)
    var = jnp.where(var > 0, var, 0)  # rounding can make it negative
    inverse_std = jax.lax.rsqrt(var + epsilon)
    y = _affine(wide, mean, inverse_std, scale, bias).astype(x.dtype)
    return (jnp.maximum(y, 0) if rectify else y, mean, var), (x, mean, inverse_std, scale, bias)


def _normalize_backward(
    epsilon: float, rectify: bool, groups: Groups, saved: Any, gradients: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse_std, scale, bias = saved
    if rectify:
        x = jax.lax.optimization_barrier(x)  # or XLA:GPU would store the mask in the forward pass
    wide, g = (a.astype(at_least_f32(x.dtype)) for a in (x, gradients[0]))
    if rectify:
        g = jnp.where(_affine(wide, mean, inverse_std, scale, bias).astype(x.dtype) > 0, g, 0)
    h = (wide - mean) * inverse_std
    here = _sums(g, g * h)
    sum_g, sum_gh = groups.sums(*here)
    share = 1 / (groups.share * math.prod(x.shape[1:-1]))
    dx = (scale.astype(g.dtype) * inverse_std) * (g - (sum_g + h * sum_gh) * share)
    # the parameters' gradients are this device's part: they are reduced with all others
    dscale, dbias = (jnp.sum(total, tuple(range(x.ndim - 1))).astype(scale.dtype) for total in reversed(here))
    return dx.astype(x.dtype), dscale, dbias


_normalize = jax.custom_vjp(_normalize_primal, nondiff_argnums=(3, 4, 5))
_normalize.defvjp(_normalize_forward, _normalize_backward)


def _sums(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums of a and of b, both [groups, n, ..., C], over each group: [groups, 1, ..., C]."""
    axes = tuple(range(1, a.ndim - 1))

    def apart(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(a, axes, keepdims=True), jnp.sum(b, axes, keepdims=True)

    def together(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        # As one sum of complex numbers: half the kernels. A reduction of two operands would have them as well, but over
        # several devices XLA gathers its parts where it adds those of one operand.
        both = jnp.sum(jax.lax.complex(a, b), axes, keepdims=True)
        return both.real, both.imag

    return jax.lax.platform_dependent(a, b, cuda=together, default=apart)


def _affine(x: jax.Array, mean: jax.Array, inverse_std: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    mean, inverse_std, scale, bias = (a.astype(x.dtype) for a in (mean, inverse_std, scale, bias))
    return (x - mean) * (inverse_std * scale) + bias


class LayerNorm(Layer):
    """Layer normalization (Ba et al. 2016) over the last dim, computed in at least f32 and rounded to `dtype`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] -> the same shape."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return layer_norm(x, scale, bias, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Normalizes x over its last dim, then applies scale and bias. The backward pass keeps x in its type, as `normalize`.

    Args:
      x: [..., C].
      scale: [C].
      bias: [C].
      dtype: of the result; it is computed in at least f32.

    Returns:
      `dtype` [..., C].
    """
    return _layer_norm_forward(x, scale, bias, dtype)[0]


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: DTypeLike) -> tuple[Any, Any]:
    wide = x.astype(at_least_f32(jnp.promote_types(x.dtype, dtype)))
    mean = jnp.mean(wide, -1, keepdims=True)
    var = jnp.mean(jnp.square(wide), -1, keepdims=True) - jnp.square(mean)
    inverse_std = jax.lax.rsqrt(jnp.where(var > 0, var, 0) + 1e-5)
    return _affine(wide, mean, inverse_std, scale, bias).astype(dtype), (x, mean, inverse_std, scale)


def _layer_norm_backward(dtype: DTypeLike, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse_std, scale = saved
    g = g.astype(mean.dtype)
    h = (x.astype(mean.dtype) - mean) * inverse_std
    scaled = g * scale.astype(g.dtype)
    dx = inverse_std * (scaled - jnp.mean(scaled, -1, keepdims=True) - h * jnp.mean(scaled * h, -1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    dscale, dbias = (jnp.sum(total, rows).astype(scale.dtype) for total in (g * h, g))
    return dx.astype(x.dtype), dscale, dbias


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
    """A product with a gradient that is fast on XLA:CPU.

    XLA:CPU transposes the first factor of the weights' gradient. Here this is x, unless the output's gradient and the
    kernel together are smaller. JAX's rule always transposes these two. It transposes the kernel's gradient only after it
    was added over the devices, where XLA no longer merges the transposition into the product.

    Args:
      x: [..., *I].
      kernel: [*I, *O].
      axes: how many dims I has.

    Returns:
      [..., *O].
    """
    return jnp.tensordot(x, kernel, axes)


def _matmul_forward(x: jax.Array, kernel: jax.Array, axes: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, kernel, axes), (x, kernel)


def _matmul_backward(axes: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    examples, outputs = tuple(range(x.ndim - axes)), kernel.ndim - axes
    if x.size <= gradient.size + kernel.size:
        weights = jnp.tensordot(x, gradient, (examples, examples))
    else:
        weights = jnp.moveaxis(jnp.tensordot(gradient, x, (examples, examples)), range(-axes, 0), range(axes))
    ends = tuple(range(-outputs, 0))
    return jnp.tensordot(gradient, kernel, (ends, ends)), weights


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), for x of any shape. Its gradient uses the result, which the next layer keeps anyway, and not a mask."""
    return jnp.maximum(x, 0)


def _relu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Without the barrier XLA:GPU stores x as well, and has no product or convolution with ReLU in its kernel.
    y = jax.lax.optimization_barrier(relu(x))
    return y, y


def _relu_backward(y: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(y > 0, gradient, 0),)


relu.defvjp(_relu_forward, _relu_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., C] + bias [C], in x's type. The gradient of `bias` is summed in at least f32."""
    return x + bias.astype(x.dtype)


def _add_bias_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.sum(g, tuple(range(g.ndim - 1)), dtype=at_least_f32(g.dtype))
    return g, total.astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function at x (Hendrycks and Gimpel 2016), exact, for x of any shape.

    The backward pass keeps x alone. Without the barrier XLA:GPU computes the derivative in the forward pass, and stores it.
    """
    return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    _, backward = jax.vjp(functools.partial(jax.nn.gelu, approximate=False), x)
    return backward(gradient)


gelu.defvjp(_gelu_forward, _gelu_backward)


# ------------------------------------------------------------------------------------------------------------- dropout


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
    # Scaled in f32: in bf16, 1 - 0.3 is wrong by 0.1 %, which would shift the mean of every output.
    kept = (x.astype(at_least_f32(x.dtype)) / (1 - rate)).astype(x.dtype)
    return jnp.where(keep_mask(key, example, rate, shape), kept, 0)


def keep_mask(key: jax.Array, example: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """A random mask. It compares raw bits with a threshold, so a run drops the same values in every precision.

    Args:
      key: PRNG key.
      example: int32 [B]. Row i of the mask is a function of `key` and `example[i]` alone.
      rate: the probability of False.
      shape: of one row.

    Returns:
      bool [B, *shape].
    """
    threshold = min(round((1 - rate) * 2**32), 2**32 - 1)

    def one(index: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, index), shape, jnp.uint32) < jnp.uint32(threshold)

    return jax.vmap(one)(example)
