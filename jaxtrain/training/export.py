"""Writes the weights of a run for other programs."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import require_local
from jaxtrain.training.stored_model import StoredModel
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


def export_safetensors(stored: StoredModel, naming: str, out: Path) -> int:
    """Writes the weights of a model as safetensors. Returns how many tensors it has.

    Args:
      stored: the model.
      naming: `torchvision`, `timm`, `transformers` or `jaxtrain`.
      out: the file.

    Raises:
      ConfigError: there are no such names of this model. WorkdirError: the file cannot be written.
    """
    trees = {"params": stored.params, "batch_stats": stored.batch_stats}
    leaves = {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
    model, images = stored.config.model, stored.images
    rows, _ = rows_for(naming, model.name, model.depths, {path: leaf.shape for path, leaf in leaves.items()})
    tensors = renamed(rows, leaves)
    if naming == "torchvision":
        tensors |= position_indices(rows, leaves)
    write_safetensors(out, tensors, config_of(stored), len(images.mean), images.num_classes)
    return len(tensors)


def config_of(stored: StoredModel) -> PretrainedConfig:
    """How images become the model's input. A run evaluates whole images, or their centre: 7/8 of the resized ones."""
    images, data = stored.images, stored.config.data
    cropped = data.augmentation == "resize_crop"
    return PretrainedConfig(
        architecture=stored.config.model.name,
        image_size=images.image_size,
        mean=images.mean,
        std=images.std,
        interpolation="bilinear",
        crop_pct=0.875 if cropped else 1.0,
        class_names=images.class_names,
    )
