"""Precision: which dtypes a run stores and computes in, how its products are rounded, and fp16's dynamic loss scale.

Parameters, optimizer state and running statistics are always stored in at least float32. Only the layers compute in
`compute_dtype`. Losses, norms and batch statistics are computed in at least float32 (`at_least_f32`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxtrain.errors import ConfigError
from jaxtrain.host.backend import is_accelerator, none_or_too_old


@dataclasses.dataclass(frozen=True)
class Policy:
    """The dtypes of a run.

    Attributes:
      param_dtype: what parameters are stored in.
      compute_dtype: what layers compute in.
      products: how matrix products and convolutions of f32 treat their factors on an accelerator, as a value of
        `jax_default_matmul_precision`. By default a GPU rounds them to TF32. Factors of 16 or 64 bits are never rounded,
        and a CPU rounds none.
    """

    param_dtype: Any
    compute_dtype: Any
    products: str


# The default in bf16 and fp16: what is left in f32 there (the last linear map, Muon's iterations) follows values that 16
# bits have rounded, and TF32 keeps at least as many.
_POLICIES = {
    "f32": Policy(jnp.float32, jnp.float32, "highest"),
    "tf32": Policy(jnp.float32, jnp.float32, "tensorfloat32"),
    "bf16": Policy(jnp.float32, jnp.bfloat16, "default"),
    "fp16": Policy(jnp.float32, jnp.float16, "default"),
    "f64": Policy(jnp.float64, jnp.float64, "highest"),
}


def resolve_precision(name: str, backend: str) -> str:
    """What `train.precision=name` means on `backend` (`jax.default_backend()`).

    `auto` is `bf16` on a GPU or TPU, which have hardware for it, and `f32` on a CPU. The answer is stored with the run,
    so that a resumed run keeps its precision on another backend.
    """
    if name != "auto":
        return name
    return "bf16" if is_accelerator(backend) else "f32"


def precision_policy(name: str) -> Policy:
    """The dtypes of `name`, a precision that is not `auto`.

    Raises:
      ConfigError: `f64` while JAX's 64-bit types are off.
    """
    if name == "f64" and jnp.result_type(float) != jnp.float64:
        raise ConfigError(
            "config.train.precision='f64': JAX's 64-bit types are off; set JAX_ENABLE_X64=1, "
            "or call jax.config.update('jax_enable_x64', True) before the first array is made."
        )
    return _POLICIES[name]


def product_precision(name: str) -> str:
    """`Policy.products` of `name`, a precision that is not `auto`; also while JAX's 64-bit types are off."""
    return _POLICIES[name].products


def require_hardware(name: str, devices: Iterable[Any]) -> None:
    """Raises `ConfigError` where a device of a run cannot compute as `name`, a precision that is not `auto`, says.

    Only `tf32` needs a certain device: without TF32 it would be f32 by another name.
    """
    for device in devices if name == "tf32" else ():
        if which := none_or_too_old(device):
            raise ConfigError(
                "config.train.precision='tf32': needs NVIDIA GPUs of compute capability 8.0 (Ampere) or newer, and the run "
                f"is on {which}; use --config.train.precision=f32, or bf16."
            )


def at_least_f32(dtype: Any) -> jnp.dtype:
    """The dtype for sums, statistics, softmax and logits: float32 for bf16, fp16 and f32; float64 for f64."""
    return jnp.promote_types(dtype, jnp.float32)


# --------------------------------------------------------------------------------------------------------- loss scale

INITIAL_SCALE = 2.0**15
MAX_SCALE = 2.0**24
MIN_SCALE = 1.0
GROWTH_INTERVAL = 2000  # steps in a row whose gradients were finite, before the scale doubles


@flax.struct.dataclass
class LossScale:
    """What fp16 multiplies the loss by, so that small gradients do not underflow (Micikevicius 2018, section 3.2).

    Attributes:
      scale: float32 [], a power of two in [MIN_SCALE, MAX_SCALE]. Without the upper bound it could double until it is
        infinite, and would then stay infinite (google/flax#2547).
      good_steps: int32 [], finite steps since the scale last changed.
    """

    scale: jax.Array
    good_steps: jax.Array


def initial_loss_scale(policy: Policy) -> LossScale | tuple[()]:
    """`TrainState.loss_scale` of a new run: a `LossScale` for fp16, otherwise `()`, a tree without leaves."""
    if policy.compute_dtype != jnp.float16:
        return ()
    return LossScale(scale=jnp.asarray(INITIAL_SCALE, jnp.float32), good_steps=jnp.zeros((), jnp.int32))


def adjust_loss_scale(loss_scale: LossScale | tuple[()], finite: jax.Array) -> LossScale | tuple[()]:
    """The scale after a step. finite: bool [], whether the step's loss and gradient norm were finite.

    The scale is halved after an overflow and doubled after `GROWTH_INTERVAL` finite steps in a row. It stays in
    [MIN_SCALE, MAX_SCALE].
    """
    if not isinstance(loss_scale, LossScale):
        return loss_scale
    scale, good_steps = loss_scale.scale, loss_scale.good_steps + 1
    grows = good_steps >= GROWTH_INTERVAL
    larger = jnp.where(grows, jnp.minimum(scale * 2, MAX_SCALE), scale)
    smaller = jnp.maximum(scale / 2, MIN_SCALE)
    return LossScale(
        scale=jnp.where(finite, larger, smaller),
        good_steps=jnp.where(finite & ~grows, good_steps, 0),
    )


def scale_factor(loss_scale: LossScale | tuple[()], dtype: Any) -> jax.Array:
    """The factor for the loss; gradients are divided by it. A scalar [] of `dtype`; 1 if there is no loss scale."""
    if not isinstance(loss_scale, LossScale):
        return jnp.ones((), dtype)
    return loss_scale.scale.astype(dtype)


def at_floor(loss_scale: LossScale | tuple[()]) -> jax.Array:
    """Whether the scale is already `MIN_SCALE`: bool []. A gradient that overflows even then is not fp16's fault.

    False if there is no loss scale.
    """
    if not isinstance(loss_scale, LossScale):
        return jnp.zeros((), bool)
    return loss_scale.scale <= MIN_SCALE
