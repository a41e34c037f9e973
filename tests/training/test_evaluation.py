"""Evaluating a run on data that has changed since, and which weights and classes a figure is of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import SMALL, draw_folder, here

from jaxtrain import cli, evaluate, train
from jaxtrain.checkpoint.manifest import read_manifest
from jaxtrain.config import CheckpointConfig, Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.data import registry
from jaxtrain.data.augment import eval_inputs
from jaxtrain.data.order import eval_subset
from jaxtrain.errors import ConfigError, DataError, WorkdirError
from jaxtrain.models.layers import Context
from jaxtrain.recipes import change
from jaxtrain.step.eval_step import add_to_sums, summarize, zero_sums_of
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import create_state
from jaxtrain.training.compiled import Evaluator
from jaxtrain.training.input_pipeline import make_input_pipeline
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.results import TrainResult
from jaxtrain.training.setup import load_data, make_run_spec

SIDE = 8


def fit(
    workdir: Path, data: Path | str, *, steps: int = 30, allow_changes: bool = False, ema: float = 0.0
) -> TrainResult:
    config = Config(
        data=DataConfig(name=f"folder:{data}", global_batch=32, image_size=SIDE),
        model=ModelConfig(name="mlp", width=32),
        optim=OptimConfig(learning_rate=0.05, lr_scaling="none", schedule="constant", ema=ema),
        train=TrainConfig(steps=steps, eval_every="10 steps"),
        checkpoint=CheckpointConfig(every="0", allow_changes=allow_changes),
    )
    return train(config, workdir, num_devices=1, quiet=True)


@pytest.fixture
def trained(tmp_path) -> Path:
    """`data`, a folder of three classes, and `run`, a run that has learned it."""
    fit(tmp_path / "run", draw_folder(tmp_path / "data", "abc", 0, 60))
    return tmp_path


def test_data_as_it_was_is_evaluated(trained):
    found = evaluate(trained / "run", num_devices=1)
    result = json.loads((trained / "run/result.json").read_text())["best"]
    assert (found.step, found.split, found.weights) == (result["step"], "test", "raw")
    assert found.result.accuracy == result["test"]["accuracy"] > 0.9


def test_grown_data_is_refused_and_no_trained_image_is_tested(trained, caplog):
    before = registry.load(DataConfig(name=f"folder:{trained / 'data'}"), image_size=SIDE)
    draw_folder(trained / "data", "abc", 60, 90)
    with pytest.raises(
        DataError, match=r"has changed since step \d+ of .*test had \d+ examples and has \d+.*--allow-changes"
    ):
        evaluate(trained / "run", num_devices=1)
    assert cli.main(["evaluate", str(trained / "run"), "--devices", "1"]) == 65
    found = evaluate(trained / "run", num_devices=1, allow_changes=True)
    assert found.result.examples > len(before.test)
    assert "test had" in caplog.text


def test_a_class_that_is_renamed_moves_no_other(trained, caplog):
    accuracy = evaluate(trained / "run", num_devices=1).result.per_class
    (trained / "data/b").rename(trained / "data/zb")
    with pytest.raises(DataError, match=r"the class 'b' is gone; the class 'zb' is new"):
        evaluate(trained / "run", num_devices=1)
    found = evaluate(trained / "run", num_devices=1, allow_changes=True)
    assert found.class_names == ("a", "b", "c")
    assert found.result.per_class[0] == accuracy[0]
    assert found.result.per_class[2] == accuracy[2]
    assert np.isnan(found.result.per_class[1])  # what it does not know is left out
    assert "the class 'zb' is new" in caplog.text
    assert "examples of test are of classes that the run does not know, and are left out" in caplog.text


def test_a_class_that_is_added_renumbers_nothing(trained):
    """It stands first, and its images are those of a class that the run knows."""
    wanted = evaluate(trained / "run", num_devices=1)
    draw_folder(trained / "data", "A", 0, 1)
    found = evaluate(trained / "run", num_devices=1, allow_changes=True)
    assert found.class_names == ("a", "b", "c")
    assert found.result == wanted.result


def own_splits(top: Path) -> Path:
    draw_folder(top / "train", "abc", 0, 40)
    draw_folder(top / "val", "abc", 40, 50)
    return draw_folder(top / "test", "abc", 50, 60).parent


def test_the_test_needs_no_training_files(tmp_path, caplog):
    found = fit(tmp_path / "run", own_splits(tmp_path / "data"))
    wanted = found.result["best"]["test"]["accuracy"]
    draw_folder(tmp_path / "data/train", "abc", 60, 70)
    assert evaluate(tmp_path / "run", num_devices=1).result.accuracy == wanted
    assert "train had 120 examples and has 150; test is as it was" in caplog.text
    with pytest.raises(DataError, match="train had 120 examples and has 150"):
        evaluate(tmp_path / "run", "train", num_devices=1)
    shutil.rmtree(tmp_path / "data/train")
    shutil.rmtree(tmp_path / "data/val")
    assert evaluate(tmp_path / "run", num_devices=1).result.accuracy == wanted
    with pytest.raises(DataError, match="no train"):
        evaluate(tmp_path / "run", "val", num_devices=1)


def test_no_split_is_drawn_for_want_of_its_files(tmp_path):
    """Of a run whose splits were all its own: what is lost is missed, and training stays what it was."""
    found = fit(tmp_path / "run", own_splits(tmp_path / "data"))
    shutil.rmtree(tmp_path / "data/val")
    shutil.rmtree(tmp_path / "data/test")
    assert evaluate(tmp_path / "run", "train", num_devices=1).result.examples == 120
    for split in ("val", "test"):
        with pytest.raises(ConfigError, match=f"has no {split} split"):
            evaluate(tmp_path / "run", split, num_devices=1, allow_changes=True)
    assert found.result["best"]["test"]["accuracy"] > 0.9


def test_the_best_is_chosen_on_the_validation_that_there_is(tmp_path):
    """Two classes have each other's names in the new one, so that no accuracy on it comes near what the old one gave."""
    data = own_splits(tmp_path / "data")
    assert fit(tmp_path / "run", data).result["best"]["validation"]["accuracy"] > 0.9
    shutil.rmtree(data / "val")
    draw_folder(data / "val", "abc", 70, 77)
    for old, new in (("a", "x"), ("b", "a"), ("x", "b")):
        (data / "val" / old).rename(data / "val" / new)
    with pytest.raises(DataError, match="validation had 30 examples and has 21"):
        fit(tmp_path / "run", data, steps=50)
    result = fit(tmp_path / "run", data, steps=50, allow_changes=True).result
    assert result["best"]["step"] > 30
    assert result["best"]["validation"]["accuracy"] < 0.9
    said = (tmp_path / "run/logs/process_0.log").read_text()
    assert "since step 30 validation had 30 examples and has 21" in said
    assert evaluate(tmp_path / "run", "val", num_devices=1).step == result["best"]["step"]


