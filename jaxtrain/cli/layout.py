"""Show where the state would live, without training: MiB a device of each tree, then a row a layer."""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from jaxtrain.cli import start
from jaxtrain.errors import ConfigError
from jaxtrain.host.files import atomic_write
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import printable

_NO_LAYER = "no layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --leaves, --json, --schedule-plot, --trace, --target, devices."""
    start.add_config_argument(parser)
    parser.add_argument(
        "--leaves", action="store_true", help="a row a leaf: its shape, PartitionSpec, stage, bytes a device"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every leaf")
    parser.add_argument("--schedule-plot", default="", metavar="SVG", help="draw the pipeline schedule into this file")
    parser.add_argument(
        "--trace", default="", metavar="RUN", help="also draw the step that this run recorded (layout.trace_step)"
    )
    start.add_target_argument(parser)
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints totals, and a row for each layer or leaf; or draws the pipeline schedule."""
    for option in ("schedule_plot", "trace"):
        path = getattr(arguments, option)
        require_local(path, f"--{option.replace('_', '-')} {path}", ConfigError)
    resolved = start.resolved(arguments)
    if arguments.trace and not arguments.schedule_plot:
        raise ConfigError("--trace needs --schedule-plot SVG.")
    start.say_what_flags_are(arguments)
    with start.progress().activity("tracing the model"):
        devices = start.planned_devices(arguments)
        from jaxtrain.training.layout_report import describe_layout, draw_schedule  # noqa: PLC0415
        from jaxtrain.training.startup_report import once_each  # noqa: PLC0415

        if arguments.schedule_plot:
            drawing = draw_schedule(resolved.config, devices, arguments.trace)
        else:
            layout = describe_layout(resolved.config, devices)
    if arguments.schedule_plot:
        atomic_write(Path(arguments.schedule_plot), drawing)
        print(printable(arguments.schedule_plot))
        return
    if arguments.json:
        print(json.dumps(layout, indent=2))
        return
    console = start.console()
    axes = " x ".join(f"{name} {size}" for name, size in layout["mesh"].items())
    console.print(f"{layout['parameters']:,} parameters; mesh {axes}")
    console.print(f"microbatches {layout['microbatches']}")
    for line in layout["stages"]:
        console.print(line)
    for table in (totals(layout), leaf_rows(layout["leaves"]) if arguments.leaves else layer_rows(layout["leaves"])):
        console.print()
        console.print(table)
    for line in once_each((leaf["path"], leaf["note"]) for leaf in layout["leaves"] if leaf["tree"] != "gradients"):
        console.print(line)
    for text in layout["warnings"]:
        print(f"jaxtrain: {printable(text)}", file=sys.stderr)


def totals(layout: Mapping[str, Any]) -> Table:
    """MiB a device of each tree that is not empty, and their sum; with pipeline stages a column for each.

    layout: of `describe_layout`.
    """
    held = {tree: list(stages.values()) for tree, stages in layout["bytes_by_stage"].items() if any(stages.values())}
    stages = max(len(counts) for counts in held.values())
    names = ["MiB a device"] if stages == 1 else [f"stage {stage}" for stage in range(stages)]
    table = _table("tree" if stages == 1 else "MiB a device", *(Column(name, justify="right") for name in names))
    for tree, counts in held.items():
        table.add_row(tree, *map(_mib, counts))
    table.add_row("sum", *(_mib(sum(counts)) for counts in zip(*held.values(), strict=True)))
    return table


def layer_rows(leaves: Sequence[Mapping[str, Any]]) -> Table:
    """A row a layer: its parameters, the axes that split any of them and of its optimizer state, its stage, MiB a device.

    Where not all is trained alike: also how many parameters are trained, and at what multiple of the learning rate.

    leaves: of `describe_layout`.
    """
    layers = dict.fromkeys(leaf["path"].split("/")[1] for leaf in leaves if leaf["tree"] == "params")
    rows: dict[str, list[Mapping[str, Any]]] = {name: [] for name in (*layers, _NO_LAYER)}
    for leaf in leaves:
        rows[next((key for key in leaf["path"].split("/")[1:] if key in layers), _NO_LAYER)].append(leaf)
    right = ("parameters", "trained", "rate", "stage", "MiB a device")
    tuned = any(leaf["rate"] != 1 for leaf in leaves if leaf["tree"] == "params")
    names = (
        "layer",
        "parameters",
        *(("trained", "rate") if tuned else ()),
        "params over",
        "opt_state over",
        *right[-2:],
    )
    table = _table(*(Column(name, justify="right" if name in right else "left") for name in names))
    for name, found in rows.items():
        trees = {tree: [leaf for leaf in found if leaf["tree"] == tree] for tree in ("params", "opt_state")}
        stages = {leaf["stage"] for leaf in found} - {None}
        table.add_row(
            name,
            f"{sum(math.prod(leaf['shape']) for leaf in trees['params']):,}",
            *(_trained(trees["params"]) if tuned else ()),
            _axes(trees["params"]),
            _axes(trees["opt_state"]),
            ", ".join(map(str, sorted(stages))) or "all",
            _mib(sum(leaf["bytes_per_device"] for leaf in found)),
        )
    return table


def _trained(leaves: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """How many parameters of a layer are trained, and the multiple of the learning rate that they have."""
    trained = [leaf for leaf in leaves if leaf["rate"]]
    return f"{sum(math.prod(leaf['shape']) for leaf in trained):,}", f"{trained[0]['rate']:.3g}" if trained else "-"


def leaf_rows(leaves: Sequence[Mapping[str, Any]]) -> Table:
    """A row a leaf. leaves: of `describe_layout`."""
    table = _table(Column("leaf", overflow="fold"), "shape", "spec", "stage", Column("bytes a device", justify="right"))
    for leaf in leaves:
        spec = ", ".join(str(axis) for axis in leaf["spec"])
        table.add_row(
            leaf["path"],
            "x".join(map(str, leaf["shape"])) or "-",
            f"P({spec})",
            "all" if leaf["stage"] is None else str(leaf["stage"]),
            f"{leaf['bytes_per_device']:,}",
        )
    return table


def _table(*columns: Column | str) -> Table:
    return Table(*columns, box=None, pad_edge=False)


def _axes(leaves: Sequence[Mapping[str, Any]]) -> str:
    """The mesh axes that split a leaf or more."""
    found = {axis for leaf in leaves for dim in leaf["spec"] for axis in (dim if isinstance(dim, list) else [dim])}
    return ", ".join(sorted(found - {None})) or "-"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f}"
