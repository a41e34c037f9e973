"""`jaxtrain status`, `stop` and `resume` of runs, by their files."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import runs

from jaxtrain.checkpoint.lease import Owner
from jaxtrain.cli import main
from jaxtrain.jobs.run_status import find_runs, read_status
from jaxtrain.observability.goodput import StartEnd, StartTimes


def make_run(path: Path, end: StartEnd | None = None, **changes: Any) -> Path:
    """The files of a run that nobody has run."""
    (path / "starts").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    seconds = {"start": 3.0, "compile": 7.0, "step": 90.0, "evaluation": 10.0}
    start = StartTimes(time.time() - 110.0, 0, 50, 0, seconds, "somewhere", end, last_step=150)
    (path / "starts" / "000001.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(start, **changes))))
    rows = [
        {"step": 40, "epoch": 3, "phase": "train", "loss": 1.5, "accuracy": 0.25},
        {"step": 45, "epoch": 4, "phase": "val", "loss": 1.2, "accuracy": 0.5},
        {"step": 50, "epoch": 5, "phase": "train", "loss": 0.75, "accuracy": None},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 51, "ph')
    return path


def ended(code: int | None, message: str) -> StartEnd:
    return StartEnd(time.time(), code, message, 50, "somewhere", "itself")


def lock(path: Path, **changes: Any) -> None:
    (path / "lock.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(Owner.here(), **changes))))


def test_each_way_to_be(tmp_path):
    for name, end, state, reason in (
        ("done", ended(0, "The run is complete."), "done", ""),
        ("saved", ended(75, "Stopped."), "stopped", "Stopped."),
        ("failed", ended(76, "The loss is nan."), "failed", "The loss is nan."),
        ("killed", ended(None, "Killed."), "died", "Killed."),
        ("unsaid", None, "died", "It ended without a word on somewhere: it was killed, or its host went down."),
    ):
        status = read_status(make_run(tmp_path / name, end))
        assert (status.state, status.reason, status.step, status.pid) == (state, reason, 50, None), name
    live = make_run(tmp_path / "live")
    lock(live)
    status = read_status(live)
    assert (status.state, status.pid, status.epoch, status.loss, status.val_accuracy) == (
        "running",
        os.getpid(),
        5,
        0.75,
        0.5,
    )
    assert status.seconds_left == pytest.approx(200.0)  # 100 steps at the pace of 50 steps in 100 s
    lock(live, born="1")  # the number of a process that is no more
    assert read_status(live).state == "died"
    lock(live, host="elsewhere", boot="other")  # cannot be asked; it has renewed its lock just now
    assert read_status(live).state == "running"
    os.utime(live / "lock.json", (1, 1))
    assert read_status(live).state == "died"


def test_what_a_run_has_cost_so_far(tmp_path, capsys):
    """110 s on eight GPUs at 36 an hour; a run on a CPU costs nothing, and without a price there is none."""
    make_run(tmp_path / "priced", gpus=8, price=36.0)
    make_run(tmp_path / "unpriced", gpus=8)
    make_run(tmp_path / "on a CPU", price=36.0)
    priced, unpriced, on_cpu = (read_status(tmp_path / name) for name in ("priced", "unpriced", "on a CPU"))
    assert (priced.gpu_hours, priced.cost) == pytest.approx((8 * 110 / 3600, 8 * 1.1))
    assert (unpriced.gpu_hours, unpriced.cost) == (priced.gpu_hours, None)
    assert (on_cpu.gpu_hours, on_cpu.cost) == (None, None)
    assert main(["status", "--root", str(tmp_path), "--json"]) == 0
    shown = {Path(run["path"]).name: run["cost"] for run in json.loads(capsys.readouterr().out)["runs"]}
    assert shown == {"priced": priced.cost, "unpriced": None, "on a CPU": None}
    assert main(["status", str(tmp_path / "priced")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "GPU hours cost" in said
    assert "0.244 8.8" in said
    (tmp_path / "priced" / "starts" / "000000.json").write_text("{")
    assert read_status(tmp_path / "priced").state == "died", "an older start's damage hides nothing else"


def test_runs_that_are_damaged_deleted_or_being_written_stop_nobody(tmp_path, capsys):
    make_run(tmp_path / "good")
    for name, file, text in (
        ("a", "starts/000001.json", "{"),
        ("b", "starts/000001.json", "[" * 10**5),
        ("c", "metrics.jsonl", "\0\xff[[["),
        ("d", "manifest.json", '{"starts": 3}'),
        ("e", "lock.json", '{"pid": "x"}'),
        ("f\x1b[31m=cmd", "config.json", "no JSON"),
    ):
        (make_run(tmp_path / name) / file).write_text(text)
    loop = tmp_path / "loop"
    loop.symlink_to(tmp_path, target_is_directory=True)
    make_run(tmp_path / ".hidden" / "x")
    assert len(list(find_runs(tmp_path))) == 7
    assert main(["status", "--root", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main(["status", "--root", str(tmp_path), "--json"]) == 0
    assert [run["state"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["damaged"] * 2 + ["died"] * 5
    assert main(["status", "--root", str(tmp_path / "absent")]) == 73
    assert main(["status", str(tmp_path / "absent")]) == 73


@pytest.mark.parametrize("command", ["status", "goodput", "logs", "resume", "stop"])
def test_where_a_directory_has_several_runs_it_is_said_how_to_see_them(command, tmp_path, capsys):
    make_run(tmp_path / "rates" / "one")
    assert main([command, str(tmp_path / "rates")]) == 73
    assert (
        f"such as {tmp_path}/rates/one; jaxtrain status --root {tmp_path}/rates lists them" in capsys.readouterr().err
    )


def test_looking_runs_no_code(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    (run / "config.json").write_text(json.dumps({"model": {"name": "evil:Model"}, "data": {"name": "evil:data"}}))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["status", str(run)]) == 0
    assert not (tmp_path / "was-run").exists()


def test_what_does_not_run_is_not_stopped_and_a_process_of_that_number_is_left_alone(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["stop", str(run)]) == 64
    lock(run, born="1")
    assert main(["stop", str(run)]) == 64
    lock(run, host="elsewhere", boot="other")
    assert main(["stop", str(run)]) == 78
    assert "its run is on elsewhere" in capsys.readouterr().err


def test_resume_goes_on_from_the_directory_alone(tmp_path, capsys):
    whole = runs.here(tmp_path / "whole", runs.SMALL)
    runs.here(tmp_path / "run", runs.SMALL, train__epochs=2)
    assert main(["resume", str(tmp_path / "run"), "--config.train.epochs=3", "--devices", "1"]) == 0
    assert read_status(tmp_path / "run").step == 12
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["last"] == whole.result["last"]
    assert main(["resume", str(tmp_path / "run"), "--config.optim.learning_rates=1"]) == 64
    assert "learning_rate" in capsys.readouterr().err
