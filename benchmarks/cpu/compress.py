"""What compressed gradients and local SGD cost in accuracy, and save in bytes: a narrow ResNet on CIFAR-10, four devices.

python -m benchmarks.run cpu2 compress

The ResNet has four blocks, 16 channels at first, and sees 8,000 of the real training images at 16 px for three epochs, in
global batches of 64: 375 steps. All ways have the same images, order, rate and steps; three seeds. The test is on all 10,000
test images. Bytes are those that a device sends, counted in the compiled program of the step.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.data import registry
from jaxtrain.data.base import Dataset, Subset
from jaxtrain.parallel.bench.programs import sent_by
from jaxtrain.step.train_state import state_shapes
from jaxtrain.training.compiled import compile_train_step
from jaxtrain.training.input_pipeline import make_input_pipeline
from jaxtrain.training.session import train
from jaxtrain.training.setup import load_data, make_run_spec, resolve_for_machine, select_devices

DEVICES, SEEDS = 4, (0, 1, 2)
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"compress": "int8"},
    "topk, 10 %": {"compress": "topk", "compress_ratio": 0.1},
    "randomk, 10 %": {"compress": "randomk", "compress_ratio": 0.1},
    "powersgd, rank 4": {"compress": "powersgd", "compress_rank": 4},
    "local SGD, 8 steps": {"sync_every": 8},
}


def part(config: DataConfig, *, image_size: int) -> Dataset:
    """CIFAR-10 with the first 8,000 training images of its order, as `benchmarks.cpu.compress:part`."""
    whole = registry.load(dataclasses.replace(config, name="cifar10", validation=0.0), image_size=image_size)
    return dataclasses.replace(
        whole, train=Subset(whole.train, np.arange(8000)), fingerprint=f"{whole.fingerprint} 8000", split_fingerprints={},
        drawn=(),
    )  # fmt: skip


def measure() -> dict[str, Any]:
    """Trains each way with each seed."""
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as name:
        for way, optim in WAYS.items():
            accuracies = []
            for seed in SEEDS:
                run = train(_config(seed, **optim), Path(name) / f"{way} {seed}", num_devices=DEVICES, quiet=True)
                accuracies.append(run.result["last"]["test"]["accuracy"])
            rows.append({"name": way, "accuracies": accuracies, "bytes_per_step": _sent_bytes(_config(0, **optim))})
    return {"devices": DEVICES, "rows": rows, "seconds": time.perf_counter() - began}


def _sent_bytes(config: Config) -> float:
    """Bytes that a device sends in a step; under local SGD, in the mean of the steps from one sync to the next."""
    devices = select_devices(DEVICES)
    config = resolve_for_machine(config, None, devices)
    run = make_run_spec(config, load_data(config.data), devices)
    inputs = make_input_pipeline(run.dataset, run.layout, config.data.residency, config.data.workers)
    step = compile_train_step(run, inputs, state_shapes(run.init, run.layout), Path("trace.json"))
    return sent_by(step.programs["step"].as_text(), run.layout.mesh)[0] / config.optim.sync_every


def _config(seed: int, **optim: Any) -> Config:
    return Config(
        seed=seed,
        data=DataConfig(
            name="benchmarks.cpu.compress:part", image_size=16, global_batch=64, augmentation="light", validation=0.0
        ),
        model=ModelConfig("resnet18", width=16, depths=(1, 1, 1, 1)),
        optim=OptimConfig(
            learning_rate=0.1, lr_scaling="none", nesterov=True, weight_decay=5e-4, warmup="50 steps", **optim
        ),
        train=TrainConfig(epochs=3, precision="f32", eval_every="0"),
        checkpoint=CheckpointConfig(every="0"),
    )  # fmt: skip
