"""What a run computes (`Task`) and on what (`Batch`, `Resident`); shared by training and evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxtrain.config import Config, OptimConfig
from jaxtrain.data.augment import Preprocess
from jaxtrain.models.classifier import Classifier
from jaxtrain.optim import loss_fn, make
from jaxtrain.parallel.layout import Layout, path_of
from jaxtrain.precision import at_least_f32, policy

PyTree = Any


@flax.struct.dataclass
class Batch:
    """One global batch of B examples as M microbatches.

    step: int32, the number of the update that this batch is for; a state at another step is left as it is. rows: int32
    [M, B/M] row numbers into `Resident`, or `()`. images: uint8 [M, B/M, H, W, C] and labels: int32 [M, B/M], or `()`.
    """

    step: jax.Array
    rows: Any = ()
    images: Any = ()
    labels: Any = ()


@flax.struct.dataclass
class Resident:
    """A data set that lives on the devices: images uint8 [N, H, W, C], labels int32 [N]; both `()` when it is streamed."""

    images: Any = ()
    labels: Any = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """What a step computes; nothing of where. skips: an update that is not finite is passed over, and the step counted."""

    model: Classifier
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    preprocess: Preprocess
    optim: OptimConfig
    seed: int
    bn_groups: int
    remat: str
    skips: bool

    @property
    def sums_dtype(self) -> jnp.dtype:
        """The type that losses and counts are added up in. (A pipeline stage may own no parameter to take it from.)"""
        return at_least_f32(self.preprocess.dtype)


def make_task(
    config: Config,
    model: Classifier,
    rate: optax.Schedule,
    *,
    side: int,
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Task:
    """The task of `config` on images of `side` pixels. mean, std: per channel, of pixels in [0, 1]."""
    preprocess = Preprocess(
        image_size=side,
        augmentation=config.data.augmentation,
        mean=mean,
        std=std,
        num_classes=classes,
        mixup=config.data.mixup,
        cutmix=config.data.cutmix,
        label_smoothing=config.optim.label_smoothing,
        padding=config.data.crop_padding,
        dtype=policy(config.train.precision).compute_dtype,
    )
    return Task(
        model=model,
        optimizer=make(config.optim, rate, model.no_decay),
        schedule=rate,
        loss=loss_fn(config.optim.loss),
        preprocess=preprocess,
        optim=config.optim,
        seed=config.seed,
        bn_groups=config.model.bn_groups,
        remat=config.train.remat,
        skips=config.train.nonfinite_skips > 0,
    )


def select(batch: Batch, resident: Resident, index: Any, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Images uint8 [B/M, H, W, C] and labels int32 [B/M] of microbatch `index`, split over the batch axes."""
    images = select_from(batch.images, batch.rows, resident.images, index, layout)
    return images, select_from(batch.labels, batch.rows, resident.labels, index, layout)


def select_from(streamed: Any, rows: Any, resident: Any, index: Any, layout: Layout) -> jax.Array:
    """Microbatch `index` of what is `streamed` [M, B/M, ...], or of the `rows` [M, B/M] of what is `resident` [N, ...]."""
    pick = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
    if isinstance(rows, tuple):
        return pick(streamed)
    return jax.lax.with_sharding_constraint(resident[pick(rows)], layout.examples)


def wrapper(
    layout: Layout, params: PyTree, remat: str, *, gathered: bool = False
) -> Callable[[Callable[..., Any], str], Callable[..., Any]] | None:
    """What the layout and `remat` put around each layer's function: gather its parameters, and what not to store.

    Under ZeRO-3 a layer's gathered parameters are never stored for the backward pass, which gathers them again
    (Rajbhandari 2020, section 5.3; XLA:CPU merges the two gathers). gathered: the parameters are whole already.
    """
    gather = layout.config.zero == 3 and not gathered
    if not gather and remat == "none":
        return None

    def wrap(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        leaves, structure = jax.tree_util.tree_flatten_with_path(params.get(name, {}))
        places = [layout.place("params", f"{name}/{path_of(path)}", leaf.shape, leaf.dtype) for path, leaf in leaves]
        shardings = structure.unflatten([layout.sharding(place.compute_spec) for place in places])

        def call(layer_params: PyTree, *args: Any) -> Any:
            if gather:
                layer_params = jax.lax.with_sharding_constraint(layer_params, shardings)
            return function(layer_params, *args)

        return jax.checkpoint(call, policy=_REMAT_POLICIES[remat])

    return wrap


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name != "sharding_constraint"


def _products(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in ("dot_general", "conv_general_dilated")


_REMAT_POLICIES = {"none": _all_but_gathered, "dots": _products, "full": jax.checkpoint_policies.nothing_saveable}
