"""Submit a job (job.yaml, as `jaxtrain init` writes it) to the local queue, Slurm, PBS, Kubernetes or SkyPilot."""

import argparse
import dataclasses
import os
import shlex

from jaxtrain.errors import ConfigError
from jaxtrain.host.gpus import Gpus
from jaxtrain.host.text import note, printable
from jaxtrain.jobs.job import SCHEDULERS, Job, read_job
from jaxtrain.jobs.queue import default_queue
from jaxtrain.jobs.runner import check_requirements, command
from jaxtrain.jobs.schedulers import submission, submit
from jaxtrain.jobs.server import exceeds_host
from jaxtrain.recipes import resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """JOB, --scheduler, --dry-run."""
    parser.add_argument("job", metavar="JOB", help="the file of a job")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="", help="in place of the job's own")
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted, and submit nothing")


def run(arguments: argparse.Namespace) -> None:
    """Checks the job and its config, then submits it. Raises `JaxtrainError`."""
    job = read_job(arguments.job)
    if arguments.scheduler:
        job = dataclasses.replace(job, scheduler=arguments.scheduler)
    if job.config:
        _check_config(job)
    if job.scheduler != "local":
        _to_scheduler(job, dry_run=arguments.dry_run)
        return
    check_requirements(job)
    if never := exceeds_host(job, Gpus()):
        raise ConfigError(f"Job {job.name}: {never}.")
    if arguments.dry_run:
        print(shlex.join(command(job)))
        return
    queue = default_queue()
    entry = queue.submit(job)
    print(f"{entry.id} waits in the queue; see it with: jaxtrain status {entry.id}")
    if not queue.is_served():
        note("nobody serves the queue yet: start jaxtrain queue serve on this host")


def _check_config(job: Job) -> None:
    """Raises `ConfigError` for a config that the run would refuse, in the job's directory: a recipe may be a file there."""
    before = os.getcwd()
    os.chdir(job.directory)
    try:
        resolve(job.config, job.overrides.items())
    finally:
        os.chdir(before)


def _to_scheduler(job: Job, *, dry_run: bool) -> None:
    if not dry_run:
        print(printable(submit(job), lines=True))
        return
    hidden = dataclasses.replace(job, environment=dict.fromkeys(job.environment, "[hidden]"))
    given = submission(hidden)
    print(shlex.join(given.command))
    if given.manifest:
        print(given.manifest, end="")
