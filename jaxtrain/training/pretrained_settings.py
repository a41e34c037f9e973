"""What the weights that a run begins with decide of its config: how pixels are normalized."""

from __future__ import annotations

import dataclasses
import logging
import os

from jaxtrain.config import Config
from jaxtrain.distributed import coordination
from jaxtrain.training.weights_source import open_source
from jaxtrain.weights.pretrained import PretrainedConfig

log = logging.getLogger("jaxtrain")


def with_weights_settings(config: Config, stored: Config | None) -> Config:
    """The config with what its weights decide at the first start: an absolute path, and how pixels are normalized.

    A resumed run keeps what was decided then, and reads nothing.

    Args:
      config: of the run, as the user gave it.
      stored: the config of the run so far; None for a fresh run.
    """
    if not config.model.init_from:
        return config
    path = os.path.abspath(os.path.expanduser(config.model.init_from))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init_from=path))
    if config.data.mean:
        return config
    mean, std = (stored.data.mean, stored.data.std) if stored else _normalization(path)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mean=mean, std=std))


def _normalization(path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of a file's own config; () where it has none."""
    with open_source(path) as source:
        known = source.config()
    if coordination.index() == 0:
        log.info("%s", normalization_line(path, known))
    return (known.mean, known.std) if known.mean and known.std else ((), ())


def normalization_line(path: str, known: PretrainedConfig) -> str:
    """Says which mean and std a run takes."""
    if known.mean and known.std:
        return f"images are normalized as {path} asks: mean {known.mean}, std {known.std}"
    return (
        f"{path} does not say how its images were normalized: the data set's own mean and std are taken; else set "
        "config.data.mean and config.data.std"
    )
