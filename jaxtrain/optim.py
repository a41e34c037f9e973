"""Learning rates, optimizers, gradient clipping, the average of the weights, and the loss.

Which fields of `config.optim` an optimizer reads, beside the learning rate, `eps` and `weight_decay`:

| name    | fields                     | what it is                                                                    |
|---------|----------------------------|-------------------------------------------------------------------------------|
| `sgd`   | momentum, nesterov         | torch.optim.SGD: decay joins the gradient, momentum without dampening         |
| `adamw` | b1, b2                     | Loshchilov 2019; the decay is multiplied by the learning rate, as in PyTorch  |
| `lamb`  | b1, b2                     | You 2020, algorithm 2                                                         |
| `lars`  | momentum, nesterov         | You 2017, algorithm 1, trust coefficient 0.001; decay joins the gradient      |
| `lion`  | b1, b2                     | Chen 2023, who take b2=0.99 and a 3-10 times smaller rate than AdamW's        |
| `muon`  | momentum, nesterov, b1, b2 | Jordan 2024 for hidden kernels, AdamW for the rest; see `_muon`               |

`sgd`, `lars` and `lion` have no `eps`. Leaves without weight decay (`decay_mask`) are not adapted layer by layer in
`lamb` and `lars` either (the default of TensorFlow Addons' LAMB and SimCLR's LARS): the norm of a bias says little
about how far it may move.

Gradient clipping is not part of an optimizer: its norm is that of the whole tree, wherever the parts of it live.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.config import OptimConfig, did_you_mean, without_effect
from jaxtrain.errors import ConfigError
from jaxtrain.plugins import load_dotted
from jaxtrain.precision import at_least_f32

PyTree = Any
Mask = Callable[[PyTree], PyTree]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def _path(path: tuple[Any, ...]) -> str:
    """'layers_03/attn/qkv/kernel'"""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _load_function(name: str, field: str) -> Callable[..., Any]:
    function = load_dotted(name, field)
    if not callable(function):
        raise ConfigError(f"config.{field}={name!r}: is a {type(function).__name__}; it must be a function.")
    return function


# ------------------------------------------------------------------------------------------------------ learning rate


def learning_rate(config: OptimConfig, global_batch: int) -> float:
    """The peak rate at `global_batch` examples a step: scaled linearly (Goyal 2017), by the square root, or not."""
    ratio = global_batch / config.lr_reference_batch
    return config.learning_rate * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[config.lr_scaling]


def schedule(config: OptimConfig, total_steps: int, warmup_steps: int, global_batch: int) -> optax.Schedule:
    """The learning rate of each step, as a function of how many updates came before it.

    With t the step (from 0), W = warmup_steps, T = total_steps, the rate is peak * warm(t) * shape(t), where

    - warm(t) = min(1, (t + 1) / W): never 0, and the last warm-up step has the peak rate. A warm-up longer than the run
      just goes on to its end.
    - shape(t), with the progress p = (t - start) / (T - start) clipped to [0, 1] and F = final_scale:
      `constant` 1; `step` step_gamma to the number of shares s of `step_at` with t >= s T;
      `cosine` F + (1 - F) (1 + cos(pi p)) / 2 (Loshchilov 2017) and `linear` F + (1 - F) (1 - p), from start = W;
      `wsd` F + (1 - F) (1 - p), from start = T - decay_share T, or W if that is later.

    The last step, t = T - 1, is thus one step short of F.

    Elementwise. A JAX array or tracer gives an array of JAX's default float type (float64 when x64 is on); a number or
    a NumPy array is computed by NumPy in float64, without touching a device.
    """
    peak = learning_rate(config, global_batch)
    milestones = [math.ceil(share * total_steps - 1e-9) for share in config.step_at]
    start = warmup_steps
    if config.schedule == "wsd":
        start = max(warmup_steps, total_steps - math.ceil(config.decay_share * total_steps - 1e-9))

    def rate(step: Any) -> Any:
        xp: Any = jnp if isinstance(step, jax.Array) else np
        t = xp.asarray(step, dtype=xp.result_type(float))
        warm = xp.minimum(1.0, (t + 1) / max(warmup_steps, 1))
        progress = xp.clip((t - start) / max(total_steps - start, 1), 0.0, 1.0)
        match config.schedule:
            case "constant":
                shape = xp.ones_like(t)
            case "step":
                passed = [xp.where(t >= milestone, config.step_gamma, 1.0) for milestone in milestones]
                shape = functools.reduce(xp.multiply, passed, xp.ones_like(t))
            case "cosine":
                shape = _from_one_to(config.final_scale, (1 + xp.cos(math.pi * progress)) / 2)
            case _:  # linear, wsd
                shape = _from_one_to(config.final_scale, 1 - progress)
        return peak * warm * shape

    return rate


def _from_one_to(final: float, fraction: Any) -> Any:
    return final + (1 - final) * fraction


# --------------------------------------------------------------------------------------------------------- optimizers


def decay_mask(params: PyTree, no_decay: tuple[str, ...] = ()) -> PyTree:
    """True for each leaf that weight decay applies to: the weights of products and convolutions.

    Never vectors and scalars, nor a leaf named `bias` or `scale` whatever its shape (Swin's qkv bias is
    [3, heads, head_dim]), nor a leaf whose path ('layers_03/attn/qkv/kernel') a regex of `no_decay` is found in.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        name = _path(path)
        excluded = name.rsplit("/", 1)[-1] in ("bias", "scale") or any(re.search(regex, name) for regex in no_decay)
        return leaf.ndim > 1 and not excluded

    return jax.tree_util.tree_map_with_path(decays, params)


