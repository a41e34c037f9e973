"""Goodput: the wall time of a run over all its starts adds up, and steps that were done twice count once."""

import contextlib
import dataclasses
import json

import pytest
import runs
from runs import SMALL, here

from jaxtrain.errors import NumericError
from jaxtrain.observability.clock import StepClock
from jaxtrain.observability.goodput import StartTimes, TimesFile, end_start, goodput, read_starts


def start(began, first, last, *, lost=0, **seconds):
    return StartTimes(began, first, last, lost, {"start": 1.0, "step": 0.0} | seconds)


def test_an_undisturbed_run():
    found = goodput([start(100, 0, 10, step=8.0, compile=1.0)])
    assert found.seconds == {"training": 8.0, "done again": 0.0, "start": 1.0, "compile": 1.0}
    assert (found.wall, found.share, found.steps, found.lost_steps) == (10.0, 0.8, 10, 0)


def test_steps_that_a_later_start_does_again_count_once():
    """Killed at step 10, on from 6; killed at once, on from 4, which the first start had done: 3 s between starts."""
    found = goodput([start(0, 0, 10, step=10.0), start(14, 6, 8, step=4.0), start(22, 4, 12, step=16.0)])
    assert found.seconds == {"training": 4 + 16, "done again": 4 + 2 + 4, "start": 3.0, "down": 3.0 + 3.0}
    assert (found.steps, found.lost_steps) == (12, 4 + 2 + 2)
    assert found.wall == 22 + 17


def test_a_rollback_and_a_step_that_was_never_finished():
    found = goodput([start(0, 0, 8, lost=2, step=10.0), start(11, 8, 8, step=5.0)])
    assert found.seconds == {"training": 8.0, "done again": 2.0 + 5.0, "start": 2.0, "down": 0.0}
    assert found.lost_steps == 2


def test_a_real_run_adds_up(tmp_path, capsys):
    run = tmp_path / "run"
    here(run, SMALL, train__steps=6)
    result = here(run, SMALL, train__steps=12).result
    first, second = read_starts(run / "starts")
    assert (first.first_step, first.step, second.first_step, second.step) == (0, 6, 6, 12)
    assert second.began >= first.began + first.wall - 0.1
    assert second.seconds["start"] == 0, "what came before was the first one's"
    assert [(each.end.code, each.end.step, each.end.by) for each in (first, second) if each.end] == [
        (0, 6, "itself"),
        (0, 12, "itself"),
    ]
    assert result["starts"] == 2
    assert json.loads((run / "result.json").read_text())["goodput"] == result["goodput"] > 0
    assert (result["gpu_hours"], result["cost"]) == (0.0, None), "a CPU is no GPU"
    assert runs.command_line(["goodput", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["wall_seconds"] == pytest.approx(sum(said["seconds"].values()))
    assert (said["starts"], said["steps"], said["lost_steps"]) == (2, 12, 0)
    assert runs.command_line(["goodput", str(run)]) == 0
    assert "2 starts, 12 steps" in capsys.readouterr().out


def test_gpu_hours_and_their_cost_over_all_starts(tmp_path, capsys):
    """Two hours on eight GPUs, one on four; the time between them costs nothing, and the latest price counts."""
    first = dataclasses.replace(start(0.0, 0, 10, step=7199.0), gpus=8, price=1.0)
    second = dataclasses.replace(start(90000.0, 10, 20, step=3599.0), gpus=4, price=2.5)
    found = goodput([first, second])
    assert (found.gpu_hours, found.cost) == pytest.approx((20.0, 50.0))
    assert goodput([first, dataclasses.replace(second, price=0.0)]).cost is None
    early = start(95000.0, 20, 20)  # it failed before it knew its devices
    assert goodput([first, second, early]).cost == pytest.approx(50.0)
    (tmp_path / "starts").mkdir()
    for number, each in enumerate((first, second), 1):
        (tmp_path / "starts" / f"{number:06d}.json").write_text(json.dumps(dataclasses.asdict(each)))
    assert runs.command_line(["goodput", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cost"] == pytest.approx(50.0)
    assert runs.command_line(["goodput", str(tmp_path)]) == 0
    assert "GPU hours 20, cost 50\n" in capsys.readouterr().out


def test_a_start_says_what_it_runs_on(tmp_path):
    times = TimesFile(tmp_path / "starts", StepClock(), lambda: 0)
    with contextlib.closing(times):
        times.runs_on(8, 2.5)
        found = times.summary()
        assert found is not None
        assert found.cost == pytest.approx(2.5 * found.gpu_hours)
        assert found.gpu_hours > 0
    (read,) = read_starts(tmp_path / "starts")
    assert (read.gpus, read.price) == (8, 2.5)


def test_every_end_is_told(tmp_path, capsys):
    """A start that failed, one that was killed, and one whose end its launcher has told."""
    run = tmp_path / "run"
    with pytest.raises(NumericError):
        here(run, SMALL, train__steps=6, optim__learning_rate=1e30)
    assert "exit code 76: " in (run / "logs" / "process_0.log").read_text()
    kept = json.loads((run / "starts" / "000001.json").read_text())
    (run / "starts" / "000002.json").write_text(json.dumps(kept | {"end": None, "host": "far"}))
    (run / "starts" / "000003.json").write_text(json.dumps({key: kept[key] for key in kept.keys() - {"end", "host"}}))
    end_start(run / "starts" / "000003.json", 137, "process 1 (pid 7) was killed by SIGKILL")
    end_start(run / "starts" / "000001.json", 137, "what it said itself stays")
    (run / "starts" / "1x.json").write_text("what is this")
    here(run, SMALL, train__steps=6, checkpoint__resume="none")
    (folder,) = (run / "superseded").iterdir()
    assert runs.command_line(["goodput", str(folder), "--json"]) == 0
    ends = json.loads(capsys.readouterr().out)["ends"]
    assert [(end["code"], end["by"]) for end in ends] == [
        (76, "itself"),
        (None, "the next start"),
        (137, "its launcher"),
    ]
    assert "rollbacks allows no more" in ends[0]["message"]
    assert ends[1]["host"] == "far"
    assert runs.command_line(["goodput", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "exit code 137 (as its launcher says): process 1 (pid 7) was killed by SIGKILL" in said
    assert "start 2, on far, steps 0 to" in said


def test_a_fresh_run_begins_a_new_account(tmp_path):
    run = tmp_path / "run"
    here(run, SMALL, train__steps=3, checkpoint__resume="none")
    assert not (run / "superseded").exists(), "nothing was here"
    here(run, SMALL, train__steps=4, checkpoint__resume="none")
    assert [each.step for each in read_starts(run / "starts")] == [4]
    (folder,) = (run / "superseded").iterdir()
    assert [each.step for each in read_starts(folder / "starts")] == [3]


def test_what_is_no_run(tmp_path, capsys):
    assert runs.command_line(["goodput", str(tmp_path)]) == 73
    assert "holds no start of a run" in capsys.readouterr().err
