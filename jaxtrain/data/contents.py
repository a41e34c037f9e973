"""What the files of an image folder held: a SHA-256 of each, kept in the data directory.

A data set's fingerprint has the files' names and sizes, since a start of a run should not read every byte. An image that was
edited at the same size shows only against these.
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
    """files: bytes and SHA-256 of each, by path below the folder. when: ISO 8601, of the last change of this record."""

    when: str
    files: dict[str, tuple[int, str]]


def record_path(folder: Path, data_dir: Path) -> Path:
    """Where the contents of `folder` are recorded."""
    where = folder.resolve()
    return data_dir / "folders" / f"{where.name}-{hashlib.sha256(str(where).encode()).hexdigest()[:12]}.json"


def read_record(path: Path) -> Contents | None:
    """None where nothing was recorded. Raises `DataError` where the record is damaged."""
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
    """Records in `path` what the files `names` below `folder` hold. Those in `known` stay as they were found first.

    Raises `WorkdirError` where `path` cannot be written.
    """
    had = known.files if known else {}
    hashes = dict(_hashes(folder, sorted(set(names) - had.keys()), progress))
    if known and not hashes:
        return known
    new = {name: (os.stat(folder / name).st_size, digest) for name, digest in hashes.items()}
    contents = Contents(time.strftime("%Y-%m-%dT%H:%M:%S%z"), {**had, **new})
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
    """Files that are gone or hold something else than was recorded, as "a/b.png has changed"."""
    names = sorted(names)
    here = [name for name in names if name in recorded.files]
    others = sorted(recorded.files.keys() - set(names))  # gone, or of splits that are not looked at
    found = [f"{name} is gone" for name in others if not (folder / name).exists()]
    found += [
        f"{name} has changed" for name, digest in _hashes(folder, here, progress) if digest != recorded.files[name][1]
    ]
    return found


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
