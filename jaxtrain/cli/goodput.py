"""Show what a run's wall time went into, over all its starts, and how each of them ended.

The time went into useful steps, repeated steps, starting, waiting, downtime.
"""

import argparse
import dataclasses
import json
import time

from rich.table import Table

from jaxtrain.cli.start import console
from jaxtrain.host.text import printable
from jaxtrain.jobs.target import refuse_many
from jaxtrain.observability.goodput import StartTimes, goodput, read_starts
from jaxtrain.observability.rendering import cost, duration, gpu_hours
from jaxtrain.workdir import Workdir, named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and --json."""
    parser.add_argument("workdir", metavar="RUN", help="the work directory of a run")
    parser.add_argument("--json", action="store_true", help="seconds by category, for programs")


def run(arguments: argparse.Namespace) -> None:
    """Prints a row for each category. Raises `WorkdirError` if no run was started there."""
    folder = named(arguments.workdir)
    refuse_many(folder)
    starts = read_starts(Workdir(folder).starts)
    found = goodput(starts)
    if arguments.json:
        ends = [start.end and dataclasses.asdict(start.end) for start in starts]
        print(json.dumps({**found.to_json(), "ends": ends}))
        return
    table = Table("what", "h:mm:ss", "share", box=None, pad_edge=False)
    for name, seconds in sorted(found.seconds.items(), key=lambda item: -item[1]):
        table.add_row(name, duration(seconds), f"{seconds / found.wall:.1%}" if found.wall else "")
    table.add_row("all", duration(found.wall), "100.0%")
    console().print(table)
    for number, start in enumerate(starts, 1):
        print(f"start {number}, {_ended(start)}")
    again = f", {found.lost_steps} done again" if found.lost_steps else ""
    count = "1 start" if found.starts == 1 else f"{found.starts} starts"
    if found.gpu_hours:
        print(f"GPU hours {gpu_hours(found.gpu_hours)}, cost {cost(found.cost)}")
    print(f"goodput {found.share:.1%}: {count}, {found.steps} steps{again}")


def _ended(start: StartTimes) -> str:
    """Where a start was, and how it ended, on one line."""
    where = f"on {start.host or '?'}, steps {start.first_step} to {start.step}"
    if start.end is None:
        return printable(f"{where}: it runs, or nobody has seen it end yet")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.end.time))
    code = "" if start.end.code is None else f", exit code {start.end.code}"
    return printable(f"{where}, ended {when}{code} (as {start.end.by} says): {start.end.message}")
