"""A signal at any moment: during an evaluation, during a save, twice to several processes."""

from __future__ import annotations

import signal

import pytest
import runs
from runs import SMALL, here

from jaxtrain.checkpoint.manifest import read_manifest

# While there is a file `hold`, a validation with so many rows before it does not end; who has heard of a signal says so.
SLOW = """
import dataclasses, os, pathlib, time

from jaxtrain.data import registry
from jaxtrain.distributed.interrupt import Interrupt

hold = pathlib.Path(__file__).with_name("hold")
rows = pathlib.Path(__file__).parent / "run" / "metrics.jsonl"
agree = Interrupt._stop

def heard(self, number):
    agree(self, number)
    hold.with_name(f"heard-{os.getpid()}").touch()

Interrupt._stop = heard

class Slow:
    def __init__(self, base):
        self.base, self.shape = base, base.shape

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        while hold.exists() and len(rows.read_text().splitlines()) >= int(hold.read_text()):
            hold.with_name(f"held-{os.getpid()}").touch()
            time.sleep(0.01)
        return self.base.read(indices)

def digits(config, image_size):
    found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
    return dataclasses.replace(found, validation=Slow(found.validation))
"""

FIELDS = SMALL | {
    "data.name": "slow:digits", "data.residency": "stream", "data.workers": 0, "data.examples": 128, "train.epochs": 3,
    "train.eval_every": "1 epoch", "checkpoint.every": "0",
}  # fmt: skip


def held(run, tmp_path, processes):
    """Waits until each process is in the validation that is held."""
    run.wait_for(lambda: len(list(tmp_path.glob("held-*"))) == processes, "the validation")


def wait_until_heard(run, tmp_path, processes):
    run.wait_for(lambda: len(list(tmp_path.glob("heard-*"))) == processes, "that all have heard of it")


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_a_validation_that_was_cut_short_is_made_up_for(tmp_path, processes):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "hold").write_text("9")  # 4 + validation + 4
    arguments = runs.arguments(tmp_path / "run", FIELDS, "--simulate-devices", str(3 - processes))
    command = ["-m", "jaxtrain", *(["launch", "--nproc", "2", "--"] if processes == 2 else []), "train", *arguments]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        held(run, tmp_path, processes)
        run.send(signal.SIGTERM)
        wait_until_heard(run, tmp_path, processes)
        (tmp_path / "hold").unlink()
        assert run.end() == 75, run.output
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


@pytest.mark.faults
def test_a_second_signal_ends_all_processes_at_once(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "hold").write_text("4")
    arguments = runs.arguments(tmp_path / "run", FIELDS, "--simulate-devices", "1")
    command = ["-m", "jaxtrain", "launch", "--nproc", "2", "--grace", str(2 * runs.SECONDS), "--", "train", *arguments]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        held(run, tmp_path, 2)
        run.send(signal.SIGINT)
        wait_until_heard(run, tmp_path, 2)
        run.send(signal.SIGINT)
        assert run.end() == 130, run.output  # long before `--grace` is over
