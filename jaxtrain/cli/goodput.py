"""Show what a run's wall time went into, over all its starts: useful steps, repeated steps, starting, waiting, downtime."""

import argparse
import json

from rich.table import Table

from jaxtrain.cli.start import console
from jaxtrain.observability.goodput import goodput, read_starts
from jaxtrain.observability.rendering import duration
from jaxtrain.workdir import Workdir, named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and --json."""
    parser.add_argument("workdir", metavar="RUN", help="the work directory of a run")
    parser.add_argument("--json", action="store_true", help="seconds by category, for programs")


def run(arguments: argparse.Namespace) -> None:
    """Prints a row for each category. Raises `WorkdirError` if no run was started there."""
    found = goodput(read_starts(Workdir(named(arguments.workdir)).starts))
    if arguments.json:
        print(json.dumps(found.to_json()))
        return
    table = Table("what", "h:mm:ss", "share", box=None, pad_edge=False)
    for name, seconds in sorted(found.seconds.items(), key=lambda item: -item[1]):
        table.add_row(name, duration(seconds), f"{seconds / found.wall:.1%}" if found.wall else "")
    table.add_row("all", duration(found.wall), "100.0%")
    console().print(table)
    again = f", {found.lost_steps} done again" if found.lost_steps else ""
    starts = "1 start" if found.starts == 1 else f"{found.starts} starts"
    print(f"goodput {found.share:.1%}: {starts}, {found.steps} steps{again}")
