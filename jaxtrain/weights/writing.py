"""Writes weights under the names of torchvision, timm or transformers, by the tables that read them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from jaxtrain.errors import ConfigError, WorkdirError
from jaxtrain.host.files import sync_directory, writing
from jaxtrain.weights.architecture import Architecture, family_of, of_run
from jaxtrain.weights.matching import OWN
from jaxtrain.weights.naming import NAMINGS
from jaxtrain.weights.pretrained import METADATA_KEY, PretrainedConfig
from jaxtrain.weights.rows import Row, same

LABELS = ("torchvision", "timm", "transformers", OWN)


def rows_for(
    label: str, model_name: str, depths: tuple[int, ...], ours: Mapping[str, tuple[int, ...]]
) -> tuple[list[Row], Architecture | None]:
    """The table that names a model's leaves, and its architecture; None where the names are our own.

    Args:
      label: one of `LABELS`.
      model_name: `model.name`.
      depths: `model.depths`.
      ours: the shapes of its leaves by path.

    Raises:
      ConfigError: there are no such names of this model.
    """
    if label == OWN:
        return [Row(path, (path,), same) for path in ours], None
    family = family_of(model_name)
    labels = [naming.label for naming in NAMINGS if naming.family == family]
    if label not in labels:
        has = (
            f"those of {', '.join(name for name in LABELS if name in labels)}"
            if labels
            else "no names but jaxtrain's own"
        )
        raise ConfigError(f"--naming {label}: {model_name} has {has}; --naming {OWN} writes every model.")
    architecture = of_run(model_name, depths, ours)
    naming = next(naming for naming in NAMINGS if (naming.family, naming.label) == (family, label))
    return naming.rows(architecture), architecture


def renamed(rows: list[Row], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our leaves under their names and in their shapes. rows: the table. leaves: by path."""
    found: dict[str, np.ndarray] = {}
    for row in rows:
        leaf, form = leaves[row.ours], row.form_of(leaves[row.ours].shape)
        parts = [leaf] if row.stack is None else [leaf.take(i, row.stack) for i in range(len(row.theirs))]
        for name, part in zip(row.theirs, parts, strict=True):
            cut = part.reshape([form.split[axis] for axis in form.axes]).transpose(np.argsort(form.axes))
            found[name] = np.ascontiguousarray(cut.reshape(form.theirs))
    return found


def position_indices(rows: list[Row], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The buffers `relative_position_index` that torchvision's Swin wants beside its tables: int64 [window^4].

    rows: the table. leaves: by path.
    """
    found = {}
    for row in rows:
        if row.table:
            window = (math.isqrt(leaves[row.ours].shape[0]) + 1) // 2
            at = np.stack(np.meshgrid(*2 * [np.arange(window)], indexing="ij")).reshape(2, -1)
            apart = at[:, :, None] - at[:, None, :] + window - 1
            name = row.theirs[0].removesuffix("bias_table") + "index"
            found[name] = (apart[0] * (2 * window - 1) + apart[1]).ravel()
    return found


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], config: PretrainedConfig, channels: int, classes: int
) -> None:
    """Writes a safetensors file: whole, or not at all.

    Args:
      path: of the file; one that is there is replaced.
      tensors: by name.
      config: goes into the metadata, as timm's `pretrained_cfg`.
      channels: of an image.
      classes: outputs of the head.

    Raises:
      WorkdirError: it cannot be written.
    """
    metadata = {"format": "pt", METADATA_KEY: json.dumps(config.to_timm(channels, classes))}
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            part.unlink(missing_ok=True)
            safetensors.numpy.save_file(dict(tensors), part, metadata)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        except safetensors.SafetensorError as error:
            raise WorkdirError(f"{path} cannot be written ({error}).") from error
        finally:
            part.unlink(missing_ok=True)
        sync_directory(path.parent)
