"""The process of one try of a job of the local queue. It holds the job's locks, so that they end with it, whatever happens."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from jaxtrain.errors import ConfigError, EnvironmentMismatchError
from jaxtrain.host.processes import STOPPING, package_command
from jaxtrain.jobs.job import Job
from jaxtrain.jobs.queue import Entry, TryEnd, lease

TAKEN = 75
"""The exit code where another one has a lock: nothing was run."""

_LOOK_SECONDS = 0.2
_GRACE_SECONDS = 120.0  # from SIGTERM to SIGKILL; `jaxtrain launch` gives its processes 60

_RUN = "from jaxtrain.jobs.runner import run_try; sys.exit(run_try(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))"
# Becomes the command that follows the process that it is to end with.
_END_WITH = (
    "from jaxtrain.host.processes import end_with; end_with(int(sys.argv[1])); "
    "import os; os.execvp(sys.argv[2], sys.argv[2:])"
)


def start(entry: Entry, number: int, gpus: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a runner, which goes on when its server ends."""
    with open(entry.log, "ab") as log:
        command = [*package_command(_RUN), str(entry.path), str(number), *gpus]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def run_try(path: str, number: int, gpus: Sequence[str]) -> int:
    """Runs a job once, and returns its exit code.

    Args:
      path: of the job's entry.
      number: of the try.
      gpus: UUIDs of those that the job gets.
    """
    entry, signals = Entry(Path(path)), []
    for each in (*STOPPING, signal.SIGINT):
        signal.signal(each, lambda caught, _: signals.append(caught))
    with contextlib.ExitStack() as held:
        if not all(held.enter_context(lock) for lock in (entry.running(), *map(lease, gpus))):
            return TAKEN
        print(f"== try {number}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
        try:
            code = _run(entry, entry.job(), gpus, signals)
        except (ConfigError, EnvironmentMismatchError, OSError) as error:
            print(error, flush=True)
            code = error.exit_code if isinstance(error, (ConfigError, EnvironmentMismatchError)) else 127
        entry.write_end(TryEnd(number, code, time.time(), interrupted=bool(signals)))
    return code


def _run(entry: Entry, job: Job, gpus: Sequence[str], signals: list[int]) -> int:
    check_requirements(job)
    process = subprocess.Popen(
        [*package_command(_END_WITH), str(os.getpid()), *command(job)],
        stdin=subprocess.DEVNULL,
        cwd=job.directory,
        env={**os.environ, **job.environment, **visible(gpus)},
    )
    deadline = float("inf")
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(_LOOK_SECONDS)
            return 128 - code if code < 0 else code
        if deadline == float("inf") and (signals or entry.is_to_stop()):
            deadline = time.monotonic() + _GRACE_SECONDS
            process.terminate()
        elif time.monotonic() > deadline:
            process.kill()


def command(job: Job) -> list[str]:
    """What a job runs on one host."""
    if job.command:
        return list(job.command)
    launch = package_command("from jaxtrain.cli import program; program()")
    return [*launch, "launch", "--", "train", *job.train_arguments()]


def visible(gpus: Sequence[str]) -> dict[str, str]:
    """The variables that show a job its GPUs alone; without any, JAX computes on the CPU."""
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    return {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}


def check_requirements(job: Job) -> None:
    """Raises `EnvironmentMismatchError` for a package that is not here, `ConfigError` for one that is no package."""
    missing = []
    for text in job.requirements:
        try:
            wanted = Requirement(text)
            version = importlib.metadata.version(wanted.name)
        except InvalidRequirement as error:
            raise ConfigError(f"Job {job.name}: requirements: {text!r} is no package ({error}).") from None
        except importlib.metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            missing.append(f"{text} (here is {version})")
    if missing:
        raise EnvironmentMismatchError(
            f"Job {job.name} needs {', '.join(missing)}; install with: pip install {' '.join(map(repr, job.requirements))}."
        )
