"""Paths: what is a local one, and where compiled programs are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_ADDRESS = re.compile(r"\s*([^/\s][^/]*):(?:/|$)")


def compile_cache(environment: Mapping[str, str] = os.environ) -> str:
    """Where JAX keeps compiled programs for later starts: `$JAX_COMPILATION_CACHE_DIR`, or a directory below ~/.cache."""
    return environment.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "jaxtrain" / "xla")


def require_local(path: str | Path, what: str, error: type[Exception]) -> None:
    """Raises `error` where `path` is an address, such as s3://bucket/run or file:///x: as a path it is a local folder `s3:`.

    Looks at the text alone, also at what is left of it once `Path` has folded its slashes (s3:/bucket/run). A colon further
    back is a letter like any other: runs/a:b, and ./s3:/b where a folder is really called so.

    what: names the setting and its value in the sentence.
    """
    if found := _ADDRESS.match(str(path)):
        rest = str(path)[found.end() :].lstrip("/")
        instead = (
            f"write /{rest}" if found[1].lower() == "file" else "give a path of a local disk or a shared file system"
        )
        raise error(f"{what} is not a local path but an address ({found[1]}:); {instead}.")
