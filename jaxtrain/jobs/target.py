"""What a user means: the work directory of a run, or a job of the local queue."""

from __future__ import annotations

from pathlib import Path

from jaxtrain.errors import ConfigError, WorkdirError
from jaxtrain.jobs.queue import Entry, default_queue
from jaxtrain.jobs.run_status import is_run


def run_or_job(name: str) -> Path | Entry:
    """The run or the job of that name; a project may lie in a directory that is called as its job.

    Args:
      name: a work directory; or a job's id, number or name.

    Raises:
      WorkdirError: there is neither.
    """
    folder = Path(name)
    if is_run(folder):
        return folder
    try:
        return default_queue().find(name)
    except ConfigError as error:
        refuse_many(folder)
        where = f"{folder} holds no run" if folder.is_dir() else f"{folder} is no work directory"
        raise WorkdirError(f"{where}, and of jobs: {error}") from None


def refuse_many(folder: Path) -> None:
    """Raises `WorkdirError` where a directory is no run itself, such as that of a sweep, and has runs in it."""
    first = None if is_run(folder) else next(filter(is_run, sorted(folder.glob("*"))), None)
    if first is not None:
        raise WorkdirError(
            f"{folder} is no run, but has some, such as {first}; jaxtrain status --root {folder} lists them."
        )
