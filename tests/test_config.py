"""The config: every bad value is one `ConfigError` that names the field, the value and what is required."""

import dataclasses
import json
import math

import pytest

from jaxtrain import config as c
from jaxtrain.config import (
    CallbacksConfig,
    CheckpointConfig,
    Config,
    CostConfig,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    ProfileConfig,
    SinksConfig,
    TelemetryConfig,
    TrainConfig,
)
from jaxtrain.durations import Duration
from jaxtrain.errors import ConfigError


def refusal(make, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*args, **kwargs)
    assert caught.value.exit_code == 64
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


# -------------------------------------------------------------------------------------------------------------- values

NAN, INF = math.nan, math.inf
BAD = [
    # types: a bool is not a number, a number is not a string
    (Config, "seed", 1.0, "a whole number"),
    (Config, "seed", True, "a whole number"),
    (Config, "seed", -1, "at least 0"),
    (Config, "seed", 2**31, "below 2**31"),
    (Config, "data", {"name": "digits"}, "DataConfig"),
    (DataConfig, "name", 3, "a string"),
    (DataConfig, "name", "", "the name of a data set"),
    (DataConfig, "global_batch", "64", "a whole number"),
    (DataConfig, "global_batch", 0, "at least 1"),
    (DataConfig, "batch_per_device", -1, "at least 0"),
    (DataConfig, "image_size", -32, "at least 0"),
    (DataConfig, "crop_padding", -2, "at least -1"),
    (DataConfig, "crop_scale", (0.0, 1.0), "two shares of the area"),
    (DataConfig, "crop_scale", (0.5, 0.25), "the smaller first"),
    (DataConfig, "crop_ratio", (0.01, 1.0), "two ratios between 1/16 and 16"),
    (DataConfig, "crop_pct", 0.0, "above 0 and at most 1"),
    (DataConfig, "interpolation", "nearest", "one of bilinear, bicubic"),
    (DataConfig, "flip", "yes", "true or false"),
    (
        DataConfig,
        "augmentation",
        "hevy",
        "random_resized_crop, or your own package.module:function. Did you mean 'heavy'?",
    ),
    (DataConfig, "mixup", -0.1, "at least 0"),
    (DataConfig, "mixup", NAN, "a finite number"),
    (DataConfig, "cutmix", INF, "a finite number"),
    (DataConfig, "mean", (0.5,), "as long as"),
    (DataConfig, "std", (0.5,), "as long as"),
    (DataConfig, "skip_bad", 1, "true or false"),
    (DataConfig, "examples", -5, "at least 0"),
    (DataConfig, "validation", 1.0, "at least 0 and below 1"),
    (DataConfig, "validation", -0.1, "at least 0 and below 1"),
    (DataConfig, "splits", "train", "pairs such as 'train=train,validation=val,test=none'"),
    (DataConfig, "splits", "train=a,val=b,validation=c", "at most once"),
    (DataConfig, "splits", "train=none", "with a split to train on"),
    (DataConfig, "dir", "None", "write ''"),
    (DataConfig, "split_seed", -1, "at least 0"),
    (DataConfig, "split_seed", 2**64, "below 2**31"),
    (DataConfig, "mixup", 32.0, "below 32"),
    (DataConfig, "cutmix", 120.0, "below 32"),
    (DataConfig, "residency", "gpu", "one of auto, device, stream"),
    (DataConfig, "workers", -2, "at least -1"),
    (DataConfig, "prepare_per_host", 1, "true or false"),
    (DataConfig, "prepare_timeout", 0, "above 0 minutes"),
    (ModelConfig, "num_classes", 1, "0, or at least 2"),
    (ModelConfig, "num_classes", -1, "0, or at least 2"),
    (ModelConfig, "init_from", "s3://bucket/vgg19.safetensors", "not a local path"),
    (ModelConfig, "init_sha256", "abc", "a SHA-256 as 64 hexadecimal digits, or ''"),
    (ModelConfig, "width", -64, "at least 0"),
    (ModelConfig, "depths", (1, 0), "whole numbers above 0"),
    (ModelConfig, "depths", (1, 2.0), "whole numbers above 0"),
    (ModelConfig, "depths", 2, "a tuple"),
    (ModelConfig, "stem", "Cifar", "one of auto, cifar, imagenet. Did you mean 'cifar'?"),
    (ModelConfig, "patch", -1, "at least 0"),
    (ModelConfig, "window", -1, "at least 0"),
    (ModelConfig, "attention", "flash", "one of plain, pallas"),
    (ModelConfig, "dropout", 1.0, "at least 0 and below 1"),
    (ModelConfig, "dropout", -0.5, "at least 0 and below 1"),
    (ModelConfig, "drop_path", 1.5, "at least 0 and below 1"),
    (ModelConfig, "bn_groups", 0, "at least 1"),
    (ModelConfig, "freeze_bn", 1, "true or false"),
    (OptimConfig, "learning_rate", -1e-9, "at least 0"),
    (OptimConfig, "learning_rate", NAN, "a finite number"),
    (OptimConfig, "learning_rate", "0.1", "a number"),
    (OptimConfig, "learning_rate", True, "a number"),
    (OptimConfig, "lr_reference_batch", 0, "at least 1"),
    (OptimConfig, "lr_scaling", "liner", "one of linear, sqrt, none. Did you mean 'linear'?"),
    (OptimConfig, "momentum", 1.0, "below 1"),
    (OptimConfig, "b1", -0.1, "at least 0"),
    (OptimConfig, "b2", 1.0, "below 1"),
    (OptimConfig, "eps", 0.0, "above 0"),
    (OptimConfig, "weight_decay", -1.0, "at least 0"),
    (OptimConfig, "schedule", "cosin", "Did you mean 'cosine'?"),
    (OptimConfig, "warmup", "5 eons", "not a duration"),
    (OptimConfig, "warmup", 5, "a string"),
    (OptimConfig, "step_at", (0.6, 0.3), "rising shares"),
    (OptimConfig, "step_at", (0.3, 1.0), "rising shares"),
    (OptimConfig, "step_at", ("0.3",), "rising shares"),
    (OptimConfig, "step_gamma", -0.1, "at least 0"),
    (OptimConfig, "decay_share", 0.0, "above 0 and at most 1"),
    (OptimConfig, "final_scale", 1.1, "between 0 and 1"),
    (OptimConfig, "clip_norm", -1.0, "at least 0"),
    (OptimConfig, "clip_norm", INF, "a finite number"),
    (OptimConfig, "label_smoothing", 1.0, "below 1"),
    (OptimConfig, "ema", 1.0, "below 1"),
    (OptimConfig, "freeze", ("(",), "not a regular expression"),
    (OptimConfig, "freeze", (3,), "a regular expression"),
    (OptimConfig, "freeze_layers", "head", "a whole number"),
    (OptimConfig, "layer_decay", 0.0, "above 0 and at most 1"),
    (OptimConfig, "layer_decay", 1.1, "above 0 and at most 1"),
    (OptimConfig, "head_rate", 0.0, "above 0"),
    (OptimConfig, "compress", "int4", "one of none, bf16, int8, topk, randomk, powersgd. Did you mean 'int8'?"),
    (OptimConfig, "compress_ratio", 0.0, "above 0 and at most 1"),
    (OptimConfig, "compress_ratio", 1.5, "above 0 and at most 1"),
    (OptimConfig, "compress_rank", 0, "at least 1"),
    (OptimConfig, "compress_min_rate", 0.5, "at least 1"),
    (OptimConfig, "compress_warmup", -1, "at least 0"),
    (OptimConfig, "sync_every", 0, "at least 1"),
    (OptimConfig, "outer_rate", 0.0, "above 0"),
    (OptimConfig, "outer_momentum", 1.0, "below 1"),
    (OptimConfig, "class_weights", "1,-2", "a number above 0 for each class"),
    (OptimConfig, "class_weights", "1,nan", "a number above 0 for each class"),
    (OptimConfig, "class_weights", "balance", "'balanced', or a number"),
    (TrainConfig, "epochs", 0, "at least 1"),
    (TrainConfig, "steps", -1, "at least 0"),
    (TrainConfig, "log_every", 0, "at least 1"),
    (TrainConfig, "steps_per_call", 0, "at least 1"),
    (TrainConfig, "eval_every", "30 minutes", "not a duration"),
    (TrainConfig, "eval_examples", -1, "at least 0"),
    (TrainConfig, "hang_seconds", -1.0, "at least 0"),
    (TrainConfig, "nonfinite_skips", -1, "at least 0"),
    (TrainConfig, "rollbacks", -1, "at least 0"),
    (TrainConfig, "spike_threshold", -0.5, "at least 0"),
    (TrainConfig, "check_replicas_every", -1, "at least 0"),
    (TrainConfig, "deterministic", "yes", "true or false"),
    (TrainConfig, "precision", "fp8", "one of auto, f32, tf32, bf16, fp16, f64"),
    (TrainConfig, "remat", "all", "one of none, full, dots"),
    (LayoutConfig, "data", 0, "at least 1, or -1"),
    (LayoutConfig, "data", -2, "at least 1, or -1"),
    (LayoutConfig, "replica", 0, "at least 1"),
    (LayoutConfig, "tensor", 0, "at least 1"),
    (LayoutConfig, "zero", 4, "0, 1, 2 or 3"),
    (LayoutConfig, "zero", -1, "0, 1, 2 or 3"),
    (LayoutConfig, "microbatches", -1, "at least 0"),
    (LayoutConfig, "stages", 0, "at least 1"),
    (LayoutConfig, "chunks", 0, "at least 1"),
    (LayoutConfig, "schedule", "1f1", "one of gpipe, 1f1b, interleaved_1f1b. Did you mean '1f1b'?"),
    (LayoutConfig, "boundaries", (3, 2), "whole numbers, each larger than the one before"),
    (LayoutConfig, "balance", "flops", "one of cost, memory, time"),
    (LayoutConfig, "stage_placement", "host", "one of spread, hosts. Did you mean 'hosts'?"),
    (LayoutConfig, "reduce", "rings", "one of auto, ring, tree, hierarchical. Did you mean 'ring'?"),
    (LayoutConfig, "reduce_bucket", 0.0, "above 0 MiB"),
    (LayoutConfig, "nccl_algo", "trees", "one of auto, ring, tree, nvls"),
    (LayoutConfig, "nccl_protocol", "ll64", "one of auto, ll, ll128, simple"),
    (LayoutConfig, "strategy", "automatic", "one of manual, auto"),
    (LayoutConfig, "keep", ("zero", "zer"), "names among data, replica, tensor"),
    (LayoutConfig, "memory_limit", -1.0, "at least 0"),
    (LayoutConfig, "trace_step", -1, "at least 0"),
    (LayoutConfig, "rules", ("kernel", ("tensor",)), "rules='kernel': must be a pair"),
    (LayoutConfig, "rules", (("kernel",),), "a pair"),
    (LayoutConfig, "rules", ((3, ("tensor",)),), "rules=(3, ('tensor',)): must be a pair"),
    (LayoutConfig, "rules", (("(", ("tensor",)),), "not a regular expression"),
    (LayoutConfig, "rules", (("kernel", ("stage",)),), "made of 'data', 'tensor' and None"),
    (LayoutConfig, "rules", (("kernel", ("tensor", "tensor")),), "each axis at most once"),
    (CallbacksConfig, "names", "swa", "a tuple"),
    (CallbacksConfig, "names", ("swap",), "your own package.module:Class, each at most once"),
    (CallbacksConfig, "names", ("swa", "swa"), "each at most once"),
    (CallbacksConfig, "patience", 0, "at least 1"),
    (CallbacksConfig, "min_delta", -0.1, "at least 0"),
    (CallbacksConfig, "swa_start", 1.0, "at least 0 and below 1"),
    (SinksConfig, "names", ("wandbb",), "a tuple of wandb, mlflow, trackio"),
    (SinksConfig, "project", "", "the name of a project"),
    (SinksConfig, "close_seconds", 0, "above 0 seconds"),
    (CheckpointConfig, "every", "soon", "not a duration"),
    (CheckpointConfig, "best", "loss", "one of val_accuracy, val_loss, val_top5"),
    (CheckpointConfig, "keep", 0, "at least 1"),
    (CheckpointConfig, "milestone_every", "30 minutes", "not a duration"),
    (CheckpointConfig, "resume", "", "auto, latest, best"),
    (CheckpointConfig, "allow_changes", 0, "true or false"),
    (TelemetryConfig, "every", -1.0, "at least 0"),
    (TelemetryConfig, "probe_every", -2, "at least -1"),
    (TelemetryConfig, "port", 65536, "at least 0 and below 65536"),
    (TelemetryConfig, "images", -1, "at least 0"),
    (TelemetryConfig, "histograms_every", -1, "at least 0"),
    (ProfileConfig, "steps", (100,), "two steps from 1 on"),
    (ProfileConfig, "steps", (0, 5), "two steps from 1 on"),
    (ProfileConfig, "steps", (6, 5), "the first and the last"),
    (ProfileConfig, "length", 0, "at least 1"),
    (CostConfig, "per_gpu_hour", -2.5, "at least 0"),
]