def test_a_class_too_many_for_the_run_is_named(tmp_path):
    data = draw_folder(tmp_path / "data", "abc", 0, 60)
    fit(tmp_path / "run", data)
    draw_folder(data, "d", 0, 20)
    with pytest.raises(DataError, match="has 4 classes and the run 3 outputs"):
        fit(tmp_path / "run", data, steps=40, allow_changes=True)


def test_without_a_test_split_nothing_is_tested(tmp_path, capfd):
    shutil.rmtree(own_splits(tmp_path / "data") / "test")
    found = fit(tmp_path / "run", tmp_path / "data")
    stored = json.loads((tmp_path / "run/result.json").read_text())
    assert stored["last"]["test"] is stored["best"]["test"] is None
    assert stored["best"]["validation"]["accuracy"] > 0.9
    assert "test" not in {row["phase"] for row in found.history}
    assert ",test," not in (tmp_path / "run/metrics.csv").read_text()
    said = (tmp_path / "run/logs/process_0.log").read_text()
    assert "it has no test split, and none is drawn: its validation split chooses the best weights" in said
    assert "nothing was tested" in said
    with pytest.raises(ConfigError, match="has no test split"):
        evaluate(tmp_path / "run", num_devices=1)
    assert evaluate(tmp_path / "run", "val", num_devices=1).result.examples == 30


def test_the_end_of_a_run_says_what_each_figure_is_of(tmp_path):
    found = fit(tmp_path / "run", draw_folder(tmp_path / "data", "abc", 0, 60), ema=0.8)
    said = (tmp_path / "run/logs/process_0.log").read_text()
    last, best = found.result["last"], found.result["best"]
    assert best["weights"] == "ema"
    assert f"last, step 30: validation accuracy {last['validation']['accuracy']:.4f}" in said
    assert f"best, step {best['step']}, by the validation accuracy of the EMA weights: " in said
    assert f"EMA test accuracy {best['test_ema']['accuracy']:.4f}" in said
    found = evaluate(tmp_path / "run", num_devices=1)
    assert (found.weights, found.result.loss) == ("ema", pytest.approx(best["test_ema"]["loss"], rel=1e-5))
    assert best["test_ema"]["loss"] != pytest.approx(best["test"]["loss"], rel=1e-3)


