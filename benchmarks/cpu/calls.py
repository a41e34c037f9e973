"""What the host spends on a step, by the steps that one program makes (`train.steps_per_call`): a tiny MLP, whole runs.

A model so small that the host is what takes the time. Runs are taken in turns, and with them the bare step on batches that
are there: what a step of a whole run takes longer is what the trainer and its input add to it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

from benchmarks.common import Spread, block_seconds, settings, start, synthetic
from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import change
from jaxtrain.training.session import train

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


def measure() -> dict[str, Any]:
    """Seconds a step of the whole loop, how many times shorter than with one step a call, and how much longer than bare."""
    seconds: dict[int, list[float]] = {count: [] for count in PER_CALL}
    bare = []
    for _ in range(TURNS):
        with settings(CONFIG):
            bare += block_seconds(*start(CONFIG), STEPS, 1)
        for count, found in seconds.items():
            with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as workdir:
                config = change(CONFIG, **{"train.steps_per_call": count})
                result = train(config, workdir, num_devices=1, quiet=True).result
            found.append(CONFIG.data.global_batch / result["throughput"])
    added = [whole - alone for whole, alone in zip(seconds[1], bare, strict=True)]
    return {
        "batch": CONFIG.data.global_batch,
        "bare": dataclasses.asdict(Spread.of(bare)),
        "added": dataclasses.asdict(Spread.of(added)),
        "per_call": [
            {
                "per_call": count,
                "seconds": dataclasses.asdict(Spread.of(found)),
                "over_one": dataclasses.asdict(
                    Spread.of([one / own for one, own in zip(seconds[1], found, strict=True)])
                ),
            }
            for count, found in seconds.items()
        ],
    }
