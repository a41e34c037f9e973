"""Go on with a run from its work directory alone, or put a job of the local queue that has ended back into it."""

import argparse
from pathlib import Path

from jaxtrain.cli import start, train
from jaxtrain.config import from_dict
from jaxtrain.errors import ConfigError
from jaxtrain.jobs.queue import default_queue
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
    folder = Path(arguments.name)
    if not folder.is_dir():
        entry = default_queue().find(arguments.name)
        entry.start_again()
        print(f"{entry.id} waits in the queue again")
        return
    with train.stopped_early():
        stored = Workdir(folder).read_config()
        if stored is None:
            raise ConfigError(f"{folder}: no run was started there (it has no config.json).")
        config = with_overrides(from_dict(stored), arguments.overrides)
        train.run_resolved(arguments, Resolved(config, {}, folder.name), str(folder))
