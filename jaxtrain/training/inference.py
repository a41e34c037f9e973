"""A trained model for use, without its data set: `apply, variables, preprocess, class_names = load_model("runs/r50")`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.manifest import DeletedError, manifested_steps, problems, read_manifest, unless_deleted
from jaxtrain.checkpoint.resume_point import CheckpointStep, Position, find_checkpoint
from jaxtrain.config import Config, LayoutConfig, from_dict
from jaxtrain.data import images
from jaxtrain.data.augment import Preprocess, eval_inputs
from jaxtrain.errors import CheckpointError, ConfigError, DataError
from jaxtrain.host import xla_flags
from jaxtrain.host.files import closing
from jaxtrain.models import registry as models
from jaxtrain.models.classifier import Classifier
from jaxtrain.models.layers import Context
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import Device, make_mesh
from jaxtrain.plugins import refuse_code
from jaxtrain.precision import precision_policy
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.jax_settings import settings
from jaxtrain.trees import PyTree, shapes_of
from jaxtrain.workdir import named

log = logging.getLogger("jaxtrain")
ImageLike = str | Path | Image.Image | np.ndarray
"""An image: the path of a file, Pillow's, or uint8 [H, W] or [H, W, channels]."""


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


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """From images of any size to the model's inputs, as the run's evaluation makes them."""

    inputs: Preprocess

    @property
    def side(self) -> int:
        """In pixels, of the square that an image is resized and cropped to before `inputs` does the rest."""
        return self.inputs.resized if self.inputs.augmentation == "resize_crop" else self.inputs.image_size

    @property
    def channels(self) -> int:
        """Of the model's images."""
        return len(self.inputs.mean)

    def square(self, image: ImageLike, where: str = "") -> np.ndarray:
        """One image as uint8 [side, side, channels]: what a folder of images would be stored as.

        where: names it in errors; "" where its path does. Raises `DataError` for one that cannot be read.
        """
        if self.channels not in (1, 3, 4):
            if isinstance(image, np.ndarray) and image.shape == (self.side, self.side, self.channels):
                return image
            raise DataError(
                f"The model takes images of {self.channels} channels, which no file has; give arrays of "
                f"{self.side} x {self.side} x {self.channels}."
            )
        if isinstance(image, str | Path):
            return images.read_file(Path(image), "", self.side, channels=self.channels)
        return images.from_memory(image, where or "the image", channels=self.channels, side=self.side)

    def __call__(self, images: Sequence[ImageLike]) -> jax.Array:
        """The model's inputs, float [B, S, S, C].

        Args:
          images: paths, Pillow's images, or uint8 arrays, each of any size.

        Raises:
          DataError: one cannot be read.
          ConfigError: there is none, or `images` is a single one.
        """
        if isinstance(images, str | Path | Image.Image) or not len(images):
            raise ConfigError("preprocess takes a list of one image or more.")
        stored = [self.square(image, f"image {index}") for index, image in enumerate(images)]
        return _eval_inputs(self.inputs, np.stack(stored))


_eval_inputs = jax.jit(eval_inputs, static_argnums=0)


def load_model(
    path: str | Path, *, checkpoint: str = "best", ema: bool | None = None, trust: bool = False
) -> LoadedModel:
    """The model of a run, for use: `apply, variables, preprocess, class_names = load_model("runs/r50")`.

    It needs no data set, writes nothing, and the run's layout does not matter. `apply(variables, preprocess(images))` are
    the logits of `jaxtrain evaluate`.

    Args:
      path: a run's work directory, or a checkpoint: `RUN/checkpoints/1200`, `RUN/checkpoints/best`.
      checkpoint: of a work directory: `best`, `latest`, a step or `epoch:N`.
      ema: whether to take the moving average of the weights; None: where the run keeps one.
      trust: run the code that the run's config names, where its model is of the user's own. Its loss, optimizer and data set
        are not needed, and never looked for.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
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


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint's weights on devices, and how to use them.

    Attributes:
      config: of the run, for these devices.
      classifier: the layers.
      preprocess: what makes the model's inputs.
      class_names: one for each logit.
      layout: of the weights.
      variables: `params` and `batch_stats`, keyed by layer.
      step: the checkpoint's.
      weights: `raw`, or `ema` for their moving average.
    """

    config: Config
    classifier: Classifier
    preprocess: Preprocessor
    class_names: tuple[str, ...]
    layout: Layout
    variables: dict[str, PyTree]
    step: int
    weights: str


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
    while True:
        try:
            return _load_trained(named(path), checkpoint, ema, trust, devices, process)
        except DeletedError as error:  # its run goes on meanwhile, and has another
            log.warning("%s", error)


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
    template = _template(model, shape, types.compute_dtype, layout, ema=bool(config.optim.ema))
    with closing(Checkpointer(start.directory, read_only=True)) as checkpoints, unless_deleted(folder):
        state = checkpoints.restore_weights(start.step, template)
    inputs = Preprocess(
        image_size=stored.image_size,
        augmentation=config.data.augmentation,
        mean=stored.mean,
        std=stored.std,
        num_classes=stored.num_classes,
        dtype=types.compute_dtype,
    )
    weights = state.ema if average else {"params": state.params, "batch_stats": state.batch_stats}
    names = output_names(stored.class_names, stored.num_classes)
    kind = "ema" if average else "raw"
    return Trained(config, model, Preprocessor(inputs), names, layout, weights, start.step, kind)


def _template(model: Classifier, shape: tuple[int, int, int], dtype: Any, layout: Layout, *, ema: bool) -> TrainState:
    """The shapes and shardings of the weights of a run, and of nothing else. shape: [H, W, C]. dtype: of the inputs."""
    initial = functools.partial(model.init, x_shape=(1, *shape), x_dtype=dtype)
    params, batch_stats = jax.eval_shape(initial, jax.random.key(0))
    average = {"params": params, "batch_stats": batch_stats} if ema else ()
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, params, batch_stats, opt_state=(), ema=average, loss_scale=())
    return shapes_of(state, layout.shardings(state))


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


def output_names(class_names: Sequence[str], count: int) -> tuple[str, ...]:
    """A name for each of so many outputs, none twice: a model may have more of them than its data has classes."""
    names = [*class_names, *(f"class {i}" for i in range(len(class_names), count))]
    counts = collections.Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} (class {i})" for i, name in enumerate(names))
