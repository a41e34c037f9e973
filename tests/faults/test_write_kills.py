"""Killed inside a save, at each point where what is on the disk changes: the checkpoint before is used, and nothing is lost."""

from __future__ import annotations

import re

import pytest
import runs
from runs import SMALL, here

from jaxtrain.checkpoint.manifest import manifested_steps, problems

# Each start of the job dies at the next of these points; the start after the last one is left alone.
POINTS = [
    (0, "files are written"),
    (1, "files are written"),
    (0, "all files are there and the manifest is not begun"),
    (0, "the manifest is written and not renamed"),
    (0, "the manifest is in its place"),
    (0, "an old checkpoint lost its manifest and is not deleted"),
]

KILLER = """
import dataclasses, os, pathlib, shutil, signal, sys
import orbax.checkpoint as ocp
from jaxtrain.checkpoint import manifest
from jaxtrain.data import registry

POINTS = %r
deaths = pathlib.Path(__file__).with_name("deaths")
number = len(deaths.read_text().splitlines()) if deaths.exists() else 0
rank = int(sys.argv[sys.argv.index("--process-id") + 1])
mine = [point for who, point in POINTS[number:number + 1] if who == rank]

def reached(point):
    if point in mine:
        with deaths.open("a") as file:
            print(point, file=file)
        os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, point, condition=lambda *_: True):
    real = getattr(owner, name)
    def hooked(*args, **kwargs):
        if condition(*args):
            reached(point)
        return real(*args, **kwargs)
    setattr(owner, name, hooked)

def after(owner, name, point, condition=lambda *_: True):
    real = getattr(owner, name)
    def hooked(*args, **kwargs):
        found = real(*args, **kwargs)
        if condition(*args):
            reached(point)
        return found
    setattr(owner, name, hooked)

def is_manifest(_, target):
    return pathlib.Path(target).name == "manifest.json" and pathlib.Path(target).parent.name.isdigit()

after(ocp.CheckpointManager, "save", "files are written")
before(manifest, "write_manifest", "all files are there and the manifest is not begun")
before(os, "replace", "the manifest is written and not renamed", is_manifest)
after(os, "replace", "the manifest is in its place", is_manifest)
before(shutil, "rmtree", "an old checkpoint lost its manifest and is not deleted",
       lambda path, *_: pathlib.Path(path).parent.name == "checkpoints" and pathlib.Path(path).name.isdigit())

def digits(config, image_size):
    return registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
"""

FIELDS = SMALL | {
    "data.name": "killer:digits", "data.examples": 128, "train.steps": 24, "train.eval_every": "0",
    "checkpoint.every": "3", "checkpoint.keep": 1,
}  # fmt: skip


@pytest.mark.faults
def test_a_kill_at_every_point_of_a_save(tmp_path):
    (tmp_path / "killer.py").write_text(KILLER % POINTS)
    run = tmp_path / "run"
    arguments = runs.arguments(run, FIELDS, "--simulate-devices", "1")
    command = ["-m", "jaxtrain", "launch", "--nproc", "2", "--max-restarts", "20", "--", "train", *arguments]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as job:
        assert job.end() == 0, job.output
        assert job.output.count("was killed by SIGKILL") == len(POINTS), job.output
        resumed = [int(step) for step in re.findall(r"resumed from .*/(\d+)", job.output)]
    assert (tmp_path / "deaths").read_text().splitlines() == [point for _, point in POINTS]
    # nothing counted before the fourth death; then each start goes on from the newest that was whole
    assert resumed == sorted(resumed)
    assert len(resumed) == 2
    here(tmp_path / "whole", FIELDS | {"data.name": "digits"}, devices=2)
    assert runs.rows(run) == runs.rows(tmp_path / "whole")
    assert runs.rows(run, "test") == runs.rows(tmp_path / "whole", "test")
    for step in manifested_steps(run / "checkpoints"):
        assert problems(run / "checkpoints" / str(step)) == []
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {str(step) for step in manifested_steps(run / "checkpoints")}, "no half checkpoint stays"
