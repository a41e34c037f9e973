"""Six runs that differ in the learning rate, as a sweep and as six commands, one after the other; and how many compile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread

REPEATS, EPOCHS = 3, 5
RATES = ("0.02", "0.05", "0.08", "0.1", "0.15", "0.2")
COMMON = ["--config", "quickstart", f"--config.train.epochs={EPOCHS}"]


def measure() -> list[dict[str, Any]]:
    """Seconds of both, in turns, with a compile cache that is empty before each; and their ratio."""
    turns = [(_sweep(), _commands()) for _ in range(REPEATS)]
    sweeps, commands = zip(*turns, strict=True)
    seconds = [found["seconds"] for found in sweeps]
    return [
        {
            "runs": len(RATES),
            "epochs": EPOCHS,
            "sweep": vars(Spread.of(seconds)),
            "commands": vars(Spread.of(list(commands))),
            "commands_over_sweep": vars(
                Spread.of([theirs / ours for ours, theirs in zip(seconds, commands, strict=True)])
            ),
            "compiled": sweeps[-1]["compiled"],
        }
    ]


def _sweep() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as folder:
        began = time.perf_counter()
        words = ["sweep", *COMMON, "--over", "optim.learning_rate", *RATES, "--workdir", f"{folder}/sweep"]
        said = _run(words, Path(folder)).stderr
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "compiled": [int(count) for count in re.findall(r"(\d+) programs compiled", said)]}


def _commands() -> float:
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as folder:
        began = time.perf_counter()
        for rate in RATES:
            workdir = f"{folder}/runs/{rate}"
            _run(["train", *COMMON, f"--config.optim.learning_rate={rate}", "--workdir", workdir], Path(folder))
        return time.perf_counter() - began


def _run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PLATFORMS": "cpu",
    }
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "jaxtrain", *words]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
