"""Files that are written whole or not at all, and never through a symbolic link that somebody else has placed there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from jaxtrain.errors import WorkdirError


class HasClose(Protocol):
    """What must be closed."""

    def close(self) -> None:
        """Gives back what it holds."""


_T = TypeVar("_T")
_Closable = TypeVar("_Closable", bound=HasClose)


def no_link(path: str, flags: int) -> int:
    """An `opener` for `open`: fails where the path is a symbolic link, which somebody else may have placed there.

    A directory above it may be a link: some keep their runs on another disk in this way.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def create(path: Path) -> TextIO:
    """Opens a new file for writing text. A file or link of that name, such as a killed process left, is removed first."""
    path.unlink(missing_ok=True)
    return open(path, "x", encoding="utf-8", newline="\n")


def open_to_append(path: Path) -> FileIO:
    """Opens a file, not through a link, to which `write_all` adds."""
    return open(path, "ab", buffering=0, opener=no_link)


def write_all(file: FileIO, data: bytes) -> None:
    """Writes all of `data` to an unbuffered file: a kill loses none of it, and closing has nothing left that could fail."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def closing(resource: _Closable) -> Iterator[_Closable]:
    """As `contextlib.closing`, but where the block has failed, an error of closing does not take the place of its error."""
    try:
        yield resource
    except BaseException:
        with contextlib.suppress(Exception):
            resource.close()
        raise
    resource.close()


ELSEWHERE = "restore it from a copy, or choose another work directory with --workdir"


def atomic_write(path: Path, text: str) -> None:
    """Replaces the content of `path` by `text`: a reader, or a restart after a kill, sees the whole old or new text.

    The temporary file has a fixed name, so that one which a killed process left is replaced. That is safe, since files that
    processes share have one writer, process 0. Raises `WorkdirError` naming the file when the disk is full, read-only or
    gone.
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
    """As `atomic_write`, but not synced: for a file that nobody needs after a power cut. Raises `OSError`."""
    part = path.with_suffix(".part")
    with create(part) as file:
        file.write(text)
    part.replace(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an `OSError` inside the block (disk full, read-only, gone) into a `WorkdirError` about writing `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        if error.errno == errno.ELOOP:  # from `no_link`; the system's own text is "Too many levels of symbolic links"
            reason = "it is a link, and is not written through; remove it"
        elif isinstance(error, NOT_THERE) and not path.parent.is_dir():
            reason = "its directory is not there"
        raise WorkdirError(f"{path} cannot be written ({reason}).") from error


NOT_THERE = (FileNotFoundError, NotADirectoryError)
_PAUSES = (0.1, 0.4, 1.5)  # seconds


def patiently(read: Callable[[], _T]) -> _T:
    """What `read` returns. It is called again where the system fails in a way that may pass, as EIO, ESTALE and EMFILE may.

    Raises `OSError`: at once where it says what is there (nothing, a directory, a link to itself).
    """
    for pause in _PAUSES:
        try:
            return read()
        except (*NOT_THERE, IsADirectoryError):
            raise
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise
            time.sleep(pause)
    return read()


def move(path: Path, to: Path) -> None:
    """Moves a file or directory, also to another file system; of a link the link itself, which leads where it led."""
    if path.is_symlink():
        to.symlink_to(os.path.realpath(path))
        path.unlink()
    else:
        shutil.move(path, to)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an `OSError` inside the block into a `WorkdirError` about reading `path`."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read ({error.strerror}).") from error


def parse_json(text: str | bytes) -> Any:
    """As `json.loads` of UTF-8. Raises `ValueError` for all that it cannot parse, also where it is nested too deeply."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """The parsed content, None where there is no such file. Raises `WorkdirError` when it cannot be read or is not JSON."""
    try:
        with reading(path):
            return parse_json(patiently(path.read_bytes)) if path.exists() else None
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged ({error}); {ELSEWHERE}.") from error


def write_synced(path: Path, text: str) -> None:
    """Writes a new file and returns once it is on the disk. Raises `OSError`."""
    with create(path) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes a rename in the directory durable. Some network file systems refuse it; there is nothing better on them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
