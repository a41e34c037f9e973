"""The config of a run: frozen dataclasses, all validation, and durations. Imports no JAX.

A recipe (a file in `configs/`) returns a locked `ml_collections.ConfigDict` made by `recipe(Config(...))`. After the
flags have changed fields of it, `from_dict` rebuilds these dataclasses, and they validate themselves: a bad value is one
`ConfigError` that names the field, the value found and the values allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtrain.durations import Duration
from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import require_local

AUGMENTATIONS = ("none", "light", "heavy", "resize_crop")
RESIDENCIES = ("auto", "device", "stream")
LR_SCALINGS = ("linear", "sqrt", "none")
SCHEDULES = ("constant", "step", "cosine", "linear", "wsd")
PRECISIONS = ("auto", "f32", "bf16", "fp16", "f64")
REMATS = ("none", "full", "dots")
PIPELINE_SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b")
BALANCES = ("cost", "memory", "time")
STAGE_PLACEMENTS = ("spread", "hosts")
STEMS = ("auto", "cifar", "imagenet")


# ------------------------------------------------------------------------------------------------------------- checks


def _require(condition: bool, field: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"config.{field}={value!r}: must be {wanted}.")


def _local(field: str, value: str, path: str) -> None:
    """path: the part of `value` that names a file or a directory."""
    require_local(path, f"config.{field}={value!r}", ConfigError)


def _one_of(field: str, value: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ConfigError(
            f"config.{field}={value!r}: must be one of {', '.join(allowed)}.{did_you_mean(value, allowed)}"
        )


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """' Did you mean X?' when a known word is close to `word`, else ''. prefix: set before X."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f" Did you mean {prefix + close[0]!r}?" if close else ""


def without_effect(section: str, values: _Section, fields: Iterable[str], why: str) -> list[str]:
    """A sentence for each of `fields` that was set to another value than its default, although nothing reads it."""
    changed = [name for name in fields if getattr(values, name) != getattr(type(values)(), name)]
    return [f"config.{section}.{name}={getattr(values, name)!r} has no effect: {why}" for name in changed]


class _Section:
    """Checks every field's type and that floats are finite, then the section's own rules (`_validate`)."""

    _prefix = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, wanted = getattr(self, field.name), hints[field.name]
            name = self._prefix + field.name
            if wanted is float and type(value) is int:
                object.__setattr__(self, field.name, value := float(value))
            if wanted is tuple and type(value) is list:
                object.__setattr__(self, field.name, value := _tuples(value))
            if type(value) is not wanted:
                raise ConfigError(f"config.{name}={value!r}: must be {_KIND.get(wanted, wanted.__name__)}.")
            if value == "None":  # `--config.data.dir=None` is a text, and would be the name of a directory
                default = getattr(type(self)(), field.name)
                raise ConfigError(f"config.{name}='None': write {default!r}, the default, or leave it out.")
            if wanted is float and not math.isfinite(value):
                raise ConfigError(f"config.{name}={value!r}: must be a finite number.")
        self._validate()

    def _validate(self) -> None:
        """Overridden by sections with rules of their own."""

    def _min(self, low: float, *names: str) -> None:
        for name in names:
            _require(getattr(self, name) >= low, self._prefix + name, getattr(self, name), f"at least {low:g}")

    def _between(self, low: float, high: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            _require(low <= value < high, self._prefix + name, value, f"at least {low:g} and below {high:g}")


_KIND = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "a tuple"}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


