"""`jaxtrain compare`: groups of seeds, means and spreads, who won, and runs that are no good."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from jaxtrain import compare
from jaxtrain.cli import main
from jaxtrain.config import Config, to_dict
from jaxtrain.errors import ConfigError, WorkdirError
from jaxtrain.reporting.comparison_tables import tables
from jaxtrain.runs.spread import Spread, difference


def make_run(
    path: Path, accuracy: float | None = None, *, code: int | None = 0, loss: float = 0.5, **settings: Any
) -> Path:
    """The files of a run that ended with `code`; with an accuracy where it is complete. settings: `optim__ema` and so on."""
    (path / "starts").mkdir(parents=True)
    config = to_dict(Config())
    for name, value in settings.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    (path / "config.json").write_text(json.dumps(config))
    end = {"time": time.time(), "code": code, "message": "It ended.", "step": 20, "host": "a", "by": "itself"}
    seconds = {"start": 1.0, "compile": 2.0, "step": 6.0, "evaluation": 1.0}
    start = {
        "began": 1e9,
        "first_step": 0,
        "step": 20,
        "lost_steps": 0,
        "seconds": seconds,
        "end": end,
        "last_step": 20,
    }
    (path / "starts" / "000001.json").write_text(json.dumps(start))
    (path / "manifest.json").write_text(json.dumps({"starts": [{"devices": {"kinds": {"cpu": 1}}}]}))
    rows = [
        {"step": 10, "epoch": 0, "phase": "train", "loss": loss + 1, "accuracy": 0.1, "throughput": 100.0},
        {"step": 20, "epoch": 1, "phase": "train", "loss": loss, "accuracy": 0.2, "throughput": 300.0},
        {"step": 20, "epoch": 1, "phase": "val", "loss": 0.7, "accuracy": 0.4},
    ]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if accuracy is not None:
        figures = {"loss": loss, "accuracy": accuracy, "top5": 1.0, "examples": 100}
        weights = {"step": 20, "weights": "raw", "validation": figures, "test": figures | {"accuracy": accuracy - 0.1}}
        result = {"last": weights, "best": weights, "throughput": 250.0, "devices": 1, "device_kind": "cpu"}
        (path / "result.json").write_text(json.dumps(result))
    return path


def make_sweep(root: Path, accuracies: dict[float, list[float]]) -> Path:
    """A run for each learning rate and accuracy; the seeds count from 0."""
    for rate, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            make_run(root / f"{rate}-{seed}", accuracy, optim__learning_rate=rate, seed=seed)
    return root


A, B = [0.71, 0.74, 0.70, 0.73], [0.75, 0.80, 0.79]


@pytest.mark.parametrize("pairs", [1, 3])
def test_the_interval_is_that_of_welch(pairs):
    found = difference(Spread.of(B), Spread.of(A), pairs=pairs)
    theirs = stats.ttest_ind(B, A, equal_var=False).confidence_interval(1 - 0.05 / pairs)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert found.value == pytest.approx(0.06)
    assert found.verdict == ("larger" if theirs.low > 0 else "within")


def test_the_interval_by_hand():
    """Two seeds each, 1 +- and 3 apart: s^2 = 2, f = 2, t(0.975, 2) = 4.302653."""
    found = difference(Spread.of([4.0, 6.0]), Spread.of([1.0, 3.0]))
    assert (found.low, found.high) == pytest.approx((3 - 4.302653 * 2**0.5, 3 + 4.302653 * 2**0.5), rel=1e-6)
    assert found.verdict == "within"


def test_no_interval_claims_to_be_certain(tmp_path):
    """Of 20 settings there are 190 pairs: 1 - 0.05 / 190 is not 100 %."""
    found = compare(make_sweep(tmp_path, dict.fromkeys(range(1, 21), A)))
    said = [*found.sentences(), *found.warnings, *(row[3] for row in tables(found)[2].rows)]
    assert sum("99.97%" in text for text in said) == 21
    assert not any("100.0%" in text for text in said)


def test_seeds_that_agree_to_the_bit_and_single_ones():
    same = Spread.of([0.5, 0.5])
    assert difference(same, same).verdict == "within"
    assert difference(Spread.of([0.6, 0.6]), same).verdict == "larger"
    alone = difference(Spread.of([0.9]), same)
    assert (alone.verdict, alone.low, alone.high) == ("unknown", None, None)


def test_groups_are_equal_but_for_the_seed_and_the_best_is_first(tmp_path):
    found = compare(make_sweep(tmp_path, {0.1: A, 0.2: B}))
    assert (found.by, found.differing) == ("val/accuracy", ("optim.learning_rate",))
    assert [group.label for group in found.groups] == ["learning_rate=0.2", "learning_rate=0.1"]
    best, other = (group.spreads for group in found.groups)
    assert (best["val/accuracy"].mean, best["val/accuracy"].n) == (pytest.approx(0.78), 3)
    assert best["val/accuracy"].deviation == pytest.approx(0.0264575131)  # sqrt((0.03^2 + 0.02^2 + 0.01^2) / 2)
    assert other["test/accuracy"].mean == pytest.approx(0.62)
    assert (best["throughput"].mean, best["goodput"].mean, best["wall_seconds"].mean) == (250.0, 0.6, 10.0)
    theirs = stats.ttest_ind(B, A, equal_var=False).confidence_interval(0.95)
    assert found.differences["learning_rate=0.1"].low == pytest.approx(theirs.low)
    assert "larger than the spread over seeds" in found.sentences()[1]


def test_less_loss_is_better(tmp_path):
    for seed, loss in enumerate((0.5, 0.25)):
        make_run(tmp_path / str(loss), 0.5, loss=loss, seed=seed, optim__weight_decay=loss)
    assert compare(tmp_path, by="train/loss").groups[0].settings == {"optim.weight_decay": 0.25}


def test_one_seed_each_says_that_nothing_can_be_said(tmp_path):
    sentences = compare(make_sweep(tmp_path, {0.1: [0.5], 0.2: [0.9]})).sentences()
    assert "nothing can be said about the spread" in sentences[2]


def test_many_groups_are_summed_up(tmp_path):
    sentences = compare(
        make_sweep(tmp_path, {rate: [rate, rate + 0.01] for rate in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)})
    ).sentences()
    assert sentences[0].startswith("learning_rate=0.6 has the highest")
    assert sentences[1].startswith("From learning_rate=0.5 ")
    assert sentences[2].startswith("Of the 5 others, ")
    assert len(sentences) == 3


def test_what_no_figure_depends_on_does_not_part_runs(tmp_path):
    make_run(tmp_path / "a", 0.5, data__dir="/here", train__log_every=5)
    make_run(tmp_path / "b", 0.6, data__dir="/there", seed=1)
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert (found.differing, [group.label for group in found.groups]) == ((), ["all runs"])


def test_an_older_config_has_the_defaults_of_what_it_lacks(tmp_path):
    old = make_run(tmp_path / "old", 0.5)
    config = json.loads((old / "config.json").read_text())
    del config["optim"]["ema"]
    (old / "config.json").write_text(json.dumps(config))
    make_run(tmp_path / "new", 0.6, seed=1)
    assert compare(tmp_path).differing == ()


def test_failed_seeds_are_counted_and_their_figures_left_out(tmp_path):
    make_sweep(tmp_path, {0.1: [0.5, 0.7]})
    make_run(tmp_path / "failed", code=76, optim__learning_rate=0.1, seed=2)
    make_run(tmp_path / "died", code=None, optim__learning_rate=0.1, seed=3)
    found = compare(tmp_path)
    (group,) = found.groups
    assert group.spreads["val/accuracy"].mean == pytest.approx(0.6)
    assert group.counted == "2 of 4 runs (1 died, 1 failed)"
    assert "2 of 4 runs" in found.sentences()[0]
    assert any("a mean is too good" in warning for warning in found.warnings)
    assert found.groups[0].runs[2].figures["val/accuracy"] == 0.4  # what it had by then


def test_stability_counts_spikes_and_refused_updates_once(tmp_path):
    run = make_run(tmp_path / "run", 0.5)
    spike = "the loss of step 7 is a spike: 9, 12 robust standard deviations above the median 1 of the last 20 steps"
    refused = "the update of step 9 was refused: loss nan, gradient norm nan (1 of at most 3 in a row are passed over)"
    rows = [{"step": 7, "text": spike}, {"step": 9, "text": refused}, {"step": 7, "text": spike}]
    (run / "bad_batches.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    start = json.loads((run / "starts/000001.json").read_text())
    (run / "starts/000001.json").write_text(json.dumps(start | {"lost_steps": 4}))
    found = compare(run).groups[0].stability
    assert (found.spikes, found.skipped_updates, found.lost_steps, found.starts) == (1, 1, 4, 1)


def test_damaged_runs_are_named_and_harm_no_other(tmp_path):
    make_run(tmp_path / "good", 0.5)
    (make_run(tmp_path / "config", 0.5) / "config.json").write_text("{")
    (make_run(tmp_path / "list", 0.5) / "config.json").write_text("[]")
    (make_run(tmp_path / "result", 0.5, seed=1) / "result.json").write_text("[1]")
    (make_run(tmp_path / "starts", 0.5, seed=2) / "starts/000001.json").write_text("nonsense")
    (make_run(tmp_path / "empty", 0.5, seed=3) / "metrics.jsonl").unlink()
    found = compare(tmp_path)
    assert {run.name for run in found.unread} == {"config", "list"}
    problems = {run.name: " ".join(run.problems) for run in found.runs}
    assert problems["good"] == ""
    for name, text in (
        ("config", "config.json"),
        ("result", "result.json"),
        ("starts", "000001"),
        ("empty", "no metrics"),
    ):
        assert text in problems[name], name
    json.dumps(found.to_json(), allow_nan=False)


def test_names_that_lead_nowhere(tmp_path):
    make_run(tmp_path / "runs/a", 0.5)
    assert [run.name for run in compare(str(tmp_path / "runs/*")).runs] == ["a"]
    with pytest.raises(WorkdirError, match="none in it"):
        compare(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="Did you mean 'val/accuracy'"):
        compare(tmp_path, by="val/acuracy")


def test_the_command_prints_sentences_tables_csv_and_json(tmp_path, capsys):
    make_sweep(tmp_path / "runs", {0.1: A, 0.2: B})
    make_run(tmp_path / "runs/0.2-9", code=76, optim__learning_rate=0.2, seed=9)
    assert main(["compare", str(tmp_path / "runs"), "--csv", str(tmp_path / "runs.csv")]) == 0
    printed = capsys.readouterr().out
    for text in (
        "learning_rate=0.2 has the highest val/accuracy: 0.7800 ± 0.0265 over 3 of 4 runs (1 failed)",
        "It ended.",
    ):
        assert text in printed
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(rows) == 8
    first = next(row for row in rows if row["run"] == "0.1-0")
    assert (first["group"], first["state"], float(first["val/accuracy"])) == ("learning_rate=0.1", "done", 0.71)
    assert main(["compare", str(tmp_path / "runs"), "--by", "test/accuracy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["by"], found["groups"][0]["complete"]) == ("test/accuracy", 3)
    assert main(["compare", str(tmp_path / "runs"), "--csv", "-"]) == 0
    assert capsys.readouterr().out == (tmp_path / "runs.csv").read_text()
    assert main(["compare", str(tmp_path / "nothing")]) == 73
