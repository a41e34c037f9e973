"""A run that was stopped, killed or taken back goes on as if it had not been; what would be another run is refused."""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import runs
from runs import EXACT, SMALL, here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxtrain import evaluate
from jaxtrain.checkpoint.manifest import annotate, delete_old, read_manifest
from jaxtrain.checkpoint.resume import go_on_with
from jaxtrain.checkpoint.resume_point import CheckpointStep, find_checkpoint, find_resume_point
from jaxtrain.config import from_dict
from jaxtrain.data import registry
from jaxtrain.errors import CheckpointError, ConfigError, NumericError, WorkdirError
from jaxtrain.observability.anomaly import Anomaly
from jaxtrain.training.recovery import rollback_point
from jaxtrain.workdir import Workdir

LAST = 12  # the last step of `SMALL` and `EXACT`

# Steps of a few milliseconds, written to disk all the time, so that a kill may come at any moment of either.
KILLED = EXACT | {"train.precision": "f32", "train.epochs": 30, "checkpoint.every": "3", "checkpoint.keep": 2}
MESH = ("--simulate-devices", "8", "--devices", "2")  # as in this process: XLA's sums depend on how many threads it has

at_length = functools.partial(pytest.param, marks=pytest.mark.faults)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A run of twelve steps with all its checkpoints: its directory, to be copied, and its result."""
    path = tmp_path_factory.mktemp("complete") / "run"
    return path, here(path, SMALL)


@pytest.fixture
def copy(complete, tmp_path):
    return shutil.copytree(complete[0], tmp_path / "run")


def superseded(workdir: Path) -> list[Path]:
    return sorted((workdir / "superseded").iterdir()) if (workdir / "superseded").exists() else []


def refused(error: type[Exception], *said: str, **call) -> str:
    """The one sentence that a run is refused with."""
    with pytest.raises(error) as caught:
        here(**call)
    text = str(caught.value)
    assert "\n" not in text
    for word in said:
        assert word in text
    return text


# --------------------------------------------------------------------------------------------------------------- kills


def kill_until_done(workdir: Path, moments: list[str], draw: random.Random) -> None:
    """Kills the run at each of these moments, starting it again each time, and then lets it end."""
    for number, moment in enumerate(moments):
        with runs.main(workdir.parent / f"{number}.txt", *runs.arguments(workdir, KILLED, *MESH)) as run:
            kill(run, workdir, moment, draw)
    with runs.main(workdir.parent / "last.txt", *runs.arguments(workdir, KILLED, *MESH)) as run:
        assert run.end() == 0, run.output


def kill(run: runs.Started, workdir: Path, moment: str, draw: random.Random) -> None:
    """Sends SIGKILL after some steps, or while a checkpoint is written."""
    before, steps = runs.count_rows(workdir), draw.randrange(1, 20)
    run.wait_for(lambda: runs.count_rows(workdir) != before, "its first step")
    if moment == "anywhere":
        run.wait_for(lambda: runs.count_rows(workdir) >= steps, "more steps")
    else:
        run.wait_for(lambda: any((workdir / "checkpoints").glob("*tmp*")), "a write")
        time.sleep(draw.uniform(0, 0.05))
    run.send(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same run, left alone."""
    path = tmp_path_factory.mktemp("undisturbed")
    return path, here(path, KILLED, devices=2)


