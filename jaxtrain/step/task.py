"""What a step computes, apart from the devices that it runs on: model, loss, optimizer, preprocessing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxtrain.config import Config, OptimConfig
from jaxtrain.data.augment import Preprocess, own_augmentation
from jaxtrain.models.classifier import Classifier, layer_name
from jaxtrain.optim.losses import loss_fn
from jaxtrain.optim.optimizers import is_own, make_optimizer
from jaxtrain.optim.param_groups import ParamGroups, frozen_statistics, moving_statistics
from jaxtrain.precision import at_least_f32
from jaxtrain.trees import PyTree


@dataclasses.dataclass(frozen=True)
class Task:
    """What a step computes. It knows nothing of devices.

    Attributes:
      model: the layers.
      schedule: the learning rate of each step.
      loss: (logits float [B, C], targets float [B, C]) -> float [B].
      preprocess: from uint8 images to the model's inputs.
      optim: the config's section.
      groups: which parameters are trained, and their rates.
      frozen_stats: the paths of the BatchNorms that run as in evaluation.
      class_weights: in the loss of training, one a class; () are all alike.
      bn_groups: BatchNorm groups in a global batch.
      remat: `train.remat`, what the forward pass stores for the backward pass.
      skips: whether the run goes on after an update that was not finite. The step is then counted, and its batch is
        used up.
    """

    model: Classifier
    schedule: optax.Schedule
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    preprocess: Preprocess
    optim: OptimConfig
    groups: ParamGroups
    frozen_stats: frozenset[str]
    class_weights: tuple[float, ...]
    bn_groups: int
    remat: str
    skips: bool

    def optimizer(
        self, learning_rate: float | jax.Array = 0.0, weight_decay: float | jax.Array = 0.0
    ) -> optax.GradientTransformation:
        """The optimizer of the trained parameters, of all layers or of some. Its state does not depend on the numbers.

        Args:
          learning_rate: float [], of one update. An optimizer of the user's own has the whole schedule instead.
          weight_decay: float [].
        """
        rate = self.schedule if is_own(self.optim.name) else lambda _: learning_rate
        optimizer = make_optimizer(self.optim, rate, self.model.no_decay, weight_decay=weight_decay)
        return self.groups.with_rates(optimizer)

    def moving(self, batch_stats: PyTree) -> PyTree:
        """The running statistics that training changes."""
        return moving_statistics(batch_stats, self.frozen_stats)

    @property
    def sums_dtype(self) -> jnp.dtype:
        """The dtype that losses and counts are added in. (It cannot be a parameter's: a pipeline stage may have none.)"""
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
    dtype: DTypeLike,
    class_weights: tuple[float, ...] = (),
) -> Task:
    """The task of a run.

    Args:
      config: of the run.
      model: the layers.
      rate: the learning rate of each step.
      side: height and width of the model's input, in pixels.
      classes: how many outputs the model has.
      mean: of each channel, of pixels in [0, 1].
      std: the standard deviation of each channel, of pixels in [0, 1].
      dtype: of the model's input: the type that it computes in.
      class_weights: in the loss of training, one a class; () are all alike.
    """
    preprocess = Preprocess(
        image_size=side,
        augmentation=config.data.augmentation,
        mean=mean,
        std=std,
        num_classes=classes,
        mixup=config.data.mixup,
        cutmix=config.data.cutmix,
        label_smoothing=config.optim.label_smoothing,
        own=own_augmentation(config.data.augmentation),
        flip=config.data.flip,
        padding=config.data.crop_padding,
        crop_scale=config.data.crop_scale,
        crop_ratio=config.data.crop_ratio,
        crop_pct=config.data.crop_pct,
        interpolation=config.data.interpolation,
        dtype=dtype,
    )
    groups = ParamGroups(config.optim, tuple(map(layer_name, range(len(model.layers)))))
    return Task(
        model=model,
        schedule=rate,
        loss=loss_fn(config.optim.loss),
        preprocess=preprocess,
        optim=config.optim,
        groups=groups,
        frozen_stats=_frozen_stats(config, model, groups, (1, side, side, len(mean)), dtype),
        class_weights=class_weights,
        bn_groups=config.model.bn_groups,
        remat=config.train.remat,
        skips=config.train.nonfinite_skips > 0,
    )


def _frozen_stats(
    config: Config, model: Classifier, groups: ParamGroups, shape: tuple[int, ...], dtype: DTypeLike
) -> frozenset[str]:
    """`Task.frozen_stats`. shape: of a batch of images. Raises `ConfigError` where what is frozen does not fit the model."""
    if not (config.optim.freeze or config.optim.freeze_layers or config.model.freeze_bn):
        return frozenset()
    params, batch_stats = jax.eval_shape(lambda: model.init(jax.random.key(0), shape, dtype))
    groups.check(params)
    return frozen_statistics(groups, params, batch_stats, every=config.model.freeze_bn)
