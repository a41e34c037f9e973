"""What a run does now, as one line that is drawn again and again: on a terminal or in a notebook, and nowhere else."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, ConsoleRenderable
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from jaxtrain.observability.rendering import Activity, live_line, short_duration
from jaxtrain.observability.text_log import can_redraw, in_notebook

_TERMINAL_RATE = 8  # redraws a second
_NOTEBOOK_SECONDS, _NOTEBOOK_WIDTH = 0.5, 100  # between redraws; columns
_PRINTED_SECONDS = 8.0
_ECHO = 2  # columns that are left for the terminal's ^C, which would wrap the line

_erased = threading.Event()
_on_screen: list[_TerminalLine] = []


def erase_line() -> None:
    """Takes the line off its terminal for good, from any thread and without a lock, since the process ends at once."""
    _erased.set()
    for line in _on_screen:
        os.write(line.console.file.fileno(), b"\r\x1b[2K")


_NO_SCREEN = 120  # columns of a line that goes to a file


class Progress:
    """Shows the innermost of the activities that a run is in. Log lines of the same console stay above it."""

    def __init__(self, console: Console | None = None, *, prints: bool = False):
        """Shows nothing yet.

        Args:
          console: that of the `TextLog`; None shows nothing at all (every process but the first).
          prints: where nothing can be drawn again, say now and then what takes long; for commands that have no log.
        """
        self._console, self._prints = console, prints
        self._activities: list[Activity] = []
        self._display: Live | _Redrawn | None = None

    @contextlib.contextmanager
    def activity(self, what: str, total: int = 0, note: str = "") -> Iterator[Activity]:
        """Shows an activity inside the context.

        Args:
          what: it is, in a word or two.
          total: how much there is to do; 0 where nobody knows.
          note: what else is worth saying.
        """
        activity = Activity(what, time.monotonic(), total, note=note)
        self._activities.append(activity)
        try:
            self._show()
            yield activity
        finally:
            self._activities.remove(activity)
            if not self._activities and not isinstance(self._display, _NotebookLine):  # whose output is used again
                self.close()

    @property
    def width(self) -> int:
        """Columns of the screen now; what is no screen has many."""
        return self._console.width if self._console is not None and can_redraw(self._console) else _NO_SCREEN

    def close(self) -> None:
        """Takes the line off the screen; may be called twice."""
        display, self._display = self._display, None
        if display is not None:
            display.stop()

    def _show(self) -> None:
        if isinstance(self._display, Live):
            self._display.refresh()
        if self._display is not None or self._console is None or self._console.quiet:
            return
        if in_notebook():
            self._display = _NotebookLine(self)
        elif can_redraw(self._console):
            self._display = _TerminalLine(self, self._console)
            self._display.start(refresh=True)
            self._console.show_cursor(True)  # a process that is killed could not give it back
        elif self._prints:
            self._display = _PrintedLines(self, self._console)

    def text(self) -> str:
        """What is done now and for how long, in words."""
        return "; ".join(
            f"{each.what}, {short_duration(time.monotonic() - each.began)}" for each in self._activities[-1:]
        )

    def line(self, width: int, *, ascii_only: bool = False) -> Text:
        """What is shown now, in fewer than `width` columns."""
        activities = [] if _erased.is_set() else self._activities[-1:]
        return live_line(activities[0], width, time.monotonic(), ascii_only=ascii_only) if activities else Text()


class _TerminalLine(Live):
    """rich's live display of one line, which also survives a narrower window: terminals wrap what is on the screen then."""

    def __init__(self, progress: Progress, console: Console):
        self._drawn = 0  # columns
        self._progress = progress
        # print() goes above the line where both share the screen, and to its file where it does not
        redirect = sys.stdout.isatty()
        super().__init__(
            console=console,
            refresh_per_second=_TERMINAL_RATE,
            transient=True,
            redirect_stdout=redirect,
            get_renderable=self._line,
        )

    def start(self, refresh: bool = False) -> None:
        super().start(refresh)
        _on_screen.append(self)

    def stop(self) -> None:
        super().stop()
        _on_screen.remove(self)

    def _line(self) -> Text:
        width = self.console.width - _ECHO
        line = self._progress.line(width, ascii_only=self.console.options.ascii_only)
        line.no_wrap, line.overflow = True, "crop"
        return line

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        wrapped = max(self._drawn - 1, 0) // self.console.width  # rows that the last line was wrapped into, but one
        clear = Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * wrapped)
        if _erased.is_set():
            self._live_render.set_renderable(Text())
        drawn = super().process_renderables(renderables)
        self._drawn = self._line().cell_len
        return [clear, *drawn] if wrapped else drawn


class _Redrawn:
    """Calls `draw` from a thread, after each of some waits, until it is stopped."""

    def __init__(self, draw: Callable[[], object], waits: Iterator[float]):
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(draw, waits), name="progress", daemon=True)
        self._thread.start()

    def _run(self, draw: Callable[[], object], waits: Iterator[float]) -> None:
        while not self._stopped.wait(next(waits)):
            draw()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


class _NotebookLine(_Redrawn):
    """One output of a notebook's cell, which is replaced. It needs IPython alone, no widgets."""

    def __init__(self, progress: Progress):
        display: Any = importlib.import_module("IPython.display").display
        bundle: Callable[[], dict[str, str]] = lambda: {"text/plain": progress.line(_NOTEBOOK_WIDTH).plain}  # noqa: E731
        self._handle = display(bundle(), raw=True, display_id=True)
        super().__init__(lambda: self._handle.update(bundle(), raw=True), itertools.repeat(_NOTEBOOK_SECONDS))

    def stop(self) -> None:
        super().stop()
        self._handle.update({"text/plain": ""}, raw=True)


class _PrintedLines(_Redrawn):
    """A line after some seconds, and each time that these have doubled."""

    def __init__(self, progress: Progress, console: Console):
        waits = (_PRINTED_SECONDS * 2 ** max(count - 1, 0) for count in itertools.count())
        super().__init__(lambda: console.print(f"jaxtrain: {progress.text()}", markup=False, soft_wrap=True), waits)
