"""Flags of other trainers and settings in YAML: which fields they are, and the hint where they are none."""

import argparse
import json

import pytest

from jaxtrain import cli
from jaxtrain.cli.flags import _INSTEAD, FLAGS
from jaxtrain.config import flat_keys


def config_of(capsys, *words: str) -> tuple[dict, str]:
    """The config that the words make of `quickstart`, and what is said of them."""
    assert cli.main(["config", *words, "--json"]) == 0
    found = capsys.readouterr()
    return json.loads(found.out), found.err


def refused(capsys, *argv: str) -> str:
    assert cli.main(list(argv)) == 64
    found = capsys.readouterr()
    assert (found.out, found.err.count("\n")) == ("", 1)
    return found.err


@pytest.mark.parametrize(
    ("words", "section", "key", "value", "said"),
    [
        ("--epochs 3", "train", "epochs", 3, "--epochs 3 is --config.train.epochs=3"),
        ("--epochs=3", "train", "epochs", 3, "--epochs=3 is --config.train.epochs=3"),
        ("--data-dir /data", "data", "dir", "/data", "--config.data.dir=/data"),
        ("--global-batch-size 256", "data", "global_batch", 256, "--config.data.global_batch=256"),
        ("--resume runs/x", "checkpoint", "resume", "runs/x", "--config.checkpoint.resume=runs/x"),
        ("--resume", "checkpoint", "resume", "latest", "--resume is --config.checkpoint.resume=latest"),
        ("--resume --epochs 3", "checkpoint", "resume", "latest", "--epochs 3 is"),
        ("--no-amp", "train", "precision", "f32", "--no-amp is --config.train.precision=f32"),
        ("--num-workers 0", "data", "workers", 0, "--config.data.workers=0"),
        ("--save-frequency 5", "checkpoint", "milestone_every", "5 epochs", "milestone_every=5 epochs"),
        ("--deterministic", "train", "deterministic", True, "--config.train.deterministic=true"),
    ],
)
def test_flags_of_other_trainers(capsys, words, section, key, value, said):
    config, found = config_of(capsys, "quickstart", *words.split())
    assert config[section][key] == value
    assert said in found
    assert found.count("\n") == 1


def test_of_two_that_name_the_same_field_the_later_wins(capsys):
    assert config_of(capsys, "quickstart", "--seed", "2", "--config.seed=3")[0]["seed"] == 3
    assert config_of(capsys, "quickstart", "--config.seed=3", "--seed", "2")[0]["seed"] == 2
    assert config_of(capsys, "quickstart")[1] == ""


def test_the_output_directory_is_the_work_directory():
    arguments = cli.parse(["train", "--config", "quickstart", "--output-dir", "runs/x"])
    assert (arguments.workdir, arguments.translations) == ("runs/x", ["--output-dir runs/x is --workdir=runs/x"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--lr 0.1 --wd=1", ["--lr use --config.optim.learning_rate=VALUE", "--config.optim.weight_decay=VALUE"]),
        ("--batch-size 32", ["--config.data.global_batch=VALUE", "data.batch_per_device"]),
        ("-b 32", ["For -b use --config.data.global_batch=VALUE"]),
        ("--learning_rate=1", ["--config.optim.learning_rate=VALUE"]),
        ("--optim.learning_rate=1", ["--config.optim.learning_rate=VALUE"]),
        ("lr=0.1", ["--config.optim.learning_rate=VALUE"]),
        ("--max_epochs 3", ["--config.train.epochs=VALUE"]),
        ("--nesterov", ["--config.optim.nesterov=VALUE"]),
        ("--limit_val_batches 2", ["--config.train.eval_examples=VALUE"]),
        ("--fast_dev_run", ["For --fast_dev_run use --smoke."]),
        ("--gpus 2", ["For --gpus use --devices."]),
        ("--learning-rat 2", ["--config.optim.learning_rate=VALUE"]),
        ("--data_dir x", ["Did you mean '--data-dir'?"]),
        ("--no-such-thing=3", ["--config.KEY=VALUE"]),
        ("--epochs", ["--epochs needs a value"]),
        ("--data-dir --seed 3", ["--data-dir needs a value"]),
        ("--no-amp=no", ["--no-amp takes no value"]),
        ("--epochs 2.5", ["config.train.epochs='2.5'", "a whole number"]),
        ("--save-frequency often", ["'often epochs' is not a duration"]),
    ],
)
def test_what_is_not_taken_is_told_where_it_belongs(capsys, words, parts):
    said = refused(capsys, "train", "--config", "quickstart", *words.split())
    assert all(part in said for part in parts), said


