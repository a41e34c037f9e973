"""What telemetry costs a step, and whether a run's memory grows with its saves.

python -m benchmarks.cpu.telemetry on|off|saves WORKDIR    # one of them
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread
from benchmarks.cpu.overhead import CONFIG, STEPS, in_turns
from jaxtrain.host.usage import HostUsage
from jaxtrain.recipes import change
from jaxtrain.training.session import train

TURNS, WARM, SAMPLES = 25, 2, 100
SAVES = 100

OFF = {"telemetry.every": 0.0, "telemetry.probe_every": 0}


def steps(workdir: Path, fields: dict[str, Any]) -> None:
    """A run without an end."""
    train(change(CONFIG, **fields), workdir, num_devices=1, quiet=True)


def saves(workdir: Path) -> None:
    """A run of `SAVES` steps that saves after each, and logs its memory."""
    every = {"train.steps": SAVES + 1, "train.log_every": 1, "checkpoint.every": "1", "telemetry.every": 0.02}
    train(change(CONFIG, **every), workdir, num_devices=1, quiet=True)


def measure() -> dict[str, Any]:
    """Ratios of neighbouring turns, with telemetry over without; and resident bytes after 10 and after `SAVES` saves."""
    found = in_turns("benchmarks.cpu.telemetry", ("on", "off"), TURNS, WARM)
    turns = list(zip(found["on"], found["off"], strict=True))
    return {
        "steps": STEPS * TURNS,
        "step_seconds": dataclasses.asdict(Spread.of([seconds / STEPS for seconds, _ in found["off"]])),
        "on_over_off": dataclasses.asdict(Spread.of([on[0] / off[0] for on, off in turns])),
        "on_over_off_processor": dataclasses.asdict(Spread.of([on[1] / off[1] for on, off in turns])),
        "sample_processor_seconds": dataclasses.asdict(_sample()),
        "resident_bytes": _resident(),
    }


def _sample() -> Spread:
    """Processor time of one look at the host, which is taken every 5 s."""
    usage, seconds = HostUsage(), []
    for _ in range(SAMPLES):
        began = time.thread_time()
        usage()
        seconds.append(time.thread_time() - began)
    return Spread.of(seconds)


def _resident() -> dict[str, float]:
    """Bytes by the number of saves."""
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as folder:
        command = [sys.executable, "-m", "benchmarks.cpu.telemetry", "saves", folder]
        subprocess.run(command, cwd=ROOT, check=True)
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    memory = {row["step"]: row["host0/process_memory"] for row in rows if row["phase"] == "train" and row["step"] > 1}
    return {str(count): memory[count + 1] for count in (10, 50, SAVES)}


if __name__ == "__main__":
    match sys.argv[1]:
        case "saves":
            saves(Path(sys.argv[2]))
        case kind:
            steps(Path(sys.argv[2]), {} if kind == "on" else OFF)
