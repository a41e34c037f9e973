"""Start-up: seconds from the command to the first step, with an empty and a filled compile cache; the quickstart as a whole."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread

RECIPES = {
    "quickstart": ["--config", "configs/quickstart.py"],
    "resnet50, synthetic 32 px": [
        "--config", "configs/resnet50_cifar100.py", "--config.data.name=synthetic", "--config.data.image_size=32",
        "--config.data.examples=256", "--config.data.global_batch=16",
    ],
}  # fmt: skip


def first_step(arguments: list[str], cache: Path) -> float:
    """Seconds from starting the process until it logs its first step."""
    workdir = tempfile.mkdtemp(prefix="jaxtrain-bench-")
    command = [sys.executable, "-m", "jaxtrain.main", *arguments, "--workdir", workdir]
    command += ["--config.train.steps=1", "--config.train.log_every=1"]
    began = time.time()
    subprocess.run(command, cwd=ROOT, env=_environment(cache), check=True, capture_output=True)
    log = (Path(workdir) / "logs" / "process_0.log").read_text()
    line = next(line for line in log.splitlines() if re.search(r"step 1/1\b", line))
    return datetime.datetime.fromisoformat(line.split()[0]).timestamp() - began


def _environment(cache: Path) -> dict[str, str]:
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}


def measure(repeats: int = 3) -> list[dict[str, Any]]:
    """Cold and warm, by recipe; each cold start has an empty cache of its own."""
    rows = []
    for name, arguments in RECIPES.items():
        cold, warm = [], []
        for _ in range(repeats):
            cache = Path(tempfile.mkdtemp(prefix="jaxtrain-cache-"))
            cold.append(first_step(arguments, cache))
            warm.append(first_step(arguments, cache))
        rows.append(
            {"name": name, "cold": dataclasses.asdict(Spread.of(cold)), "warm": dataclasses.asdict(Spread.of(warm))}
        )
    return rows


def quickstart(seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """The whole quickstart from an empty cache: seconds, and accuracy on held-out digits."""
    rows = []
    for seed in seeds:
        cache, workdir = Path(tempfile.mkdtemp(prefix="jaxtrain-cache-")), tempfile.mkdtemp(prefix="jaxtrain-bench-")
        command = [
            sys.executable,
            "-m",
            "jaxtrain.main",
            *RECIPES["quickstart"],
            f"--config.seed={seed}",
            "--workdir",
            workdir,
        ]
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=_environment(cache), check=True, capture_output=True)
        seconds = time.perf_counter() - began
        last = (Path(workdir) / "metrics.csv").read_text().splitlines()[-1].split(",")
        rows.append({"seed": seed, "seconds": seconds, "test_accuracy": float(last[3])})
    return rows
