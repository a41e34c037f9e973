"""A user's own model, optimizer, loss or data source, named in the config as `package.module:attribute`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
from typing import Any

from jaxtrain.config import did_you_mean
from jaxtrain.errors import ConfigError


def load_dotted(name: str, field: str) -> Any:
    """The object that `name` means; the working directory is importable, as it is with `python -m`.

    Args:
      name: `package.module:attribute`, e.g. "my_project.vit:ViT".
      field: the config field that holds it, e.g. "model.name"; named in the errors.

    Raises:
      ConfigError: `name` is not of that form, its module cannot be imported (the import's own error is the cause, and
        is named), or the module has no such attribute.
    """
    where = f"config.{field}={name!r}"
    module_name, _, attribute = name.partition(":")
    parts = [*module_name.split("."), *attribute.split(".")]
    if ":" not in name or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{where}: must have the form 'package.module:attribute'.")
    here = os.getcwd()
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)  # for good: what is loaded here may itself import, late, from beside it
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        cause = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{where}: importing {module_name!r} (from {here} or sys.path) failed with {cause}."
        ) from error
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        known = [key for key in vars(module) if not key.startswith("_")]
        hint = did_you_mean(attribute, known)
        raise ConfigError(f"{where}: module {module_name!r} has no {attribute!r}.{hint}") from None


def watch(section: Any) -> tuple[Any, set[str]]:
    """A copy of a config section, and the names of those of its fields that were read since."""
    read: set[str] = set()
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}

    class Watched(type(section)):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

        def __reduce__(self) -> Any:  # what is pickled for a reading worker is an ordinary section
            return functools.partial(type(section), **values), ()

    watched = Watched(**values)
    read.clear()  # the checks have read all of them
    return watched, read
