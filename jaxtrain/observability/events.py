"""`events.jsonl`: what happened in a run, as a page draws it on the curves; from the lines of the log that are marked so.

One JSON object a line: `time` (seconds since 1970), `step` (the update after which it happened), `kind` and `message`.
A start appends: what it does again stands there twice, since it happened twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from jaxtrain.host.files import writing
from jaxtrain.observability.text_log import FileHandler

Kind = Literal["start", "checkpoint", "anomaly", "roll_back", "slow_device", "gpu", "profile", "end"]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def event(kind: Kind, step: int | None = None, also: Mapping[str, Any] = _NOTHING) -> dict[str, Any]:
    """The `extra=` of a line of the log that is an event.

    Args:
      kind: of event.
      step: after which it happened; None: after the last one that `recording` knows of.
      also: more of the line's `extra`, such as `FILE_ONLY`.
    """
    return {"event": kind, "step": step, **also}


class _Events(logging.Formatter):
    def __init__(self, step: Callable[[], int]):
        super().__init__()
        self._step = step

    def format(self, record: logging.LogRecord) -> str:
        step = getattr(record, "step", None)
        values = {"time": round(record.created, 3), "step": self._step() if step is None else step}
        return json.dumps(values | {"kind": getattr(record, "event", ""), "message": record.getMessage()})


class _EventFile(logging.Handler):
    """Opens the file at the first `start`: a start that is refused leaves another run's file as it is."""

    def __init__(self, path: Path, step: Callable[[], int]):
        super().__init__()
        self._path, self._step = path, step
        self._file: FileHandler | None = None

    def emit(self, record: logging.LogRecord) -> None:
        kind = getattr(record, "event", "")
        if kind == "start" and self._file is None:
            self._file = self._open()
        if kind and self._file is not None:
            self._file.emit(record)

    def _open(self) -> FileHandler:
        with writing(self._path):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            end = os.lseek(descriptor, 0, os.SEEK_END)
            if end and os.pread(descriptor, 1, end - 1) != b"\n":  # a kill has cut the last line off
                os.write(descriptor, b"\n")
        file = FileHandler(descriptor)
        file.setFormatter(_Events(self._step))
        return file

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
        super().close()


@contextlib.contextmanager
def recording(path: Path, step: Callable[[], int]) -> Iterator[None]:
    """Inside the context the events among the lines of the log are appended to a file, from the first `start` on.

    Args:
      path: the file; process 0 writes it. A disk that takes no line ends no run.
      step: returns the last step that was done.
    """
    log, handler = logging.getLogger("jaxtrain"), _EventFile(path, step)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
