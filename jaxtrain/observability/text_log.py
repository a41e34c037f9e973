"""The text log: one file for each process, and the console.

Everything goes through the logger `jaxtrain`, never the root logger: a program that calls `jaxtrain.train` keeps its
own handlers and levels.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from rich.console import Console

from jaxtrain.host.files import writing
from jaxtrain.host.text import indented

log = logging.getLogger("jaxtrain")
FILE_ONLY = {"file_only": True}
"""Pass as `extra=` to keep a line off the console, where a progress bar shows the same."""


class TextLog:
    """Sends the logger's lines to a file (every process) and to the console (process 0: all; others: warnings).

    Closing restores the logger. The progress bar must use the same console, so that lines stay above it.
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
        file = logging.StreamHandler(os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace"))
        stamped = _Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        stamped.converter = time.gmtime  # the logs of several hosts can be merged by sorting
        file.setFormatter(stamped)
        screen = _ConsoleHandler(console if console is not None else Console(stderr=True))
        screen.setLevel(logging.INFO if process == 0 else logging.WARNING)
        self._file = file
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
            self._file.stream.close()
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


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console):
        super().__init__()
        self._console = console
        self._plain = _Formatter("%(asctime)s %(message)s", "%H:%M:%S")
        self._marked = _Formatter("%(asctime)s %(levelname)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return (self._plain if record.levelno < logging.WARNING else self._marked).format(record)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            # the plain text: no colours, no [markup], no line breaks at the 80 columns of a pipe
            self._console.print(self.format(record), markup=False, emoji=False, highlight=False, soft_wrap=True)
        except SystemExit:
            # rich raises it for a broken pipe (`... | head`), after it has silenced the console. The run goes on.
            log.info("The console is closed; the run goes on.", extra=FILE_ONLY)
        except Exception:
            self.handleError(record)
