"""TensorBoard event files without TensorFlow.

tensorboardX's own `SummaryWriter` starts a thread and a multiprocessing queue for each directory, and names files by
the second, so that a quick restart overwrites the file before. A run writes a few scalars now and then: its record
writer and protocol buffers are enough.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  (made at run time)
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter

from jaxtrain.workdir import writing

FLUSH_SECONDS = 30.0


class EventFile:
    """Appends scalars to a new event file in `directory`; TensorBoard shows all files of a directory as one run."""

    def __init__(self, directory: Path, step: int, now: Callable[[], float] = time.time):
        """Opens a file for a run that goes on from `step`; 0 starts from nothing.

        The first record tells TensorBoard to drop what earlier files hold of later steps (`SessionLog.START`).
        """
        self._directory = directory
        self._now = now
        # TensorBoard reads files in the order of their names, so a new one sorts last even when the clock went back.
        taken = (path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*"))
        second = max([int(now()), *(int(t) + 1 for t in taken if t.isdigit())])
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(directory / f"events.out.tfevents.{second:010d}.{socket.gethostname()}"))
        self._write(Event(wall_time=now(), file_version="brain.Event:2"))
        first = step + 1 if step else 0
        self._write(Event(wall_time=now(), step=first, session_log=SessionLog(status=SessionLog.START)))
        self._flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds `values` at `step`."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(wall_time=self._now(), step=step, summary=summary))
        if self._now() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def close(self) -> None:
        """Flushes and closes; may be called twice."""
        if self._writer is not None:
            self._flush()
            self._writer.close()
            self._writer = None

    def _write(self, event: Event) -> None:
        assert self._writer is not None, "the event file is closed"
        with writing(self._directory):
            self._writer.write(event.SerializeToString())

    def _flush(self) -> None:
        assert self._writer is not None
        with writing(self._directory):
            self._writer.flush()
        self._flushed = self._now()
