"""What faults cost: seconds from a fault to the end of what it causes, with real processes under `jaxtrain launch`.

python -m benchmarks.run cpu2 faults
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread

EVERY, KILLS, REPEATS = 20, 10, 3  # steps between checkpoints

# The digits at 50 ms a batch; process 1 fails or stands still once a file says so.
FAULTY = """
import dataclasses, pathlib, sys, time
from jaxtrain.data import registry

here = pathlib.Path(__file__).parent
is_second = "--process-id" in sys.argv and sys.argv[sys.argv.index("--process-id") + 1] == "1"

class Faulty:
    def __init__(self, base):
        self.base, self.shape = base, base.shape

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        time.sleep(0.05)
        if is_second and (here / "fail").exists():
            raise ValueError("a disk that is not there")
        if is_second and (here / "stick").exists():
            time.sleep(600)
        return self.base.read(indices)

def digits(config, image_size):
    found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
    return dataclasses.replace(found, train=Faulty(found.train))
"""
FIELDS: dict[str, Any] = {
    "data.name": "faulty:digits", "data.residency": "stream", "data.workers": 0, "data.global_batch": 32,
    "data.examples": 128, "model.name": "mlp", "model.width": 16, "model.depths": "()", "optim.warmup": "0",
    "optim.schedule": "constant", "train.steps": 100_000, "train.log_every": 1, "train.eval_every": "0",
    "checkpoint.every": EVERY,
}  # fmt: skip


class Job:
    """Two processes under the launcher, in a folder of their own."""

    def __init__(self, folder: Path, *options: str, **fields: Any):
        self.folder, self.run = folder, folder / "run"
        (folder / "faulty.py").write_text(FAULTY)
        changed = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
        train = ["train", "--config", str(ROOT / "configs" / "quickstart.py"), "--workdir", str(self.run)]
        train += ["--simulate-devices", "1", *(f"--config.{name}={value}" for name, value in changed.items())]
        with open(folder / "output.txt", "a") as output:
            command = [sys.executable, "-m", "jaxtrain", "launch", "--nproc", "2", *options, "--", *train]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)

    def workers(self) -> list[int]:
        """The two processes' numbers, in their order."""
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def step(self) -> int:
        """The step of the last whole row."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def starts(self) -> list[int]:
        """The step that each start went on from."""
        path = self.run / "manifest.json"
        return [start["step"] for start in json.loads(path.read_text())["starts"]] if path.exists() else []

    def goes_on(self) -> bool:
        """Whether the last start has made a step: it notes its start first, then forgets what rows lie behind it."""
        noted, written = ((self.run / name).stat().st_mtime_ns for name in ("manifest.json", "metrics.jsonl"))
        return written > noted and self.step() > self.starts()[-1]

    def has_begun(self, after: int = 0) -> None:
        """Waits for ten steps behind `after`."""
        self.wait_until(lambda: self.step() >= after + 10)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> float:
        """Seconds until `condition` holds."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                raise TimeoutError((self.folder / "output.txt").read_text()[-2000:])
            time.sleep(0.005)
        return time.monotonic() - began

    def seconds_to_end(self, code: int) -> float:
        """Seconds until the launcher ends, with this exit code."""
        began = time.monotonic()
        found = self.process.wait(300)
        if found != code:
            raise RuntimeError(f"exit code {found}, not {code}: {(self.folder / 'output.txt').read_text()[-2000:]}")
        return time.monotonic() - began


@contextlib.contextmanager
def _job(*options: str, **fields: Any) -> Iterator[Job]:
    with tempfile.TemporaryDirectory(prefix="jaxtrain-faults-") as folder:
        job = Job(Path(folder), *options, **fields)
        try:
            yield job
        finally:
            job.process.kill()
            job.process.wait()


def measure() -> list[dict[str, Any]]:
    """A row a fault: its name and the spread of its seconds."""
    return [
        *_kills(),
        _row("SIGTERM to all ended, saved at one step (75)", _signalled(signal.SIGTERM, 75)),
        _row("Ctrl-C to all ended, saved at one step (130)", _signalled(signal.SIGINT, 130)),
        _row("second Ctrl-C, a process stuck, to all ended", _repeat(_second_interrupt)),
        _row("an exception in one process to the job's end (65)", _repeat(_exception)),
        _row("a process that stands still to the job's end (limit 10 s)", _repeat(_stuck)),
        _row("a frozen process to the job's end (limit 15 s)", _repeat(_frozen)),
    ]


def _row(name: str, seconds: list[float]) -> dict[str, Any]:
    return {"name": name, "repeats": len(seconds), "seconds": dataclasses.asdict(Spread.of(seconds))}


def _repeat(scenario: Callable[[], float]) -> list[float]:
    return [scenario() for _ in range(REPEATS)]


def _kills() -> list[dict[str, Any]]:
    """One job, whose processes are killed in turn."""
    noticed, recovered, redone = [], [], []
    with _job("--max-restarts", "100") as job:
        for kill in range(KILLS):
            job.has_begun(job.step())
            workers, before, starts = job.workers(), job.step(), len(job.starts())
            os.kill(workers[kill % 2], signal.SIGKILL)
            began, other = time.monotonic(), workers[1 - kill % 2]
            noticed.append(job.wait_until(lambda other=other: other not in job.workers()))
            job.wait_until(lambda starts=starts: len(job.starts()) > starts)
            job.wait_until(job.goes_on)
            recovered.append(time.monotonic() - began)
            redone.append(float(before - job.starts()[-1]))
    return [
        _row("a killed process to the other's end", noticed),
        _row("a killed process to the first new step", recovered),
        {"name": f"steps done again after a kill, of {EVERY}", "steps": dataclasses.asdict(Spread.of(redone))},
    ]


def _signalled(number: signal.Signals, code: int) -> list[float]:
    def scenario() -> float:
        with _job() as job:
            job.has_begun()
            job.process.send_signal(number)
            return job.seconds_to_end(code)

    return _repeat(scenario)


def _second_interrupt() -> float:
    with _job() as job:
        job.has_begun()
        (job.folder / "stick").touch()
        time.sleep(1)
        job.process.send_signal(signal.SIGINT)
        time.sleep(1)
        job.process.send_signal(signal.SIGINT)
        return job.seconds_to_end(130)


def _exception() -> float:
    with _job() as job:
        job.has_begun()
        (job.folder / "fail").touch()
        return job.seconds_to_end(65)


def _stuck() -> float:
    with _job("--max-restarts", "0", train__hang_seconds=10) as job:
        job.has_begun()
        (job.folder / "stick").touch()
        return job.seconds_to_end(70)


def _frozen() -> float:
    with _job("--max-restarts", "0", "--hang", "15") as job:
        job.has_begun()
        os.kill(job.workers()[1], signal.SIGSTOP)
        return job.seconds_to_end(70)
