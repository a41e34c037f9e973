"""Measure the sums over devices of this machine: `jaxtrain bench comm`, with time, bytes sent and error of each way to add up.

With --target nothing is run: the compiled programs show the collectives that were asked for, and their bytes.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from jaxtrain.cli import start, train
from jaxtrain.errors import ConfigError
from jaxtrain.host.files import atomic_write
from jaxtrain.host.links import links_text
from jaxtrain.host.paths import require_local
from jaxtrain.host.targets import parse_target
from jaxtrain.host.text import printable
from jaxtrain.observability.progress import Progress
from jaxtrain.observability.rendering import size

if TYPE_CHECKING:
    from jaxtrain.distributed.rendezvous import Fingerprint
    from jaxtrain.parallel.bench.fit import Fit
    from jaxtrain.parallel.bench.measure import Result
    from jaxtrain.parallel.bench.programs import Case

_SIZES = "4KiB,64KiB,1MiB,16MiB"
_SMALLEST, _LARGEST = 4, 1 << 32  # bytes
_SIZE = re.compile(r"(\d+)(B|KiB|MiB|GiB)?")
_MESH = re.compile(r"(?:(\d+)x)?(\d+)")
_FILES = ("csv", "plot", "save_fit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, --sizes, --reduce, --compress, --axes, --repeats, --csv, --plot, --save-fit, --target, devices, processes."""
    parser.add_argument("what", choices=["comm"], help="comm: sums over devices, as a step adds up gradients")
    parser.add_argument("--sizes", default=_SIZES, metavar="SIZE,...", help=f"bytes of f32 to add up; default {_SIZES}")
    parser.add_argument(
        "--reduce",
        default="",
        metavar="NAME,...",
        help="values of layout.reduce; default: all",
    )
    parser.add_argument(
        "--compress",
        default="",
        metavar="NAME,...",
        help="values of optim.compress; default: all. none goes with the values of --reduce",
    )
    parser.add_argument(
        "--axes",
        default="",
        metavar="[REPLICAx]DATA,...",
        help="sizes of the axes, such as 2,4,2x4: the first so many devices; default: all, with hosts or halves as replicas",
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="how often each is timed (default 7)")
    parser.add_argument("--csv", default="", metavar="FILE", help="also write all figures as CSV")
    parser.add_argument("--plot", default="", metavar="SVG", help="also draw time by size into this file")
    parser.add_argument(
        "--save-fit",
        default="",
        metavar="FILE.json",
        help="write the fitted links; `jaxtrain plan --link within=FILE.json` plans with them",
    )
    start.add_target_argument(parser)
    start.add_device_arguments(parser)
    start.add_process_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints a row for each sum, then the fitted links. Raises `ConfigError` for wrong words."""
    sizes = [_size(word) for word in arguments.sizes.split(",")]
    meshes = [_mesh(word) for word in arguments.axes.split(",")] if arguments.axes else []
    _check(arguments)
    if arguments.target:
        _compile(arguments, sizes, meshes)
        return
    start.check_devices(arguments)
    with train.ending_together() as interrupt:
        interrupt.kept = "no file was written"
        start.configure_devices(arguments)
        start.join_processes(arguments, lambda: _fingerprint(arguments), interrupt.connect)
        start.start_backend()
        _measure(arguments, sizes, meshes)


def _measure(arguments: argparse.Namespace, sizes: Sequence[int], meshes: Sequence[tuple[int, int]]) -> None:
    import jax  # noqa: PLC0415  JAX is set up by now

    from jaxtrain.parallel.bench.measure import measure  # noqa: PLC0415
    from jaxtrain.training.setup import select_devices  # noqa: PLC0415

    devices = select_devices(arguments.devices)
    hosts = jax.process_count()
    cases = _cases(arguments, sizes, meshes or [_halves(len(devices), hosts)], len(devices), hosts)
    first = jax.process_index() == 0
    progress = start.progress() if first else Progress()
    with progress.activity("adding up", total=len(cases)) as activity:
        results = []
        for result in measure(cases, devices, arguments.repeats, activity.say):
            results.append(result)
            activity.done += 1
    if first:
        counted = f"{len(devices)} x {devices[0].device_kind}, {hosts} process{'es' if hosts > 1 else ''}"
        _report(arguments, results, f"{counted}, jax {jax.__version__}")


def _compile(arguments: argparse.Namespace, sizes: Sequence[int], meshes: Sequence[tuple[int, int]]) -> None:
    """Prints what the programs for --target have in them."""
    target = parse_target(arguments.target)
    start.without_devices()
    from jaxtrain.parallel.bench.programs import compile_case  # noqa: PLC0415
    from jaxtrain.parallel.topology import target_devices  # noqa: PLC0415

    cases = _cases(arguments, sizes, meshes or [_halves(target.devices, target.hosts)], target.devices, 1)
    rows = []
    with start.progress().activity(f"compiling for {target.name}", total=len(cases)) as activity:
        devices = target_devices(target)
        for case in cases:
            rows.append(compile_case(case, devices).figures())
            activity.done += 1
    _print(
        f"{target.name}; compiled, not measured",
        _table(rows, {"collectives of the program": lambda row: row["collectives"]}),
    )
    if arguments.csv:
        _write_csv(arguments.csv, rows)


def _report(arguments: argparse.Namespace, results: Sequence[Result], about: str) -> None:
    """Prints and writes what was measured."""
    from jaxtrain.parallel.bench.fit import fit_methods  # noqa: PLC0415
    from jaxtrain.parallel.bench.picture import picture  # noqa: PLC0415

    rows, fits = [result.figures() for result in results], fit_methods(results)
    _print(f"{about}; median of {arguments.repeats}", _table(rows, _MEASURED))
    print()
    start.console().print(_fits(fits) if fits else "No link is fitted: that takes two sizes or meshes of a way.")
    if arguments.csv:
        _write_csv(arguments.csv, rows)
    if arguments.plot:
        atomic_write(Path(arguments.plot), picture(results, about))
    if arguments.save_fit:
        links = {name: fit.link for name, fit in fits.items()}
        errors = {name: fit.median_error for name, fit in fits.items()}
        atomic_write(Path(arguments.save_fit), links_text(links, {"measured": about, "median_error": errors}))
    for name in filter(None, (getattr(arguments, option) for option in _FILES)):
        print(printable(name))


# --------------------------------------------------------------------------------------------------------------- input


def _size(word: str) -> int:
    match = _SIZE.fullmatch(word)
    count = int(match[1]) << {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30}[match[2] or "B"] if match else 0
    if not _SMALLEST <= count <= _LARGEST:
        raise ConfigError(f"--sizes {word}: must be bytes from {_SMALLEST} B to 4 GiB, such as 4096, 64KiB or 16MiB.")
    return count


def _mesh(word: str) -> tuple[int, int]:
    """(replica, data)."""
    match = _MESH.fullmatch(word)
    replica, data = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if replica * data < 2:
        raise ConfigError(f"--axes {word}: must be DATA or REPLICAxDATA with at least two devices, such as 8 or 2x4.")
    return replica, data


def _check(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for what cannot work, before JAX is loaded."""
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats {arguments.repeats}: must be at least 1.")
    for option in _FILES:
        value, flag = getattr(arguments, option), f"--{option.replace('_', '-')}"
        require_local(value, f"{flag} {value}", ConfigError)
        if value and not Path(value).absolute().parent.is_dir():
            raise ConfigError(f"{flag} {value}: there is no such directory.")
        if value and arguments.target and option != "csv":
            raise ConfigError(f"{flag} is of times, and --target {arguments.target} measures none.")
    if arguments.save_fit and not arguments.save_fit.endswith(".json"):
        raise ConfigError(f"--save-fit {arguments.save_fit}: must be a file that ends with .json.")
    if arguments.target and (arguments.devices or arguments.simulate_devices or arguments.num_processes):
        raise ConfigError("--target has its own devices; leave out --devices, --simulate-devices and --num-processes.")


