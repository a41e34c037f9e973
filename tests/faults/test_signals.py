"""A signal at any moment: during an evaluation, during a save, twice to several processes."""

from __future__ import annotations

import functools
import signal
import time

import pytest
import runs
from runs import SMALL, here

from jaxtrain.checkpoint_files import read_manifest

# Validation takes seconds; training does not.
SLOW = """
import dataclasses
import time

from jaxtrain.data import sources

class Slow:
    def __init__(self, base):
        self.base, self.shape = base, base.shape

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        time.sleep(0.5)
        return self.base.read(indices)

def digits(config, image_size):
    found = sources.load(dataclasses.replace(config, name="digits"), image_size=image_size)
    return dataclasses.replace(found, validation=Slow(found.validation))
"""

FIELDS = SMALL | {
    "data.name": "slow:digits", "data.residency": "stream", "data.workers": 0, "data.examples": 128, "train.epochs": 3,
    "train.eval_every": "1 epoch", "checkpoint.every": "0",
}  # fmt: skip


def has_rows(workdir, count):
    return runs.count_rows(workdir) >= count


@pytest.mark.parametrize("processes", [1, 2])
def test_a_validation_that_was_cut_short_is_made_up_for(tmp_path, processes):
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = runs.arguments(tmp_path / "run", FIELDS, "--simulate-devices", str(3 - processes))
    command = ["-m", "jaxtrain", *(["launch", "--nproc", "2", "--"] if processes == 2 else []), "train", *arguments]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        run.wait_for(functools.partial(has_rows, tmp_path / "run", 9), "the second epoch")  # 4 + validation + 4
        time.sleep(0.7)
        run.send(signal.SIGTERM)
        began = time.monotonic()
        assert run.end() == 75, run.output
        assert time.monotonic() - began < 20
        assert "Stopped after step 8 and saved it" in run.output
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "8")
    assert manifest.position["owes_validation"]
    assert len(runs.rows(tmp_path / "run", "val")) == 1
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        assert run.end() == 0, run.output
    here(tmp_path / "whole", FIELDS | {"data.name": "digits"}, devices=2)
    for phase in ("train", "val", "test"):
        assert runs.rows(tmp_path / "run", phase) == runs.rows(tmp_path / "whole", phase)
    best = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert best == {path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()} | {"8"}


def test_a_second_signal_ends_all_processes_at_once(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.replace("0.5", "600"))
    arguments = runs.arguments(tmp_path / "run", FIELDS, "--simulate-devices", "1")
    command = ["-m", "jaxtrain", "launch", "--nproc", "2", "--", "train", *arguments]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        run.wait_for(functools.partial(has_rows, tmp_path / "run", 4), "the first epoch")
        time.sleep(1)
        run.send(signal.SIGINT)
        time.sleep(1)
        began = time.monotonic()
        run.send(signal.SIGINT)
        assert run.end() == 130, run.output
        assert time.monotonic() - began < 10
