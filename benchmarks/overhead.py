"""What the trainer and its input add to the bare compiled step. Each is measured in a process of its own, in turns.

python -m benchmarks.overhead cached|fed|trainer      # one of them: prints its seconds a step, block by block
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from benchmarks.common import ROOT, Spread, batches, block_seconds, settings, start, synthetic
from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.trainer import train

STEPS, BLOCKS, TURNS = 60, 4, 5  # steps a block; blocks a process, after one that warms up; processes of each kind

CONFIG = synthetic(
    Config(
        data=DataConfig(global_batch=64, augmentation="light"),
        model=ModelConfig("resnet18", width=8),
        optim=OptimConfig(learning_rate=0.01, schedule="constant"),
        train=TrainConfig(steps=STEPS * (BLOCKS + 1), log_every=STEPS, eval_every="0"),
    ),
    **{"checkpoint.every": "0"},
)


def cached() -> list[float]:
    """The bare step, again and again on the same batches, which lie on the device."""
    with settings(CONFIG):
        return block_seconds(*start(CONFIG), STEPS, BLOCKS)


def fed() -> list[float]:
    """The bare step in a loop over the input pipeline."""
    seconds = []
    with settings(CONFIG):
        run, engine, state = start(CONFIG)
        for block in range(BLOCKS + 1):
            began = time.perf_counter()
            for batch in batches(run, engine, block * STEPS, STEPS):
                state, metrics = engine.step(state, batch, engine.feed.resident)
            jax.block_until_ready((state, metrics))
            seconds.append((time.perf_counter() - began) / STEPS)
    return seconds[1:]


def trainer() -> list[float]:
    """`train`, by its own rows of metrics: steps, input, logging, and all that the host does between them."""
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as workdir:
        history = train(CONFIG, workdir, num_devices=1, quiet=True).history
    return [CONFIG.data.global_batch / row["throughput"] for row in history if row["phase"] == "train"][1:]


KINDS = {"cached": cached, "fed": fed, "trainer": trainer}


def measure() -> dict[str, Any]:
    """Ratios of neighbouring processes: real batches over one cached block, and the trainer over the bare step."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(TURNS):
        for kind, seconds in found.items():
            command = [sys.executable, "-m", "benchmarks.overhead", kind]
            output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            seconds.append(Spread.of(json.loads(output.splitlines()[-1])).median)

    def over_bare(kind: str) -> dict[str, float]:
        return dataclasses.asdict(Spread.of([a / b for a, b in zip(found[kind], found["cached"], strict=True)]))

    return {
        "steps": STEPS * BLOCKS,
        "step_seconds": dataclasses.asdict(Spread.of(found["cached"])),
        "real_data_over_cached_batch": over_bare("fed"),
        "trainer_over_bare_step": over_bare("trainer"),
    }


if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]]()))
