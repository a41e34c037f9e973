"""The soak: a run of two processes is killed at random, again and again, and ends in the very same rows.

    JAXTRAIN_SOAK_KILLS=100 python -m pytest tests/faults/test_soak.py -m slow -s

Under `jaxtrain launch`, and without it, as a scheduler would start the processes again. Prints, and writes where
JAXTRAIN_SOAK_OUTPUT says, the recovery times and the steps done twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import SMALL, here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_launch import FAULTY, worker

from jaxtrain.checkpoint.manifest import manifested_steps
from jaxtrain.observability.goodput import StartEnd, read_starts

KILLS = int(os.environ.get("JAXTRAIN_SOAK_KILLS", "100"))
EVERY = 20


def fields(kills: int) -> dict[str, Any]:
    """Of a run that lasts for so many kills."""
    return SMALL | {
        "data.name": "faulty:digits", "data.residency": "stream", "data.workers": 0, "data.examples": 128,
        "train.steps": 25 * kills, "train.eval_every": "40 steps", "checkpoint.every": str(EVERY),
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


def tensorboard(run: Path, phase: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads of a phase, without what depends on the clock."""
    seen = EventAccumulator(str(run / "tensorboard" / phase), size_guidance={"scalars": 0}).Reload()
    timed = (*runs.TIMED, "time/", "host0/", "device0/", "device1/")
    tags = [tag for tag in seen.Tags()["scalars"] if not any(name in tag for name in timed)]
    return {tag: [(event.step, event.value) for event in seen.Scalars(tag)] for tag in tags}


def assert_whole(run: Path, tmp_path: Path, kills: int) -> None:
    """The rows of all files are those of a run that nobody disturbed."""
    whole = tmp_path / "whole"
    here(whole, fields(kills) | {"data.name": "digits"}, devices=2)
    assert runs.losses(run).tolist() == runs.losses(whole).tolist()
    assert runs.epochs(run) == runs.epochs(whole)
    for phase in ("train", "val", "test"):
        assert runs.rows(run, phase) == runs.rows(whole, phase)
        assert tensorboard(run, phase) == tensorboard(whole, phase)


def ends(run: Path, starts: int) -> list[StartEnd]:
    """How each start ended that a kill ended; the last one is complete."""
    found = [start.end for start in read_starts(run / "starts")]
    told = [end for end in found if end is not None]
    assert len(told) == len(found) >= starts
    assert (told[-1].code, told[-1].by) == (0, "itself")
    return told[:-1]


at_random = pytest.mark.parametrize(
    "kills", [pytest.param(2, marks=pytest.mark.faults), pytest.param(KILLS, marks=pytest.mark.slow)]
)


def wait_for_a_moment(chance: random.Random, run: Path, kills: int, wait_for: Any) -> str:
    """Waits for a moment to kill at, every third time during a save. Returns its kind."""
    if kills % 3 == 0:
        wait_for(lambda: saves(run), "a save")
        time.sleep(chance.random() * 0.05)
        return "while saving"
    time.sleep(chance.random() * 3)
    return "anywhere"


def report(name: str, figures: dict[str, Any]) -> None:
    print(json.dumps({name: figures}))
    if path := os.environ.get("JAXTRAIN_SOAK_OUTPUT"):
        file = Path(path)
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {name: figures}, indent=1) + "\n")


@at_random
@pytest.mark.timeout(7200)
def test_random_kills_end_in_the_same_rows(tmp_path, kills):
    chance, run = random.Random(kills), tmp_path / "run"
    (tmp_path / "faulty.py").write_text(FAULTY)
    arguments = runs.arguments(run, fields(kills), "--simulate-devices", "1")
    command = ["-m", "jaxtrain", "launch", "--nproc", "2", "--max-restarts", "1000", "--", "train", *arguments]
    recoveries, redone, killed = [], [], {"anywhere": 0, "while saving": 0}
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as job:
        job.wait_for(lambda: last_step(run) > 0, "the first step")
        while sum(killed.values()) < kills:
            kind = wait_for_a_moment(chance, run, sum(killed.values()), job.wait_for)
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
    assert max(redone) <= 2 * EVERY, "a checkpoint that was being written may be lost, and the one before it is used"
    assert {(end.code, end.by) for end in ends(run, kills + 1)} <= {
        (137, "its launcher"),  # it was killed, or what it said of the other one was made exact
        (None, "the next start"),  # it was killed before its launcher knew where it writes
    }
    assert_whole(run, tmp_path, kills)
    figures = {
        "kills": killed,
        "recovery_seconds": {"median": statistics.median(recoveries), "worst": max(recoveries)},
        "redone_steps": {"median": statistics.median(redone), "worst": max(redone), "interval": EVERY},
        "steps": len(runs.losses(run)),
        "checkpoints": len(manifested_steps(run / "checkpoints")),
        "identical": True,
    }
    report("with the launcher", figures)


@at_random
@pytest.mark.timeout(7200)
def test_random_kills_without_a_launcher(tmp_path, kills):
    """Whoever is left says "start me again": 70, or 0 where the run was complete."""
    chance, run = random.Random(kills + 1), tmp_path / "run"
    (tmp_path / "faulty.py").write_text(FAULTY)
    command = ["-m", "jaxtrain", "train", *runs.arguments(run, fields(kills), "--simulate-devices", "1")]
    killed, codes = {"anywhere": 0, "while saving": 0}, []
    while True:
        port, count = runs.free_port(), len(starts(run))
        with contextlib.ExitStack() as stack:
            both = [
                stack.enter_context(
                    runs.Started(tmp_path / f"{i}.txt", [*command, *runs.joined(i, 2, port)], cwd=tmp_path)
                )
                for i in range(2)
            ]
            if sum(killed.values()) == kills:
                assert [process.end() for process in both] == [0, 0], both[0].output[-3000:]
                break
            both[0].wait_for(
                lambda count=count: len(starts(run)) > count and last_step(run) > 0 and goes_on(run), "a new step"
            )
            kind = wait_for_a_moment(chance, run, sum(killed.values()), both[0].wait_for)
            victim = chance.randrange(2)
            both[victim].send(signal.SIGKILL)
            killed[kind] += 1
            assert both[victim].end() == -signal.SIGKILL
            codes.append(both[1 - victim].end())
            assert codes[-1] == 70, both[1 - victim].output[-3000:]
            assert f"Process {victim} of this run" in both[1 - victim].output.splitlines()[-1]
    assert {(end.code, end.by) for end in ends(run, kills + 1)} <= {(70, "itself"), (None, "the next start")}
    assert_whole(run, tmp_path, kills)
    report(
        "without", {"kills": killed, "codes of the others": codes, "steps": len(runs.losses(run)), "identical": True}
    )
