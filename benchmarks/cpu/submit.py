"""From `jaxtrain submit` to the first step of the run that the local queue starts, by the wall clock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread

REPEATS, SECONDS = 3, 300.0
JOB = """\
name: submitted
config: quickstart
overrides: {train.steps: 20, train.log_every: 1, checkpoint.every: "0"}
"""


def measure() -> list[dict[str, Any]]:
    """Seconds with an empty compile cache, and with what the run before has left there; the queue serves already."""
    return [
        {"cache": cache, "seconds": vars(Spread.of([_seconds(warm=cache == "warm") for _ in range(REPEATS)]))}
        for cache in ("cold", "warm")
    ]


def _seconds(*, warm: bool) -> float:
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as folder:
        top = Path(folder)
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAXTRAIN_QUEUE_DIR": str(top / "queue"),
            "JAX_COMPILATION_CACHE_DIR": str(top / "cache"),
            "JAX_PLATFORMS": "cpu",
        }
        environment.pop("XLA_FLAGS", None)
        command = [sys.executable, "-m", "jaxtrain"]
        server = subprocess.Popen([*command, "queue", "serve"], env=environment, stderr=subprocess.DEVNULL)
        try:
            time.sleep(2.0)  # it looks for jobs by now
            if warm:
                _to_first_step(command, environment, top / "before")
            return _to_first_step(command, environment, top / "measured")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def _to_first_step(command: list[str], environment: dict[str, str], folder: Path) -> float:
    """Submits the job in `folder`, waits for its first row, and then for its end."""
    folder.mkdir()
    file = folder / "job.yaml"
    file.write_text(JOB)
    rows, result = (folder / "runs" / "submitted" / name for name in ("metrics.jsonl", "result.json"))
    began = time.perf_counter()
    subprocess.run([*command, "submit", str(file)], env=environment, check=True, capture_output=True)
    _wait(lambda: rows.exists() and json.loads(rows.read_text().partition("\n")[0] or "{}").get("step") == 1, began)
    seconds = time.perf_counter() - began
    _wait(result.exists, began)
    return seconds


def _wait(holds: Any, began: float) -> None:
    while not holds():
        if time.perf_counter() - began > SECONDS:
            raise TimeoutError(f"no step and no result in {SECONDS:.0f} s")
        time.sleep(0.02)
