"""How all model families read `ModelConfig`: defaults, rules for the image size, refusals in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ConfigError
from jaxtrain.host.backend import none_or_too_old

ImageShape = tuple[int, int, int]  # height, width, channels

SMALL_IMAGE = 64  # pixels; for smaller images "auto" means the CIFAR variant of a network


def is_small(image_shape: ImageShape) -> bool:
    """Whether "auto" means the variant for small images."""
    return min(image_shape[:2]) < SMALL_IMAGE


def stem(config: ModelConfig, image_shape: ImageShape) -> str:
    """The variant of the stem: "cifar" or "imagenet"."""
    if config.stem != "auto":
        return config.stem
    return "cifar" if is_small(image_shape) else "imagenet"


def dropout(config: ModelConfig, default: float) -> float:
    """The configured dropout rate, or the model's default."""
    return default if config.dropout < 0 else config.dropout


def drop_paths(config: ModelConfig, default: float, blocks: int) -> list[float]:
    """The drop-path rate of each block, rising linearly from 0 at the first to the configured rate at the last.

    Args:
      config: the model section.
      default: the rate of the last block if the config sets none.
      blocks: how many blocks the model has.
    """
    last = default if config.drop_path < 0 else config.drop_path
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


def depths(config: ModelConfig, default: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of each stage. Raises `ConfigError` unless the config has one number for each of the model's stages."""
    count = len(default)
    if config.depths and len(config.depths) != count:
        raise ConfigError(
            f"config.model.depths={config.depths!r}: {config.name} takes {count} number{'s' if count > 1 else ''}, "
            f"such as {default!r}."
        )
    return config.depths or default


def require_side(config: ModelConfig, image_shape: ImageShape, reduction: int, hint: str = "") -> None:
    """Refuses images that are smaller than the factor by which the network reduces them.

    Args:
      config: the model section.
      image_shape: height, width and channels of the images that the model sees.
      reduction: the factor.
      hint: the end of the error's sentence: what else would help.

    Raises:
      ConfigError: a side is smaller than `reduction` pixels.
    """
    if min(image_shape[:2]) < reduction:
        height, width, _ = image_shape
        raise ConfigError(
            f"config.model.name={config.name!r} reduces images {reduction}-fold, so it needs at least "
            f"{reduction} x {reduction} pixels, and these have {height} x {width}; "
            f"set config.data.image_size={reduction} or more{hint}."
        )


def refuse(config: ModelConfig, *fields: str) -> None:
    """Raises `ConfigError` if one of `fields` is set, which this model does not use."""
    unset = ModelConfig()
    for field in fields:
        value = getattr(config, field)
        if value != getattr(unset, field) and value != 0:
            raise ConfigError(f"config.model.{field}={value!r}: {config.name} has no such setting; leave it out.")


def require_hardware(config: ModelConfig, devices: Iterable[Any]) -> None:
    """Raises `ConfigError` where a device of a run cannot run the kernel of `config.attention`."""
    for device in devices if config.attention == "pallas" else ():
        if which := none_or_too_old(device):
            raise ConfigError(
                "config.model.attention='pallas': needs NVIDIA GPUs of compute capability 8.0 (Ampere) or newer, and the run "
                f"is on {which}; use --config.model.attention=plain."
            )


def check_shapes(image_shape: ImageShape, num_classes: int) -> None:
    """Raises `ConfigError` unless the images have pixels and there are at least two classes."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ConfigError(f"The images' shape {image_shape!r} must be height, width and channels, each at least 1.")
    if num_classes < 2:
        raise ConfigError(f"config.model.num_classes={num_classes}: must be at least 2.")
