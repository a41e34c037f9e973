"""Show where every leaf of the state would live, without training: shape, PartitionSpec, stage, bytes per device."""

import argparse
import json

from rich.table import Column, Table

from jaxtrain.cli import start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --json, devices."""
    start.add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """The table of `Layout.table`, with totals."""
    resolved = start.resolved(arguments)
    start.start_devices(arguments)
    from jaxtrain.inspect import describe_layout  # noqa: PLC0415

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
            leaf["path"], shape, f"P({spec})", str(leaf["stage"]), f"{leaf['bytes_per_device']:,}", leaf["note"]
        )
    console.print(table)
    axes = " x ".join(f"{name} {size}" for name, size in layout["mesh"].items())
    console.print(f"\n{layout['parameters']:,} parameters; mesh {axes}")
    for tree, count in layout["bytes_per_device"].items():
        console.print(f"{tree}: {count:,} bytes per device")