# ----------------------------------------------------------------------------------------------------------- sections


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
    """What is trained on, and how it becomes batches.

    name: `digits`, `synthetic`, `cifar10`, `cifar100`, `folder:PATH`, any prepared TFDS name, or `package.module:factory`.
    dir: data directory; empty means `$JAXTRAIN_DATA_DIR`, then `~/.cache/jaxtrain/data`.
    global_batch: examples per optimizer step over all devices. batch_per_device > 0 sets it at first start instead.
    image_size: side in pixels that the model sees; 0 keeps the source's own.
    augmentation: `none`; `light` (pad-4 crop, flip); `heavy` (light, RandAugment, colour jitter, random erasing);
        `resize_crop` (resize to 8/7 of image_size, random crop, flip; evaluation takes the centre crop).
    crop_padding: pixels around an image before `light` and `heavy` crop it; 0 is an eighth of its side, 4 for 32.
    mixup, cutmix: the Beta distribution's alpha (Zhang 2018, Yun 2019); 0 is off, below 32; both on: a batch gets one of them.
    mean, std: per-channel normalization in [0, 1]; empty means the source's own.
    splits: which splits of a folder or a TFDS data set are used, "train=train,validation=val,test=none" for example; `none`
        goes without one, and what is not named is found by its usual name, or drawn from training.
    examples: use only the first so many training examples (for `synthetic`: how many there are); 0 means all.
    validation: share of the training set held out where the data set has no validation split of its own.
    split_seed: decides which examples those are; independent of `seed`.
    residency: keep the data set on the device (`device`), read it as it goes (`stream`), or decide by size (`auto`).
    workers: reading processes for `stream`; -1 takes them from the CPUs this process may use, 0 reads in this process, with
        several threads where large images are decoded.
    prepare_per_host: every host prepares its own copy (local disks) instead of process 0 alone.
    prepare_timeout: minutes that the other processes wait while the data set is prepared.
    """

    _prefix = "data."

    name: str = "digits"
    dir: str = ""
    global_batch: int = 128
    batch_per_device: int = 0
    image_size: int = 0
    augmentation: str = "none"
    crop_padding: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    mean: tuple = ()
    std: tuple = ()
    splits: str = ""
    examples: int = 0
    validation: float = 0.1
    split_seed: int = 0
    residency: str = "auto"
    workers: int = -1
    prepare_per_host: bool = False
    prepare_timeout: float = 60.0

    def _validate(self) -> None:
        _require(bool(self.name), "data.name", self.name, "the name of a data set")
        _local("data.name", self.name, self.name.removeprefix("folder:"))
        _local("data.dir", self.dir, self.dir)
        self._min(1, "global_batch")
        self._min(0, "batch_per_device", "image_size", "crop_padding", "examples")
        self._min(-1, "workers")
        self._between(0.0, 1.0, "validation")
        self._between(0.0, 32.0, "mixup", "cutmix")
        _require(0 <= self.split_seed < 2**31, "data.split_seed", self.split_seed, "at least 0 and below 2**31")
        _require(self.prepare_timeout > 0, "data.prepare_timeout", self.prepare_timeout, "above 0 minutes")
        _ = self.chosen_splits
        _one_of("data.augmentation", self.augmentation, AUGMENTATIONS)
        _one_of("data.residency", self.residency, RESIDENCIES)
        _require(len(self.mean) == len(self.std), "data.std", self.std, f"as long as data.mean={self.mean!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            numbers = all(type(v) in (int, float) and math.isfinite(v) for v in values)
            _require(numbers, "data." + name, values, "a tuple of finite numbers, one a channel")
        _require(all(v > 0 for v in self.std), "data.std", self.std, "above 0")

    @property
    def chosen_splits(self) -> dict[str, str]:
        """What `splits` says: of `train`, `validation` and `test` those that it names -> a split's own name, or `none`."""
        chosen: dict[str, str] = {}
        wanted = "pairs such as 'train=train,validation=val,test=none', each of train, validation and test at most once"
        for pair in filter(None, self.splits.split(",")):
            name, equals, own = (part.strip() for part in pair.partition("="))
            split = {"val": "validation"}.get(name, name)
            good = equals and own and split in ("train", "validation", "test") and split not in chosen
            _require(bool(good), "data.splits", self.splits, wanted)
            chosen[split] = own
        _require(chosen.get("train") != "none", "data.splits", self.splits, "with a split to train on")
        return chosen


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Section):
    """Which classifier.

    name: `mlp`, `vgg11` ... `vgg19_bn`, `resnet18` ... `resnet152`, `swin_tiny|small|base`, `convnet_fast`, or
        `package.module:Class`.
    num_classes: 0 means the data set's.
    width: channels of the first stage (Swin-T: 96; the other networks: 64) or hidden width (MLP: 512); 0 is the model's own.
    depths: blocks a stage, e.g. (1, 1, 1, 1); empty is the model's own.
    stem: `cifar` (3x3, stride 1) or `imagenet` (7x7, stride 2, max-pool); `auto` decides by image size (ResNet, VGG).
    patch, window: Swin's; 0 decides by image size.
    dropout, drop_path: rates; -1 is the model's own. drop_path is the last block's (stochastic depth, Huang 2016).
    bn_groups: BatchNorm takes its statistics over this many groups of the global batch; 1 is the whole batch.
    """

    _prefix = "model."

    name: str = "resnet18"
    num_classes: int = 0
    width: int = 0
    depths: tuple = ()
    stem: str = "auto"
    patch: int = 0
    window: int = 0
    dropout: float = -1.0
    drop_path: float = -1.0
    bn_groups: int = 1

    def _validate(self) -> None:
        self._min(0, "num_classes", "width", "patch", "window")
        self._min(1, "bn_groups")
        _require(self.num_classes != 1, "model.num_classes", 1, "at least 2")
        _one_of("model.stem", self.stem, STEMS)
        depths = all(type(d) is int and d > 0 for d in self.depths)
        _require(depths, "model.depths", self.depths, "a tuple of whole numbers above 0")
        for name in ("dropout", "drop_path"):
            value = getattr(self, name)
            _require(
                value == -1 or 0 <= value < 1, "model." + name, value, "at least 0 and below 1 (or -1: the model's own)"
            )


