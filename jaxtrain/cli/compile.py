"""Compile a run's programs for GPUs, which need not be there: memory, kernels, collectives, whether it fits.

Nothing is run and nothing is tuned: the figures are those of the compiled programs.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from jaxtrain.cli import start
from jaxtrain.errors import ConfigError
from jaxtrain.host.files import writing
from jaxtrain.host.paths import require_local
from jaxtrain.host.targets import parse_target
from jaxtrain.observability.rendering import size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --target, --json, --hlo."""
    start.add_config_argument(parser)
    start.add_target_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--hlo", default="", metavar="DIR", help="write the optimized programs into this folder")


def run(arguments: argparse.Namespace) -> int:
    """Prints what is in the programs. Returns 1 where the layout had no effect or the run does not fit the GPU."""
    require_local(arguments.hlo, f"--hlo {arguments.hlo}", ConfigError)
    if not arguments.target:
        raise ConfigError("jaxtrain compile needs --target, for example 8xh100; see jaxtrain compile --help.")
    target, resolved = parse_target(arguments.target), start.resolved(arguments)
    start.say_what_flags_are(arguments)
    start.without_devices()
    from jaxtrain.training.target_report import report_on  # noqa: PLC0415

    hlo = _folder(arguments.hlo) if arguments.hlo else None
    with start.progress().activity(f"compiling for {target.name}"):
        report = report_on(resolved.config, target, hlo=hlo)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if report["audit"]["passed"] and report["fits"] else 1


def _folder(name: str) -> Path:
    """The folder, made if it is not there. Raises `WorkdirError` where nothing can be written into it."""
    folder = Path(name)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder


def _print(report: Mapping[str, Any]) -> None:
    console = start.console()
    axes = " x ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1) or "one device"
    console.print(
        f"{report['devices']} x {report['device_kind']} ({axes}), {report['precision']}, data {report['data']}, "
        f"{report['microbatches']} microbatch{'es' if report['microbatches'] > 1 else ''}; compiled, not measured"
    )
    if report["flags"]:
        console.print(f"compiled with XLA_FLAGS={report['flags']}, as XLA refused a program without it")
    console.print()
    table = Table(box=None, pad_edge=False)
    for name in ("program", "kernels", "< 4 MB", "moved", "at least ms", "arguments", "temporaries", "peak"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for name, program in report["programs"].items():
        table.add_row(
            name,
            f"{program['kernels']:,}",
            f"{program['small_kernels']:,}",
            _moved(program["gigabytes"]),
            f"{program['gigabytes'] * 1e12 / report['bandwidth']:.2f}",
            *(size(program[f"{key}_bytes"]) for key in ("argument", "temporary", "peak")),
        )
    console.print(table)
    for name, program in report["programs"].items():
        _print_program(console, name, program)
    console.print()
    _print_verdict(console, report)


def _print_program(console: Any, name: str, program: Mapping[str, Any]) -> None:
    console.print()
    donated, results = program["donated_bytes"], program["output_bytes"]
    console.print(f"{name}: of {size(results)} of results {size(donated)} take the place of arguments")
    kinds = Table(
        "  kind", Column("kernels", justify="right"), Column("moved", justify="right"), box=None, pad_edge=False
    )
    for kind, total in program["kinds"].items():
        kinds.add_row(f"  {kind}", f"{total['kernels']:,}", _moved(total["gigabytes"]))
    console.print(kinds)
    for each in program["collectives"]:
        axes = ", ".join(each["axes"]) or "no axis"
        console.print(f"  {each['count']} x {each['kind']} over {axes}: {size(each['bytes'])}")
    if program["f32_products"]:
        places = ", ".join(f"{layer or 'no layer'} ({count})" for layer, count in program["f32_products"].items())
        console.print(f"  matrix products and convolutions with float32 operands: {places}")
    if program["host_callbacks"]:
        console.print(f"  {program['host_callbacks']} calls of the host")
    console.print("  the kernels that move most:")
    dearest = Table(Column("moved", justify="right", min_width=12), "layer", "from", "kind", box=None, pad_edge=False)
    for kernel in program["dearest"]:
        dearest.add_row(_moved(kernel["gigabytes"]), kernel["layer"], kernel["operation"], kernel["kind"])
    console.print(dearest)


def _print_verdict(console: Any, report: Mapping[str, Any]) -> None:
    audit = report["audit"]
    console.print("audit: passed" if audit["passed"] else f"audit: {audit['error']}")
    for note in audit["notes"]:
        console.print(f"  {note}")
    peak, reserve, usable, memory = (report[f"{name}_bytes"] for name in ("peak", "reserve", "usable", "memory"))
    need = f"{size(peak)} at least, and {size(reserve)} are reserved for cuDNN"
    there = f"the {size(usable)} that JAX takes of the GPU's {size(memory)}"
    if report["fits"]:
        console.print(f"memory: fits {there}, as far as the programs show: {need}")
        return
    console.print(f"memory: does not fit {there}: {need}.")
    console.print(
        "what lowers it, the cheapest first:" if report["remedies"] else "use more or larger GPUs, or a smaller batch"
    )
    for flags in report["remedies"]:
        console.print(f"  {flags}")


def _moved(gigabytes: float) -> str:
    return f"{gigabytes:.2f} GB" if gigabytes >= 1 else f"{gigabytes * 1e3:.2f} MB"
