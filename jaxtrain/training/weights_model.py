"""A file of weights as a model for use: its names and shapes say which model it is."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, TrainConfig
from jaxtrain.data.augment import Preprocess
from jaxtrain.data.base import channel_statistics
from jaxtrain.errors import WeightsError
from jaxtrain.models import registry as models
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import Device, make_mesh
from jaxtrain.training.trained import Preprocessor, Trained, output_names, weight_shapes
from jaxtrain.trees import path_of
from jaxtrain.weights import matching
from jaxtrain.weights.architecture import Architecture
from jaxtrain.weights.file import WeightsFile, open_weights
from jaxtrain.weights.pretrained import PretrainedConfig, pretrained_config
from jaxtrain.weights.reading import place

log = logging.getLogger("jaxtrain")
_USUAL_SIDE = 224  # of ImageNet's models
_CROP = 0.875  # `resize_crop`: 224 of 256 pixels


def model_in_file(path: Path, devices: list[Device]) -> Trained:
    """The model that a file holds, in f32: VGG, ResNet or Swin with the names of torchvision, timm or transformers.

    Images are resized, cropped and normalized as the file's own config says. What it does not say is ImageNet's usual: 224
    pixels of 256, its mean and deviation; a warning says so.

    Args:
      path: safetensors, or npz without pickle.
      devices: where the weights lie, shared out among them (ZeRO-3).

    Raises:
      WeightsError: it is no such file, or has no head.
    """
    with open_weights(path) as file:
        naming = matching.recognised(file.tensors)
        if naming is None:
            raise WeightsError(
                f"{path} does not say which model it is: give a run, or VGG, ResNet or Swin with the names of torchvision, "
                "timm or transformers (with other names: `jaxtrain evaluate --config FILE --config.model.init_from=FILE`)."
            )
        found = matching.architecture_in(file, naming)
        if not found.classes:
            raise WeightsError(f"{path} has no head, and so no classes.")
        inputs, names = _inputs(path, pretrained_config(file), found)
        data = DataConfig(augmentation=inputs.augmentation, crop_pct=inputs.crop_pct)
        config = Config(
            data=data, model=_model_config(found), layout=LayoutConfig(zero=3), train=TrainConfig(precision="f32")
        )
        return _placed(file, config, inputs, names, devices)


def _model_config(found: Architecture) -> ModelConfig:
    """The config of a model; one whose depths have no name is a kind of another one."""
    stem = "auto" if found.family == "swin" else "imagenet" if found.stem == 7 else "cifar"
    return ModelConfig(
        name=found.base,
        depths=found.depths,
        width=found.width,
        stem=stem,
        patch=found.patch,
        window=found.window,
    )


def _inputs(path: Path, known: PretrainedConfig, found: Architecture) -> tuple[Preprocess, tuple[str, ...]]:
    """How images become the model's input, and the names of its classes."""
    mean, std = (known.mean, known.std) if known.mean and known.std else channel_statistics(found.channels)
    side, crop = known.image_size or _USUAL_SIDE, known.crop_pct or _CROP
    if not (known.image_size and known.mean and known.std and known.crop_pct):
        log.warning(
            "%s does not say all of how its images were prepared: %d pixels, mean %s, std %s, %.3f of the resized image",
            path, side, mean, std, crop,
        )  # fmt: skip
    if known.interpolation not in ("", "bilinear"):
        log.warning("%s asks for %s resizing; images are resized bilinear", path, known.interpolation)
    augmentation = "none" if crop == 1.0 else "resize_crop"
    inputs = Preprocess(side, augmentation, mean, std, found.classes, crop_pct=crop)
    return inputs, output_names(known.class_names, found.classes)


def _placed(
    file: WeightsFile, config: Config, inputs: Preprocess, names: tuple[str, ...], devices: list[Device]
) -> Trained:
    shape = (inputs.image_size, inputs.image_size, len(inputs.mean))
    model = models.build(config.model, shape, inputs.num_classes, jnp.float32, jnp.float32)
    layout = Layout(make_mesh(config.layout, devices), config.layout, model.tensor_rules)
    state = weight_shapes(model, shape, jnp.float32, layout)
    trees = {"params": state.params, "batch_stats": state.batch_stats}
    targets = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
    shapes = {path: leaf.shape for path, leaf in targets.items()}
    given = place(file, matching.match(file, config.model.name, config.model.depths, shapes), targets)
    variables = jax.tree.map_with_path(lambda path, _: given[path_of(path)], trees)
    return Trained(config, model, Preprocessor(inputs), names, layout, variables, 0, "file")
