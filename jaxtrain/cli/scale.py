"""Scale a run over devices: strong and weak scaling, what a step's time goes into, and what would help.

Measured over GPUs, or over processes with cores of their own; simulated on devices that share the cores; and with --target
modelled and compiled for GPUs that need not be there. Each kind has tables of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from jaxtrain.cli import start
from jaxtrain.errors import ConfigError, InterruptedRunError, WorkdirError
from jaxtrain.host.files import atomic_write
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import printable
from jaxtrain.scaling.study import STRONG, WEAK, counts_of

JSON_FILE, CSV_FILE = "scaling.json", "scaling.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --devices, --processes, --simulate, --strong, --weak, --steps, --repeats, --target, --link, --output, ..."""
    start.add_config_argument(parser)
    parser.add_argument(
        "--devices", default="", metavar="N,...", help="numbers of devices, the smallest is the base; "
        "default 1,2,4,... of this machine"
    )  # fmt: skip
    parser.add_argument(
        "--processes", action="store_true", help="only measure: a CPU process with cores of its own for each device"
    )
    parser.add_argument(
        "--simulate", action="store_true", help="only simulate: CPU devices of one process, which share its cores"
    )
    parser.add_argument("--strong", action="store_true", help="only strong scaling: the global batch stays")
    parser.add_argument("--weak", action="store_true", help="only weak scaling: the batch of a device stays")
    parser.add_argument(
        "--steps", type=int, default=0, metavar="N", help="steps of a block; default about 1.5 s of them"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="blocks of each run, in turns (default 5)")
    start.add_target_argument(parser)
    parser.add_argument(
        "--link", action="append", default=[], metavar="within|between=LINK",
        help="what connects the GPUs of --target, as of `jaxtrain plan`",
    )  # fmt: skip
    parser.add_argument(
        "--output", default="", metavar="DIR", help=f"also write {JSON_FILE} and {CSV_FILE} into this directory"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--csv", action="store_true", help="print CSV, a line a figure")


def run(arguments: argparse.Namespace) -> None:
    """Prints the tables, the fits and the bottleneck. Raises `ConfigError` for wrong words, before anything is run."""
    counts = counts_of(arguments.devices) if arguments.devices else ()
    _check(arguments)
    resolved = start.resolved(arguments)
    start.say_what_flags_are(arguments)
    start.without_devices()
    from jaxtrain.scaling.scale import scale  # noqa: PLC0415  wrong arguments are refused before JAX is loaded

    how = "processes" if arguments.processes else "simulated" if arguments.simulate else "auto"
    both = arguments.strong == arguments.weak
    modes = [mode for mode, asked in ((STRONG, arguments.strong), (WEAK, arguments.weak)) if asked or both]
    with _ended_with_a_sentence(), start.progress().activity("scaling") as activity:
        scaled = scale(
            resolved.config, counts, how=how, modes=modes, target=arguments.target, links=arguments.link,
            steps=arguments.steps, repeats=arguments.repeats, said=activity.say,
        )  # fmt: skip
    scaled["command"] = shlex.join(["jaxtrain", *sys.argv[1:]])
    if arguments.json:
        print(json.dumps(scaled, indent=2))
    elif arguments.csv:
        print(_csv(scaled), end="")
    else:
        _print(scaled)
    if arguments.output:  # after they are shown: where they cannot be written, they are not lost
        _write(Path(arguments.output), scaled)
        if not (arguments.json or arguments.csv):
            print(printable(f"{arguments.output}/{JSON_FILE}"))


@contextlib.contextmanager
def _ended_with_a_sentence() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM raise `InterruptedRunError`; the processes that are measured are killed on the way."""
    caught = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if caught else None
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError("Stopped; nothing was written, and no process is left.") from None
    finally:
        if caught:
            signal.signal(signal.SIGTERM, before)


def _check(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for options that do not go together, or a directory that cannot be."""
    if arguments.processes and arguments.simulate:
        raise ConfigError("--processes only measures and --simulate only simulates; leave both out to have both.")
    if arguments.target and (arguments.processes or arguments.simulate):
        raise ConfigError("--target runs nothing here; leave out --processes and --simulate.")
    if arguments.json and arguments.csv:
        raise ConfigError("--json and --csv each print everything; give one of them. --output writes both.")
    require_local(arguments.output, f"--output {arguments.output}", ConfigError)
    if arguments.output and Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        raise ConfigError(f"--output {arguments.output}: is no directory.")


def _write(folder: Path, scaled: Mapping[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / JSON_FILE, json.dumps(scaled, indent=2) + "\n")
        atomic_write(folder / CSV_FILE, _csv(scaled))
    except OSError as error:
        raise WorkdirError(f"--output {folder}: cannot be written ({error.strerror}).") from error


def _csv(scaled: Mapping[str, Any]) -> str:
    """A line a figure: kind, scaling, devices, column, value."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["kind", "scaling", "devices", "column", "value"])
    writer.writerows(_figures(scaled["tables"]))
    return file.getvalue()


def _figures(tables: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    for table in tables:
        for row in table["rows"]:
            for column, value in zip(table["columns"][1:], row[1:], strict=True):
                yield [table["kind"], table["scaling"], row[0], column, value]


def _print(scaled: Mapping[str, Any]) -> None:
    from jaxtrain.scaling.tables import formatted  # noqa: PLC0415  it loads JAX

    console = start.console()
    console.print(scaled["title"])
    for table in scaled["tables"]:
        console.print()
        console.print(f"{table['kind']}: {table['caption']}")
        shown = Table(*(Column(name, justify="right") for name in table["columns"]), box=None, pad_edge=False)
        for row in table["rows"]:
            shown.add_row(*(formatted(name, value) for name, value in zip(table["columns"], row, strict=True)))
        console.print(shown)
    console.print()
    for fit in scaled["fits"]:
        console.print(fit)
    console.print(f"bottleneck: {scaled['bottleneck']}")
    console.print(f"what helps: {scaled['advice']}")
    for note in scaled["notes"]:
        console.print(f"note: {note}")
