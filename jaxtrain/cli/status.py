"""Show how runs and jobs are: all runs below a directory and all jobs of the local queue, or those that are named."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from jaxtrain.cli.start import console
from jaxtrain.errors import WorkdirError
from jaxtrain.jobs import run_status
from jaxtrain.jobs.queue import Entry, JobState, default_queue
from jaxtrain.jobs.run_status import RunStatus, age, find_runs, read_status
from jaxtrain.jobs.target import run_or_job
from jaxtrain.observability.rendering import cost, gpu_hours, loss, percent, short_duration


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """A job of the local queue, and its run."""

    id: str
    state: JobState
    run: RunStatus | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN|JOB ..., --root, --json."""
    parser.add_argument("names", nargs="*", metavar="RUN|JOB", help="a work directory, or a job's id, number or name")
    parser.add_argument("--root", default=".", metavar="DIR", help="show all runs below it (default: this directory)")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> None:
    """Prints a row for each job and run. Reads files alone: what a run's config names is never run."""
    named = [run_or_job(name) for name in arguments.names]
    folders = [each for each in named if isinstance(each, Path)] if named else find_runs(Path(arguments.root))
    entries = [each for each in named if isinstance(each, Entry)] if named else default_queue().entries()
    jobs = [_job_status(entry) for entry in entries]
    runs = [read_status(folder) for folder in folders]
    if arguments.json:
        print(
            json.dumps({"jobs": [dataclasses.asdict(job) for job in jobs], "runs": list(map(dataclasses.asdict, runs))})
        )
        return
    if jobs:
        _print_jobs(jobs)
    if runs:
        _print_runs(runs)
    if not jobs and not runs:
        print(f"no run below {Path(arguments.root).absolute()}, and no job in the queue")


def _job_status(entry: Entry) -> JobStatus:
    try:
        state, folder = entry.state(), entry.job().run
    except WorkdirError as error:
        return JobStatus(entry.id, JobState(status=run_status.DAMAGED, reason=str(error)), None)
    return JobStatus(entry.id, state, read_status(folder) if folder and folder.is_dir() else None)


def _print_jobs(jobs: Sequence[JobStatus]) -> None:
    table = Table("job", "state", "try", "GPUs", "progress", "loss", "val acc", "left", "why", box=None, pad_edge=False)
    for job in jobs:
        state = job.state
        cells = _progress(job.run) if job.run else ("", "", "", "")
        table.add_row(job.id, state.status, str(state.tries or ""), str(len(state.gpus) or ""), *cells, state.reason)
    console().print(table)


def _print_runs(runs: Sequence[RunStatus]) -> None:
    spent = ("GPU hours", "cost") if any(run.gpu_hours for run in runs) else ()
    columns = ("run", "state", "progress", "loss", "val acc", "left", "devices", "seen", *spent, "why")
    table = Table(*columns, box=None, pad_edge=False)
    for run in runs:
        seen = f"{short_duration(age(run))} ago" if run.seen else ""
        table.add_row(run.path, run.state, *_progress(run), run.devices, seen, *_spent(run)[: len(spent)], run.reason)
    console().print(table)


def _spent(run: RunStatus) -> tuple[str, str]:
    """GPU hours, and what they cost."""
    return ("", "") if run.gpu_hours is None else (gpu_hours(run.gpu_hours), cost(run.cost))


def _progress(run: RunStatus) -> tuple[str, str, str, str]:
    """Steps and epoch, loss, validation accuracy, time left."""
    of = f"/{run.last_step}" if run.last_step else ""
    epoch = "" if run.epoch is None else f" (epoch {run.epoch + 1})"
    return (
        f"{run.step}{of}{epoch}",
        "" if run.loss is None else loss(run.loss),
        "" if run.val_accuracy is None else percent(run.val_accuracy),
        "" if run.seconds_left is None else short_duration(run.seconds_left),
    )
