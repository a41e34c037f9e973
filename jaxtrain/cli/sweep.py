"""Train many runs that differ in some settings: a grid or draws, with seeds. The same command goes on where it was stopped."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from rich.table import Table

from jaxtrain.cli import flags, start
from jaxtrain.errors import ConfigError, SweepError
from jaxtrain.host.text import printable
from jaxtrain.jobs.run_status import is_run
from jaxtrain.observability.rendering import percent
from jaxtrain.reporting.report import report
from jaxtrain.runs.comparison import Comparison, number
from jaxtrain.runs.settings import short_names, shown
from jaxtrain.sweeps import session
from jaxtrain.sweeps.crew import Crew
from jaxtrain.sweeps.plan import Plan, make_plan
from jaxtrain.sweeps.session import SweepResult
from jaxtrain.sweeps.share import Share
from jaxtrain.sweeps.spec import Halving, Sweep, from_words, read_sweep
from jaxtrain.sweeps.store import Decision
from jaxtrain.sweeps.worker import FAILED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE or --config with --over; --random, --halving, --workdir, --jobs, --devices, --retry-failed, --dry-run."""
    parser.add_argument("file", nargs="?", default="", metavar="FILE", help="a sweep in YAML (docs/sweeps.md)")
    parser.add_argument(
        "--config", default="", metavar="FILE[:ARGUMENT,...]", help="in place of FILE: the recipe of all runs"
    )
    parser.add_argument(
        "--over",
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="a field that varies, and its values: --over config.optim.learning_rate 0.05 0.1 0.2; once for each field",
    )
    parser.add_argument(
        "--random",
        type=int,
        default=0,
        metavar="N",
        help="draw N settings; --over may name a range then: --over config.optim.learning_rate loguniform 0.001 1",
    )
    parser.add_argument(
        "--halving",
        action="store_true",
        help="stop the worse half early, at a quarter and half of the length and so on, until one setting is left",
    )
    parser.add_argument("--workdir", default="", metavar="DIR", help="of the sweep, with a directory for each run")
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="train N runs at once, with a share of the cores or GPUs each"
    )
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="use N devices for each run")
    parser.add_argument("--retry-failed", action="store_true", help="try runs again that have failed")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs, and run nothing")
    flags.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Trains the sweep. Raises `SweepError` where runs failed, and as `jaxtrain.sweep` does."""
    for name in ("random", "jobs", "devices"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: must be at least 1.")
    asked = _asked(arguments)
    start.say_what_flags_are(arguments)
    if arguments.dry_run:
        _list(make_plan(asked))
        return
    found = session.sweep(
        asked,
        arguments.workdir,
        jobs=arguments.jobs,
        num_devices=arguments.devices,
        retry_failed=arguments.retry_failed,
    )
    _summarize(found)


def _asked(arguments: argparse.Namespace) -> Sweep:
    """The sweep of FILE, or of the flags; overrides are those of all runs."""
    if arguments.file:
        for name in ("config", "over", "random", "halving"):
            if getattr(arguments, name):
                raise ConfigError(
                    f"--{name}: {arguments.file} describes the sweep; change it there, or leave the file out."
                )
        asked = read_sweep(arguments.file)
    else:
        asked = from_words(arguments.config, arguments.over, arguments.random)
        asked = dataclasses.replace(asked, halving=Halving() if arguments.halving else None)
    overrides = dict(arguments.overrides)
    if twice := [key for key in overrides if key in asked.over or (key == "seed" and asked.seeds)]:
        raise ConfigError(f"--config.{twice[0]}: the sweep varies it; leave one out.")
    return dataclasses.replace(asked, overrides={**asked.overrides, **overrides})


def _list(plan: Plan) -> None:
    """Checks the runs of a plan, and prints them."""
    with Crew([Share()], None, []) as crew:
        session.check(plan.runs, crew)
    keys = list(plan.runs[0].settings)
    table = Table("run", *keys, box=None, pad_edge=False)
    for run in plan.runs:
        table.add_row(run.name, *(str(run.settings[key]) for key in keys))
    start.console().print(table)
    rungs = f", halved {plan.halving.rungs} times by {plan.halving.metric}" if plan.halving else ""
    print(f"{len(plan.runs)} runs of {len(plan.settings())} settings{rungs}")


def _summarize(found: SweepResult) -> None:
    """Writes the report and prints the table, the best first. Raises `SweepError` where runs failed."""
    folders = [run.workdir.path for run in found.runs if is_run(run.workdir.path)]
    if folders:
        made = report(folders, found.path / "report", title=f"Sweep {found.path.name}")
        start.console().print(_table(made.comparison))
        if found.decisions:
            start.console().print(_rungs(found.decisions))
        print(printable(made.html))
    if failed := found.in_state(FAILED):
        sentences = " ".join(f"{run.name}: {run.reason}" for run in failed)
        which = "those whose setting halving has kept" if found.decisions else "them"
        raise SweepError(
            f"{len(failed)} of {len(found.runs)} runs failed; --retry-failed tries {which} again. {sentences}"
        )


def _rungs(decisions: Sequence[Decision]) -> Table:
    """The figure that decided, by setting and rung; those that came farthest first."""
    table = Table("halving", *(f"at {percent(decision.share)}" for decision in decisions), box=None, pad_edge=False)
    names = dict.fromkeys(name for each in reversed(decisions) for name in (*each.kept, *each.figures))
    for name in names:
        figures = [(each.figures.get(name), name in each.figures, name in each.kept) for each in decisions]
        cells = [
            ("-" if figure is None else f"{figure:.4g}") + " goes on" * kept if there else ""
            for figure, there, kept in figures
        ]
        table.add_row(name, *cells)
    return table


def _table(comparison: Comparison) -> Table:
    """A row for each setting: mean and spread over its seeds, and how steadily they trained."""
    names = short_names(comparison.differing)
    figures = [
        name
        for name in dict.fromkeys((comparison.by, "val/accuracy", "test/accuracy"))
        if any(name in group.spreads for group in comparison.groups)
    ]
    table = Table(*names.values(), *figures, "runs", "spikes", "skipped updates", "starts", box=None, pad_edge=False)
    for group in comparison.groups:
        values = (shown(group.settings[key]) for key in names)
        spreads = (number(group.spreads[name], name) if name in group.spreads else "" for name in figures)
        stability = group.stability
        counts = (stability.spikes, stability.skipped_updates, stability.starts)
        table.add_row(*values, *spreads, group.counted, *map(str, counts))
    return table
