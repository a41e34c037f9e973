"""The soak: a run of two processes is killed at random, again and again, and ends in the very same numbers.

    JAXTRAIN_SOAK_KILLS=100 python -m pytest tests/faults/test_soak.py -m slow -s

Prints, and writes where JAXTRAIN_SOAK_OUTPUT says, the recovery times and the steps done twice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from pathlib import Path

import pytest
import runs
from runs import SMALL, here
from test_launch import FAULTY, worker

from jaxtrain.checkpoint.manifest import manifested_steps

KILLS = int(os.environ.get("JAXTRAIN_SOAK_KILLS", "100"))
EVERY = 20
FIELDS = SMALL | {
    "data.name": "faulty:digits", "data.residency": "stream", "data.workers": 0, "data.examples": 128,
    "train.steps": 25 * KILLS, "train.eval_every": "0", "checkpoint.every": str(EVERY),
}  # fmt: skip


def last_step(run: Path) -> int:
    """The step of the last whole row."""
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if (run / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def saves(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    paths = list((run / "checkpoints").glob("*")) if (run / "checkpoints").exists() else []
    return any("tmp" in path.name or not (path / "manifest.json").exists() for path in paths)


def starts(run: Path) -> list[int]:
    """The step that each start went on from."""
    return [start["step"] for start in runs.starts(run)] if (run / "manifest.json").exists() else []


def goes_on(run: Path) -> bool:
    """Whether the last start has made a step: it notes its start first, then forgets what rows lie behind it."""
    noted, written = ((run / name).stat().st_mtime_ns for name in ("manifest.json", "metrics.jsonl"))
    return written > noted and last_step(run) > starts(run)[-1]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_random_kills_end_in_the_same_numbers(tmp_path):
    chance, run = random.Random(KILLS), tmp_path / "run"
    (tmp_path / "faulty.py").write_text(FAULTY)
    arguments = runs.arguments(run, FIELDS, "--simulate-devices", "1")
    command = ["-m", "jaxtrain", "launch", "--nproc", "2", "--max-restarts", "1000", "--", "train", *arguments]
    recoveries, redone, killed = [], [], {"anywhere": 0, "while saving": 0}
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as job:
        job.wait_for(lambda: last_step(run) > 0, "the first step")
        while sum(killed.values()) < KILLS:
            if sum(killed.values()) % 3 == 0:
                kind = "while saving"
                job.wait_for(lambda: saves(run), "a save")
                time.sleep(chance.random() * 0.05)
            else:
                kind = "anywhere"
                time.sleep(chance.random() * 3)
            before, count = last_step(run), len(starts(run))
            victim = worker(job, chance.randrange(2))
            if not victim:
                continue  # between two starts
            os.kill(victim, signal.SIGKILL)
            killed[kind] += 1
            began = time.monotonic()
            job.wait_for(lambda count=count: len(starts(run)) > count, "the next start")
            redone.append(max(before - starts(run)[-1], 0))
            job.wait_for(lambda: goes_on(run), "a new step")
            recoveries.append(time.monotonic() - began)
        assert job.end() == 0, job.output[-3000:]
    here(tmp_path / "whole", FIELDS | {"data.name": "digits"}, devices=2)
    assert runs.losses(run).tolist() == runs.losses(tmp_path / "whole").tolist()
    assert runs.rows(run, "test") == runs.rows(tmp_path / "whole", "test")
    assert max(redone) <= 2 * EVERY, "a checkpoint that was being written may be lost, and the one before it is used"
    figures = {
        "kills": killed,
        "recovery_seconds": {"median": statistics.median(recoveries), "worst": max(recoveries)},
        "redone_steps": {"median": statistics.median(redone), "worst": max(redone), "interval": EVERY},
        "steps": len(runs.losses(run)),
        "checkpoints": len(manifested_steps(run / "checkpoints")),
        "identical": True,
    }
    print(json.dumps(figures))
    if path := os.environ.get("JAXTRAIN_SOAK_OUTPUT"):
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")
