"""A lost GPU, or another number of processes at a later start: the same examples, the same batch, the same numbers."""

from __future__ import annotations

import os
import signal
import textwrap

import numpy as np
import pytest
import runs
from runs import SMALL, here
from test_launch import worker

# Stands for NVML: GPUs by number, lost once a file says so. CPU devices are trained on all the same.
FAKE_NVML = """
import pathlib
class NVMLError(Exception): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = nvmlEventTypeXidCriticalError = 1
def nvmlInit(): pass
def nvmlDeviceGetCount(): return {count}
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return f"GPU-{{handle}}"
def nvmlDeviceGetName(handle):
    if pathlib.Path(__file__).with_name(f"lost-{{handle}}").exists(): raise NVMLError("GPU is lost")
    return "H100"
def nvmlDeviceGetMemoryInfo(handle): return type("Info", (), {{"total": 80 << 30}})
def nvmlDeviceGetTotalEccErrors(handle, *_): return 0
def nvmlEventSetCreate(): return object()
def nvmlDeviceRegisterEvents(*_): pass
def nvmlEventSetWait_v2(*_): raise NVMLError("timeout")
"""

# The tiny digits, of which no more than fifteen batches a start are read while there is a file `hold`.
SLOW = """
import dataclasses, pathlib, time
import tiny

class Slow:
    def __init__(self, base): self.base, self.shape, self.reads = base, base.shape, 0
    def __len__(self): return len(self.base)
    def read(self, indices):
        time.sleep(0.1)
        self.reads += 1
        while self.reads > 15 and pathlib.Path(__file__).with_name("hold").exists():
            time.sleep(0.01)
        return self.base.read(indices)

def digits(config, image_size):
    found = tiny.digits(config, image_size=image_size)
    return dataclasses.replace(found, train=Slow(found.train))
"""
FIELDS = SMALL | {
    "data.name": "slow:digits", "data.residency": "stream", "data.workers": 0, "data.examples": 144, "data.global_batch": 24,
    "data.augmentation": "light", "train.precision": "f64", "train.steps": 24, "train.epochs": 4, "checkpoint.every": "3",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    here(path, FIELDS | {"data.name": "tiny:digits"})
    return path


def assert_same(run, whole):
    for phase in ("train", "val", "test"):
        found, wanted = (runs.rows(each, phase) for each in (run, whole))
        assert [row["step"] for row in found] == [row["step"] for row in wanted]
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose([r[name] for r in found], [r[name] for r in wanted], rtol=1e-12, err_msg=phase)


@pytest.mark.faults
@pytest.mark.parametrize("processes", [2, 3])
def test_a_lost_gpu_is_left_out_and_the_run_goes_on_with_the_rest(tmp_path, monkeypatch, whole, processes):
    (tmp_path / "pynvml.py").write_text(textwrap.dedent(FAKE_NVML.format(count=processes)))
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "hold").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = tmp_path / "run"
    arguments = runs.arguments(run, FIELDS, "--simulate-devices", "1")
    command = ["-m", "jaxtrain", "launch", "--nproc", str(processes), "--", "train", *arguments]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as job:
        job.wait_for(lambda: any(run.glob("checkpoints/*/manifest.json")), "a checkpoint")
        (tmp_path / "lost-1").touch()
        os.kill(worker(job, 1), signal.SIGKILL)
        (tmp_path / "hold").unlink()
        assert job.end() == 0, job.output
        assert "GPU-1 is left out: it does not answer: GPU is lost" in job.output
    counts = [start["devices"]["count"] for start in runs.starts(run)]
    assert counts == [processes, processes - 1]
    assert_same(run, whole)


@pytest.mark.faults
def test_another_number_of_processes_goes_on_with_the_same_run(tmp_path, whole):
    """2, then 1, then 3 processes through the launcher, each stopped by SIGTERM."""
    (tmp_path / "slow.py").write_text(SLOW)
    run = tmp_path / "run"
    arguments = runs.arguments(run, FIELDS | {"checkpoint.every": "0"}, "--simulate-devices", "1")
    for processes, until in ((2, 6), (1, 13), (3, 0)):
        command = ["-m", "jaxtrain", "launch", "--nproc", str(processes), "--", "train", *arguments]
        with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as job:
            if until:
                job.wait_for(lambda rows=until: runs.count_rows(run) >= rows, "steps")
                job.send(signal.SIGTERM)
            assert job.end() == (75 if until else 0), job.output
    assert [start["devices"]["count"] for start in runs.starts(run)] == [2, 1, 3]
    assert_same(run, whole)
