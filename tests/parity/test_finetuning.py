"""Fine-tuning under every layout: the same numbers, and what is frozen does not move."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np
import parity
import pytest
import runs

from jaxtrain.checkpoint.resume_point import Position, ResumePoint
from jaxtrain.config import LayoutConfig
from jaxtrain.errors import WorkdirError
from jaxtrain.optim.param_groups import ParamGroups
from jaxtrain.step import task
from jaxtrain.step.gradients import microbatch_gradients
from jaxtrain.step.train_state import state_shapes
from jaxtrain.training.compiled import compile_run
from jaxtrain.training.input_pipeline import make_input_pipeline
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.results import TrainResult
from jaxtrain.training.setup import load_data, make_run_spec
from jaxtrain.trees import path_of

ONE = LayoutConfig(data=1)
LAYOUTS = {
    "data2-accumulate2": LayoutConfig(data=2, microbatches=2),
    "zero1": LayoutConfig(data=4, zero=1),
    "zero2-accumulate2": LayoutConfig(data=2, zero=2, microbatches=2),
    "zero3": LayoutConfig(data=4, zero=3),
    "tensor2-zero3": LayoutConfig(data=2, tensor=2, zero=3),
    "stages2-zero1": LayoutConfig(data=2, zero=1, stages=2, microbatches=4),
    "stages3": LayoutConfig(data=1, stages=3, microbatches=2),
    "interleaved-zero2": LayoutConfig(data=2, zero=2, stages=2, schedule="interleaved_1f1b", chunks=2, microbatches=4),
}
RATES = {"optim.layer_decay": 0.7, "optim.head_rate": 3.0}
DEEP = {"model.depths": (7,), "data.augmentation": "light"}
MIDDLE = DEEP | RATES | {"optim.freeze": ("layers_0[013]/", "bias"), "optim.name": "lamb"}
STATISTICS = {"model.freeze_bn": True, "optim.freeze": ("bn1",), "optim.learning_rate": 0.1}
# name: (model, settings, regexes of what must not move)
CASES = {
    "probe": ("mlp", DEEP | {"optim.freeze_layers": -1, "optim.head_rate": 4.0}, ("layers_0[0-6]/",)),
    "middle": ("mlp", MIDDLE, ("layers_0[013]/", "bias")),
    "muon": ("mlp", DEEP | RATES | {"optim.freeze": ("layers_02/",), "optim.name": "muon"}, ("layers_02/",)),
    "stem": ("resnet", RATES | {"optim.freeze_layers": 1, "optim.learning_rate": 0.5}, ("layers_00/",)),
    "statistics": ("resnet", STATISTICS, ("bn1", "mean$", "var$")),
    "vgg": ("vgg", RATES | {"optim.freeze_layers": 2}, ("layers_0[01]/",)),
}
# By default one of the mesh, with BatchNorm, and one of stages, of which the first two have nothing to train.
PAIRS = [
    parity.case("statistics", "zero2-accumulate2", default=True),
    parity.case("probe", "stages3", default=True),
    parity.case("probe", "zero3", default=False),
    parity.case("middle", "interleaved-zero2", default=False),
    parity.case("middle", "tensor2-zero3", default=False),
    pytest.param("muon", "stages2-zero1", marks=pytest.mark.slow),
    parity.case("stem", "zero1", default=False),
    pytest.param("vgg", "data2-accumulate2", marks=pytest.mark.slow),
]


def run(name: str, layout: LayoutConfig, **more: Any) -> TrainResult:
    model, fields, _ = CASES[name]
    return parity.run(model, layout, **fields | {"train.steps": 4} | more)


reference = functools.cache(functools.partial(run, layout=ONE))


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def frozen_moves(name: str, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    """Of the frozen leaves, those with other bits than before; and of the others those that are as before."""
    frozen = {path for path in after if any(re.search(regex, path) for regex in CASES[name][2])}
    assert frozen
    still = {path for path in after if np.array_equal(after[path], before[path])}
    return frozen - still | {path for path in still - frozen if not path.endswith("conv/bias")}  # before a BatchNorm


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_layout_changes_no_number_and_the_frozen_leaves_do_not_move(name, layout):
    found = run(name, LAYOUTS[layout])
    parity.assert_equal(parity.numbers(found), parity.numbers(reference(name)), 1e-12)
    state = found.state
    weights = leaves({"params": state.params, "batch_stats": state.batch_stats})
    assert not frozen_moves(name, leaves(state.ema), weights), "the average of a frozen leaf is that leaf"
    held = leaves(state.opt_state)
    assert held
    assert not [path for path in held if any(re.search(regex, path) for regex in CASES[name][2])]


def test_frozen_leaves_and_statistics_keep_their_bits(tmp_path):
    """Those of the initial state of the same run; everything else moves."""
    config = parity.config("resnet", ONE, **STATISTICS)
    with settings(config):
        spec = make_run_spec(config, load_data(config.data), jax.devices()[:1])
        engine, state = compile_run(spec, ResumePoint(None, Position(), None))
        before = {name: leaves(getattr(state, name)) for name in ("params", "batch_stats", "ema")}
        for batch in engine.batches(first_step=0, first_example=0, steps=3):
            state, _ = engine.step(state, batch, engine.inputs.resident)
        for name, old in before.items():
            assert not frozen_moves("statistics", old, leaves(getattr(state, name))), name


def test_a_linear_probe_has_no_backward_pass_of_the_layers_below():
    """Of three products a layer, one is left; and nothing is stored for a backward pass. As traced, before XLA."""

    def flops_of(**fields: Any) -> float:
        config = parity.config("resnet", ONE, **fields)
        with settings(config):
            spec = make_run_spec(config, load_data(config.data), jax.devices()[:1])
            inputs = make_input_pipeline(spec.dataset, spec.layout, "device", 0)
            gradients = functools.partial(microbatch_gradients, spec.task, spec.layout, index=0)
            arguments = state_shapes(spec.init, spec.layout), inputs.train_shapes(parity.BATCH), inputs.resident
            return jax.jit(gradients).lower(*arguments).cost_analysis()["flops"]

    assert flops_of(**{"optim.freeze_layers": -1}) < 0.4 * flops_of()


# ------------------------------------------------------------------------------------------------ resuming, processes


@pytest.mark.parity
def test_resumed_under_other_layouts_in_other_processes(tmp_path):
    """Two steps on one device, two by two processes of a stage each, two under ZeRO-3: the numbers of six on one device."""
    fields = runs.EXACT | {"optim.freeze_layers": 1, "optim.layer_decay": 0.5, "optim.head_rate": 2.0, "train.steps": 6}
    whole = runs.here(tmp_path / "whole", fields)
    runs.here(tmp_path / "run", fields, train__steps=2)
    stages = {"layout.stages": 2, "layout.stage_placement": "hosts", "layout.microbatches": 4, "train.steps": 4}
    runs.train_in_turn(tmp_path, 2, 1, runs.arguments(tmp_path / "run", fields | stages))
    result = runs.here(tmp_path / "run", fields, devices=4, layout__zero=3, layout__microbatches=2)
    found, wanted = leaves(result.state), leaves(whole.state)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-12 * max(1, np.abs(leaf).max()), err_msg=path)
    with pytest.raises(WorkdirError, match=r"config\.optim\.freeze_layers: 1 -> 2"):
        runs.here(tmp_path / "run", fields, optim__freeze_layers=2)


# ------------------------------------------------------------------------------------------------------ planted faults


def a_frozen_leaf_decays(monkeypatch):
    monkeypatch.setattr(ParamGroups, "is_trained", lambda self, path: True)


def decay_from_the_wrong_end(monkeypatch):
    monkeypatch.setattr(ParamGroups, "rate", lambda self, path: 0.7 ** int(path[7:9]))


def statistics_move(monkeypatch):
    monkeypatch.setattr(task, "frozen_statistics", lambda *_, **__: frozenset())


FAULTS = {a_frozen_leaf_decays: "probe", decay_from_the_wrong_end: "probe", statistics_move: "statistics"}


@pytest.mark.parity
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_shows(fault, monkeypatch):
    name = FAULTS[fault]
    wanted = parity.numbers(reference(name))
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="relative error"):
        parity.assert_equal(parity.numbers(run(name, ONE)), wanted, 1e-12)
