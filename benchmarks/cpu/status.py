"""`jaxtrain status` over many runs: the time of the whole command, by the wall clock."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread

RUNS, REPEATS, ROWS = 1000, 5, 2000


def measure() -> dict[str, Any]:
    """Seconds for `RUNS` runs, and for one; each with `ROWS` more rows in metrics.jsonl than the quickstart writes."""
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as folder:
        one = Path(folder) / "one" / "run"
        command = [sys.executable, "-m", "jaxtrain", "train", "--config", "quickstart", "--config.train.steps=30"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAXTRAIN_QUEUE_DIR": str(Path(folder) / "queue")}
        subprocess.run([*command, "--workdir", str(one)], env=environment, check=True, capture_output=True)
        shutil.rmtree(one / "tensorboard")
        rows = one / "metrics.jsonl"
        rows.write_text(rows.read_text().splitlines()[0].join(["", "\n"]) * ROWS + rows.read_text())
        many = Path(folder) / "many"
        for number in range(RUNS):
            shutil.copytree(one, many / f"recipe{number % 10}" / f"run{number}", copy_function=os.link)
        times = {name: [_seconds(Path(folder) / name, environment) for _ in range(REPEATS)] for name in ("one", "many")}
    return {
        "runs": RUNS,
        "rows": ROWS,
        "seconds": {name: vars(Spread.of(values)) for name, values in times.items()},
    }


def _seconds(root: Path, environment: dict[str, str]) -> float:
    command = [sys.executable, "-m", "jaxtrain", "status", "--root", str(root), "--json"]
    began = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began
