"""The optimizers, by the name in `optim.name`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.config import OptimConfig, without_effect
from jaxtrain.errors import ConfigError
from jaxtrain.host.text import did_you_mean
from jaxtrain.optim.muon import Mask, muon
from jaxtrain.optim.updates import global_norm
from jaxtrain.plugins import load_callable
from jaxtrain.trees import PyTree, path_of


def decay_mask(params: PyTree, no_decay: tuple[str, ...] = ()) -> PyTree:
    """A tree like `params`, true for each leaf that weight decay applies to: the weights of matrix products and convolutions.

    Never for scalars and vectors. Never for a leaf named `bias` or `scale`, whatever its shape (Swin's qkv bias is
    [3, heads, head_dim]). Never for a leaf whose path ('layers_03/attn/qkv/kernel') matches a regex of `no_decay`.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        name = path_of(path)
        excluded = name.rsplit("/", 1)[-1] in ("bias", "scale") or any(re.search(regex, name) for regex in no_decay)
        return leaf.ndim > 1 and not excluded

    return jax.tree_util.tree_map_with_path(decays, params)


# Which fields each optimizer reads, apart from the learning rate and the weight decay.
_FIELDS = {
    "sgd": ("momentum", "nesterov"),
    "adamw": ("b1", "b2", "eps"),
    "lamb": ("b1", "b2", "eps"),
    "lars": ("momentum", "nesterov"),
    "lion": ("b1", "b2"),
    "muon": ("momentum", "nesterov", "b1", "b2", "eps"),
}


def unused_settings(config: OptimConfig) -> list[str]:
    """A sentence for each field that differs from its default and has no effect."""
    sentences: list[str] = []
    if config.name in _FIELDS:
        unread = set().union(*_FIELDS.values()).difference(_FIELDS[config.name])
        sentences += without_effect("optim", config, sorted(unread), f"{config.name} has no such setting")
    for names, schedules in (
        (("step_at", "step_gamma"), ("step",)), (("decay_share",), ("wsd",)), (("final_scale",), ("cosine", "linear", "wsd")),
    ):  # fmt: skip
        if config.schedule not in schedules:
            sentences += without_effect("optim", config, names, f"the schedule is {config.schedule}")
    return sentences


def is_own(name: str) -> bool:
    """Whether `optim.name` names a factory of the user's own, `package.module:factory`."""
    return ":" in name


def make_optimizer(
    config: OptimConfig,
    rate: optax.Schedule,
    no_decay: tuple[str, ...] = (),
    *,
    weight_decay: float | jax.Array | None = None,
) -> optax.GradientTransformation:
    """The optimizer `config.name`, or what the user's own `package.module:factory` returns.

    A factory is called as `factory(config, rate, mask)`, where `mask(params)` is `decay_mask(params, no_decay)`. The
    layout and donation need two things of it: each array of its state is a scalar or has the shape of a parameter, and
    keeps its dtype in an update.

    Args:
      config: the section `optim`.
      rate: the learning rate of each step.
      no_decay: regexes; a leaf whose path matches one is not decayed.
      weight_decay: float [], in place of the config's, where that is not 0; a program's argument. A factory does not get it.

    Raises:
      ConfigError: there is no such optimizer, or a factory returns something else.
    """
    mask = functools.partial(decay_mask, no_decay=no_decay)
    if is_own(config.name):
        optimizer = load_callable(config.name, "optim.name")(config, rate, mask)
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ConfigError(
                f"config.optim.name={config.name!r}: it returned a {type(optimizer).__name__}; "
                "it must return an optax.GradientTransformation."
            )
        return optimizer
    if config.name not in OPTIMIZERS:
        raise ConfigError(
            f"config.optim.name={config.name!r}: must be one of {', '.join(OPTIMIZERS)}, or package.module:factory."
            f"{did_you_mean(config.name, OPTIMIZERS)}"
        )
    decay = config.weight_decay if weight_decay is None or not config.weight_decay else weight_decay
    return OPTIMIZERS[config.name](config, rate, decay, mask)


def _momentum(config: OptimConfig) -> optax.GradientTransformation:
    return optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()


def _sgd(
    config: OptimConfig, rate: optax.Schedule, decay: float | jax.Array, mask: Mask
) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay, mask), _momentum(config), optax.scale_by_learning_rate(rate))


def _adamw(
    config: OptimConfig, rate: optax.Schedule, decay: float | jax.Array, mask: Mask
) -> optax.GradientTransformation:
    return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=decay, mask=mask)


def _lamb(
    config: OptimConfig, rate: optax.Schedule, decay: float | jax.Array, mask: Mask
) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(decay, mask),
        optax.masked(optax.scale_by_trust_ratio(), mask),
        optax.scale_by_learning_rate(rate),
    )


def _lion(
    config: OptimConfig, rate: optax.Schedule, decay: float | jax.Array, mask: Mask
) -> optax.GradientTransformation:
    return optax.lion(rate, config.b1, config.b2, weight_decay=decay, mask=mask)


def _lars(
    config: OptimConfig, rate: optax.Schedule, decay: float | jax.Array, mask: Mask
) -> optax.GradientTransformation:
    """The momentum adds up updates that are already multiplied by the rate, as in the paper. (`sgd` multiplies afterwards.)"""
    return optax.chain(_scale_by_layer(decay, mask), optax.scale_by_learning_rate(rate), _momentum(config))


def _scale_by_layer(weight_decay: float | jax.Array, mask: Mask, trust: float = 0.001) -> optax.GradientTransformation:
    """trust |w| / (|g| + decay |w|) * (g + decay w), You 2017, equation 6. (`optax.lars` divides by |g + decay w|.)

    The factor is 1 for a leaf of zeros (it could never leave zero otherwise) and for a gradient of zeros.
    """

    def scale(gradient: jax.Array, weight: jax.Array, adapts: bool) -> jax.Array:
        if not adapts:
            return gradient
        gradient_norm, weight_norm = global_norm(gradient), global_norm(weight)
        ratio = trust * weight_norm / (gradient_norm + weight_decay * weight_norm)
        ratio = jnp.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)
        return (ratio * (gradient + weight_decay * weight)).astype(gradient.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params, mask(params)))


OPTIMIZERS: dict[
    str, Callable[[OptimConfig, optax.Schedule, float | jax.Array, Mask], optax.GradientTransformation]
] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lamb": _lamb,
    "lars": _lars,
    "lion": _lion,
    "muon": lambda config, rate, decay, mask: muon(config, rate, decay, mask, _adamw(config, rate, decay, mask)),
}
