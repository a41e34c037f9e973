"""Stochastic weight averaging: the mean of the weights of the last epochs, with BatchNorm statistics of its own."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from runs import EXACT, RECIPE, SMALL, here, train_in_turn
from runs import arguments as words_of
from safetensors.numpy import load_file

from jaxtrain import Callback, load_config, train
from jaxtrain.errors import ConfigError
from jaxtrain.trees import path_of

SWA = EXACT | {"callbacks.names": ("swa",), "callbacks.swa_start": 0.5, "checkpoint.every": "0"}


class Weights(Callback):
    """Keeps the weights after each epoch."""

    def __init__(self):
        self.after: list[dict[str, np.ndarray]] = []

    def on_epoch(self, run, epoch, state, metrics):
        leaves = jax.tree_util.tree_leaves_with_path({"params": state.params})
        self.after.append({path_of(path): np.asarray(leaf) for path, leaf in leaves})


def fit(workdir, *callbacks, devices=1, **fields):
    changed = {name.replace("__", "."): value for name, value in fields.items()}
    return train(load_config(RECIPE, SWA | changed), workdir, num_devices=devices, quiet=True, callbacks=callbacks)


def test_the_average_is_the_mean_of_the_weights_of_the_last_epochs(tmp_path):
    weights = Weights()
    found = fit(tmp_path, weights, train__epochs=4)
    assert found.result["callbacks"]["swa"]["epochs"] == 3, "epochs 2, 3 and 4 of 4 end at a half of the run or later"
    average = load_file(tmp_path / "swa.safetensors")
    for path, leaf in weights.after[1].items():
        wanted = np.mean([leaf, weights.after[2][path], weights.after[3][path]], 0)
        np.testing.assert_allclose(average[path], wanted, rtol=1e-12, atol=1e-14)


def test_batch_norm_statistics_are_those_of_an_epoch_of_training(tmp_path):
    """One epoch of the whole training set as one batch, without augmentation: the statistics are that batch's own."""
    fields = {"data__global_batch": 128, "data__augmentation": "none", "data__mixup": 0.0, "model__bn_groups": 1}
    fields |= {"callbacks__swa_start": 0.0, "train__epochs": 1, "model__drop_path": 0.0, "model__dropout": 0.0}
    # the run's own statistics, after one step, are 0.9 of their initial values and 0.1 of those of the initial weights: with
    # a rate of 0 the averaged weights are these, so the batch's own follow
    found = fit(tmp_path, optim__learning_rate=0.0, optim__warmup="0", **fields)
    average, seen = load_file(tmp_path / "swa.safetensors"), 0
    for path, leaf in jax.tree_util.tree_leaves_with_path({"batch_stats": found.state.batch_stats}):
        name, running = path_of(path), np.asarray(leaf)
        initial = 1.0 if name.endswith("var") else 0.0
        np.testing.assert_allclose(average[name], (running - 0.9 * initial) / 0.1, rtol=1e-9, atol=1e-12)
        seen += 1
    assert seen >= 4


def test_the_figures_are_those_of_the_file(tmp_path):
    """A run that begins with the average, and changes nothing, has its figures."""
    found = fit(tmp_path / "run", train__epochs=3)
    figures = found.result["callbacks"]["swa"]
    assert figures["validation"] != found.result["last"]["validation"]
    fields = {
        "model.init_from": str(tmp_path / "run" / "swa.safetensors"),
        "train.steps": 1,
        "optim.learning_rate": 0.0,
    }
    again = here(tmp_path / "again", EXACT | fields | {"model.freeze_bn": True, "optim.ema": 0.0})
    for split in ("validation", "test"):
        assert again.result["last"][split]["loss"] == pytest.approx(figures[split]["loss"], rel=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize(
    "layout",
    [
        {"layout.zero": 1, "layout.microbatches": 2},
        {"layout.zero": 3},
        {"layout.tensor": 2, "layout.rules": "(('conv1/kernel$', (None, None, None, 'tensor')),)"},
    ],
)
def test_the_average_is_the_same_on_every_layout(tmp_path, layout):
    one = fit(tmp_path / "one", train__epochs=3).result["callbacks"]["swa"]
    other = here(tmp_path / "other", SWA | layout, devices=4).result["callbacks"]["swa"]
    assert other["epochs"] == one["epochs"] == 2
    assert other["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-11)
    a, b = (load_file(tmp_path / name / "swa.safetensors") for name in ("one", "other"))
    for name, leaf in a.items():
        np.testing.assert_allclose(b[name], leaf, rtol=1e-9, atol=1e-11)


@pytest.mark.parity
def test_pipeline_stages_average_a_model_without_batch_norm(tmp_path):
    fields = SMALL | {"callbacks.names": ("swa",), "train.precision": "f64"}
    one = here(tmp_path / "one", fields).result["callbacks"]["swa"]
    other = here(tmp_path / "two", fields | {"layout.stages": 2, "layout.microbatches": 4}, devices=2)
    assert other.result["callbacks"]["swa"]["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-11)
    with pytest.raises(ConfigError, match=r"callbacks\.names: swa takes the BatchNorm statistics"):
        here(tmp_path / "norms", SWA | {"layout.stages": 2, "layout.microbatches": 4}, devices=2)


def test_a_run_too_short_for_an_epoch_says_so(tmp_path):
    found = fit(tmp_path, train__steps=3)
    assert found.result["callbacks"]["swa"] == {"epochs": 0}
    assert not (tmp_path / "swa.safetensors").exists()
    assert "swa averaged nothing" in (tmp_path / "logs" / "process_0.log").read_text()


@pytest.mark.faults
def test_two_processes_average_stop_and_resume_as_one(tmp_path):
    """Sharded over both processes, early stopping included: the same decision, the same average."""
    fields = SWA | {"callbacks.names": "('swa','early_stopping')", "callbacks.patience": 2, "optim.learning_rate": 0.0}
    fields |= {"callbacks.swa_start": 0.0, "train.epochs": 8, "layout.zero": 3, "checkpoint.every": "2"}
    one, two = tmp_path / "one", tmp_path / "two"
    alone = here(one, fields | {"layout.zero": 0})
    begin = words_of(two, fields | {"train.epochs": 2})
    train_in_turn(tmp_path / "processes", 2, 2, begin, words_of(two, fields))
    result = json.loads((two / "result.json").read_text())
    assert result["ended"] == alone.result["ended"]
    assert result["steps"] == alone.result["steps"] == 12
    wanted = alone.result["callbacks"]["swa"]["test"]["loss"]
    assert result["callbacks"]["swa"]["test"]["loss"] == pytest.approx(wanted, rel=1e-11)
