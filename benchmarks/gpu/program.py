"""The training steps of the suite's cases, compiled for GPUs that need not be there: kernels, bytes, memory.

    python -m benchmarks.gpu.program resnet50_224 [swin_tiny_224 ...] [--target h100] [--json] [--hlo DIR] [train.remat=full]

Needs the extra `gpu-compiler`. Nothing is run, and nothing is tuned.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.ours import config_of
from benchmarks.gpu.parts import CASES
from jaxtrain.host.targets import parse_target
from jaxtrain.training.target_report import report_on


def compiled(case: str, target: str, changes: dict[str, Any], hlo: Path | None = None) -> dict[str, Any]:
    """`jaxtrain.training.target_report.report_on` of a case's step; `changes` by dotted names of the config."""
    config = config_of(CASES[case], {"data.residency": "stream"} | changes)  # a batch that lies on the device
    return report_on(config, parse_target(target), hlo=hlo, evaluation=False)


def row(case: str, report: dict[str, Any]) -> str:
    """A line of what matters most."""
    programs = report["programs"].values()
    kernels, small, moved, temporary = (
        sum(program[key] for program in programs)
        for key in ("kernels", "small_kernels", "gigabytes", "temporary_bytes")
    )
    floor = moved * 1e12 / report["bandwidth"]
    return (
        f"{case}: {kernels:,} kernels, {small:,} of them < 4 MB; {moved:.1f} GB, at least {floor:.1f} ms; "
        f"temporaries {temporary / 1e9:.2f} GB"
        f"{'; with ' if report['flags'] else ''}{report['flags']}"
    )


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="+", metavar="CASE | FIELD=VALUE", help=f"cases: {', '.join(CASES)}")
    parser.add_argument("--target", default="h100", help="as of `jaxtrain compile`")
    parser.add_argument("--json", action="store_true", help="all figures")
    parser.add_argument("--hlo", type=Path, help="a folder for the programs' texts")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    cases = [word for word in arguments.words if "=" not in word]
    changes = {key: _value(value) for key, _, value in (word.partition("=") for word in arguments.words if "=" in word)}
    for name in set(cases) - CASES.keys():
        parser.error(f"there is no case {name}; cases are {', '.join(CASES)}")
    reports = {}
    for case in cases:
        hlo = arguments.hlo / case if arguments.hlo else None
        reports[case] = compiled(case, arguments.target, changes, hlo)
        if not arguments.json:
            print(row(case, reports[case]), flush=True)
    if arguments.json:
        print(json.dumps(reports if len(cases) > 1 else next(iter(reports.values())), indent=2))


if __name__ == "__main__":
    main()
