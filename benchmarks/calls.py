"""What the host spends on a step, by the steps that one program makes (`train.steps_per_call`): a tiny MLP, whole runs.

A model so small that the host is what takes the time. Runs are taken in turns.
"""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

from benchmarks.common import Spread, synthetic
from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import change
from jaxtrain.trainer import train

STEPS, TURNS = 2048, 5
PER_CALL = (1, 8, 32)

CONFIG = synthetic(
    Config(
        data=DataConfig(global_batch=16, augmentation="none"),
        model=ModelConfig("mlp", width=16, depths=(1,)),
        optim=OptimConfig(learning_rate=0.01, schedule="constant"),
        train=TrainConfig(steps=STEPS, log_every=STEPS, eval_every="0"),
    ),
    **{"checkpoint.every": "0", "data.examples": 16 * STEPS},
)


def measure() -> list[dict[str, Any]]:
    """Seconds a step of the whole loop, and how many times shorter than with one step a call."""
    seconds: dict[int, list[float]] = {count: [] for count in PER_CALL}
    for _ in range(TURNS):
        for count, found in seconds.items():
            with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as workdir:
                config = change(CONFIG, **{"train.steps_per_call": count})
                result = train(config, workdir, num_devices=1, quiet=True).result
            found.append(CONFIG.data.global_batch / result["throughput"])
    return [
        {
            "per_call": count,
            "batch": CONFIG.data.global_batch,
            "seconds": dataclasses.asdict(Spread.of(found)),
            "over_one": dataclasses.asdict(Spread.of([one / own for one, own in zip(seconds[1], found, strict=True)])),
        }
        for count, found in seconds.items()
    ]
