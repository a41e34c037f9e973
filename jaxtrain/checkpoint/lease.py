"""A lease on the work directory, so that one run at a time writes there: a lock file that its owner renews.

The lock names its owner. On the same host a dead owner is noticed at once. On another host (a job was moved to another node)
the lock is taken over when it was not renewed for `LEASE_SECONDS`. If the owner was only frozen, it finds before it commits a
checkpoint that the lock is no longer its own (fencing), and stops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxtrain.errors import TakenOverError, WorkdirError
from jaxtrain.host.files import create, parse_json, patiently, writing
from jaxtrain.host.processes import boot_id, start_ticks

LOCK_FILE = "lock.json"
LEASE_SECONDS = 30.0
_RENEW_SECONDS = 5.0
_LOOK_SECONDS = 0.5
log = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds the lock."""

    token: str
    """Identifies this start of the run."""
    host: str
    pid: int
    boot: str
    """The kernel's identifier of the host's present boot."""
    born: str
    """When the process started (`start_ticks`), since process numbers are reused."""
    since: str
    """When it took the lock."""

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return cls(os.urandom(8).hex(), socket.gethostname(), os.getpid(), boot_id(), start_ticks(os.getpid()), since)

    def is_dead(self) -> bool:
        """Whether it is known to be dead: it ran on this host since its present boot, and does not run any more."""
        return self.boot == boot_id() and self.host == socket.gethostname() and start_ticks(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lease:
    """The lock of one work directory, held by this process until `release`."""

    def __init__(self, path: Path, owner: Owner):
        self._path, self._owner = path, owner
        self._released = threading.Event()
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    @property
    def token(self) -> str:
        """Identifies this start of the run."""
        return self._owner.token

    def check(self) -> None:
        """Raises `TakenOverError` if another run has taken over the directory."""
        owner = _read(self._path)
        if owner is None:
            raise TakenOverError(
                f"The lock {self._path} is not there any more: the work directory was deleted or moved, or another run has "
                "taken it over and has ended. This one stops, and writes nothing more there."
            )
        if owner.token != self.token:
            raise TakenOverError(
                f"Another run has taken {self._path.parent} over ({owner}) while this one stood still; "
                "this one stops and writes nothing more there."
            )

    def release(self) -> None:
        """Removes the lock, if this run still holds it."""
        self._released.set()
        with contextlib.suppress(OSError, WorkdirError):
            self.check()
            self._path.unlink()

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            with contextlib.suppress(OSError, WorkdirError):
                self.check()
                os.utime(self._path)


class NoLease:
    """For the processes that do not hold the lock."""

    token = ""

    def check(self) -> None:
        """Does nothing."""


def wait_to_see(workdir: Path, token: str, process: int, patience: float = 70.0) -> None:
    """For processes other than 0: returns once they see the lock that process 0 holds.

    Args:
      workdir: the work directory, as this process knows it.
      token: of process 0's lease.
      process: the number of this process.
      patience: seconds to wait; a network file system may show a new file a minute late.

    Raises:
      WorkdirError: the lock does not appear: each host has its own directory.
    """
    deadline = time.monotonic() + patience
    while (owner := _read(workdir / LOCK_FILE)) is None or owner.token != token:
        if time.monotonic() > deadline:
            raise WorkdirError(
                f"Process {process} on {socket.gethostname()} does not see in {workdir} what process 0 wrote there: the work "
                "directory must be on a file system that all hosts share; choose one with --workdir."
            )
        time.sleep(_LOOK_SECONDS)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[Lease]:
    """Holds the lock inside the block. Raises `WorkdirError` if a running process has it."""
    lease = acquire(workdir)
    try:
        yield lease
    finally:
        lease.release()


def acquire(workdir: Path) -> Lease:
    """Takes the lock of `workdir`. It waits up to `LEASE_SECONDS` to see whether an owner still renews it."""
    path, owner = workdir / LOCK_FILE, Owner.here()
    seen, since = _renewed(path), time.monotonic()
    while not _create(path, owner):
        holder = _read(path)
        if holder is not None and holder.is_dead():
            _take_over(path, holder)
            continue
        renewed = _renewed(path)
        if renewed != seen:  # it was renewed meanwhile
            raise WorkdirError(
                f"The work directory {workdir} is in use by another run ({holder}); wait for its end, or choose another "
                "with --workdir."
            )
        if time.monotonic() - since > LEASE_SECONDS:
            _take_over(path, holder)
        elif time.monotonic() - since < 2 * _LOOK_SECONDS:
            log.info(
                "the work directory is locked by %s; waiting up to %.0f s to see if it lives", holder, LEASE_SECONDS
            )
        time.sleep(_LOOK_SECONDS)
    return Lease(path, owner)


def _create(path: Path, owner: Owner) -> bool:
    """Writes the lock file if there is none. It appears as a whole, by a hard link, which fails where the name exists."""
    part = path.with_name(f".{path.name}.{owner.token}")
    with writing(path):
        try:
            with create(part) as file:
                file.write(json.dumps(dataclasses.asdict(owner)) + "\n")
            os.link(part, path)
        except FileExistsError:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
            return False
        finally:
            part.unlink(missing_ok=True)
    return True


def _take_over(path: Path, holder: Owner | None) -> None:
    """Removes the lock of `holder`, which nobody renews. Of several processes that try, one succeeds."""
    stale = path.with_name(f".{path.name}.stale.{os.urandom(4).hex()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(stale)
        now = _read(stale)
        if holder is not None and now is not None and now.token != holder.token:  # another run has it now: restore it
            with contextlib.suppress(FileExistsError):
                os.link(stale, path)
        else:
            log.warning("the lock of a run that is no more was taken over (%s)", holder or "unreadable")
        stale.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds the lock of a work directory, as somebody sees it who only looks."""

    owner: Owner
    lives: bool
    """Whether it runs on this host, or has renewed the lock lately."""


def look(workdir: Path) -> Holder | None:
    """Who holds the lock of `workdir`; None where nobody does."""
    path = workdir / LOCK_FILE
    owner = _read(path)
    if owner is None:
        return None
    if owner.boot == boot_id() and owner.host == socket.gethostname():
        return Holder(owner, start_ticks(owner.pid) == owner.born)
    return Holder(owner, time.time() - _renewed(path) / 1e9 < LEASE_SECONDS)


def _read(path: Path) -> Owner | None:
    try:
        owner = Owner(**parse_json(patiently(path.read_bytes)))
    except (OSError, ValueError, TypeError):
        return None
    return owner if isinstance(owner.pid, int) else None


def _renewed(path: Path) -> int:
    """When the lock was renewed, in nanoseconds of its file system's clock; 0 without a lock."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
