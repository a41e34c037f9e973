"""The text log: one file for each process, and the console.

Everything goes through the logger `jaxtrain`, never the root logger: a program that calls `jaxtrain.train` keeps its
own handlers and levels.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from jaxtrain.host.files import writing
from jaxtrain.host.text import indented, printable

log = logging.getLogger("jaxtrain")
FILE_ONLY = {"only": "file"}
"""Pass as `extra=` to keep a line off the console, which shows the same in other words."""
NOT_LIVE = {"only": "not live"}
"""Pass as `extra=` to keep a line off a terminal and a notebook, where a live line shows the same."""


def to_screen(line: str | Text) -> None:
    """Shows a line that the file has in other words. A `Text` has styles, and must be printable."""
    text = line if isinstance(line, Text) else Text(printable(line))
    log.info("%s", text.plain, extra={"only": "screen", "styled": text})


def in_notebook() -> bool:
    """Whether this is a cell of a notebook, as rich recognizes it."""
    return Console().is_jupyter


def can_redraw(console: Console) -> bool:
    """Whether a line can be drawn again and again there: on a terminal that can move its cursor.

    rich also takes a file for a terminal where FORCE_COLOR is set.
    """
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal


def make_console(*, quiet: bool = False) -> Console:
    """Where a run is shown: standard error; in a notebook, whose frames colour that as an error, standard output."""
    if in_notebook():
        return Console(file=sys.stdout, force_jupyter=False, quiet=quiet)
    return Console(stderr=True, quiet=quiet)


class TextLog:
    """Sends the logger's lines to a file (every process) and to the console (process 0: all; others: warnings).

    Closing restores the logger. `Progress` must use the same console, so that lines stay above its own.
    """

    def __init__(self, path: Path, process: int = 0, console: Console | None = None):
        """Opens the log.

        Args:
          path: the file, which is appended to; only its owner may read it.
          process: the number of this process.
          console: standard error unless one is given.
        """
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with contextlib.suppress(OSError):  # an older file that belongs to another user
            os.fchmod(descriptor, 0o600)
        file = FileHandler(descriptor)
        stamped = _Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        stamped.converter = time.gmtime  # the logs of several hosts can be merged by sorting
        file.setFormatter(stamped)
        file.addFilter(lambda record: getattr(record, "only", "") != "screen")
        screen = _ConsoleHandler(console if console is not None else Console(stderr=True))
        screen.setLevel(logging.INFO if process == 0 else logging.WARNING)
        self._handlers = (file, screen)
        self._before = log.level, log.propagate
        log.setLevel(logging.INFO)
        log.propagate = False  # absl and many notebooks have a root handler: each line would come twice
        for handler in self._handlers:
            log.addHandler(handler)

    def close(self) -> None:
        """Removes the handlers; may be called twice."""
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()
        if self._handlers:
            log.setLevel(self._before[0])
            log.propagate = self._before[1]
        self._handlers = ()

    def __enter__(self) -> TextLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Formatter(logging.Formatter):
    """Escapes texts, so that class names and file names can neither forge an entry nor control the reader's terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return indented(super().format(record))


class FileHandler(logging.Handler):
    """Writes each entry at once. A disk that takes none is no reason to end a run, and is said once."""

    def __init__(self, descriptor: int):
        super().__init__()
        self._descriptor, self._failed = descriptor, False

    def emit(self, record: logging.LogRecord) -> None:
        entry = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            os.write(self._descriptor, entry)
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning(
                    "The log cannot be written (%s); the run goes on.", error.strerror, extra={"only": "screen"}
                )

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # as in `emit`
                os.close(self._descriptor)
            self._descriptor = -1
        super().close()


class _ConsoleHandler(logging.Handler):
    """On a terminal a line has a style by its level, and is wrapped at words; elsewhere it has the time, and is never cut."""

    def __init__(self, console: Console):
        super().__init__()
        self._console, self._live = console, in_notebook() or can_redraw(console)
        hidden = {"file", "not live"} if self._live else {"file"}
        self.addFilter(lambda record: getattr(record, "only", "") not in hidden)
        time_ = "" if self._live else "%(asctime)s "
        self._plain = _Formatter(f"{time_}%(message)s", "%H:%M:%S")
        self._marked = _Formatter(f"{time_}%(levelname)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return (self._plain if record.levelno < logging.WARNING else self._marked).format(record)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # Text: no [markup], no :emoji:, no colours of numbers
            if self._live:
                style = "dim" if record.levelno < logging.WARNING else "yellow"
                style = "bold red" if record.levelno >= logging.ERROR else style
                text = getattr(record, "styled", None) or Text(self.format(record), style)
                self._console.print(text, overflow="fold")
            else:
                self._console.print(Text(self.format(record)), soft_wrap=True)
        except SystemExit:
            # rich raises it for a broken pipe (`... | head`), after it has silenced the console. The run goes on.
            log.info("The console is closed; the run goes on.", extra=FILE_ONLY)
        except Exception:
            self.handleError(record)
