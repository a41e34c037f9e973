"""The soak: a run of two processes is killed at random, again and again, and ends in the very same numbers.

    JAXTRAIN_SOAK_KILLS=100 python -m pytest tests/faults/test_soak.py -m slow -s

Prints, and writes where JAXTRAIN_SOAK_OUTPUT says, the recovery times and the steps done twice.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import time
from pathlib import Path

import pytest
import runs
from runs import SMALL, here
from test_launch import FAULTY, worker

from jaxtrain.checkpoint_files import manifested_steps

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


def first_steps(output: str) -> list[int]:
    """The step that each start went on from, as process 0 told."""
    starts = [start for start in re.split(r"(?m)^\S+ work directory:", output)[1:] if " model: " in start]
    found = [re.search(r"(?m)^\S+ resumed from .*/(\d+)$", start) for start in starts]
    return [int(step[1]) if step else 0 for step in found]


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
            before, starts = last_step(run), len(first_steps(job.output))
            victim = worker(job, chance.randrange(2))
            if not victim:
                continue  # between two starts
            os.kill(victim, signal.SIGKILL)
            killed[kind] += 1
            began = time.monotonic()
            job.wait_for(lambda starts=starts: len(first_steps(job.output)) > starts, "the next start")
            resumed = first_steps(job.output)[-1]
            redone.append(max(before - resumed, 0))
            job.wait_for(lambda resumed=resumed: last_step(run) > resumed, "a new step")
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