@pytest.mark.parametrize(("section", "field", "value", "wanted"), BAD, ids=lambda v: getattr(v, "__name__", repr(v)))
def test_a_bad_value_names_field_value_and_requirement(section, field, value, wanted):
    prefix = {s: f"{name}." for name, s in c.SECTIONS.items()}.get(section, "")
    text = refusal(section, **{field: value})
    assert wanted in text
    # of mean and std, whose lengths must agree, either may be named
    assert f"config.{prefix}{'std' if field == 'mean' else field}" in text
    assert field in ("rules", "freeze") or repr(value) in text  # of the rules, the one that is wrong is shown


def test_every_field_has_a_bad_value_in_the_table():
    """A new field must say what it refuses; these take any value of their type."""
    anything = {"optim.name", "optim.loss", "optim.nesterov", "model.name"}
    sections = {f"{name}." if name else "": s for name, s in {"": Config, **c.SECTIONS}.items()}
    tested = {prefix + field for section, field, *_ in BAD for prefix, s in sections.items() if s is section}
    assert set(c.flat_keys()) - tested == anything


def test_class_weights_are_not_for_a_loss_of_ones_own():
    text = refusal(OptimConfig, class_weights="balanced", loss="mine:focal")
    assert "config.optim.class_weights='balanced': only the loss cross_entropy" in text
    assert "in mine:focal" in text


