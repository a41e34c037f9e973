"""Write a new project: a directory with a job (job.yaml), which `jaxtrain submit` takes."""

import argparse
from pathlib import Path

from jaxtrain.errors import ConfigError
from jaxtrain.host.files import atomic_write, writing
from jaxtrain.jobs.job import parse_job

_TEMPLATE = """\
# A job of jaxtrain: `jaxtrain submit job.yaml` submits it, `jaxtrain status` shows it, `jaxtrain stop {name}` stops it.
# Paths are relative to this file.
name: {name}
description: ""
config: quickstart              # a recipe: a file, or the name of one that comes with jaxtrain
overrides: {{}}                   # fields of the config, such as {{train.epochs: 3, optim.learning_rate: 0.05}}
# command: [python, train.py]   # instead of config and overrides: any program
workdir: runs/{name}            # where the run writes everything; it goes on from what is there
requirements: []                # packages that it needs beside jaxtrain, such as [wandb, pandas>=2]
resources: {{gpu: 0, cpu: 1, memory: 2Gi}}   # on each of its hosts
environment: {{}}                 # variables; their values are not shown anywhere
scheduler: local                # or slurm, pbs, kubernetes, skypilot
retries: 2                      # how often the local queue starts it again after it has died
# nodes: 1                      # hosts; for the schedulers of clusters
# queue: ""                     # Slurm's partition, the queue of PBS, or Kueue's local queue
# time_limit: "02:00:00"        # for Slurm and PBS
# image: ""                     # of a container (launch/Dockerfile), for Kubernetes and SkyPilot
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME."""
    parser.add_argument("name", metavar="NAME", help="of the project, its directory and its job")


def run(arguments: argparse.Namespace) -> None:
    """Writes NAME/job.yaml. Raises `ConfigError` for a name that a job cannot have, or where something is there."""
    folder = Path(arguments.name)
    file = folder / "job.yaml"
    parse_job({"name": folder.name, "config": "quickstart"}, file)
    if folder.exists():
        raise ConfigError(f"{folder} is there already; choose another name.")
    with writing(folder):
        folder.mkdir(parents=True)
    atomic_write(file, _TEMPLATE.format(name=folder.name))
    print(f"wrote {file}; change it, then: jaxtrain submit {file}")
