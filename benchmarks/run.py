"""Runs the benchmarks of this machine, writes benchmarks/results/NAME.json, and puts the table into benchmarks/README.md.

python -m benchmarks.run NAME                  # everything: about 30 minutes on two cores
python -m benchmarks.run NAME steps inputs     # some of it; the rest of NAME.json stays
python -m benchmarks.run --table NAME          # the table alone
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.common import ROOT, machine, set_flags
from benchmarks.cpu import (
    calls,
    checkpoints,
    collectives,
    compress,
    dashboard,
    faults,
    finetune,
    framework,
    inputs,
    overhead,
    peers,
    pipeline,
    predict,
    scale,
    startup,
    status,
    steps,
    submit,
    sweep,
    telemetry,
)

BENCHMARKS: dict[str, Callable[[], Any]] = {
    "steps": steps.per_model,
    "layouts": steps.per_layout,
    "peers": peers.measure,
    "overhead": overhead.measure,
    "calls": calls.measure,
    "startup": startup.measure,
    "quickstart": startup.quickstart,
    "inputs": inputs.measure,
    "predict": predict.measure,
    "checkpoints": checkpoints.measure,
    "faults": faults.measure,
    "finetune": finetune.measure,
    "bubble": pipeline.bubble,
    "dispatch": pipeline.dispatch,
    "efficiency": pipeline.efficiency,
    "scale": scale.measure,
    "collectives": collectives.measure,
    "compress": compress.measure,
    "framework": framework.measure,
    "status": status.measure,
    "telemetry": telemetry.measure,
    "submit": submit.measure,
    "dashboard": dashboard.measure,
    "sweep": sweep.measure,
}
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> None:
    """Parses the arguments, measures, and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the file in benchmarks/results, such as cpu2")
    parser.add_argument("benchmarks", nargs="*", choices=[[], *BENCHMARKS], help="default: all")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table of the file")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 4)
    set_flags()
    path = ROOT / "benchmarks" / "results" / f"{arguments.name}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if not arguments.table:
        for name in arguments.benchmarks or BENCHMARKS:
            print(name, flush=True)
            results[name] = {"machine": machine(), "measured": BENCHMARKS[name]()}
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    readme = ROOT / "benchmarks" / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}")


