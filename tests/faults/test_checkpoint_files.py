"""Damaged checkpoints: every changed bit is found, an older one is used, and nothing that could be needed is deleted."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import runs
from runs import SMALL, here

import jaxtrain
from jaxtrain import evaluate
from jaxtrain.checkpoint import manifest
from jaxtrain.checkpoint.manifest import SCHEMA, best_of, delete_old, manifested_steps, problems, read_manifest
from jaxtrain.checkpoint.resume import set_aside
from jaxtrain.checkpoint.resume_point import ResumePoint, find_resume_point
from jaxtrain.config import Config, from_dict
from jaxtrain.errors import CheckpointError, UnreadableError
from jaxtrain.workdir import Workdir

EVERY = {"checkpoint.every": "2", "checkpoint.keep": 100, "train.steps": 6, "train.eval_every": "0"}


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    path = tmp_path_factory.mktemp("complete") / "run"
    return path, here(path, SMALL | EVERY)


@pytest.fixture
def copy(complete, tmp_path) -> Path:
    return shutil.copytree(complete[0], tmp_path / "copy")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_flipped_bit_is_found(copy):
    """Orbax itself restores wrong values without a word after each flip in the arrays (120 of 120, orbax 0.12.8)."""
    folder, random_bits = copy / "checkpoints" / "6", random.Random(0)
    everything = files(folder)
    weights = [path.stat().st_size for path in everything]
    assert problems(folder) == []
    chosen = [*everything, *random_bits.choices(everything, weights, k=500)]
    for path in chosen:
        bit = random_bits.randrange(8 * path.stat().st_size)
        flip(path, bit)
        assert len(problems(folder)) == 1, f"bit {bit} of {path.name}"
        flip(path, bit)
    assert problems(folder) == []


def test_every_cut_missing_and_foreign_file_is_found(copy):
    folder = copy / "checkpoints" / "6"
    for path in files(folder):
        data = path.read_bytes()
        for cut in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:cut])
            assert problems(folder), f"{path.name} cut to {cut}"
        path.unlink()
        assert problems(folder), f"{path.name} missing"
        path.write_bytes(data)
    (folder / "state" / "more").write_text("what is this?")
    assert problems(folder) == ["state/more does not belong to it"]


@pytest.mark.parametrize("where", ["arrays", "manifest"])
def test_an_older_checkpoint_is_used(copy, complete, where):
    folder = copy / "checkpoints" / "6"
    largest = max(files(folder / "state"), key=lambda path: path.stat().st_size)
    flip(folder / "manifest.json" if where == "manifest" else largest, 1234)
    result = here(copy, SMALL | EVERY)
    assert [row["step"] for row in result.history if row["phase"] == "train"] == [5, 6]
    assert runs.losses(copy).tolist() == runs.losses(complete[0]).tolist()
    runs.assert_same_bits(result, complete[1])
    (corrupt,) = (copy / "corrupt").iterdir()
    assert corrupt.name.startswith("6-")
    assert "SHA-256 differs" in (corrupt / "problems.txt").read_text()
    assert "ERROR" in (copy / "logs" / "process_0.log").read_text()


def test_a_step_that_was_asked_for_by_number_is_not_replaced(copy):
    flip(copy / "checkpoints" / "4" / "state" / "_METADATA", 77)
    with pytest.raises(CheckpointError, match=r"checkpoints/4 is damaged \(state/_METADATA has changed"):
        here(copy, SMALL | EVERY, checkpoint__resume="4")
    assert manifested_steps(copy / "checkpoints") == [2, 4, 6]


def test_list_and_verify(copy, capsys):
    assert runs.command_line(["checkpoint", "list", str(copy), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["bytes"] > 1000 for row in rows)
    accuracies = {row["step"]: row["val_accuracy"] for row in rows if row["val_accuracy"] is not None}
    assert all(row["val_top5"] >= row["val_accuracy"] for row in rows if row["step"] in accuracies)
    assert [row["step"] for row in rows if row["best"]] == [max(accuracies, key=lambda step: accuracies[step])]
    assert runs.command_line(["checkpoint", "verify", str(copy)]) == 0
    flip(copy / "checkpoints" / "2" / "state" / "_METADATA", 5)
    capsys.readouterr()
    assert runs.command_line(["checkpoint", "verify", str(copy)]) == 66
    assert "1 of 3 checkpoints" in capsys.readouterr().err
    assert runs.command_line(["evaluate", str(copy), "--checkpoint", "2"]) == 66
    assert runs.command_line(["checkpoint", "list", str(copy / "logs")]) == 66


def config_of(copy: Path, **checkpoint) -> Config:
    config = from_dict(json.loads((copy / "config.json").read_text()))
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **checkpoint))


def starts_at(copy: Path, **checkpoint) -> ResumePoint:
    """Where the run in `copy` would go on from."""
    return find_resume_point(Workdir(copy), config_of(copy, **checkpoint))


def rewrite(folder: Path, **changes) -> None:
    """Another manifest, which fits its own SHA-256."""
    (folder / "manifest.json").write_text(manifest._text(dataclasses.asdict(read_manifest(folder)) | changes))


@pytest.mark.parametrize("resume", ["6", "auto"])
def test_a_checkpoint_of_a_newer_jaxtrain_is_refused(copy, resume):
    rewrite(copy / "checkpoints" / "6", schema=SCHEMA + 1, versions={"jaxtrain": "9.1"})
    both = rf"\(written by jaxtrain 9.1\); this one, jaxtrain {jaxtrain.__version__}, reads up to {SCHEMA}: update it"
    with pytest.raises(CheckpointError, match=rf"has schema {SCHEMA + 1} {both}"):
        starts_at(copy, resume=resume)
    assert manifested_steps(copy / "checkpoints") == [2, 4, 6]


# ----------------------------------------------------------------------------------- what is not damage moves nothing


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
def test_a_read_that_fails_is_tried_again_and_never_taken_for_damage(copy, monkeypatch, number, times):
    real, folder = io.open, copy / "checkpoints" / "6"
    monkeypatch.setattr("jaxtrain.host.files.time.sleep", lambda _: None)
    for path in files(folder):
        failures = []

        def fail(file, *args, wanted=path, failures=failures, **more):
            if Path(file) == wanted and len(failures) < times:
                failures.append(file)
                raise OSError(number, os.strerror(number), str(file))
            return real(file, *args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", fail)
            patch.setattr(io, "open", fail)
            if times == 1:
                assert starts_at(copy).position.step == 6
            else:
                with pytest.raises(UnreadableError, match=rf"{path} cannot be read now \({os.strerror(number)}\)"):
                    starts_at(copy)
        assert failures
    assert manifested_steps(copy / "checkpoints") == [2, 4, 6]
    assert not (copy / "corrupt").exists()


def test_a_directory_that_cannot_be_listed_is_not_an_empty_one(copy, monkeypatch):
    monkeypatch.setattr("jaxtrain.host.files.time.sleep", lambda _: None)
    for name, real in (("listdir", os.listdir), ("scandir", os.scandir)):  # which pathlib's iterdir and os.walk call

        def fail(path, *_, real=real):
            if Path(path).name in ("checkpoints", "state"):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
            return real(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(UnreadableError, match="Stale file handle"):
                starts_at(copy)
            with pytest.raises((UnreadableError, OSError), match="Stale"):  # nor one without those files
                manifest.write_manifest(copy / "checkpoints" / "6") if name == "scandir" else starts_at(copy)
    assert problems(copy / "checkpoints" / "6") == []


def test_a_damaged_one_on_another_disk_is_moved_away_too(copy, tmp_path, monkeypatch):
    other = (copy / "checkpoints").rename(tmp_path / "other")
    (copy / "checkpoints").symlink_to(other)
    flip(other / "6" / "state" / "_METADATA", 77)

    def refuse(source, target, **_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))

    monkeypatch.setattr(os, "rename", refuse)
    assert starts_at(copy).position.step == 4
    (corrupt,) = (copy / "corrupt").iterdir()
    assert "state/_METADATA has changed" in (corrupt / "problems.txt").read_text()
    assert (corrupt / "manifest.json").exists()
    assert manifested_steps(other) == [2, 4]


def test_a_manifest_that_cannot_be_renamed_costs_one_checkpoint(tmp_path, monkeypatch):
    real, failures = os.replace, []

    def fail_once(source, target):
        if Path(target).parts[-2:] == ("2", "manifest.json") and not failures:
            failures.append(target)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    here(tmp_path, SMALL | EVERY)
    assert manifested_steps(tmp_path / "checkpoints") == [4, 6]
    assert "training goes on, and the next save tries again (1 of 3)" in (tmp_path / "logs/process_0.log").read_text()


def test_a_job_whose_newest_is_damaged_still_knows_that_it_is_that_job(copy, monkeypatch):
    position = read_manifest(copy / "checkpoints" / "4").position
    rewrite(copy / "checkpoints" / "4", position={**position, "jobs": ["a"]})
    monkeypatch.setattr("jaxtrain.checkpoint.resume_point.job_ids", lambda **_: {"a"})
    flip(copy / "checkpoints" / "6" / "manifest.json", 1234)
    assert starts_at(copy, resume="none").position.step == 4


# ------------------------------------------------------------------------------------------- links, readers, disagreement


@pytest.fixture
def archive(copy, tmp_path) -> Path:
    """Where the checkpoints of `copy` are: there are only links to them, relative ones."""
    archive = tmp_path / "archive"
    archive.mkdir()
    for step in (2, 4, 6):
        shutil.move(copy / "checkpoints" / str(step), archive)
        (copy / "checkpoints" / str(step)).symlink_to(f"../../archive/{step}")
    return archive


def test_nothing_is_deleted_or_moved_through_a_link(copy, archive):
    before = {path: path.read_bytes() for path in files(archive)}
    assert delete_old(copy / "checkpoints", 1, "val_accuracy") == []
    resume = starts_at(copy, resume="2")
    set_aside(Workdir(copy), resume, config_of(copy, resume="2"), 6)
    assert manifested_steps(copy / "checkpoints") == [2]
    (superseded,) = (copy / "superseded").iterdir()
    assert manifested_steps(superseded / "checkpoints") == [4, 6], "the links lead where they led"
    assert {path: path.read_bytes() for path in files(archive)} == before


def test_of_a_damaged_one_behind_a_link_the_link_is_moved(copy, archive):
    flip(archive / "6" / "state" / "_METADATA", 77)
    before = {path: path.read_bytes() for path in files(archive)}
    assert starts_at(copy).position.step == 4
    (corrupt,) = (copy / "corrupt").iterdir()
    assert "state/_METADATA has changed" in (corrupt / "problems.txt").read_text()
    assert (corrupt / "6").resolve() == archive / "6"
    assert {path: path.read_bytes() for path in files(archive)} == before


def test_what_is_deleted_while_it_is_read_is_not_damaged(copy, monkeypatch, capsys):
    """As retention of a running run does."""
    deleted = []

    def deleting(folder, *share):
        found = manifest.read_manifest(folder)
        if not deleted:
            deleted.append(folder.name)
            (folder / "manifest.json").unlink()
            shutil.rmtree(folder / "state")
        return [] if found is None else problems(folder, *share)

    monkeypatch.setattr("jaxtrain.cli.checkpoint.problems", deleting)
    assert runs.command_line(["checkpoint", "verify", str(copy), "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [4, 6]
    deleted.clear()
    monkeypatch.setattr("jaxtrain.training.inference.problems", deleting)
    assert evaluate(copy, checkpoint="latest", trust=True).step == 4
    assert deleted == ["6"]
    deleted.clear()
    monkeypatch.setattr("jaxtrain.checkpoint.resume_point.problems", deleting)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        starts_at(copy, resume="latest")
    assert not (copy / "corrupt").exists()


def test_a_folder_a_manifest_and_a_state_that_disagree_are_named(copy):
    folder = copy / "checkpoints"
    path = folder / "6" / "manifest.json"
    whole, position = path.read_text(), read_manifest(folder / "6").position
    for changed, said in (
        ({"step": 5}, "checkpoints/6 does not hold step 6: its manifest is of step 5"),
        ({"position": {**position, "step": 5}}, "does not hold step 6: .* with the position of step 5"),
        (
            {"position": {**position, "examples": "many"}},
            "not as this version of jaxtrain writes it .its position.examples",
        ),
    ):
        rewrite(folder / "6", **changed)
        with pytest.raises(CheckpointError, match=said):
            starts_at(copy)
        path.write_text(whole)
    (folder / "6").rename(folder / "9")
    with pytest.raises(CheckpointError, match=r"checkpoints/9 does not hold step 9: its manifest is of step 6"):
        starts_at(copy)
    assert manifested_steps(folder) == [2, 4, 9]


def test_the_state_of_another_step_is_named(copy):
    folder, fields = copy / "checkpoints" / "6", dataclasses.asdict(read_manifest(copy / "checkpoints" / "6"))
    shutil.rmtree(folder / "state")
    shutil.copytree(copy / "checkpoints" / "4" / "state", folder / "state")
    manifest.write_manifest(
        folder, **{name: fields[name] for name in fields if name not in ("schema", "files", "time")}
    )
    for use in (lambda: here(copy, SMALL | EVERY), lambda: evaluate(copy, checkpoint="6", trust=True)):
        with pytest.raises(CheckpointError, match=r"does not hold step 6: .*its state is that after step 4"):
            use()


# ------------------------------------------------------------------------------------- whatever a run directory holds


def test_what_lies_beside_is_in_nobodys_way(copy, complete, capsys):
    for name in ("040", "²", "٤٥", "-4", "4.0", "latest"):
        (copy / "checkpoints" / name).mkdir()
        shutil.copy(copy / "checkpoints" / "4" / "manifest.json", copy / "checkpoints" / name)
    (copy / "checkpoints" / "5").symlink_to("nowhere")
    for name in ("starts/1x.json", "starts/².json", "logs/process_x.log", "tensorboard/train/events.out.tfevents.².x"):
        (copy / name).write_text("?")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "phase": "val"}\n' + "[" * 99_999)
    (copy / "manifest.json").write_text("[" * 99_999)
    assert starts_at(copy).position.step == 6
    here(copy, SMALL | EVERY, checkpoint__resume="4")
    assert runs.losses(copy).tolist() == runs.losses(complete[0]).tolist()
    assert (copy / "checkpoints" / "040").exists()
    (superseded,) = (copy / "superseded").iterdir()
    assert (superseded / "checkpoints" / "5").is_symlink()
    for command in ("checkpoint list", "checkpoint verify", "goodput", "logs"):
        assert runs.command_line([*command.split(), str(copy)]) == 0, capsys.readouterr().err
    for resume in ("²", "٤٥", "9" * 5000, "epoch:" + "9" * 5000):
        assert runs.command_line(["evaluate", str(copy), "--checkpoint", resume]) in (64, 66)


DEEP = "[" * 99_999
ODD = [
    *(
        (name, kind)
        for name in ("checkpoints", "corrupt", "superseded", "starts", "tensorboard")
        for kind in ("?", "link")
    ),
    *((name, "folder") for name in ("config.json", "metrics.csv", "metrics.jsonl", "lock.json", "result.json")),
    *((name, kind) for name in ("config.json", "checkpoints/6/manifest.json") for kind in (DEEP, "[]", '{"data": 1}')),
    *(("starts/000001.json", kind) for kind in (DEEP, "[]", "{}", "folder")),
]


def test_whatever_a_run_directory_holds_the_answer_is_a_sentence(complete, tmp_path, capsys):
    for number, (name, kind) in enumerate(ODD):
        copy = shutil.copytree(complete[0], tmp_path / str(number))
        path = copy / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("nowhere")
        else:
            path.write_text(kind)
        commands = [["checkpoint", "verify"], ["goodput"], ["logs"]]
        if path.parent == copy:
            commands.append(["train"])
        if path.suffix == ".json" and kind != "folder":
            commands.append(["evaluate", "--trust"])
        for command in commands:
            words = [*command, str(copy)] if command != ["train"] else ["train", *runs.arguments(copy, SMALL | EVERY)]
            code = runs.command_line(words)
            said = capsys.readouterr().err
            assert code in (0, 64, 66, 73), f"{command} with {name} as {kind[:9]}: {said[-2000:]}"
            assert code == 0 or said.splitlines()[-1].startswith("jaxtrain: "), said
            assert "Traceback" not in said
            assert command != ["train"] or code == 73 or name == "config.json", f"{name} as {kind[:9]}"


def test_old_ones_are_deleted_but_never_the_best_a_milestone_or_the_only_one(copy):
    directory = copy / "checkpoints"
    path = directory / "4" / "manifest.json"
    path.write_text("{}")  # nobody knows what it holds
    assert delete_old(directory, 1, "val_accuracy") == [2]
    assert manifested_steps(directory) == [4, 6]
    assert delete_old(directory, 1, "val_accuracy") == []


@pytest.mark.parametrize(
    ("judged", "best"),
    [
        ([("A", 0.5), ("A", 0.7), ("A", 0.6)], 2),
        ([("A", 0.9), ("B", 0.4), ("B", 0.5)], 3),  # what A gave is no rival on B
        ([("A", 0.9), ("B", 0.4), ("A", 0.5)], 1),
        ([("", 0.9), ("A", 0.4), ("A", 0.5)], 1),  # of an older version, which did not store on what
        ([("A", 0.9), ("B", 0.4), ("B", None)], 2),
        ([("A", None)], None),
    ],
)
def test_the_best_is_that_on_the_present_validation(copy, judged, best):
    stored = read_manifest(copy / "checkpoints" / "6")
    manifests = []
    for step, (where, accuracy) in enumerate(judged, 1):
        dataset = {"fingerprint": "whole", "splits": {"validation": {"examples": 9, "fingerprint": where}}}
        part = {"train": {"eval_examples": 5000 * (step % 2)}}  # all of them, by either name
        position = {**stored.position, "dataset": dataset if where else {}, "config": part}
        loss = None if accuracy is None else 1 - accuracy  # the lowest is that of the highest accuracy
        figures = {"val_accuracy": accuracy, "val_loss": loss}
        manifests.append(dataclasses.replace(stored, step=step, position=position, **figures))
    assert [best_of(manifests, by) for by in figures] == [best, best]
