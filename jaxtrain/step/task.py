"""What a run computes (`Task`) and on what (`Batch`, `Resident`); shared by training and evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxtrain.config import Config, OptimConfig
from jaxtrain.data.augment import Preprocess
from jaxtrain.models.classifier import Classifier
from jaxtrain.optim.losses import loss_fn
from jaxtrain.optim.optimizers import make_optimizer
from jaxtrain.precision import at_least_f32, precision_policy


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
        dtype=precision_policy(config.train.precision).compute_dtype,
    )
    return Task(
        model=model,
        optimizer=make_optimizer(config.optim, rate, model.no_decay),
        schedule=rate,
        loss=loss_fn(config.optim.loss),
        preprocess=preprocess,
        optim=config.optim,
        seed=config.seed,
        bn_groups=config.model.bn_groups,
        remat=config.train.remat,
        skips=config.train.nonfinite_skips > 0,
    )
