"""All runs below a directory, looked at again and again by a thread: a run whose files have not changed is not read again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain.dashboard.overview import FILES, Row, job_row, run_id, run_row
from jaxtrain.errors import WorkdirError
from jaxtrain.host.folder import Folder
from jaxtrain.jobs.queue import Entry, Queue
from jaxtrain.jobs.run_status import DAMAGED, RUNNING, find_runs, is_run

log = logging.getLogger("jaxtrain")

_LIVELY_SECONDS = 0.5  # between two looks at runs that live, or whose files have just changed
_LIVELY_FOR = 60.0
_ALL_SECONDS = 1.0  # at least between two looks at everything
_BUSY_SHARE, _SLOW_SHARE = 9, 2  # and so many times a look's processor time, and its time by the clock
_MOST_LOGS = 256

_TOPICS = {
    "metrics.jsonl": "metrics", "events.jsonl": "events", "starts": "starts", "manifest.json": "manifest",
    "layout.json": "layout", "result.json": "result", "checkpoints": "checkpoints", "evaluation": "evaluation",
    "logs": "logs",
}  # fmt: skip

Signature = tuple[int, int, int]


@dataclasses.dataclass
class _Run:
    """What is known of a run. `changed` has the version in which each topic did."""

    folder: Folder
    signatures: dict[str, Signature]
    row: Row
    version: int
    touched: float
    changed: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Changes:
    """What is new since a version."""

    version: int
    rows: list[Row]
    gone: list[str]
    scanning: bool


class RunsIndex:
    """Keeps the rows of all runs below a root, and of the waiting jobs of a queue."""

    def __init__(self, root: Path, queue: Queue):
        """Looks at nothing before `start`. Raises `WorkdirError` where `root` is no directory."""
        if not root.is_dir():
            raise WorkdirError(f"{root} is no directory; choose another --root.")
        self.root = Path(os.path.realpath(root))
        self._queue = queue
        self._runs: dict[str, _Run] = {}
        self._jobs: dict[str, tuple[Row, int]] = {}
        self._gone: dict[str, int] = {}
        self._version, self._found, self._scanned = 0, 0, False
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="runs index", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, without waiting for a look that it may have begun."""
        self._stopped.set()

    @property
    def version(self) -> int:
        """Rises with each change that was seen."""
        return self._version

    def folder(self, identifier: str) -> Folder | None:
        """The work directory of a run; None where there is none of that identifier."""
        run = self._runs.get(identifier)
        return run.folder if run else None

    def row(self, identifier: str) -> Row | None:
        """The row of a run."""
        run = self._runs.get(identifier)
        return run.row if run else None

    def since(self, version: int) -> Changes:
        """The rows that are new, or changed, since a version; all, since -1."""
        with self._lock:
            if version == self._version:
                return Changes(version, [], [], not self._scanned)
            rows = [run.row for run in self._runs.values() if run.version > version]
            rows += [row for row, since in self._jobs.values() if since > version]
            gone = [identifier for identifier, since in self._gone.items() if since > version]
            return Changes(self._version, rows, gone, not self._scanned)

    def topics(self, identifier: str, version: int) -> list[str]:
        """Which files of a run have changed since a version."""
        with self._lock:
            run = self._runs.get(identifier)
            return [topic for topic, since in run.changed.items() if since > version] if run else []

    def progress(self) -> dict[str, Any]:
        """How far the first look has come."""
        return {"scanning": not self._scanned, "found": max(self._found, len(self._runs)), "read": len(self._runs)}

    def _keep(self) -> None:
        quiet_until = 0.0
        while not self._stopped.is_set():
            began, busy = time.monotonic(), time.thread_time()
            try:
                if began >= quiet_until:
                    first = not self._scanned
                    self._look_at_all()
                    now, busy = time.monotonic(), time.thread_time() - busy
                    pause = 0.0 if first else max(_BUSY_SHARE * busy, _SLOW_SHARE * (now - began))
                    quiet_until = now + max(_ALL_SECONDS, pause)
                else:
                    self._look_at_lively()
            except Exception:
                log.exception("the runs below %s could not be looked at; the next look may", self.root)
            self._stopped.wait(_LIVELY_SECONDS)

    def _look_at_all(self) -> None:
        jobs, rows = self._read_jobs()
        there: set[str] = set()
        folders = []
        with contextlib.suppress(WorkdirError):  # the root was removed
            for path in find_runs(self.root):
                folders.append(Folder(self.root, path.relative_to(self.root).as_posix()))
                self._found = len(folders)
        for folder in folders:
            if self._stopped.is_set():
                return
            there.add(run_id(folder.name))
            self._look_at(folder, jobs.get(folder.path))
        with self._lock:
            known: tuple[dict[str, Any], ...] = (self._runs, self._jobs)
            for items, present in zip(known, (there, rows.keys()), strict=True):
                for identifier in items.keys() - present:
                    self._version += 1
                    del items[identifier]
                    self._gone[identifier] = self._version
            for identifier, row in rows.items():
                if identifier not in self._jobs or self._jobs[identifier][0] != row:
                    self._version += 1
                    self._jobs[identifier] = row, self._version
            if not self._scanned:
                self._version += 1
                self._scanned = True

    def _look_at_lively(self) -> None:
        after = time.monotonic() - _LIVELY_FOR
        for run in list(self._runs.values()):
            if run.row.state == RUNNING or run.touched > after:
                self._look_at(run.folder, None)

    def _read_jobs(self) -> tuple[dict[Path, Entry], dict[str, Row]]:
        """The jobs by the work directories of their runs; and the rows of those that have none."""
        jobs: dict[Path, Entry] = {}
        rows: dict[str, Row] = {}
        with contextlib.suppress(OSError):
            for entry in self._queue.entries():
                with contextlib.suppress(WorkdirError):
                    run = entry.job().run
                    if run is not None:
                        jobs[Path(os.path.realpath(run))] = entry
                    if (run is None or not (run / "config.json").exists()) and (row := job_row(entry)):
                        rows[row.id] = row
        return jobs, rows

    def _look_at(self, folder: Folder, job: Entry | None) -> None:
        identifier, found = run_id(folder.name), folder.stats(FILES)
        signatures = _signatures(folder, found)
        known = self._runs.get(identifier)
        if known and known.signatures == signatures and known.row.state != RUNNING:
            return
        try:
            row = run_row(folder, found, job)
        except Exception as error:  # of a file that nobody has thought of: the others are shown all the same
            log.exception("%s could not be read", folder.path)
            row = Row(identifier, "run", folder.name, DAMAGED, f"It could not be read ({type(error).__name__}).")
        if known and not is_run(folder.path):  # taken away meanwhile: the next look at all lets go of it
            return
        if known and row.job is None:
            row = dataclasses.replace(row, job=known.row.job)
        self._note(identifier, folder, signatures, row)

    def _note(self, identifier: str, folder: Folder, signatures: dict[str, Signature], row: Row) -> None:
        with self._lock:
            known = self._runs.get(identifier)
            if known and known.row == row and known.signatures == signatures:
                return
            self._version += 1
            before = known.signatures if known else {}
            changed = dict(known.changed) if known else {}
            for name, topic in _TOPICS.items():
                if before.get(name) != signatures.get(name):
                    changed[topic] = self._version
            version = self._version if known is None or known.row != row else known.version
            touched = time.monotonic() if before or self._scanned else -math.inf
            if known and known.signatures == signatures:
                touched = known.touched
            self._runs[identifier] = _Run(folder, signatures, row, version, touched, changed)
            self._gone.pop(identifier, None)


def _signatures(folder: Folder, found: Mapping[str, os.stat_result]) -> dict[str, Signature]:
    """By which the files of a run are known to have changed. Logs are appended to, which does not show in their directory."""
    signatures = {name: (each.st_ino, each.st_size, each.st_mtime_ns) for name, each in found.items()}
    if "logs" in found and stat.S_ISDIR(found["logs"].st_mode):
        logs = Folder(folder.root, f"{folder.name}/logs")
        sizes = [each.st_size for each in logs.stats(logs.names()[:_MOST_LOGS]).values()]
        signatures["logs"] = (len(sizes), sum(sizes), 0)
    return signatures
