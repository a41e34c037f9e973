"""Stochastic weight averaging (Izmailov 2018): the mean of the weights at the ends of the last epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.config import Config
from jaxtrain.errors import ConfigError
from jaxtrain.parallel.arrays import to_every_process
from jaxtrain.step.batch_statistics import estimate_statistics
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.callbacks import Callback, RunHandle
from jaxtrain.training.export import pretrained_config
from jaxtrain.training.results import figures, on_both_splits
from jaxtrain.trees import PyTree, path_of
from jaxtrain.weights.writing import write_safetensors

log = logging.getLogger("jaxtrain")

FILE = "swa.safetensors"


class StochasticWeightAveraging(Callback):
    """Averages the weights at each end of an epoch after `callbacks.swa_start` of the run.

    At the end the BatchNorms take their statistics anew, as means over the batches of an epoch; then the average is
    evaluated, and written to `swa.safetensors`. Training itself does not see it.
    """

    name = "swa"
    every_process = True

    def __init__(self, config: Config):
        self._start, self._epochs = config.callbacks.swa_start, 0

    def on_start(self, run: RunHandle, state: TrainState) -> None:
        spec = run.compiled.run
        if spec.layout.stages > 1 and jax.tree.leaves(spec.task.moving(state.batch_stats)):
            raise ConfigError(
                f"config.callbacks.names: swa takes the BatchNorm statistics of {run.config.model.name} anew, and cannot "
                f"with config.layout.stages={spec.layout.stages}; use one stage, or leave swa out."
            )
        self.arrays = {"params": jax.tree.map(lambda leaf: jnp.zeros_like(leaf, device=leaf.sharding), state.params)}

    def on_epoch(self, run: RunHandle, epoch: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        if run.step < self._start * run.steps:
            return
        self._epochs += 1
        self.arrays = {"params": _moved(self.arrays["params"], state.params, self._epochs)}

    def on_end(self, run: RunHandle, state: TrainState) -> dict[str, Any]:
        if not self._epochs:
            log.warning("swa averaged nothing: no epoch ended after %g of the run (callbacks.swa_start)", self._start)
            return {"epochs": 0}
        spec, params = run.compiled.run, self.arrays["params"]
        batch_stats = _statistics(run, params, state.batch_stats)
        results = on_both_splits(
            lambda _, split: {"raw": run.evaluate(split, params, batch_stats)}, state, spec.dataset
        )
        _write(run, {"params": params, "batch_stats": batch_stats}, state, run.workdir / FILE)
        for split, by_weights in results.items():
            log.info("swa, mean of %d epochs: %s accuracy %.4f", self._epochs, split, by_weights["raw"].accuracy)
        return {"epochs": self._epochs, "file": FILE} | figures(results, tested=len(spec.dataset.test) > 0)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self._epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epochs = state["epochs"]


def _moved(average: PyTree, params: PyTree, count: int) -> PyTree:
    """The mean of `count` trees, from that of all but the last. Leaf by leaf: stages have other devices."""

    def move(average: jax.Array, leaf: jax.Array) -> jax.Array:
        program = jax.jit(_add, donate_argnums=0, out_shardings=average.sharding)
        return program(average, leaf, np.asarray(count, average.dtype))

    return jax.tree.map(move, average, params)


def _add(average: jax.Array, leaf: jax.Array, count: jax.Array) -> jax.Array:
    return average + (leaf - average) / count


def _statistics(run: RunHandle, params: PyTree, batch_stats: PyTree) -> PyTree:
    """The running statistics of averaged weights, over as many batches as an epoch has."""
    spec, compiled = run.compiled.run, run.compiled
    if not jax.tree.leaves(spec.task.moving(batch_stats)):
        return batch_stats
    steps = math.ceil(len(spec.dataset.train) / spec.config.data.global_batch)
    batches = compiled.batches(first_step=0, first_example=0, steps=steps)
    return estimate_statistics(
        spec.task, spec.layout, params, batch_stats, batches, compiled.inputs.resident, run.before_batch
    )


def _write(run: RunHandle, weights: PyTree, state: TrainState, path: Path) -> None:
    """Process 0 writes weights as safetensors, with jaxtrain's own names. Every process calls it."""
    mesh: Any = state.step.sharding
    leaves = jax.tree_util.tree_leaves_with_path(to_every_process(weights, mesh.mesh))
    tensors = {
        path_of(key): np.asarray(
            leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        )
        for key, leaf in leaves
    }
    if jax.process_index() == 0:
        spec = run.compiled.run
        inputs = spec.task.preprocess
        config = pretrained_config(run.config.model.name, inputs, spec.dataset.class_names)
        write_safetensors(path, tensors, config, len(inputs.mean), inputs.num_classes)
