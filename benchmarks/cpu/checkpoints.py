"""Checkpoints: how long the loop is blocked by an asynchronous save, against the whole write, its manifest, and the restore."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.common import Spread, settings, synthetic
from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.manifest import problems, read_manifest, write_manifest
from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig
from jaxtrain.step.train_state import create_state
from jaxtrain.training.setup import load_data, make_run_spec

MODELS = {"resnet50, AdamW": "resnet50", "vgg19_bn, AdamW": "vgg19_bn"}
REPEATS = 5


def measure() -> list[dict[str, Any]]:
    """Fresh states of CIFAR models with AdamW: parameters and two moments in f32."""
    return [_measure(name, model) for name, model in MODELS.items()]


def _measure(name: str, model: str) -> dict[str, Any]:
    config = synthetic(
        Config(data=DataConfig(global_batch=16), model=ModelConfig(model), optim=OptimConfig(name="adamw"))
    )
    with settings(config):
        run = make_run_spec(config, load_data(config.data), jax.devices()[:1])
        state = create_state(run.init, run.layout, run.config.seed)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        blocked, whole, hashed, verified, restored = [], [], [], [], []
        with (
            tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as folder,
            contextlib.closing(Checkpointer(Path(folder) / "checkpoints", 1)) as checkpoints,
        ):
            for step in range(1, REPEATS + 2):
                began = time.perf_counter()
                checkpoints.save(step, state, {"examples": 0, "config": {}}, epoch=-1)
                blocked.append(time.perf_counter() - began)
                checkpoints.wait()
                whole.append(time.perf_counter() - began)
                path = checkpoints.directory / str(step)
                fields = dataclasses.asdict(read_manifest(path))
                began = time.perf_counter()
                write_manifest(path, **{k: v for k, v in fields.items() if k not in ("schema", "files", "time")})
                hashed.append(time.perf_counter() - began)
                began = time.perf_counter()
                assert not problems(path)
                verified.append(time.perf_counter() - began)
                began = time.perf_counter()
                jax.block_until_ready(checkpoints.restore(step, state))
                restored.append(time.perf_counter() - began)
    seconds = {
        "blocked": blocked[1:],
        "whole": whole[1:],
        "manifest": hashed[1:],
        "verify": verified[1:],
        "restore": restored[1:],
    }
    return {
        "name": name,
        "bytes": size,
        **{key: dataclasses.asdict(Spread.of(values)) for key, values in seconds.items()},
    }
