"""What the model families share in reading `ModelConfig`: own defaults, image-size rules, refusals in one sentence."""

from __future__ import annotations

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ConfigError

ImageShape = tuple[int, int, int]  # height, width, channels

SMALL_IMAGE = 64  # pixels; below it "auto" means the CIFAR variant of a network


def is_small(image_shape: ImageShape) -> bool:
    """Whether "auto" takes the variant for small images."""
    return min(image_shape[:2]) < SMALL_IMAGE


def stem(config: ModelConfig, image_shape: ImageShape) -> str:
    """ "cifar" or "imagenet"."""
    if config.stem != "auto":
        return config.stem
    return "cifar" if is_small(image_shape) else "imagenet"


def dropout(config: ModelConfig, own: float) -> float:
    """The configured dropout rate, or the model's own."""
    return own if config.dropout < 0 else config.dropout


def drop_paths(config: ModelConfig, own: float, blocks: int) -> list[float]:
    """A rate a block, rising linearly from 0 at the first to the configured (or the model's own) rate at the last."""
    last = own if config.drop_path < 0 else config.drop_path
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


def depths(config: ModelConfig, own: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks a stage. Raises `ConfigError` unless there is one for each of the model's stages."""
    if config.depths and len(config.depths) != len(own):
        raise ConfigError(
            f"config.model.depths={config.depths!r}: {config.name} takes {len(own)} number{'s' if len(own) > 1 else ''}, "
            f"such as {own!r}."
        )
    return config.depths or own


def require_side(config: ModelConfig, image_shape: ImageShape, reduction: int, hint: str = "") -> None:
    """Raises `ConfigError` for images smaller than the factor that the network reduces them by."""
    if min(image_shape[:2]) < reduction:
        height, width, _ = image_shape
        raise ConfigError(
            f"config.model.name={config.name!r} reduces images {reduction}-fold, so it needs at least "
            f"{reduction} x {reduction} pixels, and these have {height} x {width}; "
            f"set config.data.image_size={reduction} or more{hint}."
        )


def refuse(config: ModelConfig, *fields: str) -> None:
    """Raises `ConfigError` when one of `fields` is set that this model has no use for."""
    unset = ModelConfig()
    for field in fields:
        value = getattr(config, field)
        if value != getattr(unset, field) and value != 0:
            raise ConfigError(f"config.model.{field}={value!r}: {config.name} has no such setting; leave it out.")


def check_shapes(image_shape: ImageShape, num_classes: int) -> None:
    """Raises `ConfigError` unless the images have pixels and there are at least two classes."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ConfigError(f"The images' shape {image_shape!r} must be height, width and channels, each at least 1.")
    if num_classes < 2:
        raise ConfigError(f"config.model.num_classes={num_classes}: must be at least 2.")