def test_values_that_are_not_finite_numbers_in_a_tuple():
    for bad in ((NAN, 1.0), (INF, 1.0), ("0.5", 1.0), (True, 1.0)):
        assert "finite numbers" in refusal(DataConfig, mean=bad, std=(1.0, 1.0))
    assert "above 0" in refusal(DataConfig, mean=(0.5,), std=(0.0,))


def test_whole_numbers_are_fine_for_floats_and_lists_for_tuples():
    optim = OptimConfig(learning_rate=1, step_at=[0.5])  # type: ignore[arg-type]
    assert (type(optim.learning_rate), optim.step_at) == (float, (0.5,))
    rules = LayoutConfig(rules=[["kernel$", [None, "tensor"]]]).rules  # type: ignore[arg-type]
    assert rules == (("kernel$", (None, "tensor")),)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------ meanings


def test_every_field_has_a_meaning():
    """One paragraph of whole sentences, in the string below the field."""
    fields = c.explain()
    assert list(fields) == c.flat_keys()
    for key, info in fields.items():
        assert info.meaning.endswith("."), key
        assert info.meaning[0].isupper(), key
        assert info.meaning.isprintable(), key  # no line breaks
    assert list(c.explain_sections()) == list(c.SECTIONS)
    assert all(text.endswith(".") for text in c.explain_sections().values())