# Which fields each optimizer reads beside the learning rate and the weight decay.
_FIELDS = {
    "sgd": ("momentum", "nesterov"),
    "adamw": ("b1", "b2", "eps"),
    "lamb": ("b1", "b2", "eps"),
    "lars": ("momentum", "nesterov"),
    "lion": ("b1", "b2"),
    "muon": ("momentum", "nesterov", "b1", "b2", "eps"),
}


def unused_settings(config: OptimConfig) -> list[str]:
    """A sentence for each field that was changed from its default and that nothing reads."""
    found: list[str] = []
    if config.name in _FIELDS:
        unread = {"momentum", "nesterov", "b1", "b2", "eps"}.difference(_FIELDS[config.name])
        found += without_effect("optim", config, sorted(unread), f"{config.name} has no such setting")
    for names, schedules in (
        (("step_at", "step_gamma"), ("step",)), (("decay_share",), ("wsd",)), (("final_scale",), ("cosine", "linear", "wsd")),
    ):  # fmt: skip
        if config.schedule not in schedules:
            found += without_effect("optim", config, names, f"the schedule is {config.schedule}")
    return found


def make(config: OptimConfig, rate: optax.Schedule, no_decay: tuple[str, ...] = ()) -> optax.GradientTransformation:
    """The optimizer `config.name`, or what a user's own `package.module:factory` returns.

    A factory is called as `factory(config, rate, mask)`; `mask(params)` is `decay_mask` with `no_decay` filled in. It
    follows two rules, for the layout and for donation: each array of its state is a scalar or has the shape of a
    parameter, and none changes its type in an update.

    Raises `ConfigError` for an unknown name, or when a factory returns something else.
    """
    mask = functools.partial(decay_mask, no_decay=no_decay)
    if ":" in config.name:
        optimizer = _load_function(config.name, "optim.name")(config, rate, mask)
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
    return OPTIMIZERS[config.name](config, rate, mask)


def _momentum(config: OptimConfig) -> optax.GradientTransformation:
    return optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()


def _sgd(config: OptimConfig, rate: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask), _momentum(config), optax.scale_by_learning_rate(rate)
    )


def _adamw(config: OptimConfig, rate: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=mask)


def _lamb(config: OptimConfig, rate: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.masked(optax.scale_by_trust_ratio(), mask),
        optax.scale_by_learning_rate(rate),
    )


def _lion(config: OptimConfig, rate: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    return optax.lion(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=mask)


def _lars(config: OptimConfig, rate: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """The rate is inside the momentum, as in the paper (`sgd` has it outside)."""
    return optax.chain(
        _scale_by_layer(config.weight_decay, mask), optax.scale_by_learning_rate(rate), _momentum(config)
    )


def _scale_by_layer(weight_decay: float, mask: Mask, trust: float = 0.001) -> optax.GradientTransformation:
    """trust |w| / (|g| + decay |w|) * (g + decay w), You 2017, equation 6. (`optax.lars` divides by |g + decay w|.)

    A layer of zeros, or with a gradient of zeros, keeps a factor of 1: it could never leave zero otherwise.
    """

    def scale(gradient: jax.Array, weight: jax.Array, adapts: bool) -> jax.Array:
        if not adapts:
            return gradient
        gradient_norm, weight_norm = global_norm(gradient), global_norm(weight)
        ratio = trust * weight_norm / (gradient_norm + weight_decay * weight_norm)
        ratio = jnp.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)
        return (ratio * (gradient + weight_decay * weight)).astype(gradient.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params, mask(params)))