def test_a_part_of_each_split_is_evaluated_and_said_to_be_one(tmp_path):
    run = here(tmp_path, SMALL | {"data.name": "digits", "train.steps": 4}, train__eval_examples=50)
    assert run.result["splits"] == {"train": 128, "validation": 144, "test": 359}
    for split, size in (("validation", 144), ("test", 359)):
        assert run.result["last"][split]["examples"] == run.result["best"][split]["examples"] == 50
        whole = evaluate(tmp_path, split.removesuffix("idation"), checkpoint="latest", num_devices=1)
        assert whole.result.examples == size
    said = (tmp_path / "logs/process_0.log").read_text()
    part = "evaluated on 50 of 144 validation examples and 50 of 359 test examples (config.train.eval_examples)"
    assert said.count(part) == 2
    assert f"{part}; jaxtrain evaluate takes the whole split" in said


def test_another_part_may_be_evaluated_on_resume_and_its_best_is_its_own(tmp_path):
    fields = SMALL | {"data.name": "digits", "train.eval_every": "2 steps", "train.steps": 6}
    first = here(tmp_path, fields, train__eval_examples=1)
    assert first.result["best"]["validation"]["accuracy"] == 1.0  # that one is easy
    again = here(tmp_path, fields, train__steps=10)
    assert again.result["best"]["step"] > 6
    best = again.result["best"]["validation"]
    assert best["examples"] == 144
    assert read_manifest(tmp_path / "checkpoints" / "10").position["best"] == best["accuracy"] < 1


def test_what_is_remembered_of_the_data(trained):
    record = json.loads((trained / "run/dataset.json").read_text())
    (manifest,) = (trained / "run/checkpoints").glob("30/manifest.json")
    assert json.loads(manifest.read_text())["position"]["dataset"] == record
    assert record["class_names"] == ["a", "b", "c"]
    assert (record["num_classes"], record["image_size"]) == (3, SIDE)
    assert (record["mean"], record["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert sum(split["examples"] for split in record["splits"].values()) == 180
    assert record["split_rule"] == "by file name, version 1"


def test_a_run_that_was_split_by_another_rule_is_refused_by_name(trained):
    """Not even `allow_changes` would make its test images new to it."""
    run = trained / "run"
    for path in run.glob("checkpoints/*/manifest.json"):
        values = json.loads(path.read_text())
        position = values["position"]
        position["data"] = position.pop("dataset")["fingerprint"]  # as the first version stored it
        del values["sha256"]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**values, "sha256": digest}, indent=1, sort_keys=True) + "\n")
    said = "were drawn by an older rule, by the files' positions"
    for allow in (False, True):
        with pytest.raises(DataError, match=said):
            evaluate(run, num_devices=1, allow_changes=allow)
    with pytest.raises(DataError, match=said):
        fit(run, trained / "data", steps=40, allow_changes=True)


# -------------------------------------------------------------------------------------------------- where the data is


def test_a_folder_may_move(trained, monkeypatch):
    """Its path says where it is: named by a link, with a slash, or from another directory; and not what it holds."""
    wanted = evaluate(trained / "run", num_devices=1)
    (trained / "data").rename(trained / "moved")
    with pytest.raises(DataError, match=r"there is no such folder; if it was moved, .*--data"):
        evaluate(trained / "run", num_devices=1)
    monkeypatch.chdir(trained / "moved")
    assert evaluate(trained / "run", data="../moved/", num_devices=1) == wanted
    (trained / "link").symlink_to("moved")
    assert fit(trained / "run", "../link/", steps=40).result["last"]["step"] == 40
    monkeypatch.chdir(trained)
    assert evaluate(trained / "run", num_devices=1).result.examples == wanted.result.examples  # the last place is known
    draw_folder(trained / "moved", "a", 60, 70)
    with pytest.raises(DataError, match=r"folder:.*/moved is not the one of step 40 of .*/run, folder:.*/link \("):
        fit(trained / "run", "moved", steps=50)
    with pytest.raises(DataError, match=r"is not the one of step .* or evaluate what is there with --allow-changes"):
        evaluate(trained / "run", "train", data="moved", num_devices=1)


def test_a_path_is_compared_where_nothing_else_tells_what_the_folder_holds(trained):
    """The run has no checkpoint yet, or an older version has stored none of its data set."""
    shutil.rmtree(trained / "run/checkpoints")
    shutil.copytree(trained / "data", trained / "other")
    with pytest.raises(
        WorkdirError, match=r"another config \(config.data.name: 'folder:.*/data' -> 'folder:.*/other'\)"
    ):
        fit(trained / "run", trained / "other")


