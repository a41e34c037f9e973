"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.typing import DTypeLike

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ConfigError
from jaxtrain.host.text import did_you_mean
from jaxtrain.models import convnet, mlp, resnet, settings, swin, vgg
from jaxtrain.models.classifier import Classifier
from jaxtrain.plugins import load_dotted

_BUILDERS = {name: family.build for family in (mlp, vgg, resnet, swin, convnet) for name in family.NAMES}


def names() -> tuple[str, ...]:
    """The models that come with jaxtrain."""
    return tuple(_BUILDERS)


def find(name: str) -> Callable[..., Any]:
    """The function that builds the model `name`: one of `names()`, or a user's `package.module:Class`; or `ConfigError`."""
    if ":" in name:
        factory = load_dotted(name, "model.name")
        if not callable(factory):
            raise ConfigError(f"config.model.name={name!r}: is {_kind(factory)}, not a class or function.")
        return factory
    if name not in _BUILDERS:
        raise ConfigError(
            f"config.model.name={name!r}: must be one of {', '.join(names())}, or package.module:Class."
            f"{did_you_mean(name, names())}"
        )
    return _BUILDERS[name]


def build(
    config: ModelConfig,
    image_shape: settings.ImageShape,
    num_classes: int,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> Classifier:
    """Builds the model `config.name`: one of `names()`, or a user's `package.module:Class`.

    A user's class or function is called as `Class(config, image_shape=..., num_classes=..., dtype=...,
    param_dtype=...)` and returns a `Classifier`.

    Args:
      config: the model section; 0, () and -1 in it mean the model's default.
      image_shape: height, width and channels of the images that the model sees.
      num_classes: the resolved number, at least 2.
      dtype: of the computation and the activations.
      param_dtype: of the parameters.

    Returns:
      The model. It has no parameters yet: see `Classifier.init`.

    Raises:
      ConfigError: the name is unknown, a setting does not fit the model, or the images are too small for it.
    """
    settings.check_shapes(image_shape, num_classes)
    builder = find(config.name)
    model = builder(config, image_shape=image_shape, num_classes=num_classes, dtype=dtype, param_dtype=param_dtype)
    if not isinstance(model, Classifier):
        raise ConfigError(
            f"config.model.name={config.name!r}: must return a jaxtrain.models.classifier.Classifier, "
            f"and returned {_kind(model)}."
        )
    return model


def _kind(value: object) -> str:
    return f"an object of type {type(value).__module__}.{type(value).__qualname__}"