def assert_never_disturbed(workdir: Path, undisturbed) -> None:
    """Ends the run, if it has not ended, and compares everything that it left."""
    found, (path, wanted) = here(workdir, KILLED, devices=2), undisturbed
    assert len(runs.losses(workdir)) == 120
    for phase in ("train", "val", "test"):
        assert runs.rows(workdir, phase) == runs.rows(path, phase)  # in full precision: bit for bit
        seen = EventAccumulator(str(workdir / "tensorboard" / phase)).Reload()
        shown = [(event.step, event.value) for event in seen.Scalars("loss")]
        assert shown == [(row["step"], float(np.float32(row["loss"]))) for row in runs.rows(workdir, phase)]
    assert runs.epochs(workdir) == runs.epochs(path)
    runs.assert_same_bits(found, wanted)
    assert not any((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.faults
def test_a_run_that_is_killed_over_and_over_ends_as_if_it_never_was(tmp_path, undisturbed):
    kill_until_done(tmp_path / "killed", ["in a write", "anywhere", "in a write"], random.Random(2))
    assert_never_disturbed(tmp_path / "killed", undisturbed)


def test_what_a_kill_left_of_a_write_or_a_deletion_is_in_nobodys_way(copy):
    checkpoints = copy / "checkpoints"
    (checkpoints / "12").rename(checkpoints / "12.orbax-checkpoint-tmp")  # killed before it had its name
    (checkpoints / "10" / "manifest.json").unlink()  # killed before it was whole
    (checkpoints / "4" / "manifest.json").unlink()  # killed while it was deleted
    (checkpoints / "4" / "state" / "_METADATA").unlink()
    wanted = runs.rows(copy)
    result = here(copy, SMALL)
    assert [row["step"] for row in result.history if row["phase"] == "train"] == [9, 10, 11, 12]
    assert runs.rows(copy) == wanted
    assert runs.checkpoints(copy) == [2, 6, 8, 10, 12]
    assert not any(checkpoints.glob("*tmp*"))


def test_the_only_checkpoint_is_damaged(copy):
    for step in runs.checkpoints(copy)[:-1]:
        shutil.rmtree(copy / "checkpoints" / str(step))
    path = copy / "checkpoints" / "12" / "state" / "_METADATA"
    path.write_bytes(path.read_bytes()[:10])
    text = refused(CheckpointError, str(copy / "checkpoints" / "12"), workdir=copy, fields=SMALL)
    assert "state/_METADATA has 10 bytes" in text
    assert "--config.checkpoint.resume=none" in text
    assert path.exists(), "nobody moved it away"


# ------------------------------------------------------------------------------------------------------ where it starts


def test_a_complete_run_started_again_only_writes_its_result_again(copy, complete):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    result = here(copy, SMALL)
    assert [row["phase"] for row in result.history] == ["test"]
    assert runs.rows(copy) == runs.rows(complete[0])
    assert runs.rows(copy, "test") == runs.rows(complete[0], "test")
    assert runs.epochs(copy) == runs.epochs(complete[0])
    changed = [path for path in copy.rglob("*") if path.is_file() and path.read_bytes() != before.get(path)]
    written = {path.relative_to(copy).parts[0] for path in changed}
    rows = {"metrics.csv", "metrics.jsonl", "tensorboard"}
    assert written == rows | {"events.jsonl", "logs", "manifest.json", "result.json", "starts"}
    runs.assert_same_bits(result, complete[1])
    old, new = (json.loads((path / "result.json").read_text()) for path in (complete[0], copy))
    for key in ("steps", "examples", "epochs", "last", "best", "devices"):
        assert new[key] == old[key]


@pytest.mark.faults
def test_a_complete_run_that_ended_within_an_epoch_keeps_that_epochs_row(tmp_path):
    fields = SMALL | {"train.steps": 6}
    here(tmp_path, fields)
    before = runs.epochs(tmp_path)
    assert [line.rsplit(",", 2)[0] for line in before[1:]] == ["0,train", "0,val", "1,train", "1,val", "1,test"]
    here(tmp_path, fields)
    assert runs.epochs(tmp_path) == before


@pytest.mark.parametrize(
    ("resume", "step"), [("6", 6), ("epoch:2", 8), ("latest", 12), ("best", None), ("auto", 12), ("none", 0)]
)
def test_where_a_run_goes_on_from_and_what_lay_behind_is_kept(copy, complete, resume, step):
    if step is None:
        validated = {row["step"]: row["accuracy"] for row in runs.rows(copy, "val")}
        step = max(validated, key=lambda each: (validated[each], -each))
    result = here(copy, SMALL, checkpoint__resume=resume)
    assert [row["step"] for row in result.history if row["phase"] == "train"] == list(range(step + 1, LAST + 1))
    assert runs.rows(copy) == runs.rows(complete[0])
    assert runs.epochs(copy) == runs.epochs(complete[0])
    assert runs.checkpoints(copy) == runs.checkpoints(complete[0])
    runs.assert_same_bits(result, complete[1])
    later = [each for each in runs.checkpoints(complete[0]) if each > step]
    assert len(superseded(copy)) == bool(later)
    for folder in superseded(copy):
        assert runs.checkpoints(folder) == later
        for name in ("metrics.jsonl", "metrics.csv", "result.json"):
            assert (folder / name).read_bytes() == (complete[0] / name).read_bytes()


@pytest.mark.faults
def test_two_fresh_starts_within_a_second_keep_both_predecessors(copy):
    for _ in range(2):
        here(copy, SMALL, checkpoint__resume="none", train__epochs=1)
    assert len(superseded(copy)) == 2
    assert [len(runs.losses(folder)) for folder in superseded(copy)] == [12, 4]


@pytest.mark.faults
def test_checkpoints_on_another_disk_are_set_aside_too(tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    for path in (run, other):
        path.mkdir()
    (run / "checkpoints").symlink_to(other)
    rename = os.rename

    def refused_between_disks(source, target, **more):
        if len({Path(os.path.realpath(path)).is_relative_to(other) for path in (source, target)}) == 2:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        rename(source, target, **more)

    here(run, SMALL, train__steps=4)
    whole = {path.name for path in (other / "4").rglob("*")}
    monkeypatch.setattr(os, "rename", refused_between_disks)
    here(run, SMALL, train__steps=4, checkpoint__resume="2")
    (folder,) = superseded(run)
    assert {path.name for path in (folder / "checkpoints" / "4").rglob("*")} == whole
    assert runs.checkpoints(run) == [2, 4]


def test_a_path_starts_from_another_run_and_moves_the_history_that_was_here(copy, complete, tmp_path):
    result = here(tmp_path / "new", SMALL, checkpoint__resume=str(copy / "checkpoints" / "8"))
    assert [row["step"] for row in runs.rows(tmp_path / "new")] == [9, 10, 11, 12]
    runs.assert_same_bits(result, complete[1])
    assert runs.rows(tmp_path / "new") == runs.rows(copy)[8:]
    assert superseded(copy) == []  # the other run is only read

    here(copy, SMALL, checkpoint__resume=str(tmp_path / "new"))  # a whole work directory: its latest
    assert runs.rows(copy) == []
    assert len(runs.losses(superseded(copy)[0])) == LAST
    assert runs.checkpoints(superseded(copy)[0]) == runs.checkpoints(complete[0])


@pytest.mark.parametrize("name", ["latest", "best"])
def test_a_path_may_name_the_latest_or_the_best_of_another_run(copy, tmp_path, name):
    validated = {row["step"]: row["accuracy"] for row in runs.rows(copy, "val")}
    step = max(validated, key=lambda each: (validated[each], -each)) if name == "best" else LAST
    fields = SMALL | {"checkpoint.resume": str(copy / "checkpoints" / name), "train.steps": step + 1}
    here(tmp_path / "new", fields)
    assert [row["step"] for row in runs.rows(tmp_path / "new")] == [step + 1]


def test_a_run_that_began_at_a_path_goes_on_when_it_is_started_again(copy, complete, tmp_path):
    fields = SMALL | {"checkpoint.resume": str(copy / "checkpoints" / "4")}
    here(tmp_path / "new", fields, train__steps=8)
    result = here(tmp_path / "new", fields)
    assert [row["step"] for row in runs.rows(tmp_path / "new")] == list(range(5, LAST + 1))
    assert runs.checkpoints(tmp_path / "new") == [6, 8, 10, 12]
    runs.assert_same_bits(result, complete[1])


@pytest.mark.parametrize(
    ("first", "again", "goes_on"),
    [
        ({"JAXTRAIN_JOB": "a"}, {"JAXTRAIN_JOB": "a"}, True),
        ({"JAXTRAIN_JOB": "a"}, {"JAXTRAIN_JOB": "b"}, False),
        at_length({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "JAXTRAIN_JOB": "c"}, True),
        at_length({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, False),  # by hand, in an allocation
        at_length({}, {}, False),
    ],
)
def test_a_job_that_is_started_again_by_itself_keeps_what_it_has_done(tmp_path, monkeypatch, first, again, goes_on):
    """`checkpoint.resume=none` is how the job began, not how each of its starts does."""
    fields = SMALL | {"checkpoint.resume": "none", "checkpoint.every": "4"}
    for environment, changes in ((first, {"train.steps": 8}), (again, {})):
        with monkeypatch.context() as variables:
            for name, value in environment.items():
                variables.setenv(name, value)
            here(tmp_path / "run", fields | changes)
    assert runs.checkpoints(tmp_path / "run") == [4, 8, 12]
    (folder,) = superseded(tmp_path / "run")
    assert {path.name for path in folder.iterdir() if path.name in ("checkpoints", "result.json")} == (
        {"result.json"} if goes_on else {"checkpoints", "result.json"}
    )


def test_what_is_not_there_is_refused_by_name(copy, tmp_path):
    refused(CheckpointError, "resume=7", "2, 4, 6, 8, 10, 12", workdir=copy, fields=SMALL | {"checkpoint.resume": "7"})
    refused(CheckpointError, "epoch:9", "1, 2, 3", workdir=copy, fields=SMALL | {"checkpoint.resume": "epoch:9"})
    refused(ConfigError, "newest", "epoch:N", workdir=copy, fields=SMALL | {"checkpoint.resume": "newest"})
    for resume in ("latest", "best", "3"):
        fields = SMALL | {"checkpoint.resume": resume}
        refused(CheckpointError, resume, "no checkpoint", workdir=tmp_path / "empty", fields=fields)
    (tmp_path / "model.pt").write_bytes(b"PK")
    fields = SMALL | {"checkpoint.resume": str(tmp_path / "model.pt")}
    refused(ConfigError, "model.pt", "of other programs cannot be read", workdir=copy, fields=fields)
    assert runs.checkpoints(copy) == [2, 4, 6, 8, 10, 12]
    assert superseded(copy) == []


@pytest.mark.faults
def test_the_best_and_the_milestones_stay_beside_the_latest(tmp_path):
    result = here(tmp_path, SMALL, checkpoint__keep=1, checkpoint__every="1", checkpoint__milestone_every="5")
    best = result.result["best"]["step"]
    assert set(runs.checkpoints(tmp_path)) == {5, 10, LAST, best}
    found = evaluate(tmp_path, "val", checkpoint="best", trust=True)
    assert found.step == best
    assert found.result.accuracy == max(row["accuracy"] for row in runs.rows(tmp_path, "val"))


# At such a rate the loss is lowest at another step than where most answers are right.
WILD = SMALL | {
    "optim.learning_rate": 5.0,
    "optim.ema": 0.5,
    "train.eval_every": "1",
    "checkpoint.every": "0",
    "checkpoint.keep": 1,
    "checkpoint.milestone_every": "3",
}


@pytest.mark.faults
def test_the_best_may_be_that_of_the_lowest_loss(tmp_path):
    """On both sides of a stop; and once the accuracy is asked for, it decides among what is there and what comes."""
    here(tmp_path, WILD, train__steps=6, checkpoint__best="val_loss")
    result = here(tmp_path, WILD, checkpoint__best="val_loss").result
    figures = {row["step"]: row for row in runs.rows(tmp_path, "val")}
    lowest = min(figures, key=lambda step: figures[step]["ema_loss"])
    assert lowest < 6
    milestones = [3, 6, 9, LAST]
    assert all(figures[step]["ema_accuracy"] <= figures[3]["ema_accuracy"] for step in figures)
    assert runs.checkpoints(tmp_path) == [lowest, *milestones]
    assert {key: result["best"][key] for key in ("step", "weights", "by")} == {
        "step": lowest, "weights": "ema", "by": "val_loss"
    }  # fmt: skip
    assert evaluate(tmp_path, "val", trust=True).step == lowest
    path = str(tmp_path / "checkpoints/best")  # what is best there is for that run to say
    assert evaluate(tmp_path, "val", checkpoint=path, trust=True).step == lowest
    assert find_checkpoint(tmp_path / "new/checkpoints", path, "val_accuracy") == CheckpointStep(
        tmp_path / "checkpoints", lowest
    )
    said = (tmp_path / "logs/process_0.log").read_text()
    assert f"best, step {lowest}, by the validation loss of the EMA weights" in said
    assert "checkpoint.best was" not in said

    result = here(tmp_path, WILD, train__steps=LAST + 3, checkpoint__best="val_accuracy").result
    assert "checkpoint.best was val_loss and is val_accuracy" in (tmp_path / "logs/process_0.log").read_text()
    figures = {row["step"]: row["ema_accuracy"] for row in runs.rows(tmp_path, "val")}
    later = [LAST + 1, LAST + 2, LAST + 3]
    assert result["best"]["step"] == max([lowest, *milestones, *later], key=lambda step: figures[step])
    assert evaluate(tmp_path, "val", trust=True).step == result["best"]["step"]
    assert read_manifest(tmp_path / "checkpoints/15").position["best"] == figures[result["best"]["step"]]


@pytest.mark.parametrize(("part", "is_the_same"), [(0, True), (40, True), (5000, True), (39, False)])
def test_the_best_so_far_is_kept_where_it_is_on_the_validation_examples_of_now(copy, part, is_the_same):
    """Where a run goes on, and where it goes back: its older checkpoint may be of another part."""
    config = from_dict(read_manifest(copy / "checkpoints/8").position["config"])
    now = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_examples=part))
    dataset = registry.load(config.data)
    back = rollback_point(copy / "checkpoints", Anomaly("a spike", "stop", 9), 8 * 32, now)
    on = find_resume_point(Workdir(copy), now)
    for point in (back, on):
        _, found = go_on_with(dataset, point, now)
        assert found.position.best == (point.position.best if is_the_same else None)


def test_the_best_by_accuracy_stays_until_one_has_another_figure(copy):
    directory = copy / "checkpoints"
    for step in runs.checkpoints(copy):
        annotate(directory / str(step), val_loss=None, val_accuracy=0.9 if step == 4 else 0.5)  # of an older version
    delete_old(directory, 1, "val_loss")
    assert runs.checkpoints(copy) == [4, LAST]
    with pytest.raises(CheckpointError, match="none has a val_loss: they were validated by an older version"):
        find_checkpoint(directory, "best", "val_loss")
    annotate(directory / str(LAST), val_loss=2.0)
    delete_old(directory, 1, "val_loss")
    assert runs.checkpoints(copy) == [LAST]


# --------------------------------------------------------------------------------------------------- another layout


def test_another_mesh_zero_stage_and_microbatch_count_go_on_with_the_same_run(tmp_path):
    wanted = here(tmp_path / "whole", EXACT)
    curve = runs.losses(tmp_path / "whole")
    assert np.ptp(curve) > 0.05 * curve[0]
    for end, devices, zero, parts in ((4, 1, 0, 1), (8, 4, 3, 2), (LAST, 2, 1, 4)):
        layout = {"layout.zero": zero, "layout.microbatches": parts}
        result = here(tmp_path / "moved", EXACT | layout, devices=devices, train__steps=end)
    np.testing.assert_allclose(runs.losses(tmp_path / "moved"), curve, rtol=1e-12)
    found, wanted = runs.leaves(result), runs.leaves(wanted)
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-12 * max(1.0, np.max(np.abs(leaf))), err_msg=name)


# ------------------------------------------------------------------------------------------------------------- changes


def test_another_config_is_refused_by_key_and_nothing_is_touched(copy, complete):
    fields = SMALL | {"optim.learning_rate": 0.2, "data.augmentation": "light", "checkpoint.every": "3"}
    text = refused(WorkdirError, str(copy), "allow_changes=true", workdir=copy, fields=fields)
    assert "config.optim.learning_rate: 0.1 -> 0.2" in text
    assert "config.data.augmentation: 'none' -> 'light'" in text
    assert "checkpoint.every" not in text
    assert runs.command_line(["train", *runs.arguments(copy, fields), "--devices", "1"]) == 73
    assert runs.rows(copy) == runs.rows(complete[0])
    assert (copy / "config.json").read_bytes() == (complete[0] / "config.json").read_bytes()


def test_a_run_without_a_checkpoint_yet_is_as_much_a_run(copy):
    shutil.rmtree(copy / "checkpoints")
    refused(WorkdirError, "config.seed: 0 -> 1", workdir=copy, fields=SMALL | {"seed": 1})
    (copy / "config.json").write_text('{"seed": 0')
    refused(WorkdirError, "config.json", "damaged", workdir=copy, fields=SMALL)
    (copy / "config.json").write_text('{"sead": 0}')
    refused(WorkdirError, "config.json", "sead", workdir=copy, fields=SMALL)


def test_layout_logging_and_cadence_may_change(copy, complete):
    changes = {
        "layout.zero": 1,
        "layout.microbatches": 2,
        "train.log_every": 2,
        "train.eval_every": "2 epochs",
        "checkpoint.every": "5",
        "checkpoint.keep": 3,
        "checkpoint.resume": "8",
        "data.residency": "stream",
        "data.workers": 0,
    }
    result = here(copy, SMALL | changes, devices=2)
    assert [row["step"] for row in result.history if row["phase"] == "train"] == [10, 12]
    np.testing.assert_allclose(runs.rows(copy)[-1]["loss"], runs.losses(complete[0])[-1], rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "changes", "allowed"),
    [
        ("constant", {"train.epochs": 4}, True),
        at_length("constant", {"train.steps": 9}, True),
        ("cosine", {"train.epochs": 4}, False),
        at_length("cosine", {"train.steps": 12}, True),  # the same length in other words
        at_length("wsd", {"train.epochs": 4}, True),  # 6 steps were run, and the rate falls after the ninth
        at_length("wsd", {"train.epochs": 1}, False),
        at_length("step", {"train.epochs": 2}, False),
    ],
)
def test_the_length_may_change_where_no_step_that_was_run_had_another_rate(tmp_path, schedule, changes, allowed):
    fields = SMALL | {"optim.schedule": schedule, "optim.decay_share": 0.25}
    here(tmp_path, fields)
    fields |= changes | {"checkpoint.resume": "6"}
    if not allowed:
        refused(WorkdirError, f"config.{next(iter(changes))}", workdir=tmp_path, fields=fields)
        assert len(runs.losses(tmp_path)) == LAST
        return
    here(tmp_path, fields)
    assert len(runs.losses(tmp_path)) == changes.get("train.steps", 4 * changes.get("train.epochs", 0))


