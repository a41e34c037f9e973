"""Writes the weights of a run for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxtrain.data.augment import Preprocess
from jaxtrain.data.base import CROPPED
from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import require_local
from jaxtrain.training.trained import Trained
from jaxtrain.trees import path_of
from jaxtrain.weights.pretrained import PretrainedConfig
from jaxtrain.weights.writing import position_indices, renamed, rows_for, write_safetensors


def check_out(out: str | Path, *, force: bool) -> Path:
    """The path of a file that may be written. Raises `ConfigError` where it is there, and not `force`, or has no folder."""
    require_local(out, f"--out {out}", ConfigError)
    path = Path(out).expanduser().absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--out {out}: {'is a directory' if path.is_dir() else 'its directory is not there'}.")
    if path.exists() and not force:
        raise ConfigError(f"--out {out}: is there already; --force replaces it.")
    return path


def export_safetensors(model: Trained, naming: str, out: Path) -> int:
    """Writes the weights of a model as safetensors. Returns how many tensors it has.

    Args:
      model: on one device.
      naming: `torchvision`, `timm`, `transformers` or `jaxtrain`.
      out: the file.

    Raises:
      ConfigError: there are no such names of this model. WorkdirError: the file cannot be written.
    """
    leaves = {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model.variables)}
    kind, inputs = model.config.model, model.preprocess.inputs
    rows, _ = rows_for(naming, kind.name, kind.depths, {path: leaf.shape for path, leaf in leaves.items()})
    tensors = renamed(rows, leaves)
    if naming == "torchvision":
        tensors |= position_indices(rows, leaves)
    config = pretrained_config(kind.name, inputs, model.class_names)
    write_safetensors(out, tensors, config, len(inputs.mean), inputs.num_classes)
    return len(tensors)


def pretrained_config(architecture: str, inputs: Preprocess, class_names: Sequence[str]) -> PretrainedConfig:
    """How images become the model's input. A run evaluates whole images, or the centre of resized ones.

    Args:
      architecture: the model's name.
      inputs: of the run.
      class_names: of the data set.
    """
    return PretrainedConfig(
        architecture=architecture,
        image_size=inputs.image_size,
        mean=inputs.mean,
        std=inputs.std,
        interpolation="bilinear",
        crop_pct=inputs.crop_pct if inputs.augmentation in CROPPED else 1.0,
        class_names=tuple(class_names),
    )