@dataclasses.dataclass(frozen=True)
class OptimConfig(_Section):
    """How parameters are updated.

    name: `sgd`, `adamw`, `lamb`, `lars`, `lion`, `muon`, or `package.module:factory`.
    learning_rate: at a global batch of `lr_reference_batch`; `lr_scaling` (linear, sqrt, none) carries it to another.
    schedule: `constant`, `step` (times `step_gamma` at each share of the run in `step_at`), `cosine`, `linear`, `wsd`
        (warm-up, stable, and linear decay over the last `decay_share` of the run); ends at `final_scale` of the peak.
    warmup: linear warm-up, a duration ("5 epochs", "500 steps", "1e5 examples").
    weight_decay: decoupled except in `sgd` and `lars` (where it joins the gradient, as in PyTorch and You 2017);
        never on biases, norms and position tables.
    clip_norm: clips the global gradient norm; 0 is off.
    ema: decay of the exponential moving average of the weights; 0 is off.
    loss: `cross_entropy` or `package.module:function`, `(logits [B, C], targets [B, C]) -> [B]`.
    """

    _prefix = "optim."

    name: str = "sgd"
    learning_rate: float = 0.1
    lr_reference_batch: int = 256
    lr_scaling: str = "linear"
    momentum: float = 0.9
    nesterov: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: str = "0"
    step_at: tuple = (0.3, 0.6, 0.8)
    step_gamma: float = 0.2
    decay_share: float = 0.2
    final_scale: float = 0.0
    clip_norm: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    loss: str = "cross_entropy"

    def _validate(self) -> None:
        self._min(0, "learning_rate", "weight_decay", "clip_norm", "step_gamma")
        self._min(1, "lr_reference_batch")
        _require(self.eps > 0, "optim.eps", self.eps, "above 0")
        self._between(0.0, 1.0, "momentum", "b1", "b2", "label_smoothing", "ema")
        _one_of("optim.lr_scaling", self.lr_scaling, LR_SCALINGS)
        _one_of("optim.schedule", self.schedule, SCHEDULES)
        _require(0 < self.decay_share <= 1, "optim.decay_share", self.decay_share, "above 0 and at most 1")
        _require(0 <= self.final_scale <= 1, "optim.final_scale", self.final_scale, "between 0 and 1")
        shares = all(type(s) in (int, float) and 0 < s < 1 for s in self.step_at)
        rising = shares and list(self.step_at) == sorted(self.step_at)
        _require(rising, "optim.step_at", self.step_at, "rising shares of the run, between 0 and 1")
        Duration.parse(self.warmup, "config.optim.warmup")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Section):
    """How long, how precisely, how often it reports.

    epochs, steps: the run's length; steps > 0 overrides epochs.
    log_every: steps between rows of metrics.jsonl. eval_every: duration between validations; "0" only at the end.
    steps_per_call: steps that one program makes before the host hears of them, for models so small that a GPU waits for the
        host between steps; numbers, rows and checkpoints are those of 1, and a call is cut short where something is due.
        Pipeline stages and microbatches, and on CPU models with convolutions, take one step a call whatever it says.
    hang_seconds: a process that makes no progress for so long (or for ten steps' time; 30 times longer while it compiles,
        evaluates or saves) writes its threads' stacks and ends; 0 is off.
    nonfinite_skips: updates in a row with a loss or gradient that is not finite that are passed over; 0 stops at the first.
    rollbacks: how often a start of the run may go back to the last checkpoint, and past the examples since, instead of
        stopping: after too many such updates, a spike, or copies of the weights that differ.
    spike_threshold: robust standard deviations above the median of the last 100 steps that make a loss or gradient norm a
        spike, which is warned about, or rolled back; 0 is off (10 is a careful start).
    check_replicas_every: steps between comparisons of all copies of the weights; 0 is off.
    deterministic: bit-for-bit repeatable on a GPU too, at a cost (docs/troubleshooting.md).
    precision: `auto` (bf16 compute on a GPU, f32 on CPU; stored, and kept on resume), `f32`, `bf16`, `fp16` (dynamic loss
        scale), `f64` (for proofs, on CPU).
    remat: what the backward pass computes again instead of storing: `none`, `dots` (keeps only the results of matrix
        products and convolutions), `full` (keeps only each layer's input).
    """

    _prefix = "train."

    epochs: int = 200
    steps: int = 0
    log_every: int = 50
    eval_every: str = "1 epoch"
    steps_per_call: int = 1
    hang_seconds: float = 60.0
    nonfinite_skips: int = 0
    rollbacks: int = 0
    spike_threshold: float = 0.0
    check_replicas_every: int = 0
    deterministic: bool = False
    precision: str = "auto"
    remat: str = "none"

    def _validate(self) -> None:
        self._min(1, "epochs", "log_every", "steps_per_call")
        self._min(0, "steps", "hang_seconds", "nonfinite_skips", "rollbacks", "spike_threshold", "check_replicas_every")
        _one_of("train.precision", self.precision, PRECISIONS)
        _one_of("train.remat", self.remat, REMATS)
        Duration.parse(self.eval_every, "config.train.eval_every")