def _halves(devices: int, hosts: int) -> tuple[int, int]:
    """All devices: hosts as replicas, or two halves where there is one host; (replica, data)."""
    replica = hosts if hosts > 1 and devices > hosts else 2 if hosts == 1 and devices > 2 and devices % 2 == 0 else 1
    return replica, devices // replica


def _cases(
    arguments: argparse.Namespace, sizes: Sequence[int], meshes: Sequence[tuple[int, int]], devices: int, processes: int
) -> list[Case]:
    """By mesh, size and method. Raises `ConfigError` where there are too few devices."""
    from jaxtrain.parallel.bench.methods import choose, numbers  # noqa: PLC0415
    from jaxtrain.parallel.bench.programs import Case  # noqa: PLC0415

    methods = choose(*(list(filter(None, text.split(","))) for text in (arguments.reduce, arguments.compress)))
    for replica, data in meshes:
        n, there = replica * data, f"{devices} device{'s' if devices > 1 else ''}"
        if n < 2:
            raise ConfigError(f"A sum needs at least two devices, not {there}: use more, or --simulate-devices 8.")
        if n > devices:
            raise ConfigError(f"--axes {replica}x{data} needs {n} devices, not {there}.")
        if processes > 1 and n < devices:
            raise ConfigError(f"--axes {replica}x{data}: with {processes} processes all {there} take part.")
    return [
        Case(method, replica, data, numbers(count, replica, data))
        for replica, data in dict.fromkeys(meshes)
        for count in dict.fromkeys(sizes)
        for method in methods
    ]


