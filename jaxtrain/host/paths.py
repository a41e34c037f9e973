"""Paths: what is a local one, and where compiled programs are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from jaxtrain.errors import ConfigError

_ADDRESS = re.compile(r"\s*([^/\s][^/]*):(?:/|$)")


def compile_cache(environment: Mapping[str, str] = os.environ) -> str:
    """Where JAX keeps compiled programs for later starts: `$JAX_COMPILATION_CACHE_DIR`, or a directory below ~/.cache."""
    return environment.get("JAX_COMPILATION_CACHE_DIR") or str(
        home("JAX_COMPILATION_CACHE_DIR") / ".cache/jaxtrain/xla"
    )


def home(instead: str) -> Path:
    """The user's home directory. Raises `ConfigError` where there is none: a container's user may have no entry in passwd.

    instead: the variable that names another place.
    """
    try:
        return Path.home()
    except RuntimeError:
        raise ConfigError(
            f"User {os.geteuid()} has no home directory; set HOME, or {instead}, to a directory that can be written."
        ) from None


def can_be_written(directory: str | Path) -> bool:
    """Whether files can be made in a local `directory`; where it is not there, whether it can be made."""
    path = Path(directory)
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def is_address(path: str | Path) -> bool:
    """Whether `path` is an address, such as gs://bucket/cache, and not a local path."""
    return _ADDRESS.match(str(path)) is not None


def require_local(path: str | Path, what: str, error: type[Exception]) -> None:
    """Refuses an address, such as s3://bucket/run or file:///x. As a path it would be a local folder `s3:`.

    Only the text counts, also after `Path` has reduced its slashes (s3:/bucket/run). A colon after the first slash is
    allowed: runs/a:b, or ./s3:/b for a folder that really has that name.

    Args:
      path: what the user gave.
      what: the setting and its value, for the sentence.
      error: the class to raise.

    Raises:
      error: `path` is an address.
    """
    if match := _ADDRESS.match(str(path)):
        rest = str(path)[match.end() :].lstrip("/")
        instead = (
            f"write /{rest}" if match[1].lower() == "file" else "give a path of a local disk or a shared file system"
        )
        raise error(f"{what} is not a local path but an address ({match[1]}:); {instead}.")
