"""From the command to the first step: what is computed, what is not, and what is said meanwhile."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import RECIPE, ROOT, SMALL, here

from jaxtrain import load_config
from jaxtrain.config import Config
from jaxtrain.doctor import checks
from jaxtrain.doctor.facts import data_dir
from jaxtrain.errors import ConfigError, EnvironmentMismatchError
from jaxtrain.host import compile_cache, limits, xla_flags
from jaxtrain.host.gpus import device_files
from jaxtrain.host.paths import compile_cache as compile_cache_path
from jaxtrain.optim.schedules import make_schedule
from jaxtrain.training import compiled, input_pipeline
from jaxtrain.training.jax_settings import compile_cache_note, no_compile_cache, settings


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
        "compiling the step",
        "compiled",
        "this start goes from step 0 to step 1",
    )
    places = [next(i for i, line in enumerate(lines) if line.startswith(words)) for words in beginnings]
    assert places == sorted(places)
    assert "step 1/1" in lines[places[-1] + 1]


NUMBERS = {
    "seed": 5,
    "optim.learning_rate": 0.03,
    "optim.weight_decay": 2e-3,
    "optim.schedule": "cosine",
    "optim.warmup": "2 steps",
    "train.steps": 9,
}


@pytest.mark.parametrize(
    ("devices", "layout"),
    [
        (1, {}),
        (1, {"train.steps_per_call": 2}),
        pytest.param(2, {"layout.zero": 3, "optim.name": "lars"}, marks=pytest.mark.parity),
        pytest.param(
            1, {"layout.microbatches": 2, "optim.name": "muon", "model.depths": "(16,)"}, marks=pytest.mark.parity
        ),
        pytest.param(2, {"layout.stages": 2, "optim.name": "adamw", "model.dropout": 0.2}, marks=pytest.mark.parity),
    ],
)
def test_a_run_that_differs_in_numbers_alone_compiles_nothing(tmp_path, devices, layout):
    compiled: list[str] = []
    jax.monitoring.register_event_listener(
        lambda event, **_: compiled.append(event) if "cache_misses" in event else None
    )
    here(tmp_path / "first", SMALL, **{"optim.weight_decay": 1e-3, **layout}, devices=devices)
    jax.clear_caches()
    compiled.clear()
    result = here(tmp_path / "second", SMALL, **NUMBERS, **layout, devices=devices)
    assert compiled == []
    assert len({row["learning_rate"] for row in result.history if row["phase"] == "train"}) == 8


def test_the_update_has_the_rate_of_its_step(tmp_path):
    """SGD without momentum and decay: the update is the rate times the gradient."""
    plain = {"optim.momentum": 0.0, "optim.weight_decay": 0.0, "optim.schedule": "linear", "optim.warmup": "3 steps"}
    rows = [row for row in here(tmp_path / "run", SMALL, **plain).history if row["phase"] == "train"]
    config = load_config(RECIPE, SMALL | plain)
    rates = make_schedule(config, 128)(np.arange(12)).astype(np.float32)
    assert [row["learning_rate"] for row in rows] == rates.tolist()
    assert [row["update_norm"] / row["grad_norm"] for row in rows] == pytest.approx(rates.tolist(), rel=1e-5)


def test_the_next_start_is_promised_the_programs_only_where_they_can_be_kept(tmp_path):
    (tmp_path / "file").touch()
    found = "the next start finds it"
    for folder, said in (("new/cache", found), ("file/cache", "file/cache cannot be written"), ("gs://bucket", found)):
        with settings(Config()):
            jax.config.update("jax_compilation_cache_dir", folder if ":" in folder else str(tmp_path / folder))
            assert said in compile_cache_note()
            with no_compile_cache():
                assert "switched off" in compile_cache_note()


@pytest.fixture
def own_cache(tmp_path):
    """A compile cache of this test's own."""
    before, cache = jax.config.jax_compilation_cache_dir, tmp_path / "programs"
    jax.clear_caches()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    yield cache
    jax.config.update("jax_compilation_cache_dir", before)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_a_damaged_compiled_program_is_compiled_again(tmp_path, own_cache):
    """Every entry, each in one of these ways; a program that another entry's file holds is damaged too."""
    here(tmp_path / "whole", SMALL, train__steps=4)
    whole = {path: path.read_bytes() for path in compile_cache.entries(own_cache)}
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700
    for number, (path, data) in enumerate(whole.items()):
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        ways = [bytes(flipped), data[: len(data) // 2], b"", os.urandom(len(data)), next(reversed(whole.values()))]
        path.write_bytes(ways[number % len(ways)] if number < len(whole) - 1 else bytes(flipped))
    assert compile_cache.damaged(own_cache) == sorted(whole)
    jax.clear_caches()
    here(tmp_path / "again", SMALL, train__steps=4)
    assert runs.losses(tmp_path / "again").tolist() == runs.losses(tmp_path / "whole").tolist()
    assert "an entry of the compile cache is damaged" in (tmp_path / "again/logs/process_0.log").read_text()
    assert compile_cache.damaged(own_cache) == []
    assert compile_cache.clear(own_cache) == len(whole)
    assert compile_cache.entries(own_cache) == []


def test_a_compile_cache_that_others_may_write_is_not_used(tmp_path, own_cache, monkeypatch):
    own_cache.mkdir()
    own_cache.chmod(0o777)
    here(tmp_path / "run", SMALL, train__steps=1)
    assert "is not used: anyone may write there" in (tmp_path / "run/logs/process_0.log").read_text()
    assert list(own_cache.iterdir()) == []
    own_cache.chmod(0o700)
    assert compile_cache.why_refused(own_cache) == ""
    monkeypatch.setattr(os, "geteuid", lambda: own_cache.stat().st_uid + 1)
    assert f"user {own_cache.stat().st_uid} owns it" in compile_cache.why_refused(own_cache)
    check = checks.check_compile_cache({"JAX_COMPILATION_CACHE_DIR": str(own_cache)})
    assert (check.state, "is not used" in check.found) == ("warning", True)


@pytest.mark.parametrize(
    ("environment", "code", "said"),
    [
        ({"JAX_PLATFORMS": "cuda"}, 78, "JAX_PLATFORMS='cuda': JAX finds no such devices"),
        ({"JAX_PLATFORMS": "CPU"}, 78, "JAX_PLATFORMS='CPU': JAX finds no such devices"),
        ({"XLA_FLAGS": "--xla_nonsense=1"}, 64, "Unknown flag in XLA_FLAGS: --xla_nonsense=1"),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math=maybe"}, 64, "Couldn't interpret value maybe"),
    ],
)
def test_an_environment_that_jax_cannot_start_in_is_named(environment, code, said):
    if "cuda" in environment.values() and device_files():
        pytest.skip("this machine has GPUs")
    command = [sys.executable, "-m", "jaxtrain", "evaluate", "nowhere"]
    found = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == code, found.stderr
    assert said in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("JAXTRAIN_DATA_DIR", raising=False)
    for place, variable in (
        (lambda: compile_cache_path({}), "JAX_COMPILATION_CACHE_DIR"),
        (data_dir, "JAXTRAIN_DATA_DIR"),
    ):
        with pytest.raises(ConfigError, match=f"has no home directory; set HOME, or {variable}"):
            place()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n is"),
        (MemoryError("no"), "ulimit -v is"),
        (RuntimeError("can't start new thread"), "ulimit -u is"),
    ],
)
def test_a_limit_of_the_system_is_named(error, said):
    outer = ValueError("around it")
    outer.__cause__ = error
    for each in (error, outer):
        found = limits.explained(each)
        assert isinstance(found, EnvironmentMismatchError)
        assert said in str(found)
    assert limits.explained(known := ConfigError("as it is")) is known
    assert limits.explained(other := ValueError("as it is")) is other