def _muon(config: OptimConfig, rate: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the kernels of hidden layers, AdamW for every other leaf.

    Every other leaf: all of the first and of the last layer (the stem and the head: the first and last key of the
    tree), biases, norms, tables, and whatever is not named `kernel`. A Muon update is scaled by
    0.2 sqrt(max(fan_in, fan_out)), so that its size is AdamW's and both share one learning rate and weight decay
    (Liu 2025, arXiv:2502.16982, equation 4). Momentum is corrected for its bias, Nesterov's as in NAdam (Dozat 2016).

    Raises `ConfigError` in `init` when that leaves Muon nothing to do.
    """

    def partition(hidden: PyTree) -> optax.GradientTransformation:
        muon = optax.chain(
            _orthogonalize(config),
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.scale_by_learning_rate(rate),
        )
        labels = jax.tree.map(lambda is_hidden: "muon" if is_hidden else "adamw", hidden)
        return optax.partition({"muon": muon, "adamw": _adamw(config, rate, mask)}, labels)

    def init(params: PyTree) -> PyTree:
        hidden = _hidden_kernels(params, mask)
        if params and not any(jax.tree.leaves(hidden)):
            raise ConfigError(
                f"config.optim.name='muon': of the layers {', '.join(sorted(params))} none between the first and the "
                "last has a kernel, which is what Muon updates; use adamw."
            )
        return partition(hidden).init(params)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, PyTree]:
        # The state knows which leaves are Muon's, so that a slice of the tree (some of the layers) keeps its split.
        momentum = state.inner_states["muon"].inner_state[0].mu
        hidden = jax.tree.map(lambda leaf: not _is_masked(leaf), momentum, is_leaf=_is_masked)
        return partition(hidden).update(updates, state, params)

    return optax.GradientTransformation(init, update)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _hidden_kernels(params: PyTree, mask: Mask) -> PyTree:
    names = sorted(params)

    def hidden(path: tuple[Any, ...], decays: bool) -> bool:
        keys = _path(path).split("/")
        return decays and keys[-1] == "kernel" and keys[0] not in (*names[:1], *names[-1:])

    return jax.tree_util.tree_map_with_path(hidden, mask(params))


# Newton-Schulz quintic (Jordan 2024, https://kellerjordan.github.io/posts/muon).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def _orthogonalize(config: OptimConfig) -> optax.GradientTransformation:
    """Momentum, made orthogonal by five Newton-Schulz iterations, at the size of an AdamW update."""
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
    """Which axes of each kernel are a matrix's rows (reduced over) and columns; what is neither is a batch of matrices.

    The last axis is the output's: of Dense [in, out], Conv [height, width, in, out] and an attention's output
    projection [heads, head_dim, out]. But query, key and value are three matrices, in one leaf `qkv`
    [in, 3, heads, head_dim] or in three [in, heads, head_dim].
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers:
        owner = _path(path).split("/")[-2]
        if owner == "qkv" and leaf.ndim == 4:
            return optax.contrib.MuonDimensionNumbers((0,), (2, 3))
        if owner in ("query", "key", "value") and leaf.ndim == 3:
            return optax.contrib.MuonDimensionNumbers((0,), (1, 2))
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, kernels)


OPTIMIZERS: dict[str, Callable[[OptimConfig, optax.Schedule, Mask], optax.GradientTransformation]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lamb": _lamb,
    "lars": _lars,
    "lion": _lion,
    "muon": _muon,
}


# ---------------------------------------------------------------------------------------------------------- gradients


def global_norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all leaves together, a scalar of at least float32; leaves are added in the tree's order.

    0 for a tree without leaves.
    """
    squares = [jnp.sum(jnp.square(leaf.astype(at_least_f32(leaf.dtype)))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(functools.reduce(jnp.add, squares, 0.0))


def clip_by_global_norm(gradients: PyTree, norm: jax.Array, max_norm: float) -> PyTree:
    """`gradients`, of global norm `norm`, scaled down to at most `max_norm`, as torch.nn.utils.clip_grad_norm_ does.

    A norm that is not finite gives gradients that are not: the caller refuses that update.
    """
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)


# ------------------------------------------------------------------------------------------------------------ average


def ema_update(ema: PyTree, params: PyTree, decay: float, step: jax.Array) -> PyTree:
    """d * ema + (1 - d) * params, with d = min(decay, (1 + step) / (10 + step)), in at least float32.

    `step` is the number of updates before this one. The warm-up of d, as in tf.train.ExponentialMovingAverage, lets the
    average forget the random initial weights: 0.1 of them is left after the first update, instead of `decay`.
    """
    step = jnp.asarray(step, jnp.result_type(float))  # JAX divides int32 in float32, x64 or not
    warm = jnp.minimum(decay, (1 + step) / (10 + step))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        d = warm.astype(at_least_f32(old.dtype))
        return (d * old + (1 - d) * new).astype(old.dtype)

    return jax.tree.map(average, ema, params)


# --------------------------------------------------------------------------------------------------------------- loss


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross entropy of each example, [B], in at least float32; `targets` [B, C] are probabilities."""
    dtype = at_least_f32(logits.dtype)
    return optax.softmax_cross_entropy(logits.astype(dtype), targets.astype(dtype))


def loss_fn(name: str) -> Loss:
    """The loss `optim.loss=name`: (logits [B, C], targets [B, C]) -> [B]. Raises `ConfigError` for an unknown name.

    Label smoothing, mixup and cutmix are in the targets already.
    """
    if ":" in name:
        return _load_function(name, "optim.loss")
    if name != "cross_entropy":
        raise ConfigError(
            f"config.optim.loss={name!r}: must be cross_entropy, or package.module:function."
            f"{did_you_mean(name, ['cross_entropy'])}"
        )
    return cross_entropy