def test_every_choice_of_a_field_is_explained_in_its_meaning():
    choices = {key: info for key, info in c.explain().items() if info.allowed.startswith("one of ")}
    assert len(choices) == 18
    for key, info in choices.items():
        named = info.allowed.removeprefix("one of ").replace("or your own ", "").split(", ")
        unexplained = [name for name in named if f"`{name}`" not in info.meaning]
        assert not unexplained, key


def test_what_is_explained_is_what_is_checked():
    """The words for the allowed values are those of the refusal, for every bad value that a rule refuses."""
    fields, sections = c.explain(), {s: name for name, s in c.SECTIONS.items()}
    in_a_tuple = [(DataConfig, name, ("0.5",), "") for name in ("mean", "std")]
    told = set()
    for section, field, value, _ in [*BAD, *in_a_tuple]:
        key = f"{sections[section]}.{field}" if section in sections else field
        if key in fields and f"must be {fields[key].allowed}." in refusal(section, **{field: value}):
            told.add(key)
    by_parse = {"optim.warmup", "train.eval_every", "checkpoint.every", "checkpoint.milestone_every"}
    assert {key for key, info in fields.items() if info.allowed} - told == by_parse


def test_a_duration_that_is_refused_is_told_the_explained_units():
    for key in ("optim.warmup", "checkpoint.every"):
        section, field = key.split(".")
        for unit in ("steps", "epochs", "examples", "minutes"):
            explained = unit in c.explain()[key].allowed
            if explained:
                assert c.SECTIONS[section](**{field: f"3 {unit}"})
            else:
                assert "not a duration" in refusal(c.SECTIONS[section], **{field: f"3 {unit}"})


def test_the_rest_that_is_known_of_a_field():
    info = c.explain()["optim.learning_rate"]
    assert (info.type, info.default, info.allowed) == ("float (a number)", 0.1, "at least 0")
    assert c.explain()["checkpoint.allow_changes"].type == "bool (true or false)"
    assert {key: info.default for key, info in c.explain().items()} == c.flatten(c.to_dict(Config()))


