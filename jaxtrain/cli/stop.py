"""Stop a run or a job: the run saves a checkpoint and ends, and `jaxtrain resume` goes on from there."""

import argparse
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from jaxtrain.cli.start import progress
from jaxtrain.errors import ConfigError, EnvironmentMismatchError
from jaxtrain.host.processes import start_ticks
from jaxtrain.jobs.queue import ENDED, Entry, default_queue
from jaxtrain.jobs.run_status import here, read_status
from jaxtrain.jobs.target import run_or_job

_LOOK_SECONDS = 0.2
_NOT_YET = 75  # the exit code where it has not ended in time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN|JOB, --timeout."""
    parser.add_argument("name", metavar="RUN|JOB", help="a work directory, or a job's id, number or name")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="seconds to wait for its end")


def run(arguments: argparse.Namespace) -> int:
    """Asks it to end and waits until it has. Returns 75 where it has not by then. Raises `JaxtrainError`."""
    found = run_or_job(arguments.name)
    if isinstance(found, Entry):
        return _stop_job(found, arguments.timeout)
    job = next((entry for entry in default_queue().entries() if _is_of(entry, found)), None)
    return _stop_job(job, arguments.timeout) if job else _stop_run(found, arguments.timeout)


def _is_of(entry: Entry, folder: Path) -> bool:
    """Whether a job that has not ended trains in `folder`: its server would start the run again."""
    run = entry.job().run
    return entry.state().status not in ENDED and run is not None and run.resolve() == folder.resolve()


def _stop_job(job: Entry, timeout: float) -> int:
    if job.state().status in ENDED:
        raise ConfigError(f"Job {job.id} is {job.state().status}; there is nothing to stop.")
    job.ask_to_stop()
    ended = _wait(lambda: job.state().status in ENDED or not (job.is_running() or default_queue().is_served()), timeout)
    status = job.state().status
    if status in ENDED:
        print(f"job {job.id} is {status}")
    elif ended:
        print(f"job {job.id} does not run, and the queue's server will not start it")
    else:
        print(f"job {job.id} was asked to stop, and has not ended yet")
    return 0 if ended else _NOT_YET


def _stop_run(folder: Path, timeout: float) -> int:
    status = read_status(folder)
    if status.pid is None:
        raise ConfigError(f"{folder}: no run works there (it is {status.state}); there is nothing to stop.")
    if not here(status):
        raise EnvironmentMismatchError(f"{folder}: its run is on {status.host}; give the same command there.")
    _terminate(status.pid, status.born)
    ended = _wait(lambda: read_status(folder).pid != status.pid, timeout)
    after = read_status(folder)
    print(
        f"{folder} is {after.state} at step {after.step}" if ended else f"{folder} was asked to stop, and still works"
    )
    return 0 if ended else _NOT_YET


def _terminate(pid: int, born: str) -> None:
    """Sends SIGTERM to the process `pid`, if it is the one that was started at `born`: numbers are given anew."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if start_ticks(pid) == born:
            signal.pidfd_send_signal(process, signal.SIGTERM)
    except PermissionError:
        raise EnvironmentMismatchError(
            f"Process {pid} belongs to another user; ask them, or use their account."
        ) from None
    finally:
        os.close(process)


def _wait(ended: Callable[[], bool], seconds: float) -> bool:
    """Whether `ended` becomes true in time."""
    deadline = time.monotonic() + seconds
    with progress().activity("waiting until it has saved and ended"):
        while not (done := ended()) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
    return done
