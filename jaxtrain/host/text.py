"""Text from outside: made safe for a terminal or a log, or likened to the words that exist."""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
import unicodedata
from collections.abc import Iterable

# Unicode's categories of characters that show nothing: control, surrogate, line and paragraph separator, format.
_UNSHOWN = ("Cc", "Cs", "Zl", "Zp", "Cf")
INDENT = "    "  # of all lines of a log's entry but the first
_JOINERS = "\u00ad\u200c\u200d"  # format characters that words and emoji need: soft hyphen, non-joiner, joiner


def printable(text: object, *, lines: bool = False) -> str:
    r"""`text` with escapes (\x1b, \u202e) for what would move the cursor, forge a line or reverse the direction of writing.

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


def spreadsheet_cell(text: str) -> str:
    """`text` for a cell of a CSV file, `printable`; one that a spreadsheet would take for a formula has a quote in front."""
    shown = printable(text)
    return f"'{shown}" if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else shown


def note(text: str, program: str = "jaxtrain", *, lines: bool = False) -> None:
    """Prints `text` as a line on standard error, for what must be said before a run has a log.

    lines: as in `printable`. A terminal that is gone (ssh was closed) must not keep the program from what it does next.
    """
    with contextlib.suppress(OSError):
        print(f"{program}: {printable(text, lines=lines)}", file=sys.stderr, flush=True)


def escape_message(record: logging.LogRecord) -> bool:
    """A filter for a logger, which makes its messages `printable` for all handlers."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def indented(text: str) -> str:
    """`printable` lines, all but the first indented: none can look like the beginning of another entry of a log."""
    return printable(text, lines=True).replace("\n", f"\n{INDENT}")


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """' Did you mean X?' when a known word is close to `word`, else ''.

    Args:
      word: what was written.
      known: the words that exist.
      prefix: is put before X.
    """
    close = nearest(word, known)
    return f" Did you mean {prefix + close!r}?" if close else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is closest to `word`; "" where none is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)), "")