@pytest.mark.faults
def test_a_longer_run_is_the_run_that_was_longer_from_the_start(tmp_path):
    here(tmp_path / "longer", SMALL, train__steps=6)  # ends within an epoch
    shorter = json.loads((tmp_path / "longer" / "result.json").read_text())
    longer, whole = here(tmp_path / "longer", SMALL), here(tmp_path / "whole", SMALL)
    (folder,) = superseded(tmp_path / "longer")
    assert [path.name for path in folder.iterdir()] == ["result.json"], "the old result, while the run went on"
    said = (tmp_path / "longer/logs/process_0.log").read_text()
    assert f"INFO this run goes on after its last step, 6; the result of the shorter run was moved to {folder}" in said
    assert "What this directory held" not in said
    assert json.loads((folder / "result.json").read_text()) == shorter
    assert runs.rows(tmp_path / "longer") == runs.rows(tmp_path / "whole")
    assert [line for line in runs.epochs(tmp_path / "longer") if "train" in line] == [
        line for line in runs.epochs(tmp_path / "whole") if "train" in line
    ]
    runs.assert_same_bits(longer, whole)


def test_allow_changes_goes_on_with_another_optimizer_at_the_rate_of_its_step(copy):
    plain = {"optim.momentum": 0.0, "optim.nesterov": False, "optim.weight_decay": 0.0}
    fields = SMALL | plain | {"optim.schedule": "cosine"}
    refused(WorkdirError, "config.optim.momentum: 0.9 -> 0.0", workdir=copy, fields=fields | {"checkpoint.resume": "6"})
    here(copy, fields, checkpoint__resume="6", checkpoint__allow_changes=True)
    assert "another opt_state; this run starts with a fresh one" in (copy / "logs" / "process_0.log").read_text()
    for row in runs.rows(copy)[6:]:
        rate = 0.05 * (1 + np.cos(np.pi * (row["step"] - 1) / LAST)) / 2  # 0.1 at the recipe's batch of 64
        np.testing.assert_allclose(row["learning_rate"], rate, rtol=1e-5)
        np.testing.assert_allclose(row["update_norm"] / row["grad_norm"], rate, rtol=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize("model", ["mlp", "tiny:resnet"])
def test_a_moving_average_may_begin_in_the_middle_of_a_run(tmp_path, model):
    """With rate 0 from there, so that the average is what was restored; and the best checkpoint is from before it."""
    fields = SMALL | {"model.name": model, "train.eval_every": "2 steps"}
    here(tmp_path / "run", fields, train__steps=6)
    later = {"optim.ema": 0.9, "optim.learning_rate": 0.0, "checkpoint.allow_changes": True}
    result = here(tmp_path / "run", fields | later)
    best, last = (result.result[key] for key in ("best", "last"))
    assert best["step"] <= 6
    for found in (best, last):
        assert found["test_ema"]["accuracy"] == found["test"]["accuracy"]
    with pytest.raises(ConfigError, match="no moving average"):  # whoever asks for the best one's own
        evaluate(tmp_path / "run", checkpoint="best", ema=True, trust=True)


def test_a_checkpoint_of_another_model_is_refused_even_then(copy):
    refused(WorkdirError, "config.model.width: 16 -> 8", workdir=copy, fields=SMALL | {"model.width": 8})
    fields = SMALL | {"model.width": 8, "checkpoint.allow_changes": True}
    text = refused(CheckpointError, str(copy / "checkpoints" / "12"), "params", workdir=copy, fields=fields)
    assert "is float32[16], not float32[8]" in text
    assert runs.command_line(["train", *runs.arguments(copy, fields), "--devices", "1"]) == 66
    assert len(runs.losses(copy)) == LAST


@pytest.mark.faults
def test_what_auto_decided_at_the_first_start_stays(tmp_path):
    here(tmp_path, SMALL, train__precision="bf16", train__epochs=1)
    result = here(tmp_path, SMALL, train__epochs=2)
    assert result.result["precision"] == "bf16"
    refused(WorkdirError, "'bf16' -> 'f32'", workdir=tmp_path, fields=SMALL | {"train.precision": "f32"})


@pytest.mark.faults
def test_a_batch_given_per_device_is_that_of_the_first_start(tmp_path):
    fields = SMALL | {"data.batch_per_device": 16, "data.global_batch": 128}
    here(tmp_path, fields, devices=2, train__epochs=1)
    assert json.loads((tmp_path / "config.json").read_text())["data"]["global_batch"] == 32
    here(tmp_path, fields, devices=4, train__epochs=2)
    assert len(runs.losses(tmp_path)) == 8
    assert json.loads((tmp_path / "config.json").read_text())["data"]["global_batch"] == 32


# ------------------------------------------------------------------------------------------------------- the examples

LEDGER = """
import dataclasses
import pathlib
import time

from jaxtrain.config import DataConfig
from jaxtrain.data import registry
from jaxtrain.distributed.interrupt import Interrupt

read = []


class Ledger:
    def __init__(self, base):
        self.base, self.shape = base, base.shape

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        read.append(indices.tolist())
        return self.base.read(indices)


def digits(config, image_size):
    found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
    return dataclasses.replace(found, train=Ledger(found.train))


def stuck(config, image_size):
    print("stuck", flush=True)
    time.sleep(10_000)


agree = Interrupt._stop


def heard(self, number):
    agree(self, number)
    pathlib.Path(__file__).with_name("heard").touch()


class Stuck(Ledger):
    def read(self, indices):
        if len(read) > 5:
            stuck(None, 0)
        return super().read(indices)


def stuck_later(config, image_size):
    Interrupt._stop = heard
    found = digits(config, image_size)
    return dataclasses.replace(found, train=Stuck(found.train.base))
"""


@pytest.mark.faults
def test_a_changed_batch_neither_loses_nor_repeats_an_example(tmp_path, monkeypatch):
    (tmp_path / "ledger.py").write_text(LEDGER)
    monkeypatch.syspath_prepend(tmp_path)
    ledger = importlib.import_module("ledger")

    fields = SMALL | {"data.name": "ledger:digits", "data.residency": "stream", "data.workers": 0, "data.examples": 120}

    def consumed(workdir, **more):
        """The examples in the order in which they were trained on."""
        ledger.read.clear()
        here(workdir, fields, **more)
        return [index for batch in ledger.read for index in batch]

    whole = consumed(tmp_path / "whole")
    assert len(whole) == 384  # 12 batches of 32: the last is whole, and goes past the third epoch
    for epoch in range(3):
        assert sorted(whole[120 * epoch : 120 * (epoch + 1)]) == list(range(120))
    parts = consumed(tmp_path / "changed", train__steps=5)
    workdir, fields = tmp_path / "changed", fields | {"data.global_batch": 20}
    refused(WorkdirError, "config.data.global_batch: 32 -> 20", workdir=workdir, fields=fields)
    parts += consumed(workdir, checkpoint__allow_changes=True)
    assert parts == whole[:360]
    assert len(runs.losses(workdir)) == 5 + 10
    assert [line[0] for line in runs.epochs(workdir) if "train" in line] == ["0", "1", "2"]
    assert here(workdir, fields).result["examples"] == 360  # it is this run's batch from now on


# ------------------------------------------------------------------------------------------------------------- signals


def has_rows(workdir: Path, count: int) -> bool:
    return runs.count_rows(workdir) >= count


def test_a_signal_saves_and_the_next_start_goes_on_exactly(tmp_path, undisturbed):
    workdir = tmp_path / "run"
    for rows, number, code in ((5, signal.SIGINT, 130), (30, signal.SIGTERM, 75)):
        arguments = runs.arguments(workdir, KILLED | {"checkpoint.every": "0"}, *MESH)
        with runs.main(tmp_path / f"{code}.txt", *arguments) as run:
            run.wait_for(functools.partial(has_rows, workdir, rows), "a few steps")
            run.send(number)
            assert run.end() == code
            said = run.output.splitlines()[-1]
        stopped = len(runs.losses(workdir))
        assert f"Stopped after step {stopped} and saved it" in said
        assert stopped in runs.checkpoints(workdir)
    assert_never_disturbed(workdir, undisturbed)


def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path):
    (tmp_path / "ledger.py").write_text(LEDGER)
    command = ["-m", "jaxtrain.main", *runs.arguments(tmp_path / "run", SMALL | {"data.name": "ledger:stuck"})]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        run.wait_for(lambda: "stuck" in run.output.splitlines(), "the disk that is gone")
        run.send(signal.SIGTERM)
        assert run.end() == 75
        assert run.output.splitlines()[-1].startswith("jaxtrain: Stopped before the first step")


