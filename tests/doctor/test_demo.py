"""`jaxtrain demo`: passes on devices that compute, and names the check that a planted fault breaks."""

from __future__ import annotations

import json
import tempfile
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.distributed.self_test import all_reduce, check_all_devices
from jaxtrain.doctor import demo
from jaxtrain.errors import ConfigError, EnvironmentMismatchError, NumericError
from jaxtrain.host.gpus import Gpu

NAMES = ["devices found", "all-reduce", "loss falls", "gradients finite, replicas equal"]
H100 = Gpu("GPU-0", "H100", 80 << 30)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where temporary files go; nothing may stay there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def copies(*of_device: list[float]) -> jax.Array:
    """One replicated array, whose copy on each device is as given."""
    devices = jax.devices()[: len(of_device)]
    parts = [
        jax.device_put(np.array(each, np.float32), device) for each, device in zip(of_device, devices, strict=True)
    ]
    sharding = NamedSharding(Mesh(np.array(devices), ("all",)), P())
    return jax.make_array_from_single_device_arrays(parts[0].shape, sharding, parts)


def trained(losses=(2.0,) * 4 + (0.1,) * 4, grad_norms=(1.0,) * 8, params=None):
    """What `train` returns, without any training."""
    rows = [{"phase": "train", "loss": loss, "grad_norm": n} for loss, n in zip(losses, grad_norms, strict=True)]
    params = copies([1.0, 2.0], [1.0, 2.0]) if params is None else params
    state = SimpleNamespace(params={"layer": params}, opt_state={"count": copies([8.0], [8.0])})
    return SimpleNamespace(history=[*rows, {"phase": "val", "loss": 0.1}], state=state)


def outcome(capsys, monkeypatch, train) -> tuple[int, list[str], str]:
    """Exit code, lines and the sentence of `jaxtrain demo --devices 2`, with `train` in the place of training."""
    monkeypatch.setattr(demo, "train", train)
    code = runs.command_line(["demo", "--devices", "2"])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


@pytest.mark.parity
def test_it_trains_for_real_and_all_checks_pass(capsys):
    assert runs.command_line(["demo", "--devices", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passed"]
    assert [check["name"] for check in said["checks"]] == NAMES
    assert [check["passed"] for check in said["checks"]] == [True] * 4
    found = [check["found"] for check in said["checks"]]
    assert found[0] == "2 x cpu"
    assert "over 2 devices, every sum is exact" in found[1]
    assert f"{demo.STEPS} steps" in found[2]
    assert "leaves on 2 devices, " in found[3]
    assert found[3].endswith("largest difference between copies 0")


def test_each_check_is_told_as_soon_as_it_is_made(monkeypatch):
    told: list[demo.Check] = []

    def train(config, workdir, *, num_devices, quiet):
        assert [check.name for check in told] == NAMES[:2]
        assert (num_devices, quiet, config.train.epochs, config.data.global_batch % 8) == (0, True, 1, 0)
        return trained()

    monkeypatch.setattr(demo, "train", train)
    assert demo.run_demo(report=told.append) == told
    assert [check.name for check in told] == NAMES
    assert told[0].found == "8 x cpu"


def test_a_loss_that_stays_fails(capsys, monkeypatch):
    code, lines, said = outcome(capsys, monkeypatch, lambda *_, **__: trained(losses=(2.0,) * 4 + (1.1,) * 4))
    assert code == 70
    assert [line.partition(" ")[0] for line in lines] == ["ok", "ok", "FAILED", "ok"]
    assert said.startswith("jaxtrain: 1 of the demo's 4 checks failed: 'loss falls', 8 steps")
    assert said.count("\n") == 1
    assert "2.0000" in said
    assert "1.1000" in said


def test_a_training_that_breaks_off_fails(capsys, monkeypatch):
    def train(*_, **__):
        raise NumericError("The loss (nan) of step 3 is not finite.")

    code, lines, said = outcome(capsys, monkeypatch, train)
    assert code == 70
    assert len(lines) == 4
    assert "2 of the demo's 4 checks failed: 'loss falls', the training stopped: The loss (nan) of step 3" in said


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (lambda: copies([1.0, 2.0], [1.0, 2.5]), "differ between the 2 devices by up to 0.5, the first [0]['layer']"),
        (
            lambda: copies([1.0, 0.0], [1.0, -0.0]),
            "1 of 2 leaves of the state differ between the 2 devices by up to 0,",
        ),
        (lambda: copies([1.0, np.nan], [1.0, np.nan]), "[0]['layer'] is not finite"),
    ],
    ids=["number", "bit", "nan"],
)
def test_copies_that_differ_fail(capsys, monkeypatch, params, said):
    code, lines, sentence = outcome(capsys, monkeypatch, lambda *_, **__: trained(params=params()))
    assert code == 70
    assert [line.partition(" ")[0] for line in lines] == ["ok", "ok", "ok", "FAILED"]
    assert f"'{NAMES[3]}', " in sentence
    assert said in sentence


def test_a_gradient_that_is_not_finite_fails():
    assert not demo.check_replicas([1.0, float("inf")], copies([1.0])).passed
    assert demo.check_replicas([1.0, 2.0], copies([1.0])).passed


def test_devices_that_do_not_add_fail(capsys, monkeypatch):
    """The all-reduce gives each device what it had: as of a link that carries nothing."""
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: x)
    code, lines, said = outcome(capsys, monkeypatch, lambda *_, **__: trained())
    assert code == 70
    assert [line.partition(" ")[0] for line in lines] == ["ok", "FAILED", "ok", "ok"]
    assert "'all-reduce', " in said
    assert "over 2 devices are wrong, the first 1 for 3 on device 0" in said


def test_one_wrong_sum_on_one_device_fails():
    sums = all_reduce(jax.devices(), 1 << 18)
    assert demo.check_all_reduce(sums).passed
    sums[5, 1234] += 1
    check = demo.check_all_reduce(sums)
    assert not check.passed
    assert check.found.startswith("1 of ")
    assert "on device 5" in check.found


def test_a_run_of_several_processes_does_not_start_on_devices_that_do_not_add(monkeypatch):
    check_all_devices()
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: x)
    with pytest.raises(
        EnvironmentMismatchError, match=r"over 8 devices gave \d+ wrong numbers of 8388608, the first 1 for 36"
    ):
        check_all_devices()


def test_gpus_that_are_not_used_fail():
    cpus, h100 = jax.devices()[:2], SimpleNamespace(platform="gpu", device_kind="H100")
    check = demo.check_devices(cpus, [H100], asked="")
    assert not check.passed
    assert check.found.startswith("2 x cpu, although the host has 1 x H100")
    assert demo.check_devices(cpus, [H100], asked="cpu").passed  # as with --simulate-devices
    assert demo.check_devices([h100], [H100], asked="").passed
    assert demo.check_devices(cpus, [], asked="").passed


def test_more_devices_than_there_are():
    with pytest.raises(ConfigError, match="--devices 99: this host has 8"):
        demo.run_demo(99)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 100])
def test_any_number_of_devices_divides_the_batch(count):
    for platform in ("cpu", "gpu"):
        data = demo.demo_config([SimpleNamespace(platform=platform)] * count).data
        assert data.global_batch % count == 0
        assert data.examples == demo.STEPS * data.global_batch
