"""The recorded contents of an image folder: a SHA-256 of each file, kept in the data directory.

A data set's fingerprint covers the files' names and sizes only, since a run should not read every byte when it starts. An
image that was edited and kept its size differs only from these records.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxtrain.errors import DataError
from jaxtrain.host.files import atomic_write, read_json, writing

_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Contents:
    """The record of one folder."""

    when: str
    """ISO 8601: when this record last changed."""
    files: dict[str, tuple[int, str]]
    """Path below the folder -> (bytes, SHA-256)."""


def record_path(folder: Path, data_dir: Path) -> Path:
    """Where the contents of `folder` are recorded."""
    where = folder.resolve()
    return data_dir / "folders" / f"{where.name}-{hashlib.sha256(str(where).encode()).hexdigest()[:12]}.json"


def read_record(path: Path) -> Contents | None:
    """The record in `path`, None where nothing was recorded. Raises `DataError` where it is damaged."""
    try:
        values = read_json(path)
        return (
            None if values is None else Contents(values["when"], {k: (v[0], v[1]) for k, v in values["files"].items()})
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it.") from None


def record(
    folder: Path,
    names: Iterable[str],
    path: Path,
    *,
    known: Contents | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Contents:
    """Records the contents of files.

    Args:
      folder: the folder.
      names: paths of its files, below the folder.
      path: the file to write the record to.
      known: the record so far. Its files are not read again.
      progress: wraps the files as they are read.

    Returns:
      The new record.

    Raises:
      WorkdirError: `path` cannot be written.
    """
    old = known.files if known else {}
    hashes = dict(_hashes(folder, sorted(set(names) - old.keys()), progress))
    if known and not hashes:
        return known
    new = {name: (os.stat(folder / name).st_size, digest) for name, digest in hashes.items()}
    contents = Contents(time.strftime("%Y-%m-%dT%H:%M:%S%z"), {**old, **new})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"folder": str(folder), **dataclasses.asdict(contents)}, indent=0) + "\n")
    return contents


def compare(
    folder: Path,
    names: Iterable[str],
    recorded: Contents,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[str]:
    """Compares the contents of files with their record.

    Args:
      folder: the folder.
      names: paths of its files, below the folder.
      recorded: the record to compare with. Files that are not in it are not read.
      progress: wraps the files as they are read.

    Returns:
      What differs, such as "a/b.png has changed" or "a/b.png is gone".
    """
    names = sorted(names)
    known = [name for name in names if name in recorded.files]
    others = sorted(recorded.files.keys() - set(names))  # gone, or of splits that are not used
    gone = [f"{name} is gone" for name in others if not (folder / name).exists()]
    hashes = _hashes(folder, known, progress)
    return gone + [f"{name} has changed" for name, digest in hashes if digest != recorded.files[name][1]]


def _hashes(
    folder: Path, names: list[str], progress: Callable[[Iterable[str]], Iterable[str]]
) -> Iterable[tuple[str, str]]:
    def digest(name: str) -> str:
        try:
            with open(folder / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read ({error.strerror}).") from None

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        yield from zip(progress(names), pool.map(digest, names), strict=True)
