"""The local queue: a directory with an entry for each job. Whoever submits writes an entry, and one server works through them.

    NUMBER-NAME/job.json     the job, readable by its owner alone (its environment may hold secrets)
    NUMBER-NAME/state.json   how it is; written by the server
    NUMBER-NAME/end.json     how the latest try ended; written by its runner
    NUMBER-NAME/stop         there, when somebody has asked to stop it
    NUMBER-NAME/log          what it prints

Everything is written whole and synced, so that a reboot loses nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrain.errors import ConfigError, WorkdirError
from jaxtrain.host.files import atomic_write, read_json, sync_directory, writing
from jaxtrain.host.paths import home
from jaxtrain.host.text import did_you_mean
from jaxtrain.jobs.job import Job, Resources

WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"
ENDED = (DONE, FAILED, STOPPED)

_ENTRY = re.compile(r"([0-9]{6,})-[a-z0-9-]+")


@dataclasses.dataclass(frozen=True)
class JobState:
    """How a job of the queue is."""

    status: str = WAITING
    reason: str = ""
    """Why it waits or has failed, in a sentence."""
    tries: int = 0
    """How often it was started."""
    failures: int = 0
    """How often it died by itself; a reboot does not count."""
    gpus: tuple[str, ...] = ()
    """UUIDs of the latest try."""
    submitted: float = 0.0
    """Seconds since 1970; so are the next two, 0 where it has not happened."""
    started: float = 0.0
    ended: float = 0.0
    code: int | None = None
    """The exit code of the latest try that ended."""
    boot: str = ""
    """The host's boot in which the latest try was started."""


