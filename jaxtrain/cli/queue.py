"""The local queue of jobs: `jaxtrain queue serve` works through it, and its jobs survive its end and a reboot."""

import argparse

from jaxtrain.host.gpus import Gpus
from jaxtrain.host.text import note
from jaxtrain.jobs.queue import default_queue
from jaxtrain.jobs.server import Server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """serve, --until-empty."""
    parser.add_argument("action", choices=("serve",), help="start waiting jobs as GPUs, CPUs and memory become free")
    parser.add_argument("--until-empty", action="store_true", help="end when no job waits or runs")


def run(arguments: argparse.Namespace) -> None:
    """Serves until Ctrl-C or SIGTERM. Raises `WorkdirError` where another server does."""
    queue = default_queue()
    note(f"serves {queue.path}; Ctrl-C ends the server, and its jobs go on", "jaxtrain queue")
    Server(queue, Gpus()).serve(until_empty=arguments.until_empty)
