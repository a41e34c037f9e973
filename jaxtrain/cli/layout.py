"""Show where every leaf of the state would live, without training: shape, PartitionSpec, stage, bytes per device."""

import argparse
import json
import sys
from pathlib import Path

from rich.table import Column, Table

from jaxtrain.cli import start
from jaxtrain.errors import ConfigError
from jaxtrain.host.files import atomic_write
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --json, --schedule-plot, --trace, devices."""
    start.add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--schedule-plot", default="", metavar="SVG", help="draw the pipeline schedule into this file")
    parser.add_argument(
        "--trace", default="", metavar="RUN", help="also draw the step that this run recorded (layout.trace_step)"
    )
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints a row for each leaf, and totals; or draws the pipeline schedule."""
    for option in ("schedule_plot", "trace"):
        path = getattr(arguments, option)
        require_local(path, f"--{option.replace('_', '-')} {path}", ConfigError)
    resolved = start.resolved(arguments)
    start.say_what_flags_are(arguments)
    start.start_devices(arguments)
    from jaxtrain.training.layout_report import describe_layout, draw_schedule  # noqa: PLC0415

    if arguments.schedule_plot:
        atomic_write(Path(arguments.schedule_plot), draw_schedule(resolved.config, arguments.devices, arguments.trace))
        print(printable(arguments.schedule_plot))
        return
    if arguments.trace:
        raise ConfigError("--trace needs --schedule-plot SVG.")
    layout = describe_layout(resolved.config, arguments.devices)
    if arguments.json:
        print(json.dumps(layout, indent=2))
        return
    console = start.console()
    first = Column("leaf", overflow="fold")
    table = Table(first, "shape", "spec", "stage", "bytes per device", "note", box=None, pad_edge=False)
    for leaf in layout["leaves"]:
        shape = "x".join(map(str, leaf["shape"])) or "-"
        spec = ", ".join(str(axis) for axis in leaf["spec"])
        table.add_row(
            leaf["path"],
            shape,
            f"P({spec})",
            "all" if leaf["stage"] is None else str(leaf["stage"]),
            f"{leaf['bytes_per_device']:,}",
            leaf["note"],
        )
    console.print(table)
    axes = " x ".join(f"{name} {size}" for name, size in layout["mesh"].items())
    console.print()
    console.print(f"{layout['parameters']:,} parameters; mesh {axes}; microbatches {layout['microbatches']}")
    for line in layout["stages"]:
        console.print(line)
    for text in layout["warnings"]:
        print(f"jaxtrain: {printable(text)}", file=sys.stderr)
    for tree, count in layout["bytes_per_device"].items():
        by_stage = layout["bytes_by_stage"][tree].values()
        console.print(
            f"{tree}: {count:,} bytes per device"
            + (f" ({', '.join(f'{b:,}' for b in by_stage)})" if len(set(by_stage)) > 1 else "")
        )
