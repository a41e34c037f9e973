"""Shrunk models and layouts, and what a run's numbers are: shared by the tests that compare layouts."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.trainer import TrainResult, train

STEPS = 6
BATCH = 32

# Each has what the architecture offers of dropout, drop-path and BatchNorm, and mixup on top.
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": ModelConfig("mlp", width=32, dropout=0.3)},
    "resnet": {
        "model": ModelConfig("resnet18", width=8, depths=(1, 1, 1, 1), dropout=0.1, drop_path=0.2, bn_groups=4),
        "data.image_size": 8,
        "data.augmentation": "light",
    },
    "vgg": {
        "model": ModelConfig("vgg11_bn", width=8, dropout=0.1, bn_groups=4),
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
        "model": ModelConfig("swin_tiny", width=16, depths=(2, 1, 1, 1), dropout=0.1, drop_path=0.2),
        "data.image_size": 16,
        "data.augmentation": "light",
        "optim.name": "adamw",
        "optim.learning_rate": 1e-3,
    },
}


def case(group: str, *values: Any, slow: bool = False) -> Any:
    """A test's parameters; it runs on the worker of `group`, where a reference is computed once. slow: not by default."""
    return pytest.param(*values, marks=[pytest.mark.xdist_group(group), *([pytest.mark.slow] if slow else [])])


def config(name: str, layout: LayoutConfig, **fields: Any) -> Config:
    """The run of model `name` under `layout`: f64, a constant rate, EMA, clipping, mixup."""
    sections: dict[str, dict[str, Any]] = {
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
        return train(config(name, layout, **fields), workdir, num_devices=devices_of(layout), quiet=True)


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


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Every number agrees within `tolerance`, relative to the largest of its array, or to 1 where all are smaller.

    (A bias before a BatchNorm has no gradient: it is rounding and nothing else.)
    """
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        error = np.max(np.abs(found[key] - value)) / max(np.max(np.abs(value)), 1.0)
        assert error <= tolerance, f"{key}: relative error {error:.2g}"