# --------------------------------------------------------------------------------------------------------- dictionaries


def unusual() -> Config:
    return Config(
        seed=7,
        data=DataConfig(name="synthetic", global_batch=48, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)),
        model=ModelConfig("resnet50", depths=(1, 2, 3, 4), bn_groups=4),
        optim=OptimConfig("lamb", step_at=(0.25,), warmup="1e3 examples"),
        layout=LayoutConfig(rules=(("kernel$", (None, "tensor")), ("x", ())), microbatches=2),
    )


def test_a_config_survives_being_stored():
    for config in (Config(), unusual()):
        assert c.from_dict(c.to_dict(config)) == config
        assert c.from_dict(json.loads(json.dumps(c.to_dict(config)))) == config


def test_what_is_left_out_keeps_its_default():
    assert c.from_dict({}) == Config()
    assert c.from_dict({"optim": {"name": "adamw"}}) == Config(optim=OptimConfig(name="adamw"))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"optim": {"learning_rat": 1}}, ["config.optim.learning_rat does not exist", "'config.optim.learning_rate'"]),
        ({"train": {"learning_rate": 1}}, ["config.train.learning_rate does not exist"]),
        ({"epochs": 3}, ["config.epochs does not exist"]),
        ({"optim": 3}, ["config.optim=3", "a section with keys, such as config.optim.name"]),
        ({"optim": {"ema": 2.0}}, ["config.optim.ema=2.0"]),
    ],
)
def test_a_dictionary_with_something_unknown(values, parts):
    text = refusal(c.from_dict, values)
    assert all(part in text for part in parts), text


def test_flat_keys_are_those_of_the_stored_config():
    assert c.flat_keys() == list(c.flatten(c.to_dict(unusual())))
    assert "seed" in c.flat_keys()
    assert c.flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("batch", "layout", "groups", "parts"),
    [
        (64, 3, 1, ["global_batch=64", "layout.microbatches=3", "are 63 and 66"]),
        (64, 1, 5, ["global_batch=64", "model.bn_groups=5", "are 60 and 65"]),
        (3, 4, 1, ["layout.microbatches=4", "is 4"]),
    ],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(batch, layout, groups, parts):
    sections = {"layout": LayoutConfig(microbatches=layout), "model": ModelConfig(bn_groups=groups)}
    text = refusal(Config, data=DataConfig(global_batch=batch), **sections)
    assert all(part in text for part in parts), text
    # said once the devices are known, where the batch is given per device
    assert Config(data=DataConfig(global_batch=batch, batch_per_device=3), **sections).seed == 0
    refusal(Config.check_batch, batch, layout, groups)


# ------------------------------------------------------------------------------------------------------------ durations


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0", 0), ("500", 500), ("500 steps", 500), ("1 step", 1), ("2.5 steps", 3), (" 7  Steps ", 7),
        ("1 epoch", 10), ("2.5 epochs", 25), ("0.01 epochs", 1), ("0.25epochs", 3),
        ("100 examples", 1), ("101 examples", 2), ("1e3 examples", 10), ("1 example", 1),
    ],
)  # fmt: skip
def test_durations_in_steps(text, steps):
    """1,000 examples an epoch, batches of 100."""
    assert Duration.parse(text, "config.optim.warmup").steps(1000, 100) == steps


def test_an_epoch_that_is_not_a_whole_number_of_steps_is_rounded_up():
    assert Duration.parse("1 epoch", "x").steps(1001, 100) == 11
    assert Duration.parse("3 epochs", "x").steps(1001, 100) == 31


def test_minutes_are_allowed_only_where_the_clock_may_decide():
    assert Duration.parse("1.5 minutes", "config.checkpoint.every", minutes=True).seconds == 90
    assert Duration.parse("2 min", "config.checkpoint.every", minutes=True).seconds == 120
    assert "config.optim.warmup='1 minute'" in refusal(Duration.parse, "1 minute", "config.optim.warmup")
    assert "or minutes" in refusal(Duration.parse, "1 hour", "config.checkpoint.every", minutes=True)


@pytest.mark.parametrize(
    "text", ["", "epochs", "-1", "-1 epochs", "1 2", "nan", "inf steps", "1e400", "5 epochs 3", "1,5", "٣"]
)
def test_what_is_not_a_duration(text):
    assert f"config.optim.warmup={text!r}" in refusal(Duration.parse, text, "config.optim.warmup")
