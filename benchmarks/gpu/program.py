"""The training steps of the suite's cases, compiled for GPUs that need not be there: kernels, bytes, memory.

    python -m benchmarks.gpu.program resnet50_224 [swin_tiny_224 ...] [--target h100] [--json] [--hlo DIR] [train.remat=full]
    python -m benchmarks.gpu.program all --record       # results/gpu_program.json, and the table in benchmarks/README.md

Needs the extra `gpu-compiler`. Nothing is run, and nothing is tuned. The table has what was measured beside what was
compiled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.ours import config_of
from benchmarks.gpu.parts import CASES, RESULTS, ROOT, latest, read_results
from jaxtrain.host.targets import parse_target
from jaxtrain.training.target_report import report_on

STORED = RESULTS.with_name("gpu_program.json")
BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"


def compiled(case: str, target: str, changes: dict[str, Any], hlo: Path | None = None) -> dict[str, Any]:
    """`jaxtrain.training.target_report.report_on` of a case's step; `changes` by dotted names of the config."""
    config = config_of(CASES[case], {"data.residency": "stream"} | changes)  # a batch that lies on the device
    return report_on(config, parse_target(target), hlo=hlo, evaluation=False)


def totals(report: dict[str, Any]) -> dict[str, Any]:
    """What matters most of a report, over the programs of a step."""
    keys = ("kernels", "small_kernels", "gigabytes", "temporary_bytes")
    found = {key: sum(program[key] for program in report["programs"].values()) for key in keys}
    return found | {"floor_ms": found["gigabytes"] * 1e12 / report["bandwidth"], "flags": report["flags"]}


def line(case: str, row: dict[str, Any]) -> str:
    """`totals` in a line."""
    return (
        f"{case}: {row['kernels']:,} kernels, {row['small_kernels']:,} of them < 4 MB; {row['gigabytes']:.1f} GB, "
        f"at least {row['floor_ms']:.1f} ms; temporaries {row['temporary_bytes'] / 1e9:.2f} GB"
        f"{'; with ' if row['flags'] else ''}{row['flags']}"
    )


def record(rows: dict[str, dict[str, Any]], target: str) -> None:
    """Puts rows into the result file, a key for each case, target and version of jax, and the table into the README."""
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    of = {"target": target, "jax": jax.__version__, "commit": commit.stdout.strip(), "date": time.strftime("%Y-%m-%d")}
    for case, row in rows.items():
        stored[f"{case}, {target}, jax {jax.__version__}"] = {"case": case} | of | row
    STORED.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
    readme = ROOT / "benchmarks" / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    text = table(stored, latest(read_results(RESULTS)))
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def table(stored: dict[str, Any], measured: dict[tuple[str, str, str], Any]) -> str:
    """Markdown: compiled figures, and the time measured on a GPU of that kind where there is one.

    Args:
      stored: of the result file.
      measured: of `parts.latest`.
    """
    lines = ["| step | target | jax | kernels | < 4 MB | GB | at least | temporaries | measured | over that |"]
    lines.append("| -- | -- | -- | -- | -- | -- | -- | -- | -- | -- |")
    for row in stored.values():
        times = [
            found["ours"]["step_seconds"]["median"] * 1e3
            for (device, kind, name), (_, found) in measured.items()
            if kind == "compare" and name == row["case"] and row["target"].upper() in device and "ours" in found
        ]
        cells = (f"{times[-1]:.1f} ms", f"{times[-1] / row['floor_ms']:.2f}") if times else ("", "")
        case = f"{row['case']}, batch {CASES[row['case']].batch}{' *' if row['flags'] else ''}"
        lines.append(
            f"| {case} | {row['target']} | {row['jax']} | {row['kernels']:,} | {row['small_kernels']:,} | "
            f"{row['gigabytes']:.1f} | {row['floor_ms']:.1f} ms | {row['temporary_bytes'] / 1e9:.2f} GB | {' | '.join(cells)} |"
        )
    flags = sorted({row["flags"] for row in stored.values()} - {""})
    return "\n".join([*lines, *(f"\n\\* compiled with {flag}: XLA refuses it otherwise." for flag in flags)])


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="+", metavar="CASE | FIELD=VALUE", help=f"cases: all, {', '.join(CASES)}")
    parser.add_argument("--target", default="h100", help="as of `jaxtrain compile`")
    parser.add_argument("--json", action="store_true", help="all figures")
    parser.add_argument("--record", action="store_true", help="keep the figures, and renew the table")
    parser.add_argument("--hlo", type=Path, help="a folder for the programs' texts")
    arguments = parser.parse_intermixed_args()
    jax.config.update("jax_platforms", "cpu")
    cases = [word for word in arguments.words if "=" not in word]
    changes = {key: _value(value) for key, _, value in (word.partition("=") for word in arguments.words if "=" in word)}
    for name in set(cases) - CASES.keys() - {"all"}:
        parser.error(f"there is no case {name}; cases are all, {', '.join(CASES)}")
    reports = {}
    for case in CASES if "all" in cases else cases:
        hlo = arguments.hlo / case if arguments.hlo else None
        reports[case] = compiled(case, arguments.target, changes, hlo)
        if not arguments.json:
            print(line(case, totals(reports[case])), flush=True)
    if arguments.record:
        record({case: totals(report) for case, report in reports.items()}, arguments.target)
    if arguments.json:
        print(json.dumps(reports if len(reports) > 1 else next(iter(reports.values())), indent=2))


if __name__ == "__main__":
    main()
