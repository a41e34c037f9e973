"""Plan a layout: what every possible one needs on some devices and how fast it should be, without them.

Memory is that of the compiled program where a layout was compiled, and else by formulas; times are modelled, not measured.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from jaxtrain.cli import start
from jaxtrain.errors import ConfigError
from jaxtrain.host.files import atomic_write
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import printable
from jaxtrain.observability.rendering import cost, gpu_hours, size

_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --target, --link, --compile, --all, --json, --picture, --fit, --price, devices."""
    start.add_config_argument(parser)
    start.add_target_argument(parser)
    parser.add_argument(
        "--link", action="append", default=[], metavar="within|between=LINK",
        help="what connects the GPUs of a host (within) or hosts (between): nvlink4, pcie5, infiniband-ndr, ethernet-25, ... "
        "GIGABYTES_PER_SECOND:MICROSECONDS, or FILE.json[:METHOD] of `jaxtrain bench comm --save-fit`; by default what such "
        "GPUs have, and infiniband-ndr",
    )  # fmt: skip
    parser.add_argument(
        "--compile",
        type=int,
        default=-1,
        metavar="N",
        help="compile the N fastest layouts; 0 is formulas alone (default 4)",
    )
    parser.add_argument("--all", action="store_true", help="show every layout, also those that the run refuses")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--picture", default="", metavar="SVG", help="draw memory and time of the layouts into this file"
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="the smallest number of each GPU on which this run fits, and an epoch's cost there",
    )
    parser.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="[GPU=]PRICE",
        help="of a GPU an hour, for --fit; may be repeated",
    )
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the layouts, the best first. Returns 1 where none fits."""
    require_local(arguments.picture, f"--picture {arguments.picture}", ConfigError)
    prices = _prices(arguments.price)
    resolved = start.resolved(arguments)
    start.say_what_flags_are(arguments)
    progress = start.progress()
    if arguments.fit:
        return _fit(arguments, resolved, prices, progress)
    if prices:
        raise ConfigError("--price is for --fit: it says what an epoch costs.")
    target = start.planned_target(arguments)
    from jaxtrain.training.plan.search import COMPILED, plan  # noqa: PLC0415

    compiled = COMPILED if arguments.compile < 0 else arguments.compile
    with progress.activity(f"planning for {target.name}") as activity:
        report = plan(resolved.config, target, links=arguments.link, compiled=compiled, said=activity.say)
    if arguments.picture:
        from jaxtrain.training.plan.picture import picture  # noqa: PLC0415

        atomic_write(Path(arguments.picture), picture(report))
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, everything=arguments.all)
        if arguments.picture:
            print(printable(arguments.picture))
    return 0 if report["best"] else 1


def _prices(words: Sequence[str]) -> dict[str, float]:
    """By GPU; "" is any. Raises `ConfigError` for what is no price."""
    prices = {}
    for word in words:
        gpu, _, text = word.rpartition("=")
        try:
            prices[gpu] = float(text)
        except ValueError:
            prices[gpu] = -1.0
        if not 0 <= prices[gpu] < 1e9:
            raise ConfigError(f"--price {word}: must be a price of a GPU an hour, such as 2.5 or h100=2.5.")
    return prices


def _print(report: Mapping[str, Any], *, everything: bool) -> None:
    console = start.console()
    kept = f"; kept: {', '.join(report['kept'])}" if report["kept"] else ""
    console.print(
        f"{report['target']}, global batch {report['global_batch']}, {report['precision']}, {size(report['usable_bytes'])} of "
        f"a device usable; links {report['within']} within a host, {report['between']} between{kept}"
    )
    console.print(report["how"])
    console.print()
    legal = [row for row in report["layouts"] if row["step_seconds"] is not None]
    refused = [row for row in report["layouts"] if row["step_seconds"] is None]
    rows = report["layouts"] if everything else legal[:_SHOWN]
    console.print(layouts_table(rows))
    if hidden := len(report["layouts"]) - len(rows):
        why = f", {len(refused)} of them refused by the run" if refused else ""
        console.print(f"{hidden} more{why}: --all shows them, with why not")
    console.print()
    if report["best"] is None:
        console.print("no layout fits: use more devices, or a smaller global batch")
        return
    flags = report["best"]["flags"] or "(the config as it is)"
    console.print(f"best: {flags}")
    console.print("the same in a run that chooses by itself: --config.layout.strategy=auto")


def layouts_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row a layout. rows: `layouts` of a report."""
    right = ("stages", "replica", "data", "tensor", "zero", "microbatches", "peak", "ms a step", "examples/s")
    names = (
        "stages", "replica", "data", "tensor", "zero", "microbatches", "remat", "schedule",
        "fits", "peak", "", "ms a step", "examples/s", "limit", "why not",
    )  # fmt: skip
    table = Table(*(Column(n, justify="right" if n in right else "left") for n in names), box=None, pad_edge=False)
    for row in rows:
        mesh, fields = row["mesh"], row["fields"]
        seconds, peak = row["step_seconds"], row["peak_bytes"]
        table.add_row(
            *(str(mesh[axis]) for axis in ("stage", "replica", "data", "tensor")),
            str(fields["layout.zero"]),
            str(fields.get("layout.microbatches", "-")),
            fields.get("train.remat", "-"),
            f"{fields['layout.schedule']}{f' x {chunks}' if (chunks := fields['layout.chunks']) > 1 else ''}"
            if mesh["stage"] > 1
            else "-",
            {True: "yes", False: "no", None: "perhaps"}[row["fits"]] if seconds is not None else "refused",
            size(peak) if peak is not None and peak < 1 << 60 else "-",
            "compiled" if row["compiled"] else "formula" if peak is not None else "",
            f"{1000 * seconds:.1f}" if seconds is not None else "-",
            f"{row['examples_per_second']:,.0f}" if seconds is not None else "-",
            row["limit"],
            row["why_not"],
        )
    return table


def _fit(arguments: argparse.Namespace, resolved: Any, prices: Mapping[str, float], progress: Any) -> int:
    """Prints a row for each GPU: how many the run needs, and what an epoch takes and costs."""
    start.without_devices()
    from jaxtrain.training.plan.fit import fit  # noqa: PLC0415

    with progress.activity("planning for each GPU") as activity:
        rows = fit(resolved.config, arguments.target, links=arguments.link, prices=prices, said=activity.say)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0 if any(row["devices"] for row in rows) else 1
    names = ("GPU", "count", "peak", "of", "minutes an epoch", "GPU hours an epoch", "cost an epoch", "layout")
    table = Table(
        *(Column(n, justify="left" if n in ("GPU", "layout") else "right") for n in names), box=None, pad_edge=False
    )
    for row in rows:
        if not row["devices"]:
            table.add_row(row["gpu"], "-", "-", size(row["usable_bytes"]), "-", "-", "-", row["why_not"])
            continue
        table.add_row(
            row["gpu"], str(row["devices"]), size(row["peak_bytes"]), size(row["usable_bytes"]),
            f"{row['epoch_seconds'] / 60:.3g}", gpu_hours(row["gpu_hours"]), cost(row["cost"]),
            row["flags"] or "(the config as it is)",
        )  # fmt: skip
    console = start.console()
    console.print("the fewest of each GPU that leave 30 % to spare, by formulas; times are modelled, not measured")
    console.print()
    console.print(table)
    return 0 if any(row["devices"] for row in rows) else 1