def test_other_data_is_evaluated_by_the_names_of_its_classes(trained, tmp_path, caplog):
    own = evaluate(trained / "run", num_devices=1)
    new = draw_folder(tmp_path / "new", "ca", 100, 110)  # the run's, and one of them is lacking
    found = evaluate(trained / "run", data=new, num_devices=1)
    assert found.class_names == ("a", "b", "c")
    assert (found.result.examples, found.result.accuracy > 0.9) == (20, True)
    assert np.isnan(found.result.per_class).tolist() == [False, True, False]
    assert "evaluated are the 20 examples of the whole folder, which has no class 'b'" in caplog.text
    draw_folder(tmp_path / "split/test", "abc", 100, 105)
    assert evaluate(trained / "run", data=tmp_path / "split", num_devices=1).result.examples == 15
    with pytest.raises(DataError, match=r"has test but no train"):
        evaluate(trained / "run", "val", data=tmp_path / "split", num_devices=1)
    draw_folder(new, "d", 0, 5)
    with pytest.raises(DataError, match=r"does not know: 'd' \(of the run's, it lacks 'b'\); .*--allow-changes"):
        evaluate(trained / "run", data=new, num_devices=1)
    found = evaluate(trained / "run", data=new, allow_changes=True, num_devices=1)
    assert found.result.examples == 20
    assert "evaluated are 20 of the 25 examples of the whole folder" in caplog.text
    with pytest.raises(DataError, match=r"has images of 1 channel, and step \d+ of .* was trained on images of 3"):
        evaluate(trained / "run", "train", data="digits", num_devices=1)
    with pytest.raises(ConfigError, match="digits has no test split; of train, val and test it has train"):
        evaluate(trained / "run", data="digits", num_devices=1)
    with pytest.raises(DataError, match="there is no such directory"):
        evaluate(trained / "run", data=tmp_path / "nowhere", num_devices=1)
    assert evaluate(trained / "run", num_devices=1) == own


def test_bad_images_are_left_out_of_a_run_and_listed_in_it(tmp_path):
    data = draw_folder(tmp_path / "data", "abc", 0, 60)
    (data / "b/003.png").write_bytes(b"")
    config = Config(
        data=DataConfig(
            name=f"folder:{data}", global_batch=32, image_size=SIDE, skip_bad=True, dir=str(tmp_path / "d")
        ),
        model=ModelConfig(name="mlp", width=8),
        train=TrainConfig(steps=1),
    )
    train(config, tmp_path / "run", num_devices=1, quiet=True)
    assert (tmp_path / "run/skipped_images.txt").read_text() == f"{data / 'b/003.png'} (class 'b') is empty.\n"
    record = json.loads((tmp_path / "run/dataset.json").read_text())
    assert sum(split["examples"] for split in record["splits"].values()) == 179
    assert "1 of 180 images cannot be read and are left out" in (tmp_path / "run/logs/process_0.log").read_text()


# ---------------------------------------------------------------------------------------------------------- the figures


def figures(logits: np.ndarray, labels: np.ndarray) -> dict:
    """What an evaluation must find, in plain NumPy."""
    largest = np.argsort(-logits, axis=-1)[:, :5]
    right = largest[:, 0] == labels
    each = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]
    of_class = [right[labels == c] for c in range(logits.shape[-1])]
    return {
        "loss": pytest.approx(each.mean(), rel=1e-12),
        "accuracy": right.mean(),
        "top5": (largest == labels[:, None]).any(-1).mean(),
        "examples": len(labels),
        "per_class": tuple(found.mean() if len(found) else float("nan") for found in of_class),
    }


def assert_figures(found, wanted: dict) -> None:
    """Exactly, but for the loss, whose sum has an order."""
    np.testing.assert_array_equal(found.per_class, wanted["per_class"])
    assert {name: getattr(found, name) for name in wanted if name != "per_class"} == {
        name: value for name, value in wanted.items() if name != "per_class"
    }
    numbers = (found.loss, found.accuracy, found.top5, *found.per_class)
    assert {type(number) for number in numbers} == {float}  # JSON takes them
    assert type(found.examples) is int


