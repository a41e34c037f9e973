"""A trained model on devices: its layers, its weights, and how images become its input."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxtrain.config import Config
from jaxtrain.data import images
from jaxtrain.data.augment import Preprocess, eval_inputs
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.models.classifier import Classifier
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.train_state import TrainState
from jaxtrain.trees import PyTree, shapes_of

ImageLike = str | Path | Image.Image | np.ndarray
"""An image: the path of a file, Pillow's, or uint8 [H, W] or [H, W, channels]."""


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """From images of any size to the model's inputs, as the run's evaluation makes them."""

    inputs: Preprocess

    @property
    def side(self) -> int:
        """In pixels, of the square that an image is resized and cropped to before `inputs` does the rest."""
        return self.inputs.evaluated_side

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
      step: the checkpoint's; 0 of a file of weights.
      weights: `raw`, or `ema` for their moving average; `file` of a file of weights.
    """

    config: Config
    classifier: Classifier
    preprocess: Preprocessor
    class_names: tuple[str, ...]
    layout: Layout
    variables: dict[str, PyTree]
    step: int
    weights: str


def output_names(class_names: Sequence[str], count: int) -> tuple[str, ...]:
    """A name for each of so many outputs, none twice: a model may have more of them than its data has classes."""
    names = [*class_names, *(f"class {i}" for i in range(len(class_names), count))]
    counts = collections.Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} (class {i})" for i, name in enumerate(names))


def weight_shapes(
    model: Classifier, shape: tuple[int, int, int], dtype: Any, layout: Layout, *, ema: bool = False
) -> TrainState:
    """The shapes and shardings of a model's weights, as a state that has nothing else.

    Args:
      model: the layers.
      shape: [H, W, C] of an image.
      dtype: of the model's inputs.
      layout: places the weights.
      ema: with a moving average of them.
    """
    initial = functools.partial(model.init, x_shape=(1, *shape), x_dtype=dtype)
    params, batch_stats = jax.eval_shape(initial, jax.random.key(0))
    average = {"params": params, "batch_stats": batch_stats} if ema else ()
    step: Any = jax.ShapeDtypeStruct((), np.int32)
    state = TrainState(step, params, batch_stats, opt_state=(), ema=average, loss_scale=())
    return shapes_of(state, layout.shardings(state))
