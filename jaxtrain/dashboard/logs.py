"""Pages of the logs of all processes of a run, merged by time, both ways. Reads no more of a file than a page needs."""

from __future__ import annotations

import dataclasses
import datetime
import heapq
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from jaxtrain.host.folder import Folder
from jaxtrain.host.redaction import without_logins
from jaxtrain.host.text import INDENT

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_HEAD = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z ([A-Z]+) (.*)")
_NAME = re.compile(r"process_([0-9]{1,9})\.log")
_WINDOW = 64 << 10
_MOST_LINE = 1 << 20  # bytes of an entry
_MOST_SEARCHED = 8 << 20  # bytes a page
_MOST_PROCESSES = 256


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of a log."""

    time: float
    """Seconds since 1970; 0 where it continues what was read before."""
    process: int
    level: str
    message: str
    """May have several lines."""
    first: int
    """Where it begins in its file."""
    end: int

    def fits(self, query: str, level: str) -> bool:
        """Whether it has the text, in any case, and at least the level."""
        grave = level not in LEVELS or self.level not in LEVELS or LEVELS.index(self.level) >= LEVELS.index(level)
        return grave and query.casefold() in self.message.casefold()

    def to_json(self) -> dict[str, Any]:
        """For the page."""
        text = without_logins(self.message)
        continues = not self.time
        return {
            "time": self.time,
            "process": self.process,
            "level": self.level,
            "message": text,
            "continues": continues,
        }


@dataclasses.dataclass
class _Log:
    """The open log of one process. searched: bytes that were read of it."""

    process: int
    file: BinaryIO
    size: int
    searched: int = 0

    def read(self, first: int, end: int) -> bytes:
        self.searched += max(end - first, 0)
        return os.pread(self.file.fileno(), max(end - first, 0), first)

    def before(self, end: int) -> Iterator[Entry]:
        """The entries before `end`, latest first."""
        high, window = end, _WINDOW
        while high > 0:
            low = max(high - window, 0)
            entries = _entries(self.read(low, high), self.process, low)
            if low:  # the first may have begun earlier
                entries = [entry for entry in entries[1:] if entry.time] if len(entries) > 1 else []
            if not entries and low and window < _MOST_LINE:
                window *= 2
                continue
            yield from reversed(entries)
            high, window = (entries[0].first if entries else low), _WINDOW

    def after(self, first: int, end: int) -> Iterator[Entry]:
        """The whole lines from `first` on, in their order; what continues an entry that was read before comes with no time."""
        while first < end:
            text = self.read(first, min(first + _WINDOW, end))
            if len(text) == _WINDOW and b"\n" not in text:
                text = self.read(first, min(first + _MOST_LINE, end))
            whole = text[: text.rfind(b"\n") + 1] or (text if len(text) >= _MOST_LINE else b"")
            if not whole:
                return
            yield from _entries(whole, self.process, first)
            first += len(whole)


def _entries(text: bytes, process: int, first: int) -> list[Entry]:
    """The entries of a piece of a log that begins at `first`."""
    entries: list[Entry] = []
    lines = text.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for line in lines:
        end = first + len(line) + 1
        match = _HEAD.fullmatch(line)
        if match:
            level, message = match[2].decode(), match[3].decode("utf-8", "replace")
            entries.append(Entry(_seconds(match[1].decode()), process, level, message, first, end))
        else:
            more = line.decode("utf-8", "replace").removeprefix(INDENT)
            if entries:
                last = entries[-1]
                entries[-1] = dataclasses.replace(last, message=f"{last.message}\n{more}", end=end)
            else:
                entries.append(Entry(0.0, process, "", more, first, end))
        first = end
    return entries


def _seconds(text: str) -> float:
    try:
        return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()
    except ValueError:  # the 31st of February
        return 0.0


def newest(folder: Folder, limit: int, query: str = "", level: str = "") -> dict[str, Any]:
    """The last page."""
    return _page_before(folder, None, limit, query, level)


def before(folder: Folder, cursor: str, limit: int, query: str = "", level: str = "") -> dict[str, Any]:
    """The page before a cursor. Raises `ValueError` for one that is none."""
    return _page_before(folder, _parse(cursor), limit, query, level)


def after(folder: Folder, cursor: str, limit: int, query: str = "", level: str = "") -> dict[str, Any]:
    """What was written after a cursor, as much as a page holds. Raises `ValueError` for one that is none."""
    places = _parse(cursor)
    logs = _open(folder)
    try:
        if any(log.size < places.get(log.process, 0) for log in logs) or places.keys() - {log.process for log in logs}:
            return {**_page_before(folder, None, limit, query, level), "reset": True}
        merged = heapq.merge(*(log.after(places.get(log.process, 0), log.size) for log in logs), key=_by_time)
        entries = []
        for entry in _as_much_as_a_page(merged, entries, logs, limit, query, level):
            places[entry.process] = entry.end
        return _page(logs, entries, None, places)
    finally:
        _close(logs)


def _page_before(folder: Folder, places: dict[int, int] | None, limit: int, query: str, level: str) -> dict[str, Any]:
    logs = _open(folder)
    try:
        ends = {log.process: _end_of_lines(log) for log in logs}
        reset = places is not None and any(places.get(process, 0) > end for process, end in ends.items())
        at = ends if places is None or reset else {process: places.get(process, 0) for process in ends}
        older, entries = dict(at), []
        merged = heapq.merge(*(log.before(at[log.process]) for log in logs), key=_by_time, reverse=True)
        for entry in _as_much_as_a_page(merged, entries, logs, limit, query, level):
            older[entry.process] = entry.first
        page = _page(logs, entries[::-1], older if any(older.values()) else None, ends)
        return {**page, "reset": reset}
    finally:
        _close(logs)


def _page(
    logs: list[_Log], entries: list[Entry], older: dict[int, int] | None, newer: dict[int, int]
) -> dict[str, Any]:
    return {
        "entries": [entry.to_json() for entry in entries],
        "older": _cursor(older) if older else None,
        "newer": _cursor(newer),
        "reset": False,
        "searched_bytes": sum(log.searched for log in logs),
        "processes": len(logs),
    }


def _as_much_as_a_page(
    merged: Iterable[Entry], fitting: list[Entry], logs: list[_Log], limit: int, query: str, level: str
) -> Iterator[Entry]:
    """The entries, until so many of them fit, which are added to `fitting`, or enough was searched."""
    for entry in merged:
        if entry.fits(query, level):
            fitting.append(entry)
        yield entry
        if len(fitting) == limit or sum(log.searched for log in logs) > _MOST_SEARCHED:
            return


def _by_time(entry: Entry) -> tuple[float, int]:
    return entry.time, entry.process


def _end_of_lines(log: _Log) -> int:
    """Where the last whole line ends."""
    first = max(log.size - _WINDOW, 0)
    return first + log.read(first, log.size).rfind(b"\n") + 1


def _open(folder: Folder) -> list[_Log]:
    logs = []
    for name in folder.names("logs"):
        match = _NAME.fullmatch(name)
        if match and len(logs) < _MOST_PROCESSES:
            try:
                file = folder.open(f"logs/{name}")
            except OSError:  # a link, or gone
                continue
            logs.append(_Log(int(match[1]), file, os.fstat(file.fileno()).st_size))
    return logs


def _close(logs: list[_Log]) -> None:
    for log in logs:
        log.file.close()


def _cursor(places: dict[int, int]) -> str:
    return "_".join(f"{process}.{place}" for process, place in places.items()) or "none"


def _parse(cursor: str) -> dict[int, int]:
    if cursor == "none":
        return {}
    places = {}
    for part in cursor.split("_"):
        process, _, place = part.partition(".")
        places[int(process)] = int(place)
    if min(places.values()) < 0:
        raise ValueError("a place before the file")
    return places
