"""Go on with a run from its work directory alone, or put a job of the local queue that has ended back into it."""

import argparse

from jaxtrain.cli import start, train
from jaxtrain.config import from_dict
from jaxtrain.errors import WorkdirError
from jaxtrain.jobs.queue import Entry
from jaxtrain.jobs.target import run_or_job
from jaxtrain.recipes import Resolved, with_overrides
from jaxtrain.workdir import Workdir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN|JOB, devices, processes; --config.KEY=VALUE changes what a resumed run may change."""
    parser.add_argument("name", metavar="RUN|JOB", help="a work directory, or a job's id, number or name")
    parser.set_defaults(config="", smoke=False)
    start.add_device_arguments(parser)
    start.add_process_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Trains with the config that the run has stored, or queues the job. Raises `JaxtrainError`."""
    found = run_or_job(arguments.name)
    if isinstance(found, Entry):
        found.start_again()
        print(f"{found.id} waits in the queue again")
        return
    with train.stopped_early():
        stored = Workdir(found).read_config()
        if stored is None:
            raise WorkdirError(f"{found} was deleted meanwhile.")
        config = with_overrides(from_dict(stored), arguments.overrides)
        train.run_resolved(arguments, Resolved(config, {}, found.name), str(found))
