"""Does jaxtrain run on this GPU? The quickstart on it, on its host's CPU, and stopped and resumed; their losses compared.

python -m benchmarks.gpu.quickstart [--smoke]

In f32 with deterministic operations, so that a resumed run must have the same bits as one that was not stopped. The three
run at the same time. The row has seconds, test accuracies, how far the GPU's losses are from the CPU's, and what differs
after the resume; an `error` where a run failed or the losses do not agree.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.parts import ROOT, Budget, Row, Session, add_options, scratch_folder
from benchmarks.gpu.suite import machine

SETTINGS = ("train.precision=f32", "train.deterministic=true", "train.log_every=1")
# A model that compiles fast, and steps enough to stop it.
SMOKE = ("model.name=mlp", "model.width=16", "model.depths=[]", "train.steps=400")
STOPPED = 75  # the exit code of a run that SIGTERM has ended
COMPARED = (1, 10, 100)
# Relative, of the first step's loss: the same weights and images, sums in another order.
FIRST_LOSS_DIFFERS = 1e-4


def main() -> None:
    """Parses the arguments, runs and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    arguments = parser.parse_args()
    session = Session(arguments.results, machine(arguments.commit, arguments.smoke))
    row: Row = {"kind": "quickstart", "name": "quickstart, f32, deterministic"}
    with scratch_folder(arguments.scratch) as scratch:
        runs = Runs(scratch, Budget(arguments.budget_seconds), smoke=arguments.smoke)
        # One after the other where they would only share two cores, and what is compiled.
        with ThreadPoolExecutor(1 if arguments.smoke else 3) as pool:
            parts, gpu, cpu = pool.submit(runs.parts), pool.submit(runs.run, "gpu"), pool.submit(runs.run, "cpu")
            row["exit_codes"] = {"gpu": [gpu.result()], "cpu": [cpu.result()], "parts": parts.result()}
        row["seconds"] = runs.seconds
        try:
            row |= compare(scratch)
        except (OSError, KeyError, ValueError) as error:  # of a run that left nothing
            row["error"] = f"{type(error).__name__}: {error}"
    if row["exit_codes"] != {"gpu": [0], "cpu": [0], "parts": [STOPPED, 0]}:
        row["error"] = f"exit codes {row['exit_codes']}; {row.get('error', '')}"
    session.put(row)
    print(json.dumps(row), flush=True)
    sys.exit(1 if session.failures else 0)


class Runs:
    """Starts the quickstart. What it prints goes to NAME.log, its work directory is NAME."""

    def __init__(self, scratch: Path, budget: Budget, *, smoke: bool):
        self._scratch, self._budget, self._smoke = scratch, budget, smoke
        self.seconds: dict[str, float] = {}

    def run(self, name: str) -> int:
        """To its end; the exit code."""
        began = time.monotonic()
        if name != "parts":
            shutil.rmtree(self._scratch / name, ignore_errors=True)  # of an earlier call
        code = self._wait(self._start(name))
        self.seconds[name] = time.monotonic() - began
        return code

    def parts(self) -> list[int]:
        """Stopped by SIGTERM when there is a checkpoint, and resumed; both exit codes."""
        shutil.rmtree(self._scratch / "parts", ignore_errors=True)
        process = self._start("parts")
        while process.poll() is None and not list(self._scratch.glob("parts/checkpoints/*/manifest.json")):
            time.sleep(0.01)
            if not self._budget.left:
                break
        process.send_signal(signal.SIGTERM)
        code = self._wait(process)
        stored = _losses(self._scratch / "parts")
        (self._scratch / "stopped_at").write_text(str(max(stored, default=0)))
        return [code, self.run("parts")]

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        cpu = self._smoke or name == "cpu"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu" if cpu else "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2"}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(self._scratch / "xla")
        command = [sys.executable, "-m", "jaxtrain.main", "--config", str(ROOT / "configs" / "quickstart.py")]
        command += ["--workdir", str(self._scratch / name)]
        command += [f"--config.{each}" for each in (*SETTINGS, *(SMOKE if self._smoke else ()))]
        with open(self._scratch / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(self._budget.left)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _losses(workdir: Path) -> dict[int, tuple[float, float]]:
    """Loss and norm of the gradients of each training step."""
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if row["phase"] == "train"}


def compare(scratch: Path) -> Row:
    """What the work directories `gpu`, `cpu` and `parts` in `scratch` say.

    loss_differs: step -> relative difference of the GPU's loss and the CPU's, at most so far. resumed_differs_at: steps
    whose loss or norm of the gradients is another than that of the run without a stop; the first five.
    """
    gpu, cpu, parts = (_losses(scratch / name) for name in ("gpu", "cpu", "parts"))
    apart = {step: abs(loss - cpu[step][0]) / abs(cpu[step][0]) for step, (loss, _) in gpu.items()}
    differs = [step for step in sorted(gpu.keys() | parts.keys()) if gpu.get(step) != parts.get(step)]
    results = {name: json.loads((scratch / name / "result.json").read_text()) for name in ("gpu", "cpu", "parts")}
    row: Row = {
        "steps": len(gpu),
        "stopped_at": int((scratch / "stopped_at").read_text()),
        "loss_differs": {str(n): max(each for step, each in apart.items() if step <= n) for n in COMPARED},
        "resumed_differs_at": differs[:5],
        "test_accuracy": {name: found["last"]["test"]["accuracy"] for name, found in results.items()},
        "device": results["gpu"]["device_kind"],
    }
    if differs:
        row["error"] = f"the resumed run differs from step {differs[0]} on"
    elif apart[1] > FIRST_LOSS_DIFFERS:
        row["error"] = f"the first loss differs from the CPU's by {apart[1]:.1e}"
    return row


if __name__ == "__main__":
    main()