def table(results: dict[str, Any]) -> str:
    """Markdown of everything in a results file: a table for each machine, the latest first."""
    machines: dict[str, dict[str, Any]] = {}
    dates: dict[str, list[str]] = {}
    for name, result in results.items():
        found = result["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        machine = f"{found['cpu']}, {found['cores']} cores; Python {found['python']}, {versions}"
        machines.setdefault(machine, {})[name] = result["measured"]
        dates.setdefault(machine, []).append(found["date"])
    parts = []
    for machine in sorted(machines, key=lambda machine: max(dates[machine]), reverse=True):
        days = " to ".join(sorted({min(dates[machine]), max(dates[machine])}))
        parts.append("\n".join([f"{machine}; {days}.", "", *_rows(machines[machine])]))
    return "\n\n".join(parts)


def _rows(measured: dict[str, Any]) -> list[str]:
    lines = ["| what | median | least - most |", "| -- | -- | -- |"]
    for group, label in (("steps", "step"), ("layouts", "ResNet-18 of width 16, batch 64")):
        for row in measured.get(group, []):
            plural = "s" * (row["devices"] > 1)
            detail = f", batch {row['batch']}" if group == "steps" else f" ({row['devices']} device{plural})"
            name = f"{label}: {row['name']}{detail}, {row['images_per_second']:.0f} images/s"
            name += f", at most {row['peak_bytes_per_device'] / 1e6:.1f} MB a device"
            lines.append(_row(name, row["seconds"], 1e3, "ms"))
    for row in measured.get("peers", []):
        name = f"step against PyTorch: {row['name']}, batch {row['batch']}"
        lines.append(_row(f"{name}, ours", row["ours"], 1e3, "ms"))
        lines.append(_row(f"{name}, theirs ({row['peer']})", row["theirs"], 1e3, "ms"))
        lines.append(_row(f"{name}, theirs over ours", row["theirs_over_ours"], 1, "x", 2))
    if "overhead" in measured:
        for key in ("real_data_over_cached_batch", "trainer_over_bare_step"):
            for what, time in (("", ""), ("_processor", ", processor time")):
                lines.append(_row(key.replace("_", " ") + time, measured["overhead"][key + what], 1, "x", 3))
    if "calls" in measured:
        lines.append(_row("a step of a tiny MLP, bare", measured["calls"]["bare"], 1e6, "us", 0))
        lines.append(_row("what the trainer and its input add to that step", measured["calls"]["added"], 1e6, "us", 0))
        for row in measured["calls"]["per_call"]:
            name = f"a step of a tiny MLP in a whole run, {row['per_call']} a call"
            lines.append(_row(name, row["seconds"], 1e6, "us", 0))
            if row["per_call"] > 1:
                lines.append(_row(f"{name}: times faster than 1 a call", row["over_one"], 1, "x", 2))
    for row in measured.get("startup", []):
        for key in ("cold", "warm"):
            what = f"{row['name']}: {row['phase']}" if "phase" in row else f"first step of {row['name']}"
            lines.append(_row(f"{what}, {key} compile cache", row[key], 1, "s"))
    for row in measured.get("quickstart", []):
        lines.append(
            f"| whole quickstart, cold, seed {row['seed']}: test accuracy {row['test_accuracy']:.4f} "
            f"| {row['seconds']:.1f} s | |"
        )
    units = {"images_per_second": (1, "images/s", 0), "ratio": (1, "x", 3), "share": (100, "%", 2)}
    for row in measured.get("inputs", []):
        for key, (factor, unit, digits) in units.items():
            if key in row:
                lines.append(_row(f"input, {row['name']}", row[key], factor, unit, digits))
        if not units.keys() & row.keys():
            lines.append(f"| input, {row['name']} | | |")
    for row in measured.get("predict", []):
        key, unit, digits = ("ratio", "x", 2) if "ratio" in row else ("seconds", "s", 2)
        lines.append(_row(f"predicting 1,000 JPEGs of 500 x 375: {row['name']}", row[key], 1, unit, digits))
    for row in measured.get("checkpoints", []):
        for key in ("blocked", "whole", "manifest", "verify", "restore"):
            lines.append(_row(f"checkpoint of {row['name']} ({row['bytes'] / 1e6:.0f} MB), {key}", row[key], 1, "s", 3))
    for row in measured.get("faults", []):
        key, unit = ("steps", "steps") if "steps" in row else ("seconds", "s")
        lines.append(_row(f"fault: {row['name']}", row[key], 1, unit))
    if tuned := measured.get("finetune"):
        for row in tuned["rows"]:
            low, middle, high = (100 * accuracy for accuracy in sorted(row["accuracies"]))
            name = (
                f"ten new classes, 20 images each, {row['name']} (rate {row['rate']:g}): test accuracy of three seeds"
            )
            lines.append(f"| {name} | {middle:.1f} % | {low:.1f} - {high:.1f} |")
    if compressed := measured.get("compress"):
        for row in compressed["rows"]:
            low, middle, high = (100 * accuracy for accuracy in sorted(row["accuracies"]))
            name = f"gradients by {row['name']}, {row['bytes_per_step'] / 1e6:.3f} MB a device and step: test accuracy"
            lines.append(f"| {name} | {middle:.1f} % | {low:.1f} - {high:.1f} |")
    for row in measured.get("bubble", []):
        name = f"bubble of {row['schedule']}, {row['stages']} stages, {row['microbatches']} microbatches"
        lines.append(_row(f"{name}: formula {100 * row['formula']:.1f} %", row["bubble"], 100, "%"))
    for row in measured.get("dispatch", []):
        name = f"dispatch, {row['stages']} stages, {row['microbatches']} microbatches, {row['leaves']} parameter leaves"
        lines.append(_row(f"{name}: an operation, a thread a stage", row["seconds_per_operation"], 1e3, "ms", 3))
        one = row["seconds_per_operation_by_one"]
        lines.append(_row(f"{name}: an operation, one thread (as on an accelerator)", one, 1e3, "ms", 3))
    for row in measured.get("efficiency", []):
        name = f"two stages on two cores over twice one core, {row['name']}, {row['microbatches']} microbatches"
        lines.append(_row(f"{name}: bound {row['bound']:.3f}", row["efficiency"], 1, "x", 3))
    lines += scale.table(measured.get("scale", []))
    if "status" in measured:
        found = measured["status"]
        for name, count in (("one", 1), ("many", found["runs"])):
            lines.append(_row(f"jaxtrain status, {count:,} runs", found["seconds"][name], 1, "s", 2))
    if "telemetry" in measured:
        found = measured["telemetry"]
        for time, what in (("", ""), ("_processor", ", processor time")):
            lines.append(_row(f"telemetry on over off{what}", found["on_over_off" + time], 1, "x", 3))
        lines.append(
            _row("telemetry: a look at the host, processor time", found["sample_processor_seconds"], 1e3, "ms", 2)
        )
        for saves, size in found["resident_bytes"].items():
            lines.append(f"| resident memory of a run after {saves} saves | {size / 2**20:.1f} MiB | |")
    for row in measured.get("submit", []):
        name = f"from jaxtrain submit to the first step of quickstart, {row['cache']} compile cache"
        lines.append(_row(name, row["seconds"], 1, "s"))
    if "dashboard" in measured:
        lines += dashboard.rows(measured["dashboard"], _row)
    lines += _sweep_rows(measured)
    if "collectives" in measured:
        what = "Collectives (gloo), measured -> predicted by the cost model, and the error of that:"
        lines += ["", what, "", collectives.table(measured["collectives"])]
    if "framework" in measured:
        what = "VGG-19 with BatchNorm at 32 px, 4 devices, in the ways of a framework (simulated in f32, compiled in bf16):"
        lines += ["", what, "", framework.table(measured["framework"])]
    return lines


def _sweep_rows(measured: dict[str, Any]) -> list[str]:
    lines = []
    for row in measured.get("sweep", []):
        counts = ", ".join(map(str, row["compiled"]))
        what = (
            f"{row['runs']} quickstarts of {row['epochs']} epochs that differ in the learning rate, empty compile cache"
        )
        lines.append(_row(f"{what}: jaxtrain sweep (programs compiled by each run: {counts})", row["sweep"], 1, "s"))
        lines.append(_row(f"{what}: {row['runs']} jaxtrain train", row["commands"], 1, "s"))
        lines.append(_row(f"{what}: commands over sweep", row["commands_over_sweep"], 1, "x", 2))
    return lines


def _row(name: str, spread: dict[str, float], factor: float, unit: str, digits: int = 1) -> str:
    median, least, most = (spread[key] * factor for key in ("median", "least", "most"))
    return f"| {name} | {median:.{digits}f} {unit} | {least:.{digits}f} - {most:.{digits}f} |"


if __name__ == "__main__":
    main()