LAYOUTS = {
    "one device": LayoutConfig(),
    "zero3 on two": LayoutConfig(zero=3, data=2),
    "two stages": LayoutConfig(stages=2, microbatches=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("residency", ["device", pytest.param("stream", marks=pytest.mark.parity)])
def test_the_figures_are_those_of_every_example_once(layout, residency):
    """40 examples in batches of 32 (by stages 16), so that the last is padded; two of twelve classes have none."""
    config = Config(
        data=DataConfig(name="tiny:digits", global_batch=32, residency=residency, workers=0),
        model=ModelConfig("mlp", width=16, num_classes=12),
        train=TrainConfig(steps=1, precision="f64"),
        layout=layout,
    )
    with settings(config):
        dataset = load_data(config.data)
        run = make_run_spec(config, dataset, jax.devices()[: layout.stages * max(layout.data, 1)])
        state = create_state(run.init, run.layout, run.config.seed)
        feed = make_input_pipeline(dataset, run.layout, residency, 0)
        found = Evaluator(run, feed)("test", state.params, state.batch_stats)
        part = change(config, **{"train.eval_examples": 17})
        found_in_part = Evaluator(dataclasses.replace(run, config=part), feed)("test", state.params, state.batch_stats)
        images, labels = dataset.test.read(np.arange(40))
        inputs, context = eval_inputs(run.task.preprocess, jnp.asarray(images)), Context(jnp.arange(40))
        logits, _ = run.task.model.apply(jax.device_get(state.params), {}, inputs, context)
    assert_figures(found, figures(np.asarray(logits), labels))
    chosen = eval_subset(40, 17)
    assert_figures(found_in_part, figures(np.asarray(logits)[chosen], labels[chosen]))
    assert np.isnan(found.per_class).tolist() == 10 * [False] + 2 * [True]


@pytest.fixture
def task() -> Task:
    """In f32."""
    config = Config(
        data=DataConfig(name="tiny:digits", global_batch=32),
        model=ModelConfig("mlp", width=16),
        train=TrainConfig(steps=1, precision="f32"),
    )
    return make_run_spec(config, load_data(config.data), jax.devices()[:1]).task


def test_padding_counts_for_nothing_whatever_its_loss(task):
    """A loss of NaN or of infinity there, in a batch that has examples too, and in one that has none."""
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(24, 10)), random.integers(10, size=24, dtype=np.int32)
    mask = np.arange(24) % 3 > 0
    mask[8:16] = False
    logits[~mask] = np.nan
    logits[4, labels[4]] = np.inf
    mask[4] = False
    sums = zero_sums_of(task)
    for rows in np.split(np.arange(24), 3):
        sums = add_to_sums(task, sums, jnp.float32(logits[rows]), labels[rows], jnp.asarray(mask[rows]))
    found = summarize(jax.device_get(sums))
    wanted = figures(np.float32(logits[mask]), labels[mask])
    wanted["loss"] = pytest.approx(figures(logits[mask], labels[mask])["loss"].expected, rel=1e-6)
    wanted["per_class"] = tuple(np.float32(wanted["per_class"]).tolist())
    assert_figures(found, wanted)


def test_counts_stay_exact_where_f32_would_stop_counting(task):
    """2^24 + 1 is no f32: a split of more examples than that has its last ones counted too."""
    logits, labels = jnp.eye(10, dtype=jnp.float32)[:1], jnp.zeros(1, jnp.int32)
    sums = add_to_sums(task, zero_sums_of(task), logits, labels, jnp.ones(1, bool))
    for _ in range(24):
        sums = sums.merge(sums)
    found = summarize(jax.device_get(add_to_sums(task, sums, logits, labels, jnp.ones(1, bool))))
    assert (found.examples, found.accuracy, found.top5) == (2**24 + 1, 1.0, 1.0)


def test_of_equal_logits_the_lower_class_comes_first(task):
    """As `top_k` has it, with many ties. Where the label's own logit is NaN, or no class has the label, it is wrong."""
    random = np.random.default_rng(0)
    logits, labels = (
        random.integers(3, size=(200, 10)).astype(np.float32),
        random.integers(10, size=200, dtype=np.int32),
    )
    best = np.asarray(jax.lax.top_k(logits, 5)[1])
    found = summarize(jax.device_get(add_to_sums(task, zero_sums_of(task), logits, labels, jnp.ones(200, bool))))
    assert found.accuracy == pytest.approx((best[:, 0] == labels).mean())
    assert found.top5 == pytest.approx((best == labels[:, None]).any(-1).mean())
    for wrong, to in ((np.full_like(logits, np.nan), labels), (-1 - logits, np.full_like(labels, 10))):
        found = summarize(jax.device_get(add_to_sums(task, zero_sums_of(task), wrong, to, jnp.ones(200, bool))))
        assert (found.accuracy, found.top5) == (0, 0)
