"""The run directory: what is refused before anything runs, atomic writes, and which settings may change on resume."""

import dataclasses
import errno
import os
import subprocess
from pathlib import Path

import pytest

from jaxtrain import workdir as wd
from jaxtrain.checkpoint import config_changes
from jaxtrain.config import Config, OptimConfig, TrainConfig, flat_keys, to_dict
from jaxtrain.errors import WorkdirError
from jaxtrain.host import files


def refusal(path) -> str:
    with pytest.raises(WorkdirError) as caught:
        wd.prepare(path)
    assert caught.value.exit_code == 73
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# ---------------------------------------------------------------------------------------------------------- prepare


def test_prepare_creates_the_directory_and_leaves_no_probe(tmp_path):
    run = wd.prepare(tmp_path / "runs" / "a run with ümlaut")
    assert run.path.is_dir()
    assert [p.name for p in run.path.iterdir()] == ["logs"]
    run.metrics_csv.write_text("kept")
    assert wd.prepare(run.path).metrics_csv.read_text() == "kept"


def test_the_names_other_tools_rely_on(tmp_path):
    run = wd.Workdir(tmp_path)
    paths = [run.config, run.metrics_csv, run.metrics_jsonl, run.tensorboard, run.manifest, run.result, run.checkpoints]
    assert [str(p.relative_to(tmp_path)) for p in [*paths, run.log(3)]] == [
        "config.json",
        "metrics.csv",
        "metrics.jsonl",
        "tensorboard",
        "manifest.json",
        "result.json",
        "checkpoints",
        "logs/process_3.log",
    ]


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        text = refusal(path)
        assert str(path) in text
        assert "a file is in its way" in text
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "empty name"),
        ("a\x00b", "control character"),
        ("a\nb", "control character"),
        ("gs://bucket/run", "not a local path"),
        ("s3:/bucket/run", "an address (s3:)"),
        (Path("s3://bucket/run"), "an address (s3:)"),
        (" hdfs://host/run", "an address (hdfs:)"),
        ("file:///runs/x", "write /runs/x"),
        ("x" * 300, "File name too long"),
    ],
)
def test_an_illegal_name_is_refused(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["runs/a:b", "./s3:/b", "a:b"])
def test_a_colon_in_a_name_is_a_letter(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert wd.prepare(name).path == tmp_path / name
    assert (tmp_path / name / "logs").is_dir()


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "mkdir"])
def test_every_step_of_the_probe_counts(tmp_path, monkeypatch, call):
    def fails(*_args, **_kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    target = {"open": "builtins.open", "fsync": "os.fsync", "replace": "os.replace", "mkdir": "os.mkdir"}[call]
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(target, fails)
        text = refusal(tmp_path / "run")
    assert "Read-only file system" in text
    assert "--workdir" in text
    assert not list((tmp_path / "run").glob(".probe*"))


def test_a_file_system_that_is_really_read_only_is_refused(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a read-only tmpfs is not permitted here")
    try:
        assert "Read-only file system" in refusal(tmp_path / "run")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# ------------------------------------------------------------------------------------------------------------ files


def test_an_interrupted_write_keeps_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.atomic_write(path, "old")

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WorkdirError, match=r"result\.json cannot be written \(No space left on device\)"):
            files.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    (tmp_path / ".result.json.part").write_text("what a killed process left")
    files.atomic_write(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_config_is_stored_and_read_back(tmp_path):
    run = wd.prepare(tmp_path)
    assert run.read_config() is None
    config = to_dict(Config(optim=OptimConfig(learning_rate=1 / 3)))
    run.write_config(config)
    assert config_changes.changes(run.read_config() or {}, config) == []  # tuples come back as lists: no change


@pytest.mark.parametrize("text", ["", '{"seed": 0', "[1]", "null", b"\xff\xfe{}"])
def test_a_damaged_config_is_refused(tmp_path, text):
    run = wd.prepare(tmp_path)
    run.config.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WorkdirError, match=r"config\.json is damaged") as caught:
        run.read_config()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- changes


def changed(**values):
    """The change that each dotted key (`__` for the dot) makes to the default config."""
    new = to_dict(Config())
    for name, value in values.items():
        *section, key = name.split("__")
        (new[section[0]] if section else new)[key] = value
    return config_changes.changes(to_dict(Config()), new)


def test_every_field_has_its_kind():
    """A new field must be put in one of the three lists here by hand: a wrong `free` would move numbers in silence."""
    free = {
        *("data.dir", "data.batch_per_device", "data.residency", "data.workers", "data.skip_bad"),
        *("data.prepare_per_host", "data.prepare_timeout"),
        *("train.log_every", "train.eval_every", "train.eval_examples", "train.deterministic"),
        *("train.remat", "train.hang_seconds"),
        *("train.steps_per_call", "train.nonfinite_skips", "train.rollbacks", "train.spike_threshold"),
        "train.check_replicas_every",
        *("layout.data", "layout.replica", "layout.tensor", "layout.zero", "layout.microbatches", "layout.rules"),
        *("layout.stages", "layout.schedule", "layout.chunks", "layout.boundaries", "layout.balance"),
        *("layout.stage_placement", "layout.trace_step", "layout.strategy", "layout.keep", "layout.memory_limit"),
        *("layout.reduce", "layout.reduce_bucket", "layout.nccl_algo", "layout.nccl_protocol"),
        *("checkpoint.every", "checkpoint.keep", "checkpoint.milestone_every", "checkpoint.resume"),
        *("checkpoint.allow_changes", "checkpoint.best"),
        *("telemetry.every", "telemetry.probe_every", "telemetry.port", "telemetry.images"),
        "telemetry.histograms_every",
        *("callbacks.names", "callbacks.patience", "callbacks.min_delta", "callbacks.swa_start"),
        *("sinks.names", "sinks.project", "sinks.close_seconds"),
        *("profile.steps", "profile.length", "cost.per_gpu_hour"),
    }
    length = {"train.epochs", "train.steps"}
    numbers = {
        "seed",
        *("data.name", "data.global_batch", "data.image_size", "data.augmentation", "data.crop_padding", "data.mixup"),
        *("data.cutmix", "data.flip", "data.crop_scale", "data.crop_ratio", "data.crop_pct", "data.interpolation"),
        *("data.mean", "data.std", "data.splits", "data.examples", "data.validation", "data.split_seed"),
        *(key for key in flat_keys() if key.startswith(("model.", "optim."))),
        "train.precision",
    }
    other = {key: object() for key in flat_keys()}
    kinds = {change.key: change.kind for change in config_changes.changes({}, other)}
    got = {kind: {key for key, value in kinds.items() if value == kind} for kind in ("free", "length", "numbers")}
    assert got == {"free": free, "length": length, "numbers": numbers}


def test_what_moves_where_or_how_often_is_free():
    found = changed(layout__zero=3, layout__microbatches=4, checkpoint__keep=5, train__log_every=1, data__workers=2)
    assert len(found) == 5
    assert config_changes.refused(found, same_rates=False) == []


def test_bn_groups_is_not_a_layout():
    assert [c.key for c in config_changes.refused(changed(model__bn_groups=4), same_rates=True)] == ["model.bn_groups"]


def test_the_length_is_free_only_where_no_rate_already_used_moves():
    found = changed(train__epochs=7)
    assert config_changes.refused(found, same_rates=True) == []
    assert [c.key for c in config_changes.refused(found, same_rates=False)] == ["train.epochs"]


def test_the_refusal_names_each_key_both_values_and_the_flag(tmp_path):
    found = config_changes.refused(changed(optim__learning_rate=0.2, seed=3, layout__zero=1), same_rates=True)
    text = config_changes.refuse_text(tmp_path, found)
    assert f"{tmp_path} " in text
    assert "(config.seed: 0 -> 3, config.optim.learning_rate: 0.1 -> 0.2)" in text
    assert "--config.checkpoint.allow_changes=true" in text
    assert "layout" not in text
    assert "\n" not in text


def test_a_field_that_an_older_version_did_not_store_had_its_default():
    stored = to_dict(Config())
    del stored["optim"]["ema"]
    assert config_changes.changes(stored, to_dict(Config())) == []
    new = to_dict(Config(optim=dataclasses.replace(Config().optim, ema=0.9)))
    assert [str(c) for c in config_changes.changes(stored, new)] == ["config.optim.ema: 0.0 -> 0.9"]


def test_a_field_that_only_the_stored_config_has_is_a_change():
    stored = {**to_dict(Config(train=TrainConfig())), "gone": 1}
    assert [(c.key, c.kind) for c in config_changes.changes(stored, to_dict(Config()))] == [("gone", "numbers")]