def _fingerprint(arguments: argparse.Namespace) -> Fingerprint:
    """What must be the same on all processes."""
    from jaxtrain.distributed.initialize import fingerprint_of  # noqa: PLC0415  it loads JAX

    words = {f"--{name}": getattr(arguments, name) for name in ("sizes", "reduce", "compress", "axes", "repeats")}
    return {**fingerprint_of({}, ""), "config": words}


# -------------------------------------------------------------------------------------------------------------- output

_Cell = Callable[[Mapping[str, Any]], str]
_LEFT = ("reduce", "compress", "collectives of the program")
_MEASURED: dict[str, _Cell] = {
    "ms": lambda row: f"{1e3 * row['seconds']:.3f}",
    "least": lambda row: f"{1e3 * row['least_seconds']:.3f}",
    "most": lambda row: f"{1e3 * row['most_seconds']:.3f}",
    "GB/s": lambda row: f"{row['sent_bytes'] / row['seconds'] / 1e9:.3f}",
    "error": lambda row: f"{row['error']:.1e}",
}


def _print(about: str, table: Table) -> None:
    console = start.console()
    console.print(f"{about}; every program sends the bytes of its formula")
    console.print()
    console.print(table)


def _table(rows: Sequence[Mapping[str, Any]], figures: Mapping[str, _Cell]) -> Table:
    """A row a sum; the last columns are `figures`."""
    cells: dict[str, _Cell] = {
        "reduce": lambda row: row["reduce"] if row["compress"] == "none" else "-",
        "compress": lambda row: row["compress"],
        "devices": lambda row: f"{row['replica']} x {row['data']}",
        "size": lambda row: size(row["bytes"]),
        "messages": lambda row: str(row["messages"]),
        "a device sends": lambda row: size(row["sent_bytes"]),
        **figures,
    }
    table = Table(*(Column(n, justify="left" if n in _LEFT else "right") for n in cells), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(cell(row) for cell in cells.values()))
    return table


def _fits(fits: Mapping[str, Fit]) -> Table:
    names = ("fitted link of", "us a message", "GB/s a device", "median error")
    table = Table(*(Column(n, justify="left" if n == names[0] else "right") for n in names), box=None, pad_edge=False)
    for name, fit in fits.items():
        link = fit.link
        table.add_row(
            name, f"{1e6 * link.latency:.1f}", f"{link.bandwidth / 1e9:.3f}", f"{100 * fit.median_error:.0f} %"
        )
    return table


def _write_csv(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(Path(name), file.getvalue())