@dataclasses.dataclass(frozen=True)
class LayoutConfig(_Section):
    """Where every leaf of the state lives; changes no number of the run (docs/architecture.md).

    data, replica, tensor: sizes of the mesh axes; data=-1 fills the devices. The batch is split over replica x data.
    zero: 0 nothing, 1 optimizer state, 2 and gradient accumulator, 3 and parameters are sharded over `data`.
    microbatches: parts that the global batch is computed in, one after the other; 0 takes as many as `stages` can use.
    stages: pipeline stages, contiguous slices of the model's layers, each on its own devices. schedule: the order of their
    work. chunks: slices a stage holds under `interleaved_1f1b`. boundaries: the first layer of each slice but the first;
    () balances them by `balance`. stage_placement: `spread` lets every stage touch every process where that is possible,
    so that activations stay in their process; `hosts` gives each stage processes of its own. trace_step: the step whose
    operations are timed for `jaxtrain layout --trace` (it waits for each of them); 0 is off.
    rules: extra tensor-parallel rules, ((regex over the leaf's path, (axis or None per dim, ...)), ...); first match wins.
    """

    _prefix = "layout."

    data: int = -1
    replica: int = 1
    tensor: int = 1
    zero: int = 0
    microbatches: int = 1
    rules: tuple = ()
    stages: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    boundaries: tuple = ()
    balance: str = "cost"
    stage_placement: str = "spread"
    trace_step: int = 0

    def _validate(self) -> None:
        _require(self.data == -1 or self.data >= 1, "layout.data", self.data, "at least 1, or -1 to fill the devices")
        self._min(1, "replica", "tensor", "stages", "chunks")
        self._min(0, "microbatches", "trace_step")
        _require(self.zero in (0, 1, 2, 3), "layout.zero", self.zero, "0, 1, 2 or 3")
        _one_of("layout.schedule", self.schedule, PIPELINE_SCHEDULES)
        _one_of("layout.balance", self.balance, BALANCES)
        _one_of("layout.stage_placement", self.stage_placement, STAGE_PLACEMENTS)
        rising = all(isinstance(b, int) for b in self.boundaries) and list(self.boundaries) == sorted(
            set(self.boundaries)
        )
        _require(rising, "layout.boundaries", self.boundaries, "whole numbers, each larger than the one before")
        if self.boundaries and self.stages == 1:
            raise ConfigError(
                f"config.layout.boundaries={self.boundaries}: there is one stage; set config.layout.stages."
            )
        for rule in self.rules:
            ok = isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], tuple)
            _require(ok, "layout.rules", rule, "a pair ('regex', (axis or None per dim, ...))")
            try:
                re.compile(rule[0])
            except re.error as error:
                raise ConfigError(f"config.layout.rules: {rule[0]!r} is not a regular expression ({error}).") from None
            axes = [axis for axis in rule[1] if axis is not None]
            known = all(axis in ("data", "tensor") for axis in axes) and len(set(axes)) == len(axes)
            _require(known, "layout.rules", rule, "made of 'data', 'tensor' and None, each axis at most once")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Section):
    """What is kept, and where a run starts from.

    every: duration between saves, in steps, epochs, examples or minutes; "0" saves only the best and the last.
    keep: how many of the latest are kept, beside the best and the milestones. milestone_every: kept for good; "0" is off.
    resume: `auto` (the newest, if any), `latest`, `best`, a step, `epoch:12`, a path, or `none` (a fresh run).
    allow_changes: let a run go on although settings that change its numbers differ from the stored ones.
    """

    _prefix = "checkpoint."

    every: str = "1 epoch"
    keep: int = 2
    milestone_every: str = "0"
    resume: str = "auto"
    allow_changes: bool = False

    def _validate(self) -> None:
        self._min(1, "keep")
        Duration.parse(self.every, "config.checkpoint.every", minutes=True)
        Duration.parse(self.milestone_every, "config.checkpoint.milestone_every")
        _require(
            bool(self.resume), "checkpoint.resume", self.resume, "auto, latest, best, a step, epoch:N, a path or none"
        )
        _local("checkpoint.resume", self.resume, self.resume)


