"""Sweeps: what is planned, what goes on after a kill, what halving keeps, what a failing run costs."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from runs import RECIPE, ROOT, SMALL, Started, command_line, here, rows

from jaxtrain import sweep
from jaxtrain.checkpoint import lease
from jaxtrain.cli import parse
from jaxtrain.cli import start as start_lib
from jaxtrain.errors import ConfigError, WorkdirError
from jaxtrain.sweeps import store
from jaxtrain.sweeps.halving import decide
from jaxtrain.sweeps.plan import make_plan
from jaxtrain.sweeps.spec import Halving, from_words, read_sweep

FIXED = SMALL | {"checkpoint.every": "0"}
SIX = {"config": str(RECIPE), "overrides": FIXED, "grid": {"optim.learning_rate": [0.05, 0.1, 0.2]}, "seeds": [0, 1]}
LONG = SIX | {"overrides": SMALL | {"train.epochs": 25, "checkpoint.every": "10", "optim.schedule": "cosine"}}


@pytest.fixture(autouse=True)
def _workers_find_what_tests_name(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1")


def started(output: Path, source: dict, workdir: Path, *more: str) -> Started:
    """`jaxtrain sweep FILE --workdir DIR ...` as a process of its own."""
    file = output.with_suffix(".yaml")
    file.write_text(json.dumps(source))  # which is YAML
    return Started(output, ["-m", "jaxtrain", "sweep", str(file), "--workdir", str(workdir), *more])


def starts(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "starts").glob("*.json"))


def everything(workdir: Path) -> dict[str, list]:
    """What every run of a sweep has recorded."""
    return {
        run.parent.name: [rows(run.parent, phase) for phase in ("train", "val", "test")]
        for run in workdir.glob("*/config.json")
    }


# ------------------------------------------------------------------------------------------------------------- the plan


def test_a_plan_names_runs_by_their_settings_in_the_order_of_the_grid():
    plan = make_plan(
        read_sweep(
            SIX | {"grid": {"optim": {"learning_rate": ["1e-1", 0.05]}, "config.optim.step_at": [[0.3, 0.6], []]}}
        )
    )
    assert [run.name for run in plan.runs[:4]] == [
        "learning_rate=0.1,step_at=0.3-0.6,seed=0",
        "learning_rate=0.1,step_at=0.3-0.6,seed=1",
        "learning_rate=0.1,step_at=,seed=0",
        "learning_rate=0.1,step_at=,seed=1",
    ]
    assert plan.runs[1].config.seed == 1
    assert plan.runs[1].config.optim.step_at == (0.3, 0.6)
    assert len(plan.settings()) == 4


def test_flags_describe_the_same_plan_as_a_file():
    words = [["config.optim.learning_rate", "0.05", "0.1", "0.2"], ["seed", "0", "1"]]
    found = make_plan(from_words(str(RECIPE), words))
    assert [run.name for run in found.runs] == [run.name for run in make_plan(read_sweep(SIX)).runs]


def test_the_seed_alone_may_vary():
    found = make_plan(from_words(str(RECIPE), [["config.seed", "0", "1", "2"]]))
    assert [run.name for run in found.runs] == ["seed=0", "seed=1", "seed=2"]
    assert len(found.settings()) == 1


def test_names_are_safe_and_short_and_apart():
    grid = {"optim.learning_rate": [0.123456789, 0.2], "checkpoint.resume": ["/a/b:c d", "x%y", "z" * 200, "z" * 201]}
    names = [run.name for run in make_plan(read_sweep({"config": "quickstart", "grid": grid, "seeds": [3]})).runs]
    assert names[0] == "learning_rate=0.123456789,resume=a-b-c-d,seed=3"
    assert len(set(names)) == 8
    assert all(len(name) <= 140 and not set(name) & set("/\\:%* \n") for name in names)


def test_draws_are_in_their_ranges_and_more_of_them_begin_with_the_same():
    ranges = {
        "optim.learning_rate": {"loguniform": [0.001, 1]},
        "optim.momentum": {"uniform": ["0.5", 0.9]},
        "model.width": {"int": [8, 16]},
        "optim.nesterov": [True, False],
    }
    few, many = (make_plan(read_sweep({"config": "quickstart", "random": {"n": n, "ranges": ranges}})) for n in (5, 20))
    assert [run.name for run in many.runs[:5]] == [run.name for run in few.runs]
    assert len({run.name for run in many.runs}) == 20
    rates = [run.settings["optim.learning_rate"] for run in many.runs]
    assert min(rates) < 0.03 < max(rates)
    assert all(0.001 <= rate <= 1 for rate in rates)
    assert all(0.5 <= run.settings["optim.momentum"] <= 0.9 for run in many.runs)
    assert {8, 16} <= {run.settings["model.width"] for run in many.runs} <= set(range(8, 17))
    assert {run.settings["optim.nesterov"] for run in many.runs} == {True, False}


BASE = {"config": "quickstart"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (BASE | {"gird": {}}, "no key 'gird'.*Did you mean 'grid'"),
        ({"grid": {"seed": [1]}}, "the sweep has no config"),
        (BASE, "nothing varies"),
        (BASE | {"grid": {}}, "grid: {} must be fields and lists of values"),
        (BASE | {"grid": {"optim.learning_rate": []}}, "learning_rate: \\[\\] must be a list of at least one value"),
        (BASE | {"grid": {"optim.learning_rate": 0.1}}, "learning_rate: 0.1 must be a list"),
        (BASE | {"grid": {"optim.learning_rat": [0.1]}}, "learning_rat does not exist.*Did you mean.*rate"),
        (BASE | {"grid": {"optim": [0.1]}}, "config.optim is a section"),
        (BASE | {"grid": {"optim.learning_rate": ["fast"]}}, "config.optim.learning_rate='fast': must be a number"),
        (BASE | {"grid": {"optim.learning_rate": [-1]}}, "config.optim.learning_rate"),
        (BASE | {"grid": {"optim.learning_rate": [0.1, "0.10"]}}, "learning_rate=0.1 are the same"),
        (BASE | {"seeds": [1, 1]}, "are the same"),
        (BASE | {"seeds": "many"}, "seeds: 'many' must be a list of whole numbers"),
        (BASE | {"seeds": [0.5]}, "must be a list of whole numbers"),
        (BASE | {"seeds": 2, "overrides": {"seed": 3}}, "seed varies, and has a fixed value"),
        (BASE | {"seeds": 2, "grid": {"seed": [1]}}, "has seeds, and seed in the grid"),
        (BASE | {"seeds": 2, "jobs": 0}, "jobs: 0 must be a whole number of at least 1"),
        (BASE | {"grid": {"seed": [1]}, "random": {"n": 1}}, "choose one of them"),
        (BASE | {"random": {"n": 2}}, "random needs n, and ranges"),
        (BASE | {"random": {"n": 2, "ranges": {"optim.momentum": {"uniform": [1, 0]}}}}, "two rising numbers"),
        (BASE | {"random": {"n": 2, "ranges": {"optim.momentum": {"loguniform": [0, 1]}}}}, "two rising numbers above 0"),
        (BASE | {"random": {"n": 2, "ranges": {"optim.momentum": {"normal": [0, 1]}}}}, "one of choice, uniform"),
        (BASE | {"random": {"n": 9, "ranges": {"optim.nesterov": [True, False]}}}, "have 2 different settings, and 9"),
        (BASE | {"seeds": 2, "halving": {}}, "of 1 settings, one in 2 is kept"),
        (BASE | {"seeds": 2, "halving": {"metric": "loss"}}, "metric: 'loss' must be one of val_accuracy"),
        (BASE | {"grid": {"train.steps": list(range(1, 200)), "data.split_seed": list(range(100))}}, "19,900 runs"),
    ],
)  # fmt: skip
def test_a_sweep_that_is_wrong_is_refused_in_a_sentence(source, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as caught:
        sweep(source, tmp_path / "sweep", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    for text, said in (
        ("a: [", "is no YAML"),
        ("- 1", "must hold keys and values"),
        ("a: 1\na: 2", "'a' is there twice"),
    ):
        (tmp_path / "sweep.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_sweep(tmp_path / "sweep.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_sweep(tmp_path / "none.yaml")


# ------------------------------------------------------------------------------------------------------------- halving


def test_halving_keeps_the_best_by_the_mean_of_their_seeds():
    figures = {"a": [0.9, 0.1], "b": [0.6, 0.7], "c": [0.8, None], "d": [0.5, 0.5], "e": [float("nan"), 1.0]}
    found = decide(Halving(eta=2, rungs=2, metric="val_accuracy"), 1, figures)
    assert found.kept == ("b", "a")
    assert found.share == 0.25
    assert found.figures == {"a": 0.5, "b": pytest.approx(0.65), "c": None, "d": 0.5, "e": None}
    assert decide(Halving(2, 2, "val_loss"), 2, {"a": [1.0], "b": [0.5], "c": [2.0]}).kept == ("b",)
    assert decide(Halving(3, 1, "val_accuracy"), 1, {"a": [None], "b": [None]}).kept == ("a",)


@pytest.mark.faults
def test_halving_pauses_runs_and_the_survivor_is_as_one_that_was_not_paused(tmp_path, capsys):
    fixed = FIXED | {"train.epochs": 4, "optim.schedule": "cosine"}
    source = {
        "config": str(RECIPE),
        "overrides": fixed,
        "grid": {"optim.learning_rate": [1e-5, 0.1, 1e-6, 0.01]},
        "halving": {},
    }
    found = sweep(source, tmp_path / "sweep", quiet=True)
    assert [run.state for run in found.runs] == ["halved", "done", "halved", "halved"]
    assert [(each.rung, each.share, len(each.figures)) for each in found.decisions] == [(1, 0.25, 4), (2, 0.5, 2)]
    assert found.decisions[-1].kept == ("learning_rate=0.1",)
    steps = {run.name: rows(run.workdir.path)[-1]["step"] for run in found.runs}
    assert sorted(steps.values()) == [4, 4, 8, 16]
    here(tmp_path / "plain", SMALL, train__epochs=4, optim__schedule="cosine", optim__learning_rate=0.1)
    survivor = found.runs[1].workdir.path
    assert [rows(survivor, phase) for phase in ("train", "val", "test")] == [
        rows(tmp_path / "plain", phase) for phase in ("train", "val", "test")
    ]
    again = sweep(source, tmp_path / "sweep", quiet=True)
    assert again.decisions == found.decisions
    assert {run.name: starts(run.workdir.path) for run in again.runs}["learning_rate=0.1"] == [
        f"{number:06d}.json" for number in (1, 2, 3)
    ]
    (tmp_path / "source.yaml").write_text(json.dumps(source))
    capsys.readouterr()
    assert command_line(["sweep", str(tmp_path / "source.yaml"), "--workdir", str(tmp_path / "sweep")]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = printed.index(["halving", "at", "25.0", "%", "at", "50.0", "%"])
    assert printed[first + 1][0] == "learning_rate=0.1"
    shown = f"{found.decisions[0].figures['learning_rate=0.1']:.4g}"
    assert printed[first + 1][1:4] == [shown, "goes", "on"]
    assert [len(line) for line in printed[first + 1 : first + 5]] == [7, 5, 2, 2]
    for more in ([0.2], [0.2, 0.3, 0.4, 0.5]):  # eight settings would have another rung
        grid = {"optim.learning_rate": [1e-5, 0.1, 1e-6, 0.01, *more]}
        with pytest.raises(ConfigError, match=f"one: {len(more)} runs are new, and halving has already decided"):
            sweep(source | {"grid": grid}, tmp_path / "sweep", quiet=True)


def test_a_run_that_has_ended_early_counts_with_its_last_validation(tmp_path):
    early = {"callbacks.names": ["early_stopping"], "callbacks.patience": 1, "callbacks.min_delta": 1.0}
    fixed = FIXED | {"train.epochs": 8, "train.eval_every": 1} | early
    source = {"config": str(RECIPE), "overrides": fixed, "grid": {"optim.learning_rate": [1e-6, 0.1]}, "halving": {}}
    found = sweep(source, tmp_path / "sweep", quiet=True)
    assert [run.state for run in found.runs] == ["done", "done"]
    last = {run.name: rows(run.workdir.path, "val")[-1] for run in found.runs}
    assert all(0 < row["step"] < 16 for row in last.values())
    assert found.decisions[0].figures == {name: row["accuracy"] for name, row in last.items()}


def test_before_halving_has_decided_settings_may_be_added(tmp_path):
    few, many = (
        make_plan(read_sweep(BASE | {"grid": {"model.width": list(range(8, 8 + n))}, "halving": {}})) for n in (2, 4)
    )
    store.write(tmp_path, few, [])
    stored = store.read(tmp_path)
    assert stored is not None
    store.refuse_changes(stored, many, tmp_path)
    fixed = make_plan(read_sweep(BASE | {"grid": {"model.width": [8, 9, 10, 11]}, "halving": {"rungs": 2}}))
    with pytest.raises(ConfigError, match="halving is"):
        store.refuse_changes(stored, fixed, tmp_path)


def test_a_value_that_is_written_another_way_is_the_same(tmp_path):
    def plan(*values):
        return make_plan(read_sweep(BASE | {"grid": {"optim.learning_rate": list(values)}}))

    store.write(tmp_path, plan("0.1", "0.05"), [])
    stored = store.read(tmp_path)
    assert stored is not None
    store.refuse_changes(stored, plan("5e-2", "0.10", "0.2"), tmp_path)
    with pytest.raises(ConfigError, match=r"learning_rate has no 0\.05 any more"):
        store.refuse_changes(stored, plan("0.10", "0.2"), tmp_path)


def test_fewer_draws_are_named_as_such(tmp_path):
    ranges = {"optim.learning_rate": {"uniform": [0.1, 0.2]}}
    five, four = (make_plan(read_sweep(BASE | {"random": {"n": n, "ranges": ranges}})) for n in (5, 4))
    store.write(tmp_path, five, [])
    stored = store.read(tmp_path)
    assert stored is not None
    with pytest.raises(ConfigError, match=r"another one: random is \{'n': 4.*, and was \{'n': 5"):
        store.refuse_changes(stored, four, tmp_path)


# ----------------------------------------------------------------------------------------------------- runs of a sweep


def test_the_second_to_the_sixth_run_compile_nothing_and_the_same_command_does_nothing_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    with started(tmp_path / "out.txt", SIX, tmp_path / "sweep") as process:
        assert process.end() == 0, process.output
    compiled = [int(line.split()[-3]) for line in process.output.splitlines() if "programs compiled" in line]
    assert compiled[0] > 0
    assert compiled[1:] == [0] * 5
    table = process.output[process.output.index("learning_rate  ") :].splitlines()
    assert len([line for line in table if "  2 runs " in line]) == 3
    before = everything(tmp_path / "sweep")
    assert len(before) == 6
    last = tmp_path / "sweep" / "learning_rate=0.2,seed=1"
    (start,) = json.loads((last / "manifest.json").read_text())["starts"]
    alone = start_lib.resolved(parse(start["command"][1:])).config
    assert alone == make_plan(read_sweep(SIX)).runs[-1].config, "the command of the run by itself"
    assert start["command"][-2:] == ["--workdir", str(last)]
    again = sweep(SIX, tmp_path / "sweep", quiet=True)
    assert all(starts(run.workdir.path) == ["000001.json"] for run in again.runs)
    more = sweep(SIX | {"seeds": 3}, tmp_path / "sweep", quiet=True)
    assert len(more.in_state("done")) == 9
    assert all(starts(run.workdir.path) == ["000001.json"] for run in more.runs)
    assert {name: each for name, each in everything(tmp_path / "sweep").items() if name in before} == before
    for changed, said in (
        ({"grid": {"optim.learning_rate": [0.05, 0.1]}}, "config.optim.learning_rate has no 0.2 any more"),
        ({"overrides": FIXED | {"optim.momentum": 0.5}}, "config.optim.momentum is 0.5, and was 0.9"),
        ({"grid": {"optim.momentum": [0.5]}}, "config.optim.learning_rate varies no more"),
        ({"halving": {}}, "halving was not asked for"),
    ):
        with pytest.raises(ConfigError, match=said):
            sweep(SIX | {"seeds": 3} | changed, tmp_path / "sweep", quiet=True)


def test_a_run_that_fails_does_not_end_the_sweep_and_is_tried_again_only_where_asked(tmp_path):
    source = SIX | {"grid": {"optim.learning_rate": [1e30, 0.1]}, "seeds": [0]}
    with started(tmp_path / "out.txt", source, tmp_path / "sweep") as process:
        assert process.end() == 70, process.output
    assert "1 of 2 runs failed; --retry-failed tries them again." in process.output.splitlines()[-1]
    failed, done = tmp_path / "sweep/learning_rate=1e+30,seed=0", tmp_path / "sweep/learning_rate=0.1,seed=0"
    found = sweep(source, tmp_path / "sweep", quiet=True)
    assert [run.state for run in found.runs] == ["failed", "done"]
    assert "not finite" in found.runs[0].reason
    assert (starts(failed), starts(done)) == (["000001.json"], ["000001.json"])
    again = sweep(source, tmp_path / "sweep", retry_failed=True, quiet=True)
    assert [run.state for run in again.runs] == ["failed", "done"]
    assert (len(starts(failed)), len(starts(done))) == (2, 1)


def test_what_a_config_names_and_is_not_there_is_found_before_the_first_run(tmp_path):
    with pytest.raises(ConfigError, match=r"The run optim.name=nothing,seed=0: .*nothing"):
        sweep(SIX | {"grid": {"optim.name": ["sgd", "nothing"]}}, tmp_path / "sweep", quiet=True)
    assert not everything(tmp_path / "sweep")


def test_a_sweep_has_its_directory_for_itself(tmp_path):
    (tmp_path / "other").mkdir()
    store.write(tmp_path / "other", make_plan(read_sweep(SIX)), [])
    with pytest.raises(WorkdirError, match="is the directory of a sweep"):
        here(tmp_path / "other", SMALL, train__steps=1)
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="a file is in its way"):
        sweep(SIX, tmp_path / "file", quiet=True)
    here(tmp_path / "run", SMALL, train__steps=1)
    with pytest.raises(WorkdirError, match="is the work directory of a run"):
        sweep(SIX, tmp_path / "run", quiet=True)
    (tmp_path / "sweep").mkdir()
    with lease.held(tmp_path / "sweep"), pytest.raises(WorkdirError, match="in use by another run"):
        sweep(SIX, tmp_path / "sweep", quiet=True)


# ------------------------------------------------------------------------------------------------------ stopped, killed


@pytest.mark.faults
def test_ctrl_c_saves_the_run_and_the_same_command_goes_on(tmp_path):
    folder, two = tmp_path / "sweep", LONG | {"grid": {"optim.learning_rate": [0.05, 0.1]}, "seeds": [0]}
    with started(tmp_path / "out.txt", two, folder) as process:
        process.wait_for(lambda: list(folder.glob("*/checkpoints/*/manifest.json")), "checkpoint")
        process.send(signal.SIGINT)
        assert process.end() == 130, process.output
    assert "the same command goes on" in process.output
    ends = [json.loads(path.read_text())["end"]["code"] for path in sorted(folder.glob("*/starts/*.json"))]
    assert ends in ([130], [0, 130])
    sweep(two, folder, quiet=True)
    sweep(two, tmp_path / "whole", quiet=True)
    assert everything(folder) == everything(tmp_path / "whole")


def children(pid: int) -> list[int]:
    return [int(text) for path in Path(f"/proc/{pid}/task").glob("*/children") for text in path.read_text().split()]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def killed_until_done(folder: Path, output: Path, draw: random.Random, *, workers_too: bool, kills: int) -> None:
    """A sweep that is killed some times at a random moment, and then ends."""
    for number in range(kills):
        with started(output / f"{number}.txt", LONG, folder) as process:
            process.wait_for(lambda: list(folder.glob("*/starts/*.json")), "start of a run")
            time.sleep(draw.uniform(0.0, 4.0))
            workers = children(process.pid)
            if process.ended():
                break
            process.send(signal.SIGKILL)
            for worker in workers if workers_too else ():
                os.kill(worker, signal.SIGKILL)
            process.end()
            deadline = time.monotonic() + 60
            while any(map(lives, workers)):
                assert time.monotonic() < deadline, "a worker goes on without its sweep"
                time.sleep(0.05)
    with started(output / "last.txt", LONG, folder) as process:
        assert process.end() == 0, process.output


@pytest.mark.faults
@pytest.mark.parametrize("workers_too", [False, True])
def test_a_sweep_that_was_killed_does_nothing_twice_and_loses_nothing(tmp_path, workers_too):
    sweep(LONG, tmp_path / "whole", quiet=True)
    folder, draw = tmp_path / "killed", random.Random(os.environ.get("JAXTRAIN_TEST_SEED"))
    killed_until_done(folder, tmp_path, draw, workers_too=workers_too, kills=5)
    assert everything(folder) == everything(tmp_path / "whole")
    for run in folder.glob("*=*"):
        ends = [json.loads((run / "starts" / name).read_text())["end"] for name in starts(run)]
        assert [end["code"] == 0 for end in ends] == [False] * (len(ends) - 1) + [True], run


@pytest.mark.faults
def test_halving_that_was_killed_decides_the_same(tmp_path):
    source = LONG | {"grid": {"optim.learning_rate": [1e-5, 0.1, 1e-6, 0.01]}, "halving": {}}
    whole, folder = sweep(source, tmp_path / "whole", quiet=True), tmp_path / "killed"
    draw = random.Random(os.environ.get("JAXTRAIN_TEST_SEED"))
    for number in range(4):
        with started(tmp_path / f"{number}.txt", source, folder) as process:
            process.wait_for(lambda: list(folder.glob("*/starts/*.json")), "start of a run")
            time.sleep(draw.uniform(0.0, 5.0))
            process.send(signal.SIGKILL)
            process.end()
    found = sweep(source, folder, quiet=True)
    assert found.decisions == whole.decisions
    for name in found.decisions[-1].kept:
        for seed in (0, 1):
            assert rows(folder / f"{name},seed={seed}") == rows(tmp_path / f"whole/{name},seed={seed}")


@pytest.mark.faults
def test_a_second_signal_ends_the_sweep_at_once(tmp_path):
    with started(tmp_path / "out.txt", LONG, tmp_path / "sweep") as process:
        process.wait_for(lambda: list(tmp_path.glob("sweep/*/checkpoints/*/manifest.json")), "checkpoint")
        workers = children(process.pid)
        process.send(signal.SIGTERM)
        process.send(signal.SIGTERM)
        assert process.end() == 75, process.output
    assert not any(map(lives, workers))


@pytest.mark.faults
def test_a_worker_that_dies_is_replaced_and_its_run_goes_on(tmp_path):
    folder = tmp_path / "sweep"
    with started(tmp_path / "out.txt", LONG, folder) as process:
        process.wait_for(lambda: list(folder.glob("*/checkpoints/*/manifest.json")), "checkpoint")
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
        assert process.end() == 0, process.output
    sweep(LONG, tmp_path / "whole", quiet=True)
    assert everything(folder) == everything(tmp_path / "whole")


@pytest.mark.faults
def test_two_at_once_train_the_same_runs(tmp_path):
    sweep(LONG, tmp_path / "whole", quiet=True)
    found = sweep(LONG, tmp_path / "sweep", jobs=2, quiet=True)
    assert len(found.in_state("done")) == 6
    first = {name: runs[0][0]["loss"] for name, runs in everything(tmp_path / "whole").items()}
    assert {name: runs[0][0]["loss"] for name, runs in everything(tmp_path / "sweep").items()} == pytest.approx(first)
