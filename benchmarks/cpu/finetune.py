"""What pretrained weights are worth: a small ResNet on ten classes of CIFAR-100 of which it has 20 images each.

python -m benchmarks.run cpu2 finetune      # took 13 minutes on a core shared with other work

It has four blocks, 16 channels at first, and is first trained on the other 90 classes, at 16 px. Then the ten are trained
on from these weights (all layers, and as a linear probe) and from scratch: the same images, steps and augmentation, three
seeds. The seed also chooses the 20 images. Each way takes the rate, of 0.02 and 0.1, that did best with another seed.
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
from jaxtrain.data.base import Dataset, Relabelled, Subset, labels_of
from jaxtrain.training.session import train

OLD, NEW, SHOTS = 90, 10, 20  # classes to begin with, classes to go on with, and images of each
SEEDS, RATE_SEED, RATES = (0, 1, 2), 3, (0.02, 0.1)
WAYS: dict[str, dict[str, Any]] = {
    "from scratch": {},
    "from the weights": {"head_rate": 2.0},
    "a linear probe of the weights": {"freeze_layers": -1},
}


def old_classes(config: DataConfig, *, image_size: int) -> Dataset:
    """The first 90 classes of CIFAR-100, as `benchmarks.cpu.finetune:old_classes`."""
    return _of_classes(config, image_size, np.arange(OLD), 0)


def new_classes(config: DataConfig, *, image_size: int) -> Dataset:
    """The last 10 classes, 20 images of each drawn by `config.split_seed`, and all of their test images."""
    return _of_classes(config, image_size, np.arange(OLD, OLD + NEW), SHOTS)


def _of_classes(config: DataConfig, image_size: int, classes: np.ndarray, shots: int) -> Dataset:
    whole = registry.load(dataclasses.replace(config, name="cifar100", validation=0.0), image_size=image_size)
    renumbered = np.full(OLD + NEW, -1, np.int32)
    renumbered[classes] = np.arange(len(classes))
    chance = np.random.default_rng(config.split_seed)

    def cut(source: Any, shots: int) -> Any:
        labels = labels_of(source)
        assert labels is not None
        rows = np.flatnonzero(renumbered[labels] >= 0)
        if shots:
            rows = np.concatenate([chance.permutation(rows[labels[rows] == c])[:shots] for c in classes])
        return Relabelled(Subset(source, rows), renumbered)

    names = tuple(whole.class_names[c] for c in classes)
    train, test = cut(whole.train, shots), cut(whole.test, 0)
    kind = f"{whole.fingerprint} {len(names)} {shots} {config.split_seed}"
    return dataclasses.replace(
        whole, train=train, test=test, validation=Subset(whole.test, np.arange(0)), num_classes=len(names),
        class_names=names, fingerprint=kind, split_fingerprints={}, drawn=(),
    )  # fmt: skip


def measure() -> dict[str, Any]:
    """Pretrains once, then trains each way with each seed."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as name:
        directory = Path(name)
        before = train(_config("old_classes", 128, 0.1, epochs=2), directory / "old", num_devices=1, quiet=True)
        weights = str(directory / "old")

        def accuracy(way: str, rate: float, seed: int) -> float:
            optim = {"learning_rate": rate, **WAYS[way]}
            config = _config(
                "new_classes", 50, seed=seed, epochs=20, init="" if way == "from scratch" else weights, **optim
            )
            run = train(config, directory / f"{way} {rate} {seed}", num_devices=1, quiet=True)
            return run.result["last"]["test"]["accuracy"]

        rows = []
        for way in WAYS:
            rate = max(RATES, key=lambda rate: accuracy(way, rate, RATE_SEED))
            rows.append({"name": way, "rate": rate, "accuracies": [accuracy(way, rate, seed) for seed in SEEDS]})
    return {
        "pretrained": before.result["last"]["test"]["accuracy"],
        "rows": rows,
        "seconds": time.perf_counter() - began,
    }


def _config(
    data: str, batch: int, learning_rate: float, *, epochs: int, seed: int = 0, init: str = "", **optim: Any
) -> Config:
    return Config(
        seed=seed,
        data=DataConfig(
            name=f"benchmarks.cpu.finetune:{data}", image_size=16, global_batch=batch, augmentation="light", split_seed=seed,
            validation=0.0,
        ),
        model=ModelConfig("resnet18", width=16, depths=(1, 1, 1, 1), init_from=init),
        optim=OptimConfig(
            learning_rate=learning_rate, lr_scaling="none", nesterov=True, weight_decay=5e-4, warmup="1 epoch", **optim
        ),
        train=TrainConfig(epochs=epochs, precision="f32", eval_every="0"),
        checkpoint=CheckpointConfig(every="0"),
    )  # fmt: skip
