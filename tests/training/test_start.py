"""From the command to the first step: what is computed, what is not, and what is said meanwhile."""

import os
import subprocess
import sys

import pytest
from runs import ROOT, SMALL, here

from jaxtrain.training import compiled


@pytest.fixture
def made(monkeypatch):
    """Which fresh states were made."""
    found, make = [], compiled.create_state
    monkeypatch.setattr(compiled, "create_state", lambda *given: found.append(1) or make(*given))
    return found


def test_a_resumed_run_makes_no_fresh_state(tmp_path, made):
    here(tmp_path / "run", SMALL, train__steps=4)
    assert made == [1]
    result = here(tmp_path / "run", SMALL, train__steps=8)
    assert made == [1]
    assert int(result.state.step) == 8


def test_a_start_says_what_it_is_and_that_it_compiles_before_it_has_compiled(tmp_path):
    here(tmp_path / "run", SMALL, train__steps=1)
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "run/logs/process_0.log").read_text().splitlines()]
    beginnings = (
        "work directory",
        "model: mlp",
        "data: tiny:digits",
        "data resident on the devices; compiling",
        "compiled",
    )
    places = [next(i for i, line in enumerate(lines) if line.startswith(words)) for words in beginnings]
    assert places == sorted(places)
    assert "step 1/1" in lines[places[-1] + 1]


@pytest.mark.parity
def test_a_state_that_is_made_with_little_optimization_has_the_same_bits():
    """In a process of its own: the tests' own $XLA_FLAGS ask for none at all."""
    code = """
import jax, numpy as np
from jaxtrain.step import train_state as state
from jaxtrain.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.setup import load_data, make_run_spec
config = Config(
    data=DataConfig(name="digits", global_batch=8),
    model=ModelConfig("tiny:resnet", width=5),
    train=TrainConfig(precision="f32"),
)
with settings(config):
    run = make_run_spec(config, load_data(config.data), jax.devices()[:1])
    quick = state.create_state(run.init, run.layout)
    assert state._run_once_options(run.layout)
    state._run_once_options = lambda layout: None
    usual = state.create_state(run.init, run.layout)
for a, b in zip(jax.tree.leaves(quick), jax.tree.leaves(usual), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), (a, b)
"""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
