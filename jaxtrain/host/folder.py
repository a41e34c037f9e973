"""Reads files that somebody else may have placed there: through no link, no more than a bound, and nothing that would block."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import parse_json

MOST_JSON = 16 << 20
"""Bytes of a JSON file that is read whole."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True)
class Folder:
    """A directory below `root`. No link below `root` is followed; `root` itself may be one."""

    root: Path
    name: str = "."
    """Its path below `root`."""

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.root / self.name

    def open(self, name: str) -> BinaryIO:
        """Opens a regular file by its path below this folder. Raises `OSError`, also for a link, a pipe or a directory."""
        with self._parent(name) as (folder, last):
            file = os.fdopen(os.open(last, _FILE, dir_fd=folder), "rb")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise OSError(errno.EINVAL, "it is no regular file")
        return file

    def read(self, name: str, most: int = MOST_JSON) -> bytes:
        """All of a file. Raises `OSError`, also where it has more than `most` bytes."""
        with self.open(name) as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
        return content

    def read_json(self, name: str, most: int = MOST_JSON) -> Any:
        """The parsed content; None where there is no such file. Raises `WorkdirError` where it cannot be read or parsed."""
        try:
            return parse_json(self.read(name, most))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise WorkdirError(f"{name} is damaged ({error}).") from None
        except OSError as error:
            raise WorkdirError(f"{name} cannot be read ({reason(error)}).") from None

    def stat(self, name: str) -> os.stat_result | None:
        """Of a file or directory, a link not followed; None where there is none, or it cannot be reached."""
        with contextlib.suppress(OSError), self._parent(name) as (folder, last):
            return os.stat(last, dir_fd=folder, follow_symlinks=False)
        return None

    def stats(self, names: Iterable[str]) -> dict[str, os.stat_result]:
        """As `stat`, of the things in this folder that are there."""
        found = {}
        with contextlib.suppress(OSError), self._parent("./.") as (folder, _):
            for name in names:
                with contextlib.suppress(OSError):
                    found[name] = os.stat(name, dir_fd=folder, follow_symlinks=False)
        return found

    def names(self, name: str = ".") -> list[str]:
        """What a directory holds, sorted; nothing where it is none, or cannot be read."""
        with contextlib.suppress(OSError), self._parent(f"{name}/.") as (folder, _):
            return sorted(os.listdir(folder))
        return []

    @contextlib.contextmanager
    def _parent(self, name: str) -> Iterator[tuple[int, str]]:
        """The open directory in which the last part of `name` is, and that part."""
        parts = PurePosixPath(name).parts
        last = "." if name.endswith("/.") or not parts else parts[-1]
        above = (*PurePosixPath(self.name).parts, *(parts if last == "." else parts[:-1]))
        if any(part in ("..", "/") or "\0" in part for part in (*above, last)):
            raise OSError(errno.EINVAL, "it is no path below the folder")
        folder = os.open(self.root, _DIRECTORY)
        try:
            for part in above:
                below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = below
            yield folder, last
        finally:
            os.close(folder)


def reason(error: OSError) -> str:
    """Why a file cannot be read, in a few words."""
    if error.errno == errno.ELOOP:
        return "it is a link, and none is followed"
    return error.strerror or str(error)