def test_a_second_ctrl_c_ends_a_run_that_cannot_stop(tmp_path):
    (tmp_path / "ledger.py").write_text(LEDGER)
    fields = SMALL | {"data.name": "ledger:stuck_later", "data.residency": "stream", "data.workers": 0}
    command = ["-m", "jaxtrain.main", *runs.arguments(tmp_path / "run", fields)]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        run.wait_for(lambda: "stuck" in run.output.splitlines(), "the disk that is gone")
        run.wait_for(lambda: runs.count_rows(tmp_path / "run") == 7, "the steps of what was read ahead")
        time.sleep(1)  # the last of these has come back, and the run waits for the next batch
        run.send(signal.SIGINT)
        run.wait_for(
            (tmp_path / "heard").exists, "that it has heard of the first"
        )  # which waits for a step that never comes
        run.send(signal.SIGINT)
        assert run.end() == 130
        assert run.output.splitlines()[-1].startswith("jaxtrain: Stopped at once")


# --------------------------------------------------------------------------------------------------------- bad numbers


def stored(workdir: Path) -> list[np.ndarray]:
    """Every array of the newest checkpoint."""
    import jax  # noqa: PLC0415
    import orbax.checkpoint as ocp  # noqa: PLC0415

    path = workdir / "checkpoints" / str(runs.checkpoints(workdir)[-1]) / "state"
    return [np.asarray(leaf) for leaf in jax.tree.leaves(ocp.PyTreeCheckpointer().restore(path))]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_loss_that_is_not_finite_stops_the_run_before_that_update(tmp_path):
    fields = SMALL | {"optim.learning_rate": 1e16, "optim.lr_scaling": "none", "checkpoint.every": "0"}
    with pytest.raises(NumericError) as caught:
        here(tmp_path, fields)
    assert caught.value.exit_code == 76
    step = len(runs.rows(tmp_path)) + 1
    assert f"of step {step} is not finite" in str(caught.value)
    assert f"the state after step {step - 1} is kept" in str(caught.value)
    assert runs.checkpoints(tmp_path) == [step - 1]
    assert all(np.isfinite(leaf).all() for leaf in stored(tmp_path))
    refused(NumericError, f"of step {step} is not finite", workdir=tmp_path, fields=fields)


@pytest.mark.faults
def test_fp16_halves_its_scale_after_an_overflow_and_resumes_with_it(tmp_path, monkeypatch):
    (tmp_path / "steep.py").write_text(
        "from jaxtrain.optim.losses import loss_fn\n\n\ndef loss(logits, targets):\n"
        '    return 1000 * loss_fn("cross_entropy")(logits, targets)\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    fields = SMALL | {"train.precision": "fp16", "optim.loss": "steep:loss", "optim.learning_rate": 1e-4}
    whole = here(tmp_path / "whole", fields)
    scales = [row["loss_scale"] for row in runs.rows(tmp_path / "whole")]
    assert scales[0] == 2**15
    assert scales[1] == 2**14
    assert scales[-1] == scales[-2] < 2**14  # and then it fits
    assert np.isfinite(runs.losses(tmp_path / "whole")[-3:].astype(float)).all()
    for end in (2, 9, LAST):  # taken up while it still falls, and after
        parts = here(tmp_path / "parts", fields, train__steps=end)
    assert runs.rows(tmp_path / "parts") == runs.rows(tmp_path / "whole")
    runs.assert_same_bits(parts, whole)
