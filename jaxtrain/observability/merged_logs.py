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
    entries: list[Entry] = []
    for path in sorted(Workdir(named(workdir)).logs.glob("process_*.log")):
        if not (name := re.fullmatch(r"process_([0-9]{1,9})\.log", path.name)):
            continue
        process = int(name[1])
        with reading(path):
            lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
        of_process: list[Entry] = []
        for line in lines:
            if match := _LINE.fullmatch(line):
                of_process.append(Entry(match[1], process, match[2], match[3]))
            elif of_process:  # the next line of the same entry
                message = f"{of_process[-1].message}\n{line.removeprefix(INDENT)}"
                of_process[-1] = dataclasses.replace(of_process[-1], message=message)
        entries += of_process
    if not entries:
        raise WorkdirError(f"{workdir} holds no logs of a run.")
    return sorted(entries, key=lambda entry: (entry.time, entry.process))