@dataclasses.dataclass(frozen=True)
class TryEnd:
    """How one try of a job ended."""

    number: int
    """Of the try, from 1."""
    code: int
    """As shells have it."""
    time: float
    interrupted: bool
    """Whether its runner was told to end: the host is shut down."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One job of the queue."""

    path: Path

    @property
    def id(self) -> str:
        """What a user calls it: 000001-NAME."""
        return self.path.name

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.path / "log"

    def job(self) -> Job:
        """The job. Raises `WorkdirError` where it is damaged."""
        values = _tuples(self._read("job.json"))
        try:
            return Job(**{**values, "resources": Resources(**values["resources"])})
        except (TypeError, KeyError) as error:
            raise WorkdirError(f"{self.path / 'job.json'} holds no job ({error}).") from None

    def state(self) -> JobState:
        """How it is. Raises `WorkdirError` where that is damaged."""
        return self._parse("state.json", JobState)

    def state_written(self) -> int:
        """When the state was written, in nanoseconds of its file system's clock; 0 where there is none."""
        try:
            return (self.path / "state.json").stat().st_mtime_ns
        except OSError:
            return 0

    def write_state(self, state: JobState) -> None:
        """For the server, and for the submitter before the server sees it."""
        atomic_write(self.path / "state.json", json.dumps(dataclasses.asdict(state)) + "\n")

    def end(self) -> TryEnd | None:
        """How the latest try ended that has ended by itself."""
        return self._parse("end.json", TryEnd) if (self.path / "end.json").exists() else None

    def write_end(self, end: TryEnd) -> None:
        """For the runner."""
        atomic_write(self.path / "end.json", json.dumps(dataclasses.asdict(end)) + "\n")

    def ask_to_stop(self) -> None:
        """For a user: the server stops it, or does not start it."""
        atomic_write(self.path / "stop", "")

    def is_to_stop(self) -> bool:
        """Whether a user has asked for that."""
        return (self.path / "stop").exists()

    def start_again(self) -> None:
        """For a user: puts a job that has ended back into the queue, where its run goes on. Raises `ConfigError`."""
        state = self.state()
        if state.status not in ENDED:
            raise ConfigError(f"Job {self.id} is {state.status}; only one that has ended can be resumed.")
        (self.path / "stop").unlink(missing_ok=True)
        self.write_state(dataclasses.replace(state, status=WAITING, reason="", failures=0, ended=0.0))

    @contextlib.contextmanager
    def running(self) -> Iterator[bool]:
        """Holds the lock that a try holds for as long as it lives. Yields whether it could be had."""
        with _locked(self.path / "running") as held:
            yield held

    def is_running(self) -> bool:
        """Whether a try lives."""
        with _locked(self.path / "running", patience=0.0) as free:
            return not free

    def _parse(self, name: str, kind: type) -> Any:
        values = self._read(name)
        try:
            return kind(**_tuples(values))
        except TypeError as error:
            raise WorkdirError(f"{self.path / name} is damaged ({error}).") from None

    def _read(self, name: str) -> dict[str, Any]:
        values = read_json(self.path / name)
        if not isinstance(values, dict):
            raise WorkdirError(f"{self.path / name} is missing, or holds no JSON object.")
        return values


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where a dataclass has tuples."""
    return {key: tuple(each) if isinstance(each, list) else each for key, each in values.items()}


class Queue:
    """The queue of a directory."""

    def __init__(self, path: Path):
        self.path = path

    def entries(self) -> list[Entry]:
        """Every job, in the order of submission."""
        with contextlib.suppress(FileNotFoundError):
            return [Entry(path) for path in sorted(self.path.iterdir()) if _ENTRY.fullmatch(path.name)]
        return []

    def submit(self, job: Job) -> Entry:
        """Adds a job. It appears as a whole, also to a server that looks at this moment."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = self.path / f".part.{os.getpid()}.{os.urandom(4).hex()}"
            part.mkdir(mode=0o700)
            try:
                entry = Entry(part)
                secret = part / "job.json"
                secret.touch(mode=0o600)
                with open(secret, "w", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(job)))
                    file.flush()
                    os.fsync(file.fileno())
                entry.write_state(JobState(submitted=time.time()))
                return self._enter(part, job.name)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise

    def _enter(self, part: Path, name: str) -> Entry:
        """Gives the directory the next number. Of two that submit at once, one finds its number taken and takes the next."""
        with _locked(self.path / ".submit", patience=60.0):
            number = max((int(entry.id.partition("-")[0]) for entry in self.entries()), default=0) + 1
            path = self.path / f"{number:06d}-{name}"
            part.rename(path)
            sync_directory(self.path)
        return Entry(path)

    def find(self, name: str) -> Entry:
        """The job of an id, a number or, where one job alone has it, a name. Raises `ConfigError`."""
        entries = self.entries()
        found = [entry for entry in entries if name in (entry.id, entry.id.partition("-")[2])]
        if name.isdecimal():
            found = [entry for entry in entries if int(entry.id.partition("-")[0]) == int(name)]
        if len(found) != 1:
            ids = [entry.id for entry in entries]
            of_that_name = f"jobs {', '.join(entry.id for entry in found)} have that name" if found else "no such job"
            raise ConfigError(f"{name}: {of_that_name} in the queue {self.path}.{did_you_mean(name, ids)}")
        return found[0]

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """For the server: no other one works on this queue meanwhile. Raises `WorkdirError` where one does."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(self.path / ".server") as held:
            if not held:
                raise WorkdirError(f"The queue {self.path} is served already; one server is enough.")
            yield

    def is_served(self) -> bool:
        """Whether a server works on it."""
        if not self.path.exists():
            return False
        with _locked(self.path / ".server", patience=0.0) as free:
            return not free


@contextlib.contextmanager
def _locked(path: Path, patience: float = 1.0) -> Iterator[bool]:
    """Holds the lock of a file, which ends with the process whatever happens to it. Yields whether it could be had.

    patience: seconds in which it is tried; who only looks holds it for a moment.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield _flock(descriptor, time.monotonic() + patience)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, deadline: float) -> bool:
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def lease(gpu: str, patience: float = 1.0) -> contextlib.AbstractContextManager[bool]:
    """Holds the lease on a GPU of this host, for all queues of this user. Yields whether it could be had.

    Args:
      gpu: its UUID.
      patience: seconds in which it is tried; 0 for who only looks.

    Raises:
      WorkdirError: the directory of the leases cannot be made, or is not this user's.
    """
    folder = Path(tempfile.gettempdir(), f"jaxtrain-{os.getuid()}")
    with writing(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise WorkdirError(f"{folder} belongs to somebody else; remove it.")
    return _locked(folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}.lease", patience)


def default_queue() -> Queue:
    """The user's queue on this host: `$JAXTRAIN_QUEUE_DIR`, or below the home directory."""
    named = os.environ.get("JAXTRAIN_QUEUE_DIR")
    return Queue(Path(named) if named else home("JAXTRAIN_QUEUE_DIR") / ".local/state/jaxtrain/queue")
