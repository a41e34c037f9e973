"""A user's own model, optimizer, loss, augmentation, data set or callback, which a config names `package.module:attribute`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.errors import REPORT_THIS, ConfigError
from jaxtrain.host.search_path import add_working_directory
from jaxtrain.host.text import did_you_mean

OWN_CODE = ("model.name", "data.name", "data.augmentation", "optim.name", "optim.loss", "callbacks.names")
"""The fields that may name code; the last one may have several names."""


# Where a user's code was loaded from. Of a folder with installed packages only the package itself counts.
_own_packages: set[str] = set()
_own_folders: set[str] = set()
_LIBRARIES = ("jaxtrain", "jax", "jaxlib", "flax", "optax", "numpy")  # a config may name code of these too


def is_factory(name: str) -> bool:
    """Whether a data set's `name` means `package.module:factory` (and not `folder:PATH`, nor `name:1.0.0`)."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name) is not None and not name.startswith("folder:")


def code_in(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The user's own code that a config names, as pairs (field, name). config: flat, by dotted names."""
    values = {field: config.get(field, "") for field in OWN_CODE}
    pairs = [(f, str(name)) for f, v in values.items() for name in (v if isinstance(v, (tuple, list)) else [v])]
    return [(f, name) for f, name in pairs if (is_factory(name) if f == "data.name" else ":" in name)]


def refuse_code(config: Mapping[str, Any], source: Path) -> None:
    """Raises `ConfigError` when a config from a run's directory names code, since it may name anything: `os:system`.

    config: flat, by dotted names. source: the file or directory that holds it.
    """
    for field, name in code_in(config):
        raise ConfigError(
            f"config.{field}={name!r}: {source} names code to run, and code that a directory names is not run; "
            "use --trust (in Python: trust=True) if you trust whoever made it."
        )


def load_dotted(name: str, field: str) -> Any:
    """The object that `name` means. Its module may also be in the current directory, which is searched last.

    Only for a name that the user gave or trusts; see `refuse_code`.

    Args:
      name: `package.module:attribute`, e.g. "my_project.vit:ViT".
      field: the config field that holds it, e.g. "model.name"; named in the errors.

    Raises:
      ConfigError: `name` has another form, its module cannot be imported (the sentence has the import's own error), or
        the module has no such attribute.
    """
    where = f"config.{field}={name!r}"
    module_name, _, attribute = name.partition(":")
    parts = [*module_name.split("."), *attribute.split(".")]
    if ":" not in name or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{where}: must have the form 'package.module:attribute'.")
    add_working_directory()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        cause = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{where}: importing {module_name!r} (from {os.getcwd()} or sys.path) failed with {cause}."
        ) from error
    if parts[0] not in (*_LIBRARIES, *sys.stdlib_module_names):
        _own_packages.add(parts[0])
        if file := getattr(module, "__file__", None):  # a folder without __init__.py has none
            _own_folders.add(os.path.dirname(os.path.abspath(file)))
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        known = [key for key in vars(module) if not key.startswith("_")]
        hint = did_you_mean(attribute, known)
        raise ConfigError(f"{where}: module {module_name!r} has no {attribute!r}.{hint}{_found_in(module)}") from None


def load_callable(name: str, field: str) -> Callable[..., Any]:
    """The function or class that `name` means; as `load_dotted`, and `ConfigError` where it is something else."""
    function = load_dotted(name, field)
    if not callable(function):
        raise ConfigError(f"config.{field}={name!r}: is a {type(function).__name__}; it must be a function.")
    return function


def _found_in(module: Any) -> str:
    """Says where a module is, if not in the current directory: an installed one may have the name of the user's."""
    file = getattr(module, "__file__", None) or "built in"
    return (
        ""
        if file.startswith(os.getcwd() + os.sep)
        else f" The module is {file}; the current directory is searched last."
    )


def whose_fault(error: BaseException) -> str:
    """The line above the traceback of an error that jaxtrain did not raise on purpose.

    Where code that the config names was running, the error is most likely that code's, and the line says where it was.
    """
    cause: BaseException | None = error
    while cause is not None:
        for frame, line in reversed(list(traceback.walk_tb(cause.__traceback__))):
            package, file = frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code.co_filename
            if _is_own(package, file):
                what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                return f"Your own code failed ({what}), at {file}:{line}, in {frame.f_code.co_name}; this is its traceback."
        cause = cause.__cause__ or cause.__context__
    return REPORT_THIS


def place_in_own_code(error: BaseException) -> str:
    """`, at FILE:LINE`, where a user's code raised `error`, whoever has loaded it; "" where it was none."""
    libraries = (os.path.dirname(os.__file__) + os.sep, os.path.dirname(__file__) + os.sep)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if (
            os.path.isabs(frame.filename)
            and not frame.filename.startswith(libraries)
            and "site-packages" not in frame.filename
        ):
            return f", at {frame.filename}:{frame.lineno}"
    return ""


def _is_own(package: str, file: str) -> bool:
    if package in _own_packages:
        return True
    installed = f"{os.sep}site-packages{os.sep}" in file or package in _LIBRARIES
    return not installed and os.path.dirname(os.path.abspath(file)) in _own_folders


def watch(section: Any) -> tuple[Any, set[str]]:
    """A copy of a config section, and a set that gets the name of each field of the copy that is read."""
    read: set[str] = set()
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}

    class Watched(type(section)):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

        def __reduce__(self) -> Any:  # pickled, for a worker process, it is an ordinary section
            return functools.partial(type(section), **values), ()

    watched = Watched(**values)
    read.clear()  # the section's own checks have read every field
    return watched, read
