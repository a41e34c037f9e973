"""Show the resolved config of a recipe, and where each value came from."""

import argparse

from rich.table import Column, Table

from jaxtrain.cli import start
from jaxtrain.config import flatten, to_dict
from jaxtrain.recipes import resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE; overrides are taken out before."""
    parser.add_argument(
        "config", metavar="FILE[:ARGUMENT,...]", help="a recipe and its arguments; --config.KEY=VALUE changes a field"
    )


def run(arguments: argparse.Namespace) -> None:
    """One row a field."""
    found = resolve(arguments.config, arguments.overrides)
    table = Table(Column("field", overflow="fold"), Column("value", overflow="fold"), "from", box=None, pad_edge=False)
    for key, value in flatten(to_dict(found.config)).items():
        table.add_row(f"config.{key}", repr(value), found.origins[key])
    start.console().print(table)
