"""The optimizer Muon (Jordan 2024): momentum, made orthogonal, for the kernels of hidden layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.config import OptimConfig
from jaxtrain.errors import ConfigError
from jaxtrain.trees import PyTree, path_of

Mask = Callable[[PyTree], PyTree]


def muon(
    config: OptimConfig,
    rate: optax.Schedule,
    decay: float | jax.Array,
    mask: Mask,
    others: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Muon for the kernels of hidden layers, and `others` for every other leaf.

    Every other leaf: all leaves of the first and of the last layer (the stem and the head: the first and last key of
    the tree), biases, norms, tables, and whatever is not named `kernel`. A Muon update is scaled by
    0.2 sqrt(max(fan_in, fan_out)). Its size is then AdamW's, so both share one learning rate and weight decay (Liu 2025,
    arXiv:2502.16982, equation 4). Momentum is corrected for its bias, Nesterov's as in NAdam (Dozat 2016).

    Args:
      config: the settings; `momentum`, `nesterov` and `eps` are read.
      rate: the learning rate of each step.
      decay: the weight decay.
      mask: of the parameters, true for each leaf that weight decay applies to.
      others: the optimizer of the other leaves (AdamW).

    Raises:
      ConfigError: from the result's `init`, if no leaf is left for Muon.
    """

    def partition(hidden: PyTree) -> optax.GradientTransformation:
        muon = optax.chain(
            _orthogonalize(config),
            optax.add_decayed_weights(decay, mask),
            optax.scale_by_learning_rate(rate),
        )
        labels = jax.tree.map(lambda is_hidden: "muon" if is_hidden else "adamw", hidden)
        return optax.partition({"muon": muon, "adamw": others}, labels)

    def init(params: PyTree) -> PyTree:
        hidden = _hidden_kernels(params, mask)
        if params and not any(jax.tree.leaves(hidden)):
            raise ConfigError(
                f"config.optim.name='muon': of the layers {', '.join(sorted(params))} none between the first and the "
                "last has a kernel to train, which is what Muon updates; use adamw."
            )
        return partition(hidden).init(params)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, PyTree]:
        # Which leaves are Muon's is read from the state: a pipeline stage has some of the layers only, and its first
        # layer is not the model's stem.
        momentum = state.inner_states["muon"].inner_state[0].mu
        hidden = jax.tree.map(lambda leaf: not _is_masked(leaf), momentum, is_leaf=_is_masked)
        return partition(hidden).update(updates, state, params)

    return optax.GradientTransformation(init, update)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _hidden_kernels(params: PyTree, mask: Mask) -> PyTree:
    """True for each leaf that Muon updates."""
    names = sorted(params)

    def hidden(path: tuple[Any, ...], decays: bool) -> bool:
        keys = path_of(path).split("/")
        return decays and keys[-1] == "kernel" and keys[0] not in (*names[:1], *names[-1:])

    return jax.tree_util.tree_map_with_path(hidden, mask(params))


# Newton-Schulz quintic (Jordan 2024, https://kellerjordan.github.io/posts/muon).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def _orthogonalize(config: OptimConfig) -> optax.GradientTransformation:
    """Momentum, made orthogonal by five Newton-Schulz iterations, scaled to the size of an AdamW update."""
    muon = optax.contrib.scale_by_muon(
        _NEWTON_SCHULZ,
        beta=config.momentum,
        eps=config.eps,
        nesterov=config.nesterov,
        weight_dimension_numbers=_matrix_axes,
    )

    def init(params: PyTree) -> Any:
        # optax keeps the three coefficients in the state: a leaf that is neither a scalar nor shaped like a parameter.
        return muon.init(params)._replace(ns_coeffs=())  # type: ignore[union-attr]

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        new, state = muon.update(updates, state._replace(ns_coeffs=jnp.asarray(_NEWTON_SCHULZ)), params)
        scaled = jax.tree.map(_adamw_size, new, _matrix_axes(new))
        return scaled, state._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)


def _adamw_size(update: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
    fan_in, fan_out = (math.prod(update.shape[axis] for axis in side) for side in axes)  # type: ignore[union-attr]
    return 0.2 * math.sqrt(max(fan_in, fan_out)) * update


def _matrix_axes(kernels: PyTree) -> PyTree:
    """Which dims of each kernel are a matrix's rows (reduced over) and columns. The other dims are a batch of matrices.

    The last dim is the output's: of Dense [in, out], Conv [height, width, in, out] and an attention's output
    projection [heads, head_dim, out]. But query, key and value are three matrices, in one leaf `qkv`
    [in, 3, heads, head_dim] or in three [in, heads, head_dim].
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers:
        owner = path_of(path).split("/")[-2]
        if owner == "qkv" and leaf.ndim == 4:
            return optax.contrib.MuonDimensionNumbers((0,), (2, 3))
        if owner in ("query", "key", "value") and leaf.ndim == 3:
            return optax.contrib.MuonDimensionNumbers((0,), (1, 2))
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, kernels)
