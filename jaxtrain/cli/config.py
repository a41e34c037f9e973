"""Show the resolved config of a recipe, and where each value came from; or explain fields of the config (--explain)."""

import argparse
import json
import textwrap
from pathlib import Path

from rich.table import Column, Table

from jaxtrain.checkpoint.config_changes import kind_of
from jaxtrain.cli import start
from jaxtrain.config import SECTIONS, FieldInfo, explain, explain_sections, flat_keys, flatten, to_dict
from jaxtrain.errors import ConfigError
from jaxtrain.recipes import Resolved, unknown_field

_WIDTH = 100  # characters of a line of an explanation, also on a wider screen: longer ones are hard to read

_ON_RESUME = {
    "free": "may change freely",
    "length": "may change where every step already run keeps its learning rate; otherwise only with "
    "--config.checkpoint.allow_changes=true",
    "numbers": "may change only with --config.checkpoint.allow_changes=true",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE or --config FILE, --explain, --json; overrides are taken out before."""
    parser.add_argument("file", nargs="?", metavar="FILE[:ARGUMENT,...]", help="the same as --config FILE")
    start.add_config_argument(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the values as JSON, as a run stores them in config.json"
    )
    parser.add_argument(
        "--explain",
        nargs="+",
        metavar="KEY",
        help="print what these fields mean, such as optim.warmup, or all fields of a section, such as optim: type, default, "
        "allowed values, whether a resumed run may change them, and with a recipe (--config FILE) the value there",
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints one row a field, or the explanation of the fields that `--explain` names. Raises `ConfigError`."""
    if arguments.file and arguments.config:
        raise ConfigError(f"jaxtrain config takes one recipe: {arguments.file}, or --config {arguments.config}.")
    arguments.config = arguments.file or arguments.config
    named = arguments.config or arguments.yaml
    if not named and not arguments.explain:
        raise ConfigError("jaxtrain config needs FILE, or --explain KEY; see jaxtrain config --help.")
    if not named and arguments.overrides:
        key = arguments.overrides[0][0]
        raise ConfigError(f"--config.{key} changes a field of a recipe; write jaxtrain config FILE --explain KEY.")
    if arguments.json and arguments.explain:
        raise ConfigError("--json prints values; --explain has none.")
    keys = [key.removeprefix("config.") for key in arguments.explain or ()]
    for key in keys:
        _check_key(key)
    resolved = start.resolved(arguments) if named else None
    start.say_what_flags_are(arguments)
    if keys:
        _print_explanations(keys, resolved)
    elif resolved and arguments.json:
        print(json.dumps(to_dict(resolved.config), indent=2))
    elif resolved:
        _print_values(resolved)


def _print_values(resolved: Resolved) -> None:
    table = Table(Column("field", overflow="fold"), Column("value", overflow="fold"), "from", box=None, pad_edge=False)
    for key, value in flatten(to_dict(resolved.config)).items():
        table.add_row(f"config.{key}", repr(value), resolved.origins[key])
    start.console().print(table)


def _check_key(key: str) -> None:
    if key not in SECTIONS and key not in flat_keys():
        if Path(key.partition(":")[0]).is_file():
            raise ConfigError(f"--explain {key}: is a file; write it first, jaxtrain config FILE --explain KEY.")
        raise unknown_field(key)


def _print_explanations(keys: list[str], resolved: Resolved | None) -> None:
    fields, sections, console = explain(), explain_sections(), start.console()
    width = min(_WIDTH, console.width)
    paragraphs = []
    for key in keys:
        if key in sections:
            paragraphs.append(textwrap.wrap(f"config.{key}: {sections[key]}", width))
        for name, info in fields.items():
            if name == key or name.startswith(f"{key}."):
                paragraphs.append(_explanation(name, info, resolved, width))
    for number, lines in enumerate(paragraphs):
        for line in ["", *lines] if number else lines:
            console.print(line)


def _explanation(key: str, info: FieldInfo, resolved: Resolved | None, width: int) -> list[str]:
    """The lines about one field.

    Args:
      key: its dotted name.
      info: what `explain` says of it.
      resolved: the config whose value is shown, if any.
      width: characters of a line.
    """
    rows = {"type": info.type, "default": repr(info.default), "allowed": info.allowed}
    if resolved:
        value = flatten(to_dict(resolved.config))[key]
        rows["value"] = f"{value!r} (from: {resolved.origins[key]})"
    rows |= {"on resume": _ON_RESUME[kind_of(key)], "meaning": info.meaning}
    lines = [f"config.{key}"]
    for name, text in rows.items():
        if text:
            lines += textwrap.wrap(
                text,
                width,
                initial_indent=f"  {name:11}",
                subsequent_indent=" " * 13,
                break_on_hyphens=False,
                break_long_words=False,
            )
    return lines
