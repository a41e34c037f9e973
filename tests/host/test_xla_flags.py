"""The flags that XLA is started with: the user's win, and jaxlib knows them all."""

import os
import subprocess
import sys

import pytest

from jaxtrain.host import xla_flags


def test_a_flag_that_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2 --xla_dump_to=x")
    xla_flags.set_flags(xla_flags.DETERMINISTIC)
    wanted = "--xla_gpu_autotune_level=2 --xla_dump_to=x --xla_gpu_deterministic_ops=true"
    assert os.environ["XLA_FLAGS"] == wanted
    xla_flags.set_flags(xla_flags.DETERMINISTIC)
    assert os.environ["XLA_FLAGS"] == wanted, "nothing is added twice"


@pytest.mark.parametrize(("visible", "hides"), [("0", False), ("", False), ("-1", False), ("0,1", True)])
def test_collectives_are_overlapped_where_there_are_several_gpus(monkeypatch, visible, hides):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ("xla_gpu_enable_latency_hiding_scheduler" in xla_flags.for_run("f32")) == hides


def test_double_precision_keeps_the_convolutions_that_can_compute_it():
    """Those of the flag would take 14 to 70 times as long."""
    assert set(xla_flags.for_run("f32")) - set(xla_flags.for_run("f64")) == set(xla_flags.CPU_CONVOLUTIONS)


def test_jaxlib_knows_every_flag(monkeypatch):
    """It ends the process at one that it does not know."""
    monkeypatch.delenv("XLA_FLAGS")
    for flags in (xla_flags.SEVERAL_PROCESSES, xla_flags.for_run("f32", deterministic=True)):
        xla_flags.set_flags(flags)
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
