"""List a run's checkpoints, or check every file of them against its manifest."""

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path

from rich.table import Table

from jaxtrain.checkpoint.manifest import (
    DeletedError,
    best_of,
    manifested_steps,
    problems,
    read_manifest,
    unless_deleted,
)
from jaxtrain.cli import start
from jaxtrain.errors import CheckpointError, DamagedError
from jaxtrain.workdir import named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """list|verify, RUN, --json."""
    parser.add_argument("action", choices=("list", "verify"))
    parser.add_argument("workdir", metavar="RUN", help="the work directory of a run, or its checkpoints")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Prints a row for each checkpoint. Raises `CheckpointError` if there is none, or if `verify` finds a damaged one."""
    path = named(arguments.workdir)
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    rows = _rows(directory, verify=arguments.action == "verify")
    if not rows:
        raise CheckpointError(f"{arguments.workdir} holds no checkpoint.")
    _mark_best(directory, rows)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        names = [name for name in rows[0] if name != "problems"]
        table = Table(*names, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*("-" if row[name] is None else str(row[name]) for name in names))
        start.console().print(table)
    damaged = [row for row in rows if row["problems"]]
    if damaged:
        found = "; ".join(f"{row['step']}: {row['problems'][0]}" for row in damaged)
        states = " or ".join(sorted({row["state"] for row in damaged}))
        raise CheckpointError(f"{len(damaged)} of {len(rows)} checkpoints in {directory} are {states} ({found}).")


def _rows(directory: Path, *, verify: bool) -> list[dict]:
    """A row for each checkpoint. One that a running run deletes meanwhile has none."""
    while steps := manifested_steps(directory):
        rows = []
        for step in steps:
            with contextlib.suppress(DeletedError):
                with unless_deleted(directory / str(step)):
                    row = _row(directory / str(step), verify=verify)
                rows.append(row)
        if rows:
            return rows
    return []


def _mark_best(directory: Path, rows: list[dict]) -> None:
    """Marks the row of the checkpoint that is best by the run's `checkpoint.best`."""
    from jaxtrain.checkpoint.resume_point import stored_best_by  # noqa: PLC0415

    manifests = []
    for row in rows:
        with contextlib.suppress(CheckpointError):  # its row says so
            manifests.append(read_manifest(directory / str(row["step"])))
    best = best_of(manifests, stored_best_by(directory, manifests))
    for row in rows:
        row["best"] = row["step"] == best


def _row(folder: Path, *, verify: bool) -> dict:
    row = {
        "step": int(folder.name),
        "epoch": None,
        "val_accuracy": None,
        "val_loss": None,
        "val_top5": None,
        "best": False,
        "milestone": None,
        "bytes": None,
        "time": None,
    }
    try:
        found = problems(folder) if verify else []
        manifest = read_manifest(folder)
    except DamagedError as error:
        return row | {"state": "damaged", "problems": [str(error)]}
    except CheckpointError as error:
        return row | {"state": "not readable", "problems": [str(error)]}
    row |= {name: value for name, value in dataclasses.asdict(manifest).items() if name in row}
    row["bytes"] = manifest.bytes
    row["epoch"] = manifest.epoch if manifest.epoch >= 0 else None
    return row | {"state": "damaged" if found else "verified" if verify else "not verified", "problems": found}
