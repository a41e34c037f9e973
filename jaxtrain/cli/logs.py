"""Show the logs of all processes of a run, merged by time."""

import argparse
import dataclasses
import json

from jaxtrain.host.text import indented
from jaxtrain.observability.merged_logs import merged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, --json."""
    parser.add_argument("workdir", metavar="RUN", help="the work directory of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(arguments: argparse.Namespace) -> None:
    """Prints every entry, in the order of time."""
    for entry in merged(arguments.workdir):
        if arguments.json:
            print(json.dumps(dataclasses.asdict(entry)))
        else:
            print(indented(f"{entry.time} {entry.process} {entry.level} {entry.message}"))
