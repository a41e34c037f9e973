"""Merges the logs of all processes of a run, sorted by time. Reads the files of `text_log`; imports no JAX."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import reading
from jaxtrain.host.text import INDENT
from jaxtrain.workdir import Workdir, named

_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ([A-Z]+) (.*)")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of a log."""

    time: str
    """ISO 8601, UTC."""
    process: int
    level: str
    message: str
    """May have several lines, as a traceback has."""


def merged(workdir: str | Path) -> list[Entry]:
    """All entries, by time, then by process. Raises `WorkdirError` where no run has logged anything."""
    entries = Follower(workdir).new(last=True)
    if not entries:
        raise WorkdirError(f"{workdir} holds no logs of a run.")
    return entries


class Follower:
    """Reads the logs of a run again and again, and each time what is new."""

    def __init__(self, workdir: str | Path):
        self._folder = Workdir(named(workdir)).logs
        self._files: dict[int, _File] = {}

    def new(self, *, last: bool = False) -> list[Entry]:
        """The entries since the last call, by time, then by process.

        last: with each file's last entry, even if it was written just now: more of its lines may follow. Otherwise it comes
        once nothing has followed it until the next call.
        """
        for path in self._folder.glob("process_*.log"):
            if name := re.fullmatch(r"process_([0-9]{1,9})\.log", path.name):
                self._files.setdefault(int(name[1]), _File(path, int(name[1])))
        found = [entry for file in self._files.values() for entry in file.new(last=last)]
        return sorted(found, key=lambda entry: (entry.time, entry.process))


@dataclasses.dataclass
class _File:
    """The log of one process. offset: of what was not read yet. pending: the last entry, to which lines may be added."""

    path: Path
    process: int
    offset: int = 0
    pending: Entry | None = None

    def new(self, *, last: bool) -> list[Entry]:
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = len(text) if last else text.rfind(b"\n") + 1  # a line that is being written waits
        self.offset += whole
        lines = text[:whole].decode("utf-8", "replace").removesuffix("\n").split("\n") if whole else []
        entries = [] if self.pending is None else [self.pending]
        for line in lines:
            if match := _LINE.fullmatch(line):
                entries.append(Entry(match[1], self.process, match[2], match[3]))
            elif entries:  # the next line of the same entry
                message = f"{entries[-1].message}\n{line.removeprefix(INDENT)}"
                entries[-1] = dataclasses.replace(entries[-1], message=message)
        self.pending = entries.pop() if entries and lines and not last else None
        return entries
