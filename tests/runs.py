"""Starts runs as a user does, in this process or in processes of their own, and reads what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxtrain import load_config, train
from jaxtrain.cli import main as command_line
from jaxtrain.training.results import TrainResult

__all__ = ["command_line"]  # `jaxtrain ...` in this process

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "quickstart.py"
SECONDS = 500  # that a process may take; a test that waits so long has failed

# A run of 12 steps, in epochs of 4: an MLP on the digits, its rate constant so that the length may change.
SMALL: dict[str, Any] = {
    "data.name": "tiny:digits",
    "data.global_batch": 32,
    "data.examples": 128,
    "model.name": "mlp",
    "model.width": 16,
    "model.depths": "()",
    "optim.schedule": "constant",
    "optim.warmup": "0",
    "train.epochs": 3,
    "train.log_every": 1,
    "checkpoint.every": "2",
    "checkpoint.keep": 20,
}
# Everything that draws random numbers or keeps a state, in f64: what must come out the same on every mesh.
EXACT: dict[str, Any] = SMALL | {
    "data.augmentation": "light",
    "data.mixup": 0.2,
    "model.name": "tiny:resnet",
    "model.width": 4,
    "model.dropout": 0.1,
    "model.drop_path": 0.1,
    "model.bn_groups": 4,
    "optim.learning_rate": 0.4,
    "optim.ema": 0.9,
    "optim.clip_norm": 5.0,
    "train.precision": "f64",
}


def module(name: str, code: str) -> ModuleType:
    """A module of this code, to be put into `sys.modules`."""
    made = ModuleType(name)
    exec(code, vars(made))
    return made


def here(workdir: Path, fields: dict[str, Any], *, devices: int = 1, **more: Any) -> TrainResult:
    """Trains in this process; `more` has fields too, with a double underscore for the dot."""
    fields = fields | {name.replace("__", "."): value for name, value in more.items()}
    return train(load_config(RECIPE, fields), workdir, num_devices=devices, quiet=True)


def arguments(workdir: Path, fields: dict[str, Any], *more: str) -> list[str]:
    """The command line of the same run."""
    changed = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config", str(RECIPE), "--workdir", str(workdir), *changed, *more]


class Started:
    """A process of its own, which ends with the `with` block. Its output goes to a file: a full pipe would stop it."""

    def __init__(self, output: Path, command: Sequence[str], *, cwd: Path | None = None):
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        self._output = output
        with output.open("w") as file:
            command = [sys.executable, *command]
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=cwd)

    @property
    def output(self) -> str:
        """Standard output and standard error so far."""
        return self._output.read_text()

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Waits for its end; returns the exit code, -9 when SIGKILL ended it."""
        try:
            return self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {SECONDS} s:\n{self.output}") from None

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Returns as soon as `condition` is true. Fails when the process ends before."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self._process.poll() is None, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} in {SECONDS} s:\n{self.output}"
            time.sleep(0.005)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def main(output: Path, *argv: str) -> Started:
    """`python -m jaxtrain.main ...`"""
    return Started(output, ["-m", "jaxtrain.main", *argv])


def joined(process: int, count: int, port: int) -> list[str]:
    """The arguments that make a process one of `count` on this host."""
    return ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count), "--process-id", str(process)]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def draw_folder(top: Path, classes: str, first: int, last: int, side: int = 8) -> Path:
    """TOP/CLASS/*.png: images `first` ... `last` - 1 of each class, which has a bright quarter of its own."""
    for name in classes:
        (top / name).mkdir(parents=True, exist_ok=True)
        for k in range(first, last):
            pixels = np.random.default_rng(1000 * ord(name) + k).integers(0, 120, (side, side, 3), np.uint8)
            row, column = divmod(ord(name) % 4, 2)
            half = side // 2
            pixels[row * half : (row + 1) * half, column * half : (column + 1) * half] += 100
            Image.fromarray(pixels).save(top / name / f"{k:03d}.png")
    return top


# ------------------------------------------------------------------------------------------------------------- records


TIMED = ("time", "throughput", "throughput_per_device", "data_wait", "process_spread", "flops_per_second", "mfu")
"""What a row has of the clock, beside telemetry, whose names have a slash."""


def rows(workdir: Path, phase: str = "train") -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without what depends on the clock."""
    found = [row for row in _json_lines(workdir) if row["phase"] == phase]
    return [{k: v for k, v in row.items() if k not in TIMED and "/" not in k} for row in found]


def _json_lines(workdir: Path) -> Iterator[dict[str, Any]]:
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        yield json.loads(line)


def count_rows(workdir: Path) -> int:
    """How many lines metrics.jsonl has by now."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def epochs(workdir: Path) -> list[str]:
    """The lines of metrics.csv without the throughput."""
    return [line.rpartition(",")[0] for line in (workdir / "metrics.csv").read_text().splitlines()]


def losses(workdir: Path) -> np.ndarray:
    """The training loss of every step; fails unless each step is there once."""
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return np.array([row["loss"] for row in found])


def checkpoints(workdir: Path) -> list[int]:
    """The steps that were saved, rising."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def starts(workdir: Path) -> list[dict[str, Any]]:
    """What manifest.json says of each start."""
    return json.loads((workdir / "manifest.json").read_text())["starts"]


def leaves(result: TrainResult) -> dict[str, np.ndarray]:
    """Every leaf of the final state."""
    found = jax.tree_util.tree_leaves_with_path(result.state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def assert_same_bits(found: TrainResult, wanted: TrainResult) -> None:
    """Both states are the same, bit for bit."""
    a, b = leaves(found), leaves(wanted)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].tobytes() != b[name].tobytes() or a[name].dtype != b[name].dtype] == []


@contextlib.contextmanager
def several(folder: Path, *commands: list[str]) -> Iterator[list[Started]]:
    """A process for each command."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Started(folder / f"{process}.txt", command)) for process, command in enumerate(commands)
        ]


def train_in_turn(folder: Path, processes: int, devices: int, *jobs: list[str]) -> None:
    """`processes` processes of `devices` devices each do these training jobs, one after the other."""
    port, commands = free_port(), []
    for process in range(processes):
        mine = [["train", *job] for job in jobs]
        mine[0] += ["--simulate-devices", str(devices), *joined(process, processes, port)]
        commands.append([str(Path(__file__).with_name("jobs.py")), json.dumps(mine)])
    with several(folder, *commands) as started:
        for process in started:
            assert process.end() == 0, process.output
