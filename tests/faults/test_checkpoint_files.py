"""Damaged checkpoints: every changed bit is found, an older one is used, and nothing that could be needed is deleted."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import runs
from runs import SMALL, here

from jaxtrain.checkpoint import manifest
from jaxtrain.checkpoint.manifest import SCHEMA, best_of, delete_old, manifested_steps, problems, read_manifest
from jaxtrain.errors import CheckpointError

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


def test_a_checkpoint_of_a_newer_jaxtrain_is_refused(copy):
    path = copy / "checkpoints" / "6" / "manifest.json"
    values = dataclasses.asdict(read_manifest(path.parent)) | {"schema": SCHEMA + 1}
    path.write_text(manifest._text(values))
    with pytest.raises(CheckpointError, match=rf"has schema {SCHEMA + 1} .*reads up to {SCHEMA}: update it"):
        here(copy, SMALL | EVERY, checkpoint__resume="6")


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