@dataclasses.dataclass(frozen=True)
class Config(_Section):
    """A whole run. `seed` decides initialisation, order, augmentation and dropout; Python and NumPy are seeded with it too."""

    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    layout: LayoutConfig = LayoutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def _validate(self) -> None:
        _require(0 <= self.seed < 2**31, "seed", self.seed, "at least 0 and below 2**31")
        batch, parts, groups = self.data.global_batch, self.layout.microbatches, self.model.bn_groups
        if self.data.batch_per_device:
            return  # the batch is known once the devices are, and checked then (`run.decide`)
        self.check_batch(batch, parts, groups)

    @staticmethod
    def check_batch(batch: int, parts: int, groups: int) -> None:
        """Raises `ConfigError` unless `batch` divides into the microbatches and the BatchNorm groups."""
        for name, count in (("layout.microbatches", max(parts, 1)), ("model.bn_groups", groups)):
            if batch % count:
                near = sorted({max(batch // count, 1) * count, (batch // count + 1) * count})
                raise ConfigError(
                    f"config.data.global_batch={batch} does not divide into config.{name}={count} equal parts; "
                    f"the nearest that do {'are' if len(near) > 1 else 'is'} {' and '.join(map(str, near))}."
                )


SECTIONS: Mapping[str, type[_Section]] = types.MappingProxyType(
    {f.name: f.default.__class__ for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default)}  # type: ignore[misc]
)


# --------------------------------------------------------------------------------------------------------- conversion


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts, as stored in `config.json`."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Rebuilds and validates a `Config`. Raises `ConfigError` for an unknown key, a wrong type or a bad value."""
    sections: dict[str, Any] = {}
    known = [f.name for f in dataclasses.fields(Config)]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"config.{name} does not exist.{did_you_mean(name, flat_keys(), 'config.')}")
        if name not in SECTIONS:
            sections[name] = value
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"config.{name}={value!r}: must be a section with keys, such as config.{name}.{_example(name)}."
            )
        fields = [f.name for f in dataclasses.fields(SECTIONS[name])]  # type: ignore[arg-type]
        for key in value:
            if key not in fields:
                raise ConfigError(
                    f"config.{name}.{key} does not exist.{did_you_mean(f'{name}.{key}', flat_keys(), 'config.')}"
                )
        sections[name] = SECTIONS[name](**{k: _tuples(v) for k, v in value.items()})
    return Config(**sections)


def _example(section: str) -> str:
    return dataclasses.fields(SECTIONS[section])[0].name  # type: ignore[arg-type]


def plain(values: Any) -> dict[str, Any]:
    """Plain nested dicts from any mappings, such as a `ConfigDict`."""
    return {k: plain(v) if isinstance(v, Mapping) or hasattr(v, "items") else v for k, v in values.items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'data.name': ..., ...}: one entry a field."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def flat_keys() -> list[str]:
    """Every field's dotted name."""
    return list(flatten(to_dict(Config())))
