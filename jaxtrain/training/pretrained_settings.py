"""What the weights that a run begins with decide of its config: how pixels are normalized."""

from __future__ import annotations

import dataclasses
import logging
import os

from jaxtrain.config import WEIGHTS_REQUIRED, Config
from jaxtrain.data.base import channel_statistics
from jaxtrain.distributed import coordination
from jaxtrain.errors import ConfigError
from jaxtrain.training.weights_source import open_source
from jaxtrain.weights import matching

log = logging.getLogger("jaxtrain")


def with_weights_settings(config: Config, stored: Config | None) -> Config:
    """The config with what its weights decide at the first start: an absolute path, and how pixels are normalized.

    A resumed run keeps what was decided then, and reads nothing.

    Args:
      config: of the run, as the user gave it.
      stored: the config of the run so far; None for a fresh run.
    """
    if config.model.init_from == WEIGHTS_REQUIRED and stored:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, init_from=stored.model.init_from))
    if config.model.init_from in ("", WEIGHTS_REQUIRED):
        return config
    path = os.path.abspath(os.path.expanduser(config.model.init_from))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init_from=path))
    if config.data.mean:
        return config
    mean, std = (stored.data.mean, stored.data.std) if stored else _normalization(path)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mean=mean, std=std))


def require_weights(config: Config) -> None:
    """Raises `ConfigError` for a new run of a recipe that must begin with weights, where no file is named."""
    if config.model.init_from == WEIGHTS_REQUIRED:
        raise ConfigError(
            "config.model.init_from='required': this recipe goes on from pretrained weights, and never begins from scratch; "
            "get them as safetensors, such as timm's (docs/weights.md), and name the file: --config.model.init_from=FILE."
        )


def _normalization(path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and std that a run takes from its weights; () for the data set's own. Process 0 says which."""
    with open_source(path) as source:
        known, naming = source.config(), matching.recognised(source.tensors)
        in_colour = naming is not None and matching.architecture_in(source, naming).channels == 3
    if known.mean and known.std:
        mean, std, text = known.mean, known.std, f"as {path} asks"
    elif in_colour:  # what torchvision, timm and transformers publish was trained on ImageNet
        (mean, std), text = channel_statistics(3), f"as for ImageNet, since {path} does not say how its own were"
    else:
        mean, std, text = (), (), f"as the data set's own are, since {path} does not say how its own were"
    if coordination.index() == 0:
        log.info("images are normalized %s%s", text, f": mean {mean}, std {std}" if mean else "")
    return mean, std
