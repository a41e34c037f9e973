"""A disk that is full: the failed checkpoint is cleaned up, training goes on, and a later save succeeds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import runs
from runs import SMALL, here

from jaxtrain.checkpoint.manifest import manifested_steps, problems
from jaxtrain.errors import WorkdirError
from jaxtrain.training import session

# Slow enough that little is read ahead. Fills its disk once there is a checkpoint and none is being written (the older one goes
# when it is whole, and would make room), and frees it at the batch after a save has failed.
FILLING = """
import dataclasses
import os
import time

from jaxtrain.data import registry

class Filling:
    def __init__(self, base, path):
        self.base, self.shape, self.path = base, base.shape, path
        self.filled, self.reads = False, 0

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        time.sleep(0.1)
        self.reads += 1
        run = os.path.join(os.path.dirname(self.path), "run")
        folder = os.path.join(run, "checkpoints")

        def checkpoints():
            return os.listdir(folder) if os.path.exists(folder) else []

        def is_first_written(there):
            return len(there) == 1 and os.path.exists(os.path.join(folder, there[0], "manifest.json"))

        # The first checkpoint is that of step 3: the fifth batch comes when it is written, however long that takes.
        while self.reads > 4 and len(checkpoints()) < 2 and not is_first_written(checkpoints()):
            time.sleep(0.01)
        if not self.filled and is_first_written(checkpoints()):
            self.filled = True
            free = os.statvfs(os.path.dirname(self.path))
            with open(self.path, "wb") as file:
                file.write(b"x" * (free.f_bavail * free.f_frsize - int(os.environ["LEFT"])))
        elif os.path.exists(self.path) and os.environ["FREED"] == "yes":
            with open(os.path.join(run, "logs", "process_0.log")) as log:
                if "training goes on" in log.read():
                    os.unlink(self.path)
        return self.base.read(indices)

def digits(config, image_size):
    found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
    return dataclasses.replace(found, train=Filling(found.train, os.environ["FILLER"]))
"""

FIELDS = SMALL | {
    "data.name": "filling:digits", "data.residency": "stream", "data.workers": 0, "data.examples": 128,
    "model.width": 600, "train.steps": 24, "train.eval_every": "0", "checkpoint.every": "3", "checkpoint.keep": 1,
}  # fmt: skip


# At its ninth batch, which comes after two checkpoints, something happens to the disk.
BREAKING = """
import dataclasses, os, resource, shutil, subprocess

from jaxtrain.data import registry

RUN = os.environ["RUN"]

