"""Shrunk models and layouts, and what a run's numbers are: shared by the tests that compare layouts."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import conftest
import jax
import numpy as np
import pytest

from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.data import registry
from jaxtrain.data.base import ArraySource, Dataset, Subset
from jaxtrain.training.results import TrainResult
from jaxtrain.training.session import train

STEPS = 6
BATCH = 32

# Each has what the architecture offers of dropout, drop-path and BatchNorm, and mixup on top.
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {
        "model": ModelConfig("mlp", width=32, dropout=0.3),
        "data.augmentation": "tiny:speckle",
        "optim.class_weights": "balanced",
    },
    "resnet": {
        "model": ModelConfig("tiny:resnet18", width=8, dropout=0.1, drop_path=0.2, bn_groups=4),
        "data.image_size": 8,
        "data.augmentation": "light",
        "optim.learning_rate": 3.0,
    },
    "vgg": {
        "model": ModelConfig("vgg11_bn", width=8, depths=(1, 1, 1, 1, 1), dropout=0.1, bn_groups=4),
        "data.image_size": 32,
        # Its first gradients are tiny: LARS still moves. (AdamW would make steps of a zero gradient's rounding.)
        "optim.name": "lars",
        "optim.learning_rate": 10.0,
    },
    "convnet": {
        "model": ModelConfig("convnet_fast", width=4, depths=(1, 2, 1), dropout=0.1, bn_groups=4),
        "data.image_size": 9,
        "optim.learning_rate": 2.0,
    },
    "swin": {
        "model": ModelConfig("tiny:swin", width=32, dropout=0.1, drop_path=0.2),
        "data.image_size": 16,
        "data.augmentation": "light",
        "optim.name": "adamw",
        "optim.learning_rate": 1e-2,
    },
}


def case(*values: Any, default: bool) -> Any:
    """A test's parameters. Without `default` it is in the group `parity`, which is not part of the default suite."""
    return pytest.param(*values, marks=[] if default else [pytest.mark.parity])


def planted(faults: Sequence[Callable[..., None]], default: Callable[..., None]) -> list[Any]:
    """A test's parameters: of the planted faults, `default` alone is part of the default suite."""
    return [
        pytest.param(fault, id=fault.__name__, marks=[] if fault is default else [pytest.mark.parity])
        for fault in faults
    ]


def config(name: str, layout: LayoutConfig, *, seed: int = 0, **fields: Any) -> Config:
    """The run of model `name` under `layout`: f64, a constant rate, EMA, clipping, mixup."""
    sections: dict[str, dict[str, Any]] = {
        "model": {},
        "data": {"name": "synthetic", "global_batch": BATCH, "examples": 64, "mixup": 0.4},
        "optim": {
            "learning_rate": 0.1,
            "lr_reference_batch": BATCH,
            "weight_decay": 5e-4,
            "schedule": "constant",
            "ema": 0.9,
            "clip_norm": 5.0,
            "label_smoothing": 0.1,
        },
        "train": {"steps": STEPS, "log_every": 1, "precision": "f64", "eval_every": "0"},
        "checkpoint": {"every": "0"},
    }
    model = MODELS[name]["model"]
    for key, value in ({k: v for k, v in MODELS[name].items() if k != "model"} | fields).items():
        section, _, field = key.partition(".")
        if section == "model":
            model = dataclasses.replace(model, **{field: value})
        else:
            sections[section][field] = value
    return Config(
        seed=seed,
        data=DataConfig(**sections["data"]),
        model=model,
        optim=OptimConfig(**sections["optim"]),
        train=TrainConfig(**sections["train"]),
        layout=layout,
        checkpoint=dataclasses.replace(Config().checkpoint, **sections["checkpoint"]),
    )


def devices_of(layout: LayoutConfig) -> int:
    """How many devices `layout` needs."""
    return layout.stages * layout.data * layout.replica * layout.tensor


def run(name: str, layout: LayoutConfig, **fields: Any) -> TrainResult:
    """Trains in a directory of its own, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="jaxtrain-parity-") as workdir:
        result = train(config(name, layout, **fields), workdir, num_devices=devices_of(layout), quiet=True)
    conftest.give_back_memory()  # no other layout has a program of this one's
    return result


def numbers(result: TrainResult) -> dict[str, np.ndarray]:
    """Everything that a layout must not change: curves, test losses with and without EMA, final parameters."""
    rows = [row for row in result.history if row["phase"] == "train"]
    curves = {key: np.array([row[key] for row in rows]) for key in ("loss", "accuracy", "grad_norm", "update_norm")}
    last = result.result["last"]
    tests = {key: np.array([last[key]["loss"], last[key]["accuracy"]]) for key in ("test", "test_ema")}
    state = {
        f"{tree}{jax.tree_util.keystr(path)}": np.asarray(leaf)
        for tree in ("params", "batch_stats", "ema")
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(result.state, tree))
    }
    return curves | tests | state


def errors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference in each array, relative to its largest number, or to 1 where all are smaller.

    (A bias before a BatchNorm has no gradient: it is rounding and nothing else.)
    """
    assert found.keys() == wanted.keys()
    return {
        key: float(np.max(np.abs(found[key] - value)) / max(np.max(np.abs(value)), 1.0))
        for key, value in wanted.items()
    }


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Every number agrees within `tolerance`, as `errors` measures it."""
    for key, error in errors(found, wanted).items():
        assert error <= tolerance, f"{key}: relative error {error:.2g}"


# -------------------------------------------------------------------------------------------------------------- images


def cifar(config: DataConfig, *, image_size: int) -> Dataset:
    """`parity:cifar`: 360 images of the prepared CIFAR-10, with 40 for validation and 40 for the test."""
    found = registry.load(dataclasses.replace(config, name="cifar10"), image_size=image_size)
    parts = {"train": 360, "validation": 40, "test": 40}
    return dataclasses.replace(found, **{k: Subset(getattr(found, k), np.arange(n)) for k, n in parts.items()})


def flat(config: DataConfig, *, image_size: int) -> Dataset:
    """`parity:flat`: what drawings and skies have, and noise has not: areas that are flat, or rise by whole levels.

    There neighbouring patches are alike, or differ as much at other levels, so that the largest value of a window is
    there twice, or nearly twice. A tenth of each image is noise, and its label is the row of its brightest area.
    """
    del config
    chance, count, side, areas = np.random.default_rng(0), 96, image_size or 32, 3
    edges = np.linspace(0, side, areas + 1).astype(int)
    places = np.clip(np.searchsorted(edges, np.arange(side), "right") - 1, 0, areas - 1)
    shape = (count, areas, areas, 3)
    slopes = chance.integers(-3, 4, (2, *shape)) * (chance.random((1, *shape[:3], 1)) < 0.7)
    start = chance.integers(60, 196, shape)
    of = np.ix_(range(count), places, places)
    row, column = np.mgrid[:side, :side][..., None]
    x = start[of] + slopes[0][of] * (row - side // 2) + slopes[1][of] * (column - side // 2)
    x = np.where(chance.random((count, side, side, 1)) < 0.1, chance.integers(0, 256, x.shape), np.clip(x, 0, 255))
    labels = start.sum((2, 3)).argmax(1).astype(np.int32)
    parts = (ArraySource(x[i].astype(np.uint8), labels[i]) for i in (slice(64), slice(64, 80), slice(80, 96)))
    names = tuple(str(i) for i in range(areas))
    usual = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}  # those of CIFAR-10
    return Dataset("flat", *parts, num_classes=areas, class_names=names, fingerprint="flat", **usual)
