"""What the trainer and its input add to the bare compiled step.

Three processes take turns of a few seconds, the others stopped (SIGSTOP) meanwhile: what slows the machine for longer than
that slows all of them alike, and the ratio of neighbouring turns stays. Beside the clock's time that of the processors, of all
threads: on cores that the step keeps busy, what the trainer computes is what it costs.

python -m benchmarks.cpu.overhead cached|fed|trainer WORKDIR  # one of them: a line in WORKDIR/metrics.jsonl after each block
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.common import ROOT, Spread, batches, settings, start, synthetic
from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.step.batch import Batch
from jaxtrain.training.session import train

STEPS, TURNS, WARM = 32, 25, 2  # steps a block, an epoch; blocks of each kind, after some that warm up

CONFIG = synthetic(
    Config(
        data=DataConfig(global_batch=64, augmentation="light"),
        model=ModelConfig("resnet18", width=8),
        optim=OptimConfig(learning_rate=0.01, schedule="constant"),
        train=TrainConfig(steps=10**6, log_every=STEPS, eval_every="0"),
    ),
    **{"checkpoint.every": "0"},
)


def cached(workdir: Path) -> None:
    """The bare step, again and again on the same batches, which lie on the device."""
    _steps(workdir, lambda first: first)


def fed(workdir: Path) -> None:
    """The bare step in a loop over the input pipeline."""
    _steps(workdir, lambda _: None)


def _steps(workdir: Path, reused: Callable[[list[Batch]], Iterable[Batch] | None]) -> None:
    workdir.mkdir()
    with settings(CONFIG), (workdir / "metrics.jsonl").open("w") as rows:
        run, engine, state = start(CONFIG)
        first = list(batches(run, engine, 0, STEPS))
        for block in itertools.count():
            for batch in reused(first) or batches(run, engine, block * STEPS, STEPS):
                state, metrics = engine.step(state, batch, engine.inputs.resident)
            jax.block_until_ready((state, metrics))
            print(block, file=rows, flush=True)


def trainer(workdir: Path) -> None:
    """`train`: steps, input, logging, and all that the host does between them."""
    train(CONFIG, workdir, num_devices=1, quiet=True)


KINDS = {"cached": cached, "fed": fed, "trainer": trainer}


class Job:
    """A process that runs during its turns alone; it adds a line to WORKDIR/metrics.jsonl after each block."""

    def __init__(self, module: str, kind: str, workdir: Path) -> None:
        """Starts `python -m module kind workdir`."""
        self._rows = workdir / "metrics.jsonl"
        self._process = subprocess.Popen([sys.executable, "-m", module, kind, str(workdir)], cwd=ROOT)

    def turn(self) -> tuple[float, float]:
        """Runs to the end of its next block; returns the seconds that took, by the clock and of processors."""
        before, began, used = self._blocks(), time.perf_counter(), self._processor_seconds()
        self._process.send_signal(signal.SIGCONT)
        while self._blocks() == before:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._process.args} ended with {self._process.returncode}.")
            time.sleep(0.002)
        self._process.send_signal(signal.SIGSTOP)
        return time.perf_counter() - began, self._processor_seconds() - used

    def _processor_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _blocks(self) -> int:
        return self._rows.read_bytes().count(b"\n") if self._rows.exists() else 0


def in_turns(module: str, kinds: Sequence[str], turns: int, warm: int) -> dict[str, list[tuple[float, float]]]:
    """`Job.turn` of each kind, `turns` times in turns, after `warm` turns of each that do not count."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as folder, contextlib.ExitStack() as stack:
        jobs: dict[str, Job] = {}
        for kind in kinds:
            jobs[kind] = Job(module, kind, Path(folder, kind))
            stack.callback(jobs[kind].kill)
            for _ in range(warm):
                jobs[kind].turn()
        for _ in range(turns):
            for kind, job in jobs.items():
                found[kind].append(job.turn())
    return found


def measure() -> dict[str, Any]:
    """Ratios of neighbouring turns: real batches over one cached block, and the trainer over the bare step."""
    found = in_turns("benchmarks.cpu.overhead", tuple(KINDS), TURNS, WARM)

    def over_bare(kind: str, clock: int) -> dict[str, float]:
        turns = zip(found[kind], found["cached"], strict=True)
        return dataclasses.asdict(Spread.of([turn[clock] / bare[clock] for turn, bare in turns]))

    return {
        "steps": STEPS * TURNS,
        "step_seconds": dataclasses.asdict(Spread.of([seconds / STEPS for seconds, _ in found["cached"]])),
        "real_data_over_cached_batch": over_bare("fed", 0),
        "real_data_over_cached_batch_processor": over_bare("fed", 1),
        "trainer_over_bare_step": over_bare("trainer", 0),
        "trainer_over_bare_step_processor": over_bare("trainer", 1),
    }


if __name__ == "__main__":
    KINDS[sys.argv[1]](Path(sys.argv[2]))
