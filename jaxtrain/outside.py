"""What comes from outside is not taken at its word: addresses given for paths, texts for a terminal, links in a file's way.

Imports the standard library alone, so that every module may use it.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from pathlib import Path
from typing import TextIO

# ----------------------------------------------------------------------------------------------------------- addresses

_ADDRESS = re.compile(r"\s*([^/\s][^/]*):(?:/|$)")


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


# --------------------------------------------------------------------------------------------------------------- texts

# Unicode's categories: controls, halves of pairs, breaks of lines and paragraphs, and what shows nothing itself.
_UNSHOWN = ("Cc", "Cs", "Zl", "Zp", "Cf")
INDENT = "    "  # of the further lines of an entry in a log
_JOINERS = "\u00ad\u200c\u200d"  # what shows nothing, but belongs to words and emoji: hyphenation, Persian, families


def printable(text: object, *, lines: bool = False) -> str:
    r"""`text` as it may go to a terminal or into a log: what would move the cursor, forge a line or turn letters round is
    shown as an escape (\x1b, \u202e).

    lines: line breaks and tabs stay, as a traceback needs them; else they are escaped too.
    """
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(_shown(letter, lines) for letter in plain)


def _shown(letter: str, lines: bool) -> str:
    if letter in _JOINERS or (lines and letter in "\n\t") or unicodedata.category(letter) not in _UNSHOWN:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


def escape_message(record: logging.LogRecord) -> bool:
    """A logger's filter: its messages are `printable`, wherever its handlers send them."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def indented(text: str) -> str:
    """`printable` lines of which all but the first are indented, so that none looks like the beginning of another entry."""
    return printable(text, lines=True).replace("\n", f"\n{INDENT}")


# --------------------------------------------------------------------------------------------------------------- files


def no_link(path: str, flags: int) -> int:
    """An `opener` for `open`: fails where the name's last part is a link, which somebody else may have planted there.

    A directory above it may be one: runs are kept on other disks so.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def create(path: Path) -> TextIO:
    """Opens a file of our own for writing text. What has its name goes first: a killed process's, or a link to elsewhere."""
    path.unlink(missing_ok=True)
    return open(path, "x", encoding="utf-8", newline="\n")
