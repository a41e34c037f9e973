"""Entries of the compile cache. They are machine code: one that has changed computes something else, or crashes.

JAX takes what it finds (with zstd it notices no changed bit), so each entry begins with a SHA-256. Imports no JAX.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

CHECKED = "-sha256"  # ends the keys of our entries: those of other programs, in the same directory, are not taken
_SIZE = hashlib.sha256().digest_size


def with_digest(key: str, program: bytes) -> bytes:
    """The entry of a program."""
    return _digest(key, program) + program


def program_in(key: str, entry: bytes) -> bytes | None:
    """The program of an entry; None where the entry is damaged, or another's."""
    program = entry[_SIZE:]
    return program if entry == with_digest(key, program) else None


def _digest(key: str, program: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + program).digest()


def entries(directory: Path) -> list[Path]:
    """The files of all entries, of other programs too."""
    return sorted(path for path in directory.glob("*-cache") if path.is_file())


def damaged(directory: Path) -> list[Path]:
    """The files of our entries that are damaged. Raises `OSError`."""
    ours = {path: path.name.removesuffix(f"{CHECKED}-cache") for path in directory.glob(f"*{CHECKED}-cache")}
    return sorted(path for path, key in ours.items() if program_in(key, path.read_bytes()) is None)


def clear(directory: Path) -> int:
    """Deletes all entries, and says how many. Raises `OSError`."""
    found = entries(directory)
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def why_refused(directory: Path) -> str:
    """Why what lies there is not run: whoever may write there may have put it there. "" where only this user may."""
    try:
        found = directory.stat()
    except OSError:  # it is not there, or it cannot be read
        return ""
    if found.st_uid != os.geteuid():
        return f"user {found.st_uid} owns it, and not {os.geteuid()}, who runs this"
    return "anyone may write there" if found.st_mode & 0o002 else ""