def test_xlas_alarms_are_hidden_on_a_cpu_and_where_nothing_is_trained(monkeypatch):
    for gpus, always, level in ((0, False, "3"), (8, False, None), (8, True, "3")):
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
        monkeypatch.setattr(xla_flags, "device_files", lambda gpus=gpus: gpus)
        xla_flags.hide_alarms(always=always)
        assert os.environ.get("TF_CPP_MIN_LOG_LEVEL") == level
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    xla_flags.hide_alarms(always=True)
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0", "the user's own is kept"


@pytest.mark.parametrize("per_call", [1, pytest.param(4, marks=pytest.mark.parity)])
def test_rates_go_to_the_devices_again_where_those_that_are_there_end(tmp_path, monkeypatch, per_call):
    """Steps 1 to 9 of a warm-up, with the rates of four at a time on the devices, from the step that a start goes on from."""
    for module in (input_pipeline, compiled):
        monkeypatch.setattr(module, "RATES", 4)
    fields = SMALL | {"optim.warmup": "100 steps", "train.steps_per_call": per_call, "checkpoint.every": "0"}
    here(tmp_path / "run", fields, train__steps=3)
    rows = [row for row in here(tmp_path / "run", fields, train__steps=12).history if row["phase"] == "train"]
    rates = make_schedule(load_config(RECIPE, fields), 128)(np.arange(3, 12)).astype(np.float32)
    assert [row["learning_rate"] for row in rows] == rates.tolist()


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
    quick = state.create_state(run.init, run.layout, run.config.seed)
    assert state._run_once_options(run.layout)
    state._run_once_options = lambda layout: None
    usual = state.create_state(run.init, run.layout, run.config.seed)
for a, b in zip(jax.tree.leaves(quick), jax.tree.leaves(usual), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), (a, b)
"""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
