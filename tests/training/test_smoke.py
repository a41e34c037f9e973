"""`jaxtrain train --smoke`: the run's own programs for a moment, and nothing left behind but the compile cache."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from runs import RECIPE, SMALL, arguments, command_line, here

from jaxtrain.config import from_dict, nested_dicts
from jaxtrain.distributed.interrupt import Interrupt
from jaxtrain.errors import CheckpointError, EnvironmentMismatchError, PeerError
from jaxtrain.recipes import load_config
from jaxtrain.training import smoke as smoke_module
from jaxtrain.training.smoke import Measured, smoke

FIELDS = SMALL | {"optim.ema": 0.9, "train.eval_every": "2 steps"}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary directories are made; empty again after each test."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(path))
    yield path
    assert not list(path.iterdir())


@pytest.fixture
def cache(tmp_path) -> Path:
    """A compile cache of its own."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def programs(cache: Path) -> set[str]:
    return {name for name in os.listdir(cache) if name.startswith("jit_") and name.endswith("-cache")}


def test_it_compiles_what_the_run_needs_and_leaves_nothing_else(tmp_path, monkeypatch, capsys, cache):
    monkeypatch.chdir(tmp_path)
    assert command_line(["train", *arguments(Path("run"), FIELDS, "--devices", "1", "--smoke")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "temporary"]
    said = capsys.readouterr().err
    parts = ["two steps should take about", "step 1: loss", "step 2: loss", "evaluated 40 examples of validation"]
    parts += ["equal bit for bit", "all of it works. The whole run should take about", "12 steps", "6 validations"]
    places = [said.rindex(part) for part in parts]
    assert places == sorted(places)
    compiled = programs(cache)
    assert any(name.startswith("jit_step") for name in compiled)
    jax.clear_caches()
    run = here(tmp_path / "run", FIELDS)
    assert not {name for name in programs(cache) - compiled if re.match(r"jit_(step|add|call|update|init)", name)}
    (loss,) = re.findall(r"step 1: loss (\S+),", said)
    assert float(loss) == pytest.approx(run.history[0]["loss"], abs=1e-4)


def test_a_work_directory_is_not_touched(tmp_path):
    here(tmp_path / "run", SMALL, train__steps=2)

    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "run").rglob("*")}

    before = files()
    assert command_line(["train", *arguments(tmp_path / "run", SMALL, "--devices", "1", "--smoke")]) == 0
    assert files() == before


@pytest.mark.parametrize(
    "fields",
    [
        {"layout.stages": 2, "layout.microbatches": 2, "layout.zero": 1},
        pytest.param({"train.steps_per_call": 3, "layout.zero": 3}, marks=pytest.mark.parity),
        pytest.param({"data.residency": "stream", "data.workers": 0}, marks=pytest.mark.parity),
    ],
    ids=["stages", "several steps a call", "streamed"],
)
def test_any_layout(fields):
    config = from_dict(nested_dicts(load_config(RECIPE, SMALL | fields)))
    assert smoke(config, num_devices=2, quiet=True) > 0


def test_what_fails_has_the_exit_code_that_the_run_would_have(tmp_path, capsys):
    for code, fields in ((76, {"optim.learning_rate": 1e38}), (64, {"layout.data": 3})):
        words = arguments(tmp_path / "run", SMALL | fields, "--devices", "2", "--smoke")
        assert command_line(["train", *words]) == code, capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_state_that_comes_back_as_another_is_found(monkeypatch):
    def restore(self, step, template):
        state = restored(self, step, template)
        return dataclasses.replace(state, params=jax.tree.map(jnp.negative, state.params))

    restored = smoke_module.Checkpointer.restore
    monkeypatch.setattr(smoke_module.Checkpointer, "restore", restore)
    with pytest.raises(CheckpointError, match="not what was saved"):
        smoke(from_dict(nested_dicts(load_config(RECIPE, SMALL))), num_devices=1, quiet=True)


def test_a_signal_while_it_compiles_leaves_nothing_either(monkeypatch, temporary):
    left = []
    interrupt = Interrupt(lambda error: left.append((str(error), list(temporary.iterdir()))))

    def compile_run(*_):
        interrupt.asked(signal.SIGINT, 2)  # ends the process
        raise LookupError

    monkeypatch.setattr(smoke_module, "compile_run", compile_run)
    with pytest.raises(LookupError):
        smoke(from_dict(nested_dicts(load_config(RECIPE, SMALL))), num_devices=1, quiet=True, interrupt=interrupt)
    assert left == [("Stopped at once; --smoke has left nothing behind.", [])]


def test_a_process_that_never_comes_leaves_no_directory(monkeypatch):
    def broadcast_str(name, text, timeout):
        raise PeerError("Process 1 did not come.")

    monkeypatch.setattr(smoke_module, "broadcast_str", broadcast_str)
    with pytest.raises(PeerError):
        smoke(from_dict(nested_dicts(load_config(RECIPE, SMALL))), num_devices=1, quiet=True)


def test_hosts_that_share_no_temporary_directory_are_refused(monkeypatch):
    monkeypatch.setattr(smoke_module, "broadcast_str", lambda name, text, timeout: f"{text}/on-another-host")
    with pytest.raises(EnvironmentMismatchError, match="set TMPDIR"):
        smoke(from_dict(nested_dicts(load_config(RECIPE, SMALL))), num_devices=1, quiet=True)


def test_what_a_whole_run_takes():
    fields = SMALL | {
        "train.steps": 100,
        "train.eval_every": "10 steps",
        "checkpoint.every": "50",
        "train.precision": "f32",
    }
    config = from_dict(nested_dicts(load_config(RECIPE, fields)))
    with smoke_module.settings(config):
        run = smoke_module.make_run_spec(config, smoke_module.load_data(config.data), jax.devices()[:1])
        seconds, text = smoke_module.whole_run(run, Measured(step=60.0, evaluation_batch=10.0, save=1.0, restore=1.0))
    # 40 examples are two batches of 32: ten validations, and at the end both splits of the best and the last test
    assert seconds == 100 * 60 + (10 + 1 + 2) * 2 * 10 + 2
    assert "1:44:22, compiled: 100 steps 1:40:00, 10 validations and the test 260 s, 2 saves 2 s" in text
