"""Start-up: seconds from the command to the first step, with an empty and a filled compile cache; the quickstart as a whole."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
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

# What ends a phase of a start, in the run's own log.
_LINES = {
    "import, devices": r"work directory: ",
    "data, model": r"model: ",
    "state, compile": r"(data .*; )?compiled in ",
}


@dataclasses.dataclass(frozen=True)
class Ran:
    """A run in a process of its own, by the wall clock. began, ended: of the process."""

    workdir: Path
    began: float
    ended: float

    def first(self, pattern: str) -> float:
        """When the first line was logged that begins with `pattern`."""
        log = (self.workdir / "logs" / "process_0.log").read_text()
        line = next(line for line in log.splitlines() if re.match(pattern, line.split(" ", 2)[2]))
        return datetime.datetime.fromisoformat(line.split()[0]).timestamp()


def run(arguments: list[str], cache: Path) -> Ran:
    """`python -m jaxtrain.main` with a new work directory."""
    workdir = tempfile.mkdtemp(prefix="jaxtrain-bench-")
    command = [sys.executable, "-m", "jaxtrain.main", *arguments, "--workdir", workdir]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    began = time.time()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return Ran(Path(workdir), began, time.time())


def first_step(arguments: list[str], cache: Path) -> float:
    """Seconds from starting the process until it logs its first step."""
    ran = run([*arguments, "--config.train.steps=1", "--config.train.log_every=1"], cache)
    return ran.first(r".*step 1/1\b") - ran.began


def phases(ran: Ran) -> dict[str, float]:
    """Seconds of each phase of a whole run: up to the first step by its log lines, from there by its own clock."""
    times = [ran.began, *(ran.first(pattern) for pattern in _LINES.values())]
    found = dict(zip(_LINES, (end - start for start, end in itertools.pairwise(times)), strict=True))
    last = ran.first("result: ")
    clock = json.loads((ran.workdir / "result.json").read_text())["seconds"]
    between = {name: clock[name] for name in ("evaluation", "checkpoint")}
    found["steps, records"] = last - times[-1] - sum(between.values())
    return found | between | {"end": ran.ended - last, "whole": ran.ended - ran.began}


def measure(repeats: int = 3) -> list[dict[str, Any]]:
    """Cold and warm: the first step by recipe, and the whole quickstart by phase. Each cold start has an empty cache."""
    rows = []
    for name, arguments in RECIPES.items():
        cold, warm = [], []
        for _ in range(repeats):
            cache = Path(tempfile.mkdtemp(prefix="jaxtrain-cache-"))
            cold.append(first_step(arguments, cache))
            warm.append(first_step(arguments, cache))
        rows.append({"name": name, **_both(cold, warm)})
    turns = []
    for _ in range(repeats):
        cache = Path(tempfile.mkdtemp(prefix="jaxtrain-cache-"))
        turns.append([phases(run(RECIPES["quickstart"], cache)) for _ in ("cold", "warm")])
    for phase in turns[0][0]:
        cold, warm = ([turn[i][phase] for turn in turns] for i in (0, 1))
        rows.append({"name": "quickstart", "phase": phase, **_both(cold, warm)})
    return rows


def _both(cold: list[float], warm: list[float]) -> dict[str, Any]:
    return {"cold": dataclasses.asdict(Spread.of(cold)), "warm": dataclasses.asdict(Spread.of(warm))}


def quickstart(seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """The whole quickstart from an empty cache: seconds, and accuracy on held-out digits."""
    rows = []
    for seed in seeds:
        cache = Path(tempfile.mkdtemp(prefix="jaxtrain-cache-"))
        ran = run([*RECIPES["quickstart"], f"--config.seed={seed}"], cache)
        last = (ran.workdir / "metrics.csv").read_text().splitlines()[-1].split(",")
        rows.append({"seed": seed, "seconds": ran.ended - ran.began, "test_accuracy": float(last[3])})
    return rows


if __name__ == "__main__":  # one turn: the phases of a cold and a warm quickstart
    with tempfile.TemporaryDirectory(prefix="jaxtrain-cache-") as one:
        for kind in ("cold", "warm"):
            print(kind, json.dumps({k: round(v, 2) for k, v in phases(run(RECIPES["quickstart"], Path(one))).items()}))
