"""Compare runs: in which settings they differ, who won, and whether by more than seeds differ.

Runs that are equal but for the seed are a group, with a mean and its spread. Runs that failed are counted, and named.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path

from rich import table as rich_table

from jaxtrain.cli.start import console
from jaxtrain.errors import ConfigError
from jaxtrain.host.files import atomic_write
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import printable, spreadsheet_cell
from jaxtrain.reporting.comparison_tables import tables
from jaxtrain.reporting.table import Table, is_number
from jaxtrain.runs.comparison import Comparison, compare
from jaxtrain.runs.settings import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN ..., --by, --csv, --json."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a work directory, a directory with runs in it, or a pattern ('runs/lr*')",
    )
    parser.add_argument(
        "--by",
        default="",
        metavar="FIGURE",
        help="what decides: val/accuracy (the default, where runs have it), test/accuracy, train/loss, throughput, "
        "wall_seconds, ...; last/test/accuracy is of the last weights, not the best",
    )
    parser.add_argument(
        "--csv",
        default="",
        metavar="FILE",
        help="also write a row for each run, with all its figures; - is standard output",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")


def run(arguments: argparse.Namespace) -> None:
    """Prints sentences and tables. Raises `JaxtrainError`: a name leads to no run, or no run has the figure."""
    require_local(arguments.csv, f"--csv {arguments.csv}", ConfigError)
    if arguments.csv == "-" and arguments.json:
        raise ConfigError("--csv - and --json: both would go to standard output; name a file for --csv.")
    found = compare(arguments.runs, by=arguments.by)
    if arguments.csv == "-":
        sys.stdout.write(_csv(found))
        return
    if arguments.csv:
        atomic_write(Path(arguments.csv), _csv(found))
    if arguments.json:
        print(json.dumps(found.to_json(), allow_nan=False))
        return
    for text in (*found.sentences(), *found.warnings):
        print(printable(text))
    for each in tables(found):
        print()
        _print(each)


def _print(table: Table) -> None:
    made = rich_table.Table(box=None, pad_edge=False)
    for place, name in enumerate(table.columns):
        numbers = all(is_number(row[place]) for row in table.rows)
        made.add_column(name, justify="right" if numbers else "left")
    for row in table.rows:
        made.add_row(*row)
    print(printable(table.caption))
    console().print(made)


def _csv(found: Comparison) -> str:
    """A row a run: what it is, the settings that differ, all figures, stability."""
    labels = {each.path: group.label for group in found.groups for each in group.runs}
    figures = sorted({name for each in found.runs for name in each.figures})
    counts = ("spikes", "skipped_updates", "lost_steps", "starts")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ("run", "group", "seed", "state", "step")
    writer.writerow([*head, *map(spreadsheet_cell, (*found.differing, *figures)), *counts])
    for each in found.runs:
        what = (each.name, labels.get(each.path), each.seed, each.state, each.step)
        values = [shown(each.settings.get(key)) for key in found.differing]
        numbers = [each.figures.get(name) for name in figures]
        stability = [getattr(each.stability, name) for name in counts]
        writer.writerow(
            [*(spreadsheet_cell("" if cell is None else str(cell)) for cell in (*what, *values)), *numbers, *stability]
        )
    return file.getvalue()
