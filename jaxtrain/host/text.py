"""Text from outside, as it may go to a terminal or into a log."""

from __future__ import annotations

import logging
import sys
import unicodedata

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


def note(text: str, program: str = "jaxtrain") -> None:
    """Prints `text` as a line on standard error, for what must be said before a run has a log."""
    print(f"{program}: {printable(text)}", file=sys.stderr, flush=True)


def escape_message(record: logging.LogRecord) -> bool:
    """A logger's filter: its messages are `printable`, wherever its handlers send them."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def indented(text: str) -> str:
    """`printable` lines of which all but the first are indented, so that none looks like the beginning of another entry."""
    return printable(text, lines=True).replace("\n", f"\n{INDENT}")
