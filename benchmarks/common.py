"""What the benchmarks share: shrunk runs, repeats, and the machine they ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint.resume_point import Position, ResumePoint
from jaxtrain.config import Config
from jaxtrain.host import xla_flags
from jaxtrain.recipes import change
from jaxtrain.scaling.measuring import Spread
from jaxtrain.step.batch import Batch
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.compiled import CompiledRun, compile_run
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.setup import RunSpec, load_data, make_run_spec

ROOT = Path(__file__).resolve().parent.parent


def set_flags() -> None:
    """XLA's flags, as a run has them; they count before the first device is used."""
    xla_flags.set_flags(xla_flags.for_run("f32"))


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and command."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit.stdout.strip(),
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def timed(function: Callable[[], Any], repeats: int) -> Spread:
    """Seconds of `function()`, whose result is waited for."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - began)
    return Spread.of(seconds)


def synthetic(config: Config, **fields: Any) -> Config:
    """`config` on learnable synthetic images of CIFAR's shape (random bytes: never time zeros)."""
    return change(
        config,
        **{"data.name": "synthetic", "data.image_size": 32, "data.examples": 2048, "train.precision": "f32", **fields},
    )


def start(config: Config, devices: int = 1) -> tuple[RunSpec, CompiledRun, TrainState]:
    """A compiled run. The caller is inside `settings(config)`."""
    set_flags()
    run = make_run_spec(config, load_data(config.data), jax.devices()[:devices])
    engine, state = compile_run(run, ResumePoint(None, Position(), None))
    return run, engine, state


def block_seconds(run: RunSpec, engine: CompiledRun, state: TrainState, steps: int, repeats: int) -> list[float]:
    """Seconds a step, of each of `repeats` blocks of `steps`; a block before them warms up. Donates `state`."""
    seconds = []
    for repeat in range(repeats + 1):
        block = list(batches(run, engine, repeat * steps, steps))
        began = time.perf_counter()
        for batch in block:
            state, metrics = engine.step(state, batch, engine.inputs.resident)
        jax.block_until_ready((state, metrics))
        seconds.append((time.perf_counter() - began) / steps)
    return seconds[1:]


def batches(run: RunSpec, engine: CompiledRun, first_step: int, steps: int) -> Generator[Batch]:
    """The training batches of `steps` updates."""
    batch = run.config.data.global_batch
    return engine.batches(first_step=first_step, first_example=first_step * batch, steps=steps)


__all__ = [
    "ROOT",
    "Spread",
    "batches",
    "block_seconds",
    "machine",
    "set_flags",
    "settings",
    "start",
    "synthetic",
    "timed",
]
