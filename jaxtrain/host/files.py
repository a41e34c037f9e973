"""Files that are written whole or not at all, and never through a link that somebody else has planted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxtrain.errors import WorkdirError


def no_link(path: str, flags: int) -> int:
    """An `opener` for `open`: fails where the name's last part is a link, which somebody else may have planted there.

    A directory above it may be one: runs are kept on other disks so.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def create(path: Path) -> TextIO:
    """Opens a file of our own for writing text. What has its name goes first: a killed process's, or a link to elsewhere."""
    path.unlink(missing_ok=True)
    return open(path, "x", encoding="utf-8", newline="\n")


ELSEWHERE = "restore it from a copy, or choose another work directory with --workdir"


# ------------------------------------------------------------------------------------------------------------ files


def atomic_write(path: Path, text: str) -> None:
    """Replaces `path` by `text` at once: a reader, or a restart after a kill, sees the old text or the new, whole.

    The temporary name is fixed, so what a killed process left, or a link to elsewhere, is replaced; shared files have one
    writer, process 0.
    Raises `WorkdirError` naming the file when the disk is full, read-only or gone.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            write_synced(part, text)
            os.replace(part, path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def replace_unsynced(path: Path, text: str) -> None:
    """Replaces `path` by `text` at once, for a file of this moment that nobody needs after a power cut. Raises `OSError`."""
    part = path.with_suffix(".part")
    with create(part) as file:
        file.write(text)
    part.replace(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says against writing `path` (disk full, gone, read-only) into `WorkdirError`."""
    try:
        yield
    except OSError as error:
        linked = error.errno == errno.ELOOP  # `outside.no_link`; the system's own words would speak of too many levels
        reason = "it is a link, and is not written through; remove it" if linked else error.strerror
        raise WorkdirError(f"{path} cannot be written ({reason}).") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """The same for reading."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read ({error.strerror}).") from error


def read_json(path: Path) -> Any:
    """The parsed file, None where there is none. Raises `WorkdirError` when it cannot be read or is not JSON."""
    try:
        with reading(path):
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise WorkdirError(f"{path} is damaged ({error}); {ELSEWHERE}.") from error


def write_synced(path: Path, text: str) -> None:
    with create(path) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes a rename durable; some network file systems refuse to sync a directory, and offer nothing better."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
