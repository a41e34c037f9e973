"""The logs of all processes of a run, as one: sorted by time. Reads what `observability.text_log` writes; imports no JAX."""

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
    """One entry of a log. time: ISO 8601, UTC. message: may have several lines, as a traceback has."""

    time: str
    process: int
    level: str
    message: str


def merged(workdir: str | Path) -> list[Entry]:
    """All entries, by time, then by process. Raises `WorkdirError` where no run has logged anything."""
    entries: list[Entry] = []
    for path in sorted(Workdir(named(workdir)).logs.glob("process_*.log")):
        process = int(path.stem.rpartition("_")[2])
        with reading(path):
            lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
        own: list[Entry] = []
        for line in lines:
            if found := _LINE.fullmatch(line):
                own.append(Entry(found[1], process, found[2], found[3]))
            elif own:  # the next line of the same entry
                own[-1] = dataclasses.replace(own[-1], message=f"{own[-1].message}\n{line.removeprefix(INDENT)}")
        entries += own
    if not entries:
        raise WorkdirError(f"{workdir} holds no logs of a run.")
    return sorted(entries, key=lambda entry: (entry.time, entry.process))