def full():
    with open(os.path.join(os.path.dirname(RUN), "filler"), "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass

def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

def gone():
    shutil.rmtree(RUN)

def no_more_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
    os.pipe()

def read_only():
    checkpoints = os.path.join(RUN, "checkpoints")
    for options in (["--bind", checkpoints], ["-o", "remount,ro,bind"]):
        subprocess.run(["mount", *options, checkpoints], check=True)

def own():
    raise ValueError("a fault of one's own")

class Breaking:
    def __init__(self, base):
        self.base, self.shape, self.batches = base, base.shape, 0

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        self.batches += 1
        if self.batches == 9:
            try:
                globals()[os.environ["HAPPENS"]]()
            except OSError:
                pass
        return self.base.read(indices)

def digits(config, image_size):
    found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
    return dataclasses.replace(found, train=Breaking(found.train))
"""


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A file system of 12 MiB; a checkpoint takes about 2."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    (tmp_path / "filling.py").write_text(FILLING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FILLER", str(path / "filler"))
    yield path
    subprocess.run(["umount", "-l", path / "run" / "checkpoints"], check=False, capture_output=True)
    subprocess.run(["umount", "-l", path], check=True)


# Of a save that failed, Orbax's other writes end when its event loop is closed.
@pytest.mark.filterwarnings(
    "ignore:(?s)Exception ignored in.*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize(
    "left", [pytest.param(600_000, marks=pytest.mark.faults), 0], ids=["seen before", "found while writing"]
)
def test_training_goes_on_and_a_later_save_succeeds(disk: Path, monkeypatch, left):
    monkeypatch.setenv("LEFT", str(left))
    monkeypatch.setenv("FREED", "yes")
    if not left:  # nobody looks before writing
        monkeypatch.setattr("jaxtrain.checkpoint.checkpointer._is_short_of", lambda *_: False)
        monkeypatch.setenv("LEFT", "600000")
    result = here(disk / "run", FIELDS)
    log = (disk / "run" / "logs" / "process_0.log").read_text()
    assert log.count("training goes on, and the next save tries again") >= 1
    assert "No space left on device" in log
    assert len(runs.losses(disk / "run")) == 24
    steps = manifested_steps(disk / "run" / "checkpoints")
    assert steps[-1] == 24
    assert all(problems(disk / "run" / "checkpoints" / str(step)) == [] for step in steps)
    assert not list((disk / "run" / "checkpoints").glob("*tmp*")), "what was begun is gone"
    assert result.result["steps"] == 24


def test_the_third_failed_save_in_a_row_ends_the_run_with_a_good_checkpoint(disk: Path, monkeypatch):
    monkeypatch.setenv("LEFT", "600000")
    monkeypatch.setenv("FREED", "no")
    with pytest.raises(WorkdirError, match=r"was not written \(No space left on device\); 3 in a row"):
        here(disk / "run", FIELDS)
    (step,) = manifested_steps(disk / "run" / "checkpoints")
    assert problems(disk / "run" / "checkpoints" / str(step)) == []
    os.unlink(disk / "filler")
    here(disk / "run", FIELDS | {"data.name": "digits"}, checkpoint__allow_changes=True)
    assert len(runs.losses(disk / "run")) == 24


def test_the_last_save_that_fails_ends_the_run_and_is_made_up_for(disk: Path, monkeypatch):
    """No later save would try again: a run that says that it is done has its last weights on the disk."""
    monkeypatch.setenv("LEFT", "600000")
    monkeypatch.setenv("FREED", "no")
    said = (
        r"step 6 in .* was not written \(No space left on device\), and no other save follows: .* goes on from step 3\."
    )
    with pytest.raises(WorkdirError, match=said):
        here(disk / "run", FIELDS, train__steps=6)
    assert not (disk / "run" / "result.json").exists()
    os.unlink(disk / "filler")
    result = here(disk / "run", FIELDS | {"data.name": "digits"}, checkpoint__allow_changes=True, train__steps=6)
    assert manifested_steps(disk / "run" / "checkpoints")[-1] == result.result["steps"] == 6
    assert len(runs.losses(disk / "run")) == 6


def test_a_disk_without_room_for_one_checkpoint_is_refused_at_the_start(disk: Path, monkeypatch):
    monkeypatch.setenv("LEFT", "0")
    monkeypatch.setattr(session, "compile_run", lambda *_: pytest.fail("it was compiled first"))
    (disk / "filler").write_bytes(b"x" * (11 << 20))
    with pytest.raises(WorkdirError, match="A checkpoint takes 2 MiB and"):
        here(disk / "run", FIELDS | {"data.name": "digits"})


# Whether the lock is missed first, or a file of the run cannot be written, is chance.
GONE = "is not there any more or cannot be written (its directory is not there)."


@pytest.mark.parametrize(
    ("happens", "code", "said"),
    [
        ("full", 73, "(No space left on device)"),
        ("read_only", 73, "was not written (Read-only file system); 3 in a row."),
        pytest.param("limited", 73, "(File too large)", marks=pytest.mark.faults),
        pytest.param("gone", 73, GONE, marks=pytest.mark.faults),
        pytest.param("no_more_files", 73, "(Too many open files)", marks=pytest.mark.faults),
        pytest.param("own", 65, "(ValueError: a fault of one's own, at ", marks=pytest.mark.faults),
    ],
)
def test_what_happens_in_the_middle_of_a_run_ends_it_with_one_sentence(disk: Path, monkeypatch, happens, code, said):
    """An error of closing what is open does not take the place of the first one."""
    (disk.parent / "breaking.py").write_text(BREAKING)
    monkeypatch.setenv("HAPPENS", happens)
    monkeypatch.setenv("RUN", str(disk / "run"))
    fields = FIELDS | {"data.name": "breaking:digits", "train.steps": 200}
    arguments = runs.arguments(disk / "run", fields, "--simulate-devices", "1")
    with runs.Started(disk.parent / "output.txt", ["-m", "jaxtrain.main", *arguments], cwd=disk.parent) as run:
        assert run.end() == code, run.output
        assert "Traceback" not in run.output
        assert run.output.splitlines()[-1].startswith("jaxtrain: ")
        assert any(each in run.output.splitlines()[-1] for each in said.split(" or "))