def test_flags_of_the_run_come_behind_those_of_launch(capsys):
    assert "comes after --" in refused(capsys, "launch", "--nproc", "2", "--epochs", "3", "--", "train")


def test_every_hint_is_to_a_field_or_an_option():
    parser = argparse.ArgumentParser()
    cli.COMMANDS["train"].add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    for instead in set(_INSTEAD.values()) | {flag.target for flag in FLAGS.values()}:
        if instead.startswith("--"):
            assert instead in options
        elif "." in instead.split()[0]:
            words = instead.replace(",", " ").replace("=", " ").split()
            assert {word for word in words if "." in word} <= set(flat_keys()), instead
    assert not {f"--{name}" for name in _INSTEAD} & set(FLAGS)


def test_settings_in_yaml(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: resnet50\ntrain:\n  epochs: 3\n  deterministic: yes\noptim.learning_rate: 1e-3\n"
        "data: {mean: [0.5], std: [0.25]}\nglobal_batch_size: 32\nno-amp: true\nseed: 4\n"
    )
    config, said = config_of(capsys, "quickstart", "--yaml", str(path), "--seed", "5")
    assert (config["model"]["name"], config["model"]["width"], config["seed"]) == ("resnet50", 16, 5)
    assert (config["train"]["epochs"], config["train"]["deterministic"], config["train"]["precision"]) == (
        3,
        True,
        "f32",
    )
    assert (config["optim"]["learning_rate"], config["data"]["mean"], config["data"]["global_batch"]) == (
        0.001,
        [0.5],
        32,
    )
    assert "model: resnet50 is config.model.name; global_batch_size: 32 is config.data.global_batch=32; no-amp" in said
    config, _ = config_of(capsys, "--yaml", str(path))  # without a recipe: of the defaults
    assert (config["model"]["width"], config["train"]["epochs"]) == (0, 3)
    assert cli.main(["config", "--yaml", str(path), "--config.optim.ema=0.5"]) == 0
    rows = {row.split()[0]: row.split()[-1] for row in capsys.readouterr().out.splitlines()[1:]}
    assert [rows[f"config.{key}"] for key in ("seed", "optim.ema", "optim.b1")] == ["file", "flag", "default"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("batch_size: 3", "--config.data.global_batch=VALUE"),
        ("optim: {lr: 3}", "config.optim.lr does not exist. For lr use --config.optim.learning_rate"),
        ("optm: {name: sgd}", "config.optm.name does not exist. Did you mean 'config.optim.name'?"),
        ("pipeline_parallelism: true", "--config.layout.stages=VALUE"),
        ("train: 3", "train: 3 is a section"),
        ("output_dir: x", "It is --workdir on the command line"),
        ("seed:", "seed has no value"),
        ("no_amp: false", "must be true, or left out"),
        ("seed: [", "is no YAML"),
        ("- seed", "must hold fields of the config"),
        ("", "must hold fields of the config"),
    ],
)
def test_yaml_that_is_refused(capsys, tmp_path, text, part):
    (tmp_path / "bad.yaml").write_text(text)
    said = refused(capsys, "config", "--yaml", str(tmp_path / "bad.yaml"))
    assert f"--yaml {tmp_path / 'bad.yaml'}: " in said
    assert part in said


def test_a_yaml_file_is_no_recipe(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 3")
    assert f"is given with --yaml {tmp_path}" in refused(capsys, "config", str(tmp_path / "mine.yaml"))
    assert "No such file" in refused(capsys, "config", "--yaml", str(tmp_path / "none.yaml"))
