"""A trained model for use, without its data set: `apply, variables, preprocess, class_names = load_model("runs/r50")`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.manifest import DeletedError, manifested_steps, problems, read_manifest, unless_deleted
from jaxtrain.checkpoint.resume_point import CheckpointStep, Position, find_checkpoint
from jaxtrain.config import Config, LayoutConfig, TrainConfig, from_dict
from jaxtrain.data.augment import Preprocess
from jaxtrain.errors import CheckpointError, ConfigError
from jaxtrain.host import xla_flags
from jaxtrain.host.files import closing
from jaxtrain.models import registry as models
from jaxtrain.models.layers import Context
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import Device, make_mesh
from jaxtrain.plugins import refuse_code
from jaxtrain.precision import precision_policy
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.trained import Preprocessor, Trained, output_names, weight_shapes
from jaxtrain.training.weights_model import model_in_file
from jaxtrain.trees import PyTree
from jaxtrain.workdir import named

log = logging.getLogger("jaxtrain")


class LoadedModel(NamedTuple):
    """A model for use."""

    apply: Callable[[Mapping[str, PyTree], jax.Array], jax.Array]
    """(variables, images float [B, S, S, C]) -> logits, float [B, classes]. Pure, for `jax.jit`."""
    variables: dict[str, PyTree]
    """`params` and `batch_stats`, on the first device."""
    preprocess: Preprocessor
    """A list of images -> what `apply` takes."""
    class_names: tuple[str, ...]
    """One for each logit."""


def load_model(
    path: str | Path, *, checkpoint: str = "best", ema: bool | None = None, trust: bool = False
) -> LoadedModel:
    """The model of a run, for use: `apply, variables, preprocess, class_names = load_model("runs/r50")`.

    It needs no data set, writes nothing, and the run's layout does not matter. `apply(variables, preprocess(images))` are
    the logits of `jaxtrain evaluate`.

    Args:
      path: a run's work directory; a checkpoint: `RUN/checkpoints/1200`, `RUN/checkpoints/best`; or a file of weights that
        VGG, ResNet or Swin have in other programs (`weights_model.model_in_file`).
      checkpoint: of a work directory: `best`, `latest`, a step or `epoch:N`.
      ema: whether to take the moving average of the weights; None: where the run keeps one.
      trust: run the code that the run's config names, where its model is of the user's own. Its loss, optimizer and data set
        are not needed, and never looked for.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged. WeightsError: so is the file.
      ConfigError: the run keeps no average, or its model is code and `trust` is not set.
    """
    model = load_trained(path, checkpoint=checkpoint, ema=ema, trust=trust, devices=jax.local_devices()[:1])
    products = precision_policy(model.config.train.precision).products

    def apply(variables: Mapping[str, PyTree], images: jax.Array) -> jax.Array:
        context = Context(example=jnp.arange(images.shape[0], dtype=jnp.int32))
        with jax.default_matmul_precision(products):
            logits, _ = model.classifier.apply(variables["params"], variables["batch_stats"], images, context)
        return logits

    return LoadedModel(apply, model.variables, model.preprocess, model.class_names)


def load_trained(
    path: str | Path,
    *,
    checkpoint: str = "best",
    ema: bool | None = None,
    trust: bool = False,
    devices: list[Device],
    process: contextlib.ExitStack | None = None,
) -> Trained:
    """The weights of a checkpoint, shared out among devices (ZeRO-3).

    Args:
      path: as of `load_model`; so are `checkpoint`, `ema` and `trust`.
      checkpoint: of a work directory.
      ema: whether to take the moving average.
      trust: whether the config's own code may run.
      devices: where the weights lie.
      process: gets JAX's settings of the run, until it is closed; None leaves those of the process.

    Raises:
      CheckpointError, ConfigError: as `load_model`.
    """
    if named(path).is_file():
        return _load_file(named(path), checkpoint, ema, devices, process)
    while True:
        try:
            return _load_trained(named(path), checkpoint, ema, trust, devices, process)
        except DeletedError as error:  # its run goes on meanwhile, and has another
            log.warning("%s", error)


def _load_file(
    path: Path, checkpoint: str, ema: bool | None, devices: list[Device], process: contextlib.ExitStack | None
) -> Trained:
    if ema or checkpoint != "best":
        raise ConfigError(f"{path} is a file of weights: it has no checkpoints, and no moving average.")
    if process is not None:
        process.enter_context(settings(Config(train=TrainConfig(precision="f32"))))
    return model_in_file(path, devices)


def _load_trained(
    path: Path,
    checkpoint: str,
    ema: bool | None,
    trust: bool,
    devices: list[Device],
    process: contextlib.ExitStack | None,
) -> Trained:
    start, position, config = find_stored(path, checkpoint)
    folder = start.directory / str(start.step)
    if not trust:
        refuse_code({"model.name": config.model.name}, folder)
    if process is not None:
        xla_flags.set_flags(xla_flags.for_run(config.train.precision))
        process.enter_context(settings(config))
    config = for_inference(config, LayoutConfig(zero=3))
    average = uses_average(path, config, ema)
    stored, types = position.dataset, precision_policy(config.train.precision)
    if not stored.mean:
        raise CheckpointError(
            f"{folder} does not say what its model's images are: an older version wrote it; let its run go on for a step."
        )
    shape = (stored.image_size, stored.image_size, len(stored.mean))
    model = models.build(config.model, shape, stored.num_classes, types.compute_dtype, types.param_dtype)
    layout = Layout(make_mesh(config.layout, devices), config.layout, model.tensor_rules)
    template = weight_shapes(model, shape, types.compute_dtype, layout, ema=bool(config.optim.ema))
    with closing(Checkpointer(start.directory, read_only=True)) as checkpoints, unless_deleted(folder):
        state = checkpoints.restore_weights(start.step, template)
    inputs = Preprocess(
        image_size=stored.image_size,
        augmentation=config.data.augmentation,
        mean=stored.mean,
        std=stored.std,
        num_classes=stored.num_classes,
        crop_pct=config.data.crop_pct,
        interpolation=config.data.interpolation,
        dtype=types.compute_dtype,
    )
    weights = state.ema if average else {"params": state.params, "batch_stats": state.batch_stats}
    names = output_names(stored.class_names, stored.num_classes)
    kind = "ema" if average else "raw"
    return Trained(config, model, Preprocessor(inputs), names, layout, weights, start.step, kind)


def find_stored(path: Path, checkpoint: str) -> tuple[CheckpointStep, Position, Config]:
    """A checkpoint whose files are whole, and what is stored with it.

    Args:
      path: a work directory, or a checkpoint.
      checkpoint: which one of the work directory.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    directory = path / "checkpoints"
    if manifested_steps(directory):
        start = find_checkpoint(directory, checkpoint, setting="checkpoint")
    elif manifested_steps(path.parent) and path.parent != path:
        start = find_checkpoint(directory, str(path.absolute()), setting="checkpoint")
    else:
        start = None
    if start is None:
        raise CheckpointError(f"{path} holds no checkpoint.")
    folder = start.directory / str(start.step)
    with unless_deleted(folder):
        if found := problems(folder):
            raise CheckpointError(f"{folder} is damaged ({found[0]}); choose another with --checkpoint.")
        stored = read_manifest(folder).position
    return start, Position.from_json(stored), from_dict(stored["config"])


def for_inference(config: Config, layout: LayoutConfig) -> Config:
    """A run's config without what only training needs, and with another layout; no number depends on it."""
    return dataclasses.replace(
        config,
        layout=layout,
        model=dataclasses.replace(config.model, bn_groups=1, attention="plain"),  # which every device computes
        optim=dataclasses.replace(config.optim, class_weights=""),  # of the training's loss alone
        train=dataclasses.replace(config.train, eval_examples=0),  # the whole split, whatever the run took
    )


def uses_average(path: Path, config: Config, ema: bool | None) -> bool:
    """Whether the moving average of the weights is meant; None: where the run keeps one. `ConfigError` if it keeps none."""
    if ema and not config.optim.ema:
        raise ConfigError(f"{path} keeps no moving average of the weights (config.optim.ema=0).")
    return bool(config.optim.ema) if ema is None else ema
