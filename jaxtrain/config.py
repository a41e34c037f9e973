"""The config of a run: frozen dataclasses, the meaning and the rule of each field, and durations. Imports no JAX.

A recipe (a file in `configs/`) returns a locked `ml_collections.ConfigDict` made by `recipe(Config(...))`. After the
flags have changed fields of it, `from_dict` rebuilds these dataclasses, and they check themselves: a bad value is one
`ConfigError` that names the field, the value found and the values allowed. The string below a field is its meaning;
`jaxtrain config --explain KEY` prints it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

from jaxtrain.durations import Duration
from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import did_you_mean

AUGMENTATIONS = ("none", "light", "heavy", "resize_crop", "random_resized_crop")
INTERPOLATIONS = ("bilinear", "bicubic")
RESIDENCIES = ("auto", "device", "stream")
LR_SCALINGS = ("linear", "sqrt", "none")
SCHEDULES = ("constant", "step", "cosine", "linear", "wsd")
PRECISIONS = ("auto", "f32", "tf32", "bf16", "fp16", "f64")
REMATS = ("none", "full", "dots")
PIPELINE_SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b")
BALANCES = ("cost", "memory", "time")
STAGE_PLACEMENTS = ("spread", "hosts")
COMPRESSORS = ("none", "bf16", "int8", "topk", "randomk", "powersgd")
REDUCTIONS = ("auto", "ring", "tree", "hierarchical")
NCCL_ALGORITHMS = ("auto", "ring", "tree", "nvls", "collnetdirect", "collnetchain")
NCCL_PROTOCOLS = ("auto", "ll", "ll128", "simple")
BEST_BY = ("val_accuracy", "val_loss", "val_top5")
WEIGHTS_REQUIRED = "required"
STEMS = ("auto", "cifar", "imagenet")
CALLBACKS = ("early_stopping", "swa")
SINKS = ("wandb", "mlflow", "trackio")
ATTENTIONS = ("plain", "pallas")


# -------------------------------------------------------------------------------------------------------------- rules


def _require(condition: object, field: str, value: object, wanted: str, hint: str = "") -> None:
    if not condition:
        raise ConfigError(f"config.{field}={value!r}: must be {wanted}.{hint}")


def _require_local(field: str, value: str, path: str) -> None:
    """Raises `ConfigError` where `path`, the part of `value` that names a file or a directory, is an address."""
    require_local(path, f"config.{field}={value!r}", ConfigError)


def _require_regex(field: str, regex: str) -> None:
    try:
        re.compile(regex)
    except re.error as error:
        raise ConfigError(f"config.{field}: {regex!r} is not a regular expression ({error}).") from None


@dataclasses.dataclass(frozen=True)
class _Rule:
    """Which values a field may have. It stands in the field's annotation, and both the check and `explain` read it there.

    words: as in "must be {words}.". check: takes the field's dotted name and the value; raises `ConfigError`.
    """

    words: str
    check: Callable[[str, Any], object]


def _must_be(words: str, holds: Callable[[Any], bool]) -> _Rule:
    return _Rule(words, lambda field, value: _require(holds(value), field, value, words))


def _at_least(low: float) -> _Rule:
    return _must_be(f"at least {low:g}", lambda value: value >= low)


def _between(low: float, high: float) -> _Rule:
    return _must_be(f"at least {low:g} and below {high:g}", lambda value: low <= value < high)


def _one_of(allowed: tuple[str, ...], own: str = "") -> _Rule:
    """own: the form of a user's own code, where the field may name such code too."""
    words = f"one of {', '.join(allowed)}" + (f", or your own {own}" if own else "")

    def check(field: str, value: str) -> None:
        _require(value in allowed or (own and ":" in value), field, value, words, did_you_mean(value, allowed))

    return _Rule(words, check)


def _duration(*, minutes: bool = False) -> _Rule:
    units = "steps, epochs, examples or minutes" if minutes else "steps, epochs or examples"
    words = f"a number of {units}, such as '5 epochs'; a number alone counts steps"
    return _Rule(words, lambda field, value: Duration.parse(value, f"config.{field}", minutes=minutes))


_SEED = _must_be("at least 0 and below 2**31", lambda value: 0 <= value < 2**31)
_MODEL_RATE = _must_be("at least 0 and below 1 (or -1: the model's own)", lambda value: value == -1 or 0 <= value < 1)
_CHANNELS = _must_be(
    "a tuple of finite numbers, one a channel",
    lambda values: all(type(v) in (int, float) and math.isfinite(v) for v in values),
)


def _is_sha256(value: str) -> bool:
    return re.fullmatch("([0-9a-fA-F]{64})?", value) is not None


def _rising_shares(values: tuple) -> bool:
    return all(type(v) in (int, float) and 0 < v < 1 for v in values) and list(values) == sorted(values)


def _are_shares(values: tuple) -> bool:
    return len(values) == 2 and all(type(v) in (int, float) for v in values) and 0 < values[0] <= values[1] <= 1


def _are_ratios(values: tuple) -> bool:
    return len(values) == 2 and all(type(v) in (int, float) for v in values) and 1 / 16 <= values[0] <= values[1] <= 16


def _is_window(values: tuple) -> bool:
    return not values or (len(values) == 2 and all(type(v) is int for v in values) and 1 <= values[0] <= values[1])


def _rising_numbers(values: tuple) -> bool:
    return all(isinstance(v, int) for v in values) and list(values) == sorted(set(values))


def without_effect(section: str, values: _Section, fields: Iterable[str], why: str) -> list[str]:
    """A sentence for each field that was changed from its default although nothing reads it.

    Args:
      section: the section's name, such as "optim".
      values: the section.
      fields: names of the fields that nothing reads.
      why: the end of the sentence.
    """
    changed = [name for name in fields if getattr(values, name) != getattr(type(values)(), name)]
    return [f"config.{section}.{name}={getattr(values, name)!r} has no effect: {why}" for name in changed]


class _Section:
    """Checks each field's type, that floats are finite, and the rule in its annotation; then the section's own rules.

    A string directly below a field is its meaning: one paragraph of whole sentences, which `explain` returns.
    """

    _prefix = ""

    def __post_init__(self) -> None:
        annotations = _annotations(type(self))
        for name, (wanted, _) in annotations.items():
            self._check_type(name, wanted)
        for name, (_, rule) in annotations.items():
            if rule:
                rule.check(self._prefix + name, getattr(self, name))
        self._validate()

    def _check_type(self, name: str, wanted: type) -> None:
        """Makes a whole number a float, and a list a tuple, where such a one is wanted; refuses what has another type."""
        value, field = getattr(self, name), self._prefix + name
        if wanted is float and type(value) is int:
            object.__setattr__(self, name, value := float(value))
        if wanted is tuple and type(value) is list:
            object.__setattr__(self, name, value := _tuples(value))
        if type(value) is not wanted:
            raise ConfigError(f"config.{field}={value!r}: must be {_TYPE_WORDS.get(wanted, wanted.__name__)}.")
        if value == "None":  # `--config.data.dir=None` is a string, and would be the name of a directory
            default = getattr(type(self)(), name)
            raise ConfigError(f"config.{field}='None': write {default!r}, the default, or leave it out.")
        if wanted is float and not math.isfinite(value):
            raise ConfigError(f"config.{field}={value!r}: must be a finite number.")

    def _validate(self) -> None:
        """Rules that concern several fields, or whose error names a part of the value. Overridden by sections."""


@functools.cache  # a config is built anew for each override
def _annotations(section: type[_Section]) -> dict[str, tuple[type, _Rule | None]]:
    """Each field's type, and the rule beside it in `Annotated[type, rule]`."""
    hints = typing.get_type_hints(section, include_extras=True)
    found = {}
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        hint = hints[field.name]
        found[field.name] = (hint.__origin__, hint.__metadata__[0]) if hasattr(hint, "__metadata__") else (hint, None)
    return found


_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", tuple: "a tuple"}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


# ----------------------------------------------------------------------------------------------------------- sections


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
    """What is trained on, and how it becomes batches."""

    _prefix = "data."

    name: Annotated[str, _must_be("the name of a data set", bool)] = "digits"
    """The data set: `digits` (in scikit-learn), `synthetic` (made as it is read), `cifar10`, `cifar100`, `folder:PATH` (a
    folder of images for each class), the name of a prepared TFDS data set, or your own `package.module:factory`. A run goes
    on from another PATH if the images there are the same."""

    dir: str = ""
    """The data directory. "" means `$JAXTRAIN_DATA_DIR`, and where that is not set, `~/.cache/jaxtrain/data`."""

    global_batch: Annotated[int, _at_least(1)] = 128
    """Examples per optimizer step, over all devices and microbatches."""

    batch_per_device: Annotated[int, _at_least(0)] = 0
    """Above 0, it sets `data.global_batch` at the first start: to so many examples for each part of the mesh that the batch
    is split over (`replica` x `data`). The run keeps that global batch, also on another number of devices. 0 is off."""

    image_size: Annotated[int, _at_least(0)] = 0
    """Side in pixels of the square images that the model sees. 0 keeps the size that the data set has."""

    augmentation: Annotated[str, _one_of(AUGMENTATIONS, own="package.module:function")] = "none"
    """How training images are changed at random. `none`: not at all. `light`: a crop of the padded image, and a horizontal
    flip. `heavy`: `light`, then RandAugment (Cubuk 2020), colour jitter and random erasing (Zhong 2020). `resize_crop`: the
    image is resized to `data.image_size` / `data.crop_pct`, then a random crop and a flip. `random_resized_crop`: a random
    box of the image is resized to `data.image_size`, then a flip, as torchvision's RandomResizedCrop does it. Evaluation
    after these two takes the centre crop of the image resized as for `resize_crop`. Or your own `package.module:function`,
    (images uint8 [B, S, S, C], a random key for each [B]) -> uint8 [B, S, S, C]."""

    flip: bool = True
    """Whether `light`, `heavy` and both crops mirror an image, left to right, with probability 1/2. `false` for digits,
    text, and whatever else a mirror makes into something else."""

    crop_padding: Annotated[int, _at_least(-1)] = 0
    """Pixels of padding on each side before `light` and `heavy` crop an image. 0 is an eighth of the image's side: 4 for 32.
    -1 does not crop."""

    crop_scale: Annotated[
        tuple, _must_be("two shares of the area, above 0 and at most 1, the smaller first", _are_shares)
    ] = (
        0.08,
        1.0,
    )
    """The smallest and the largest share of an image's area that a box of `random_resized_crop` has."""

    crop_ratio: Annotated[tuple, _must_be("two ratios between 1/16 and 16, the smaller first", _are_ratios)] = (
        0.75,
        1.3333333333333333,
    )
    """The smallest and the largest width over height that a box of `random_resized_crop` has. Between them it is
    log-uniform."""

    crop_pct: Annotated[float, _must_be("above 0 and at most 1", lambda value: 0 < value <= 1)] = 0.875
    """What `data.image_size` is of the side to which `resize_crop` and the evaluation of both crops resize an image before they
    crop it: 0.875 makes 256 of 224. Images of a folder are stored at that side."""

    interpolation: Annotated[str, _one_of(INTERPOLATIONS)] = "bilinear"
    """How images are resized on the device, with antialiasing, as Pillow does it: `bilinear` or `bicubic`. A folder's images
    are first resized to the side that they are stored at, always `bilinear`."""

    mixup: Annotated[float, _between(0.0, 32.0)] = 0.0
    """Mixup (Zhang 2018): alpha of the distribution Beta(alpha, alpha) from which the share of the second image is drawn. 0
    is off. Where cutmix is on too, each batch gets one of the two, with equal probability."""

    cutmix: Annotated[float, _between(0.0, 32.0)] = 0.0
    """Cutmix (Yun 2019): alpha of the distribution Beta(alpha, alpha) from which the area of the pasted box is drawn. 0 is
    off. Where mixup is on too, each batch gets one of the two, with equal probability."""

    mean: Annotated[tuple, _CHANNELS] = ()
    """What is subtracted from each channel of the pixels, which are in [0, 1]; one number a channel, as many as
    `data.std` has. () means the data set's own mean."""

    std: Annotated[tuple, _CHANNELS] = ()
    """What each channel is divided by after `data.mean` is subtracted; one number above 0 a channel. () means the data
    set's own standard deviation."""

    splits: str = ""
    """Which splits of a folder or a TFDS data set are used: pairs such as "train=train,validation=val,test=none", in which
    `none` goes without that split. A split that is not named is found by its usual name, or drawn from training."""

    skip_bad: bool = False
    """Whether the images of a folder that cannot be read are left out, and named in `skipped_images.txt` of the work
    directory. They are found by reading all images once: by `jaxtrain data verify`, or at the first start. Otherwise the
    first one that is met ends the run."""

    examples: Annotated[int, _at_least(0)] = 0
    """Use only the first so many training examples. 0 means all. For `synthetic`: how many there are; 0 means 10,000."""

    validation: Annotated[float, _between(0.0, 1.0)] = 0.1
    """The share of the training set that is held out for validation, where the data set has no validation split of its
    own. 0 holds out none."""

    split_seed: Annotated[int, _SEED] = 0
    """Decides which examples are held out; independent of `seed`. For `synthetic` it also decides the images."""

    residency: Annotated[str, _one_of(RESIDENCIES)] = "auto"
    """Where the data set is kept. `device`: a copy on every device, and no input pipeline. `stream`: it is read as training
    goes. `auto`: `device` for a data set of at most a tenth of a device's memory (1 GiB where that is unknown)."""

    workers: Annotated[int, _at_least(-1)] = -1
    """Processes that read for `stream`. -1 decides by the CPUs that this process may use. 0 reads in this process, with
    several threads where images must be decoded."""

    prepare_per_host: bool = False
    """Every host prepares its own copy of the data set, for data directories on local disks. Otherwise process 0 prepares
    one copy for all."""

    prepare_timeout: Annotated[float, _must_be("above 0 minutes", lambda value: value > 0)] = 60.0
    """Minutes that the other processes wait while the data set is prepared."""

    def _validate(self) -> None:
        _require_local("data.name", self.name, self.name.removeprefix("folder:"))
        _require_local("data.dir", self.dir, self.dir)
        _ = self.chosen_splits
        _require(len(self.mean) == len(self.std), "data.std", self.std, f"as long as data.mean={self.mean!r}")
        _require(all(v > 0 for v in self.std), "data.std", self.std, "above 0")

    @property
    def chosen_splits(self) -> dict[str, str]:
        """`splits` as a dict, such as {"train": "train[:90%]", "test": "none"}; without the splits that it does not name."""
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
    """Which classifier, and of what size. A setting that the model has no use for is refused."""

    _prefix = "model."

    name: str = "resnet18"
    """The model: `mlp`; `vgg11`, `vgg13`, `vgg16`, `vgg19`, each also with BatchNorm as `vgg11_bn` and so on (Simonyan
    2015); `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnet152` (He 2016); `swin_tiny`, `swin_small`, `swin_base`
    (Liu 2021); `convnet_fast`; or your own `package.module:Class`."""

    num_classes: Annotated[int, _must_be("0, or at least 2", lambda value: value == 0 or value >= 2)] = 0
    """Outputs of the classifier. 0 means the number of classes of the data set."""

    init_from: str = ""
    """The file that a new run takes its first weights from: safetensors, or `.npz` without pickle, with the names of
    torchvision, timm or transformers, or jaxtrain's own; or a run of jaxtrain, or a checkpoint of one. A head of another number
    of classes begins anew (docs/weights.md). A run that goes on does not read it again. "" draws all weights at random.
    `required` stands in a recipe for a file that must be named: without one, a new run is refused."""

    init_sha256: Annotated[str, _must_be("a SHA-256 as 64 hexadecimal digits, or ''", _is_sha256)] = ""
    """The SHA-256 that the file of `model.init_from` must have. "" takes any file; the run records what it had."""

    width: Annotated[int, _at_least(0)] = 0
    """Channels of the first stage (Swin-T and Swin-S: 96, Swin-B: 128, the other networks: 64), or units of the first hidden
    layer (MLP: 512). 0 is the model's own."""

    depths: Annotated[
        tuple, _must_be("a tuple of whole numbers above 0", lambda v: all(type(d) is int and d > 0 for d in v))
    ] = ()
    """Blocks of each stage, such as (1, 1, 1, 1). () is the model's own."""

    stem: Annotated[str, _one_of(STEMS)] = "auto"
    """The variant of a ResNet or VGG. `cifar`: a ResNet begins with a 3x3 convolution of stride 1. `imagenet`: it begins with a
    7x7 convolution and a max-pool, both of stride 2; a VGG averages its last feature map to 7x7. `auto`: `cifar` for images
    below 64 pixels, else `imagenet`."""

    patch: Annotated[int, _at_least(0)] = 0
    """Side in pixels of a Swin's patches. 0 decides by image size: 2 below 64 pixels, else 4."""

    window: Annotated[int, _at_least(0)] = 0
    """Side in patches of the windows in which a Swin computes attention. 0 decides by image size: 4 for images below 64
    pixels, else 7."""

    attention: Annotated[str, _one_of(ATTENTIONS)] = "plain"
    """How a Swin computes attention. `plain`: by operations of XLA. `pallas`: by one kernel, whose scores never reach the GPU's
    memory (after FlashAttention, Dao 2022); only on NVIDIA GPUs, not in f64, and not yet measured on one. With several
    GPUs the compile cache then does not keep the step. An evaluation of a checkpoint is always `plain`."""

    dropout: Annotated[float, _MODEL_RATE] = -1.0
    """Probability that an activation is dropped in training (Srivastava 2014). -1 is the model's own: VGG 0.5, MLP 0.3, the
    others 0."""

    drop_path: Annotated[float, _MODEL_RATE] = -1.0
    """Probability that the last block is skipped in training (stochastic depth, Huang 2016); it rises linearly from 0 at the
    first block. For ResNet and Swin. -1 is the model's own."""

    bn_groups: Annotated[int, _at_least(1)] = 1
    """BatchNorm takes its statistics over this many groups of the global batch, each by itself. 1 is the whole batch, on all
    devices (synchronized BatchNorm); more is ghost BatchNorm (Hoffer 2017). It must be a multiple of
    `layout.microbatches`."""

    freeze_bn: bool = False
    """Whether all BatchNorms run as in evaluation: they use their running statistics, and do not change them. For fine-tuning
    with small batches. Their scales and biases are trained, unless `optim.freeze` names them."""

    def _validate(self) -> None:
        _require_local("model.init_from", self.init_from, self.init_from)


@dataclasses.dataclass(frozen=True)
class OptimConfig(_Section):
    """How parameters are updated."""

    _prefix = "optim."

    name: str = "sgd"
    """The optimizer: `sgd`, `adamw` (Loshchilov 2019), `lamb` (You 2020), `lars` (You 2017), `lion` (Chen 2023), `muon`
    (Jordan 2024; AdamW for all but the kernels of hidden layers), or your own `package.module:factory`."""

    learning_rate: Annotated[float, _at_least(0)] = 0.1
    """The peak learning rate at a global batch of `optim.lr_reference_batch`."""

    lr_reference_batch: Annotated[int, _at_least(1)] = 256
    """The global batch, in examples, for which `optim.learning_rate` is given."""

    lr_scaling: Annotated[str, _one_of(LR_SCALINGS)] = "linear"
    """How the learning rate is carried to another global batch. `linear`: times the ratio of `data.global_batch` to
    `optim.lr_reference_batch` (Goyal 2017). `sqrt`: times the square root of that ratio (Hoffer 2017). `none`: not at all."""

    momentum: Annotated[float, _between(0.0, 1.0)] = 0.9
    """Share of the previous update direction that is kept, for `sgd`, `lars` and `muon`. 0 is off."""

    nesterov: bool = False
    """Nesterov's momentum (Sutskever 2013) in place of the plain one, for `sgd`, `lars` and `muon`."""

    b1: Annotated[float, _between(0.0, 1.0)] = 0.9
    """Decay of the average of the gradients (Adam's beta 1, Kingma 2015), for `adamw`, `lamb`, `lion`, and the parameters
    that `muon` gives to AdamW."""

    b2: Annotated[float, _between(0.0, 1.0)] = 0.999
    """Decay of the average of the squared gradients (Adam's beta 2), for `adamw`, `lamb`, and the parameters that `muon` gives
    to AdamW. In `lion` it is the decay of the momentum; Chen 2023 take 0.99."""

    eps: Annotated[float, _must_be("above 0", lambda value: value > 0)] = 1e-8
    """Is added to the divisor of an update, so that it is never 0; for `adamw`, `lamb` and `muon`."""

    weight_decay: Annotated[float, _at_least(0)] = 0.0
    """Strength of the weight decay. It is decoupled from the gradient and multiplied by the learning rate (Loshchilov 2019),
    except in `sgd` and `lars`, where it joins the gradient (as in PyTorch, and in You 2017). Biases, norms and position
    tables never decay. 0 is off."""

    schedule: Annotated[str, _one_of(SCHEDULES)] = "cosine"
    """The course of the learning rate after the warm-up. `constant`. `step`: times `optim.step_gamma` at each share of the run
    in `optim.step_at`. `cosine`: half a cosine (Loshchilov 2017). `linear`: a straight line. `wsd`: warm-up, stable, and a
    linear decay over the last `optim.decay_share` of the run (Hu 2024). The last three end at `optim.final_scale` of the
    peak."""

    warmup: Annotated[str, _duration()] = "0"
    """Length of the linear warm-up of the learning rate at the start of the run (Goyal 2017), such as "5 epochs", "500 steps"
    or "1e5 examples". "0" is off."""

    step_at: Annotated[tuple, _must_be("rising shares of the run, between 0 and 1", _rising_shares)] = (0.3, 0.6, 0.8)
    """When the schedule `step` lowers the learning rate: shares of the run, each larger than the one before."""

    step_gamma: Annotated[float, _at_least(0)] = 0.2
    """What the learning rate is multiplied by at each share in `optim.step_at`, under the schedule `step`."""

    decay_share: Annotated[float, _must_be("above 0 and at most 1", lambda value: 0 < value <= 1)] = 0.2
    """The share of the run, at its end, over which the learning rate decays under the schedule `wsd`."""

    final_scale: Annotated[float, _must_be("between 0 and 1", lambda value: 0 <= value <= 1)] = 0.0
    """The learning rate at the end of the run, as a share of the peak, under the schedules `cosine`, `linear` and `wsd`."""

    freeze: tuple = ()
    """Regexes of leaves that are not trained, such as ('layers_0[0-5]/',). They are searched in a leaf's path (`jaxtrain layout
    --leaves` prints the paths). A frozen leaf gets no update, no gradient and no optimizer state, and does not count in
    `optim.clip_norm`. A BatchNorm whose parameters are all frozen runs as in evaluation, and keeps its statistics."""

    freeze_layers: int = 0
    """How many of the first layers are not trained, as well as `optim.freeze`: 1 is the stem. A negative number counts from the
    end: -1 is all layers but the head, a linear probe. 0 freezes none."""

    layer_decay: Annotated[float, _must_be("above 0 and at most 1", lambda value: 0 < value <= 1)] = 1.0
    """What the learning rate is multiplied by from each layer to the one below it (Bao 2022): the head has 1, the layer below
    it `layer_decay`, the next its square. Decoupled weight decay follows, as in PyTorch's param groups. 1 is off."""

    head_rate: Annotated[float, _must_be("above 0", lambda value: value > 0)] = 1.0
    """What the learning rate of the head, the last layer, is multiplied by, such as 10 for a new head on trained layers."""

    clip_norm: Annotated[float, _at_least(0)] = 0.0
    """Gradients whose global norm (that of all parameters together) is larger are scaled down to this norm (Pascanu 2013). 0
    is off."""

    label_smoothing: Annotated[float, _between(0.0, 1.0)] = 0.0
    """The share of each target that is spread evenly over all classes (Szegedy 2016). 0 is off."""

    ema: Annotated[float, _between(0.0, 1.0)] = 0.0
    """Decay per step of the exponential moving average of the weights, which is evaluated and saved beside them (Polyak 1992),
    such as 0.999. In the first steps it is lower: at most (1 + step) / (10 + step). 0 is off."""

    loss: str = "cross_entropy"
    """The loss: `cross_entropy`, or your own `package.module:function`, (logits [B, C], targets [B, C]) -> [B]."""

    compress: Annotated[str, _one_of(COMPRESSORS)] = "none"
    """How gradients are compressed when devices add them up, for slow links (docs/communication.md). It changes the run's
    numbers, and does so differently on another number of devices. `none`. `bf16`, `int8`: rounded to half and to a quarter of
    the bytes of f32, at random and without bias (Alistarh 2017). `topk`: the largest values alone. `randomk`: values drawn at
    random, the same ones on each device (Stich 2018). `powersgd`: a product of two thin matrices (Vogels 2019). What these
    three do not send, each device adds to its next gradients (error feedback)."""

    compress_ratio: Annotated[float, _must_be("above 0 and at most 1", lambda value: 0 < value <= 1)] = 0.1
    """The share of a leaf's values that `optim.compress=topk` and `randomk` send."""

    compress_rank: Annotated[int, _at_least(1)] = 4
    """The rank of the matrices of `optim.compress=powersgd`."""

    compress_min_rate: Annotated[float, _at_least(1)] = 2.0
    """A leaf that `optim.compress` would not shrink by at least this factor is sent whole."""

    compress_warmup: Annotated[int, _at_least(0)] = 0
    """Steps at the start of the run whose gradients `optim.compress` sends whole."""

    sync_every: Annotated[int, _at_least(1)] = 1
    """Steps between two averages of the weights (local SGD, Stich 2019): in between, each shard of the batch trains weights of
    its own. It changes the run's numbers, and does so differently on another number of devices. 1 adds up the gradients at
    every step."""

    outer_rate: Annotated[float, _must_be("above 0", lambda value: value > 0)] = 1.0
    """Under `optim.sync_every`, the learning rate of the outer update: what the mean change of the weights since the last sync
    is multiplied by (DiLoCo, Douillard 2023: 0.7). 1 takes the mean of the weights."""

    outer_momentum: Annotated[float, _must_be("at least 0 and below 1", lambda value: 0 <= value < 1)] = 0.0
    """Under `optim.sync_every`, the Nesterov momentum of the outer update (DiLoCo: 0.9)."""

    class_weights: str = ""
    """Weights of the classes in the loss of training, for uneven data. "": all alike. `balanced`: N / (K N_k) for a class that
    N_k of the N training examples are of, where K classes have any; 1 for a class without. Or a number above 0 for each class,
    in their order, such as "1,2.5,0.5". The loss is then the weighted mean over the global batch: it is divided by the sum of
    the weights of the batch's labels, as in PyTorch's CrossEntropyLoss. Evaluation counts all examples alike."""

    def _validate(self) -> None:
        for regex in self.freeze:
            _require(isinstance(regex, str), "optim.freeze", regex, "a regular expression")
            _require_regex("optim.freeze", regex)
        wanted = "'', 'balanced', or a number above 0 for each class, such as '1,2.5,0.5'"
        try:
            good = all(weight > 0 and math.isfinite(weight) for weight in self.numbered_class_weights)
        except ValueError:
            good = False
        _require(good, "optim.class_weights", self.class_weights, wanted)
        if self.class_weights and ":" in self.loss:
            raise ConfigError(
                f"config.optim.class_weights={self.class_weights!r}: only the loss cross_entropy takes class weights; leave "
                f"it out, and weigh the classes in {self.loss}."
            )

    @property
    def numbered_class_weights(self) -> tuple[float, ...]:
        """The numbers in `class_weights`; () where there are none."""
        return () if self.class_weights in ("", "balanced") else tuple(map(float, self.class_weights.split(",")))


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Section):
    """How long, in which precision, how often the run reports, and what it does about faults."""

    _prefix = "train."

    epochs: Annotated[int, _at_least(1)] = 200
    """The run's length in epochs, where `train.steps` is 0."""

    steps: Annotated[int, _at_least(0)] = 0
    """The run's length in optimizer steps. 0 means that `train.epochs` decides."""

    log_every: Annotated[int, _at_least(1)] = 50
    """Steps between two rows of `metrics.jsonl`."""

    eval_every: Annotated[str, _duration()] = "1 epoch"
    """Time between two validations. "0" validates at the end only."""

    eval_examples: Annotated[int, _at_least(0)] = 0
    """Examples of a split that each of the run's evaluations takes, the final test too: a part that is drawn by a fixed rule,
    the same one in every run and on every layout. `result.json` says how many of how many. `jaxtrain evaluate` takes the
    whole split all the same. 0 is all."""

    steps_per_call: Annotated[int, _at_least(1)] = 1
    """Optimizer steps that one program makes before the host hears of them, for models so small that a GPU waits for the host
    between steps. Numbers, rows and checkpoints are those of 1, and a call is cut short where something is due. With pipeline
    stages or microbatches, and on a CPU with convolutions, a call makes one step whatever this says. At most 1024 are one
    call."""

    hang_seconds: Annotated[float, _at_least(0)] = 60.0
    """A process that makes no progress for so many seconds, and for ten times the length of a step, writes the stacks of its
    threads and ends. While it compiles, evaluates or saves it has 30 times as long. 0 is off."""

    nonfinite_skips: Annotated[int, _at_least(0)] = 0
    """Updates in a row that are passed over because their loss or gradient is not finite. One more makes the run roll back or
    stop. 0 passes over none."""

    rollbacks: Annotated[int, _at_least(0)] = 0
    """How often one start of the run may go back to the last checkpoint, and past the examples since, instead of stopping. It
    does so after more than `train.nonfinite_skips` bad updates, after a spike, or where copies of the weights differ. 0
    never goes back."""

    spike_threshold: Annotated[float, _at_least(0)] = 0.0
    """A loss or gradient norm is a spike when it is so many robust standard deviations (Iglewicz 1993) above the median of the
    last 100 steps. A spike gives a warning, or a roll-back where `train.rollbacks` allows one. 0 is off; 10 is a careful
    start."""

    check_replicas_every: Annotated[int, _at_least(0)] = 0
    """Steps between two comparisons of all copies of the weights, bit by bit, which find a faulty device. 0 is off."""

    deterministic: bool = False
    """Makes a run repeatable bit by bit on a GPU too, which costs speed (docs/troubleshooting.md). A CPU is so without it."""

    precision: Annotated[str, _one_of(PRECISIONS)] = "auto"
    """The type that the model computes in. `auto`: bf16 on a GPU and f32 on a CPU, decided at the first start and kept on
    resume. `f32`: on a GPU too, where JAX alone would round the factors of products to TF32. `tf32`: f32, but the factors of
    matrix products and convolutions keep the 10 bits of TF32; for NVIDIA GPUs from Ampere on. `bf16`. `fp16`: with a dynamic
    loss scale (Micikevicius 2018). `f64`: for proofs, on a CPU."""

    remat: Annotated[str, _one_of(REMATS)] = "none"
    """What the backward pass computes again instead of storing it (Chen 2016), to save memory. `none`: nothing. `dots`: all but
    the results of matrix products and convolutions. `full`: all but each layer's input."""


STRATEGIES = ("manual", "auto")
CHOSEN_FIELDS = ("data", "replica", "tensor", "zero", "microbatches", "stages", "schedule", "chunks", "remat")
"""What `layout.strategy=auto` chooses: fields of `layout`, and `train.remat`."""


def _are_chosen_fields(value: Any) -> bool:
    return isinstance(value, tuple) and all(name in CHOSEN_FIELDS for name in value)


@dataclasses.dataclass(frozen=True)
class LayoutConfig(_Section):
    """Where every leaf of the state lives. It changes no number of the run (docs/architecture.md)."""

    _prefix = "layout."

    data: Annotated[int, _must_be("at least 1, or -1 to fill the devices", lambda v: v == -1 or v >= 1)] = -1
    """Size of the mesh axis `data`: the batch is split over `replica` x `data`, and ZeRO shards over `data`. -1 takes all
    devices that the other axes leave."""

    replica: Annotated[int, _at_least(1)] = 1
    """Size of the mesh axis `replica`: groups of devices that each hold the whole state, sharded inside the group."""

    tensor: Annotated[int, _at_least(1)] = 1
    """Size of the mesh axis `tensor`: devices that the large kernels are split over (tensor parallelism, Shoeybi 2019)."""

    zero: Annotated[int, _must_be("0, 1, 2 or 3", lambda value: value in (0, 1, 2, 3))] = 0
    """The ZeRO stage (Rajbhandari 2020): what is sharded over the axis `data`. 0: nothing. 1: the optimizer state and the
    average of the weights. 2: the gradient accumulator too. 3: the parameters too."""

    microbatches: Annotated[int, _at_least(0)] = 1
    """Parts of the global batch that are computed one after the other, which saves memory and feeds pipeline stages. 0 takes
    as many as `layout.stages` can use."""

    rules: tuple = ()
    """Rules of tensor parallelism that come before the model's own: pairs ('regex', (axis or None per dim, ...)). The regex is
    searched in a leaf's path (`jaxtrain layout` prints the paths), an axis is 'data' or 'tensor', and the first rule that
    matches wins."""

    stages: Annotated[int, _at_least(1)] = 1
    """Pipeline stages: contiguous parts of the model's layers, each on its own devices (docs/pipeline.md). 1 is no pipeline."""

    schedule: Annotated[str, _one_of(PIPELINE_SCHEDULES)] = "1f1b"
    """The order in which a stage runs its forwards and backwards. `gpipe` (Huang 2019): all forwards, then all backwards.
    `1f1b` (Narayanan 2021): one forward, one backward in turn, with fewer activations in memory. `interleaved_1f1b`: the
    same with several chunks of the model a stage, for shorter idle times and more transfers."""

    chunks: Annotated[int, _at_least(1)] = 1
    """Chunks of the model on each stage under `interleaved_1f1b`, which needs at least 2."""

    boundaries: Annotated[tuple, _must_be("whole numbers, each larger than the one before", _rising_numbers)] = ()
    """The first layer of each chunk of the model but the first, `stages` x `chunks` - 1 numbers. () cuts where
    `layout.balance` is most even."""

    balance: Annotated[str, _one_of(BALANCES)] = "cost"
    """What is divided evenly among the stages. `cost`: operations, or the bytes that they move. `memory`: parameters and
    stored activations. `time`: seconds, measured at start, so that the cut may change with the next start."""

    stage_placement: Annotated[str, _one_of(STAGE_PLACEMENTS)] = "spread"
    """Which devices a stage has. `spread`: a part of every process's devices where that is possible, so that activations stay
    in their process. `hosts`: neighbouring devices, so that where possible a stage has processes of its own, and only
    activations pass between them."""

    reduce: Annotated[str, _one_of(REDUCTIONS)] = "auto"
    """How gradients are added up over `replica` x `data` (docs/communication.md). `auto`: by XLA's own collectives. `ring`:
    a reduce-scatter and an all-gather, each of messages between neighbours. `tree`: recursive halving and doubling, with
    fewer messages. `hierarchical`: a ring inside each replica, one across replicas with the part of each device, and one
    inside again, so that the links between replicas carry 1 / `data` of the bytes."""

    reduce_bucket: Annotated[float, _must_be("above 0 MiB", lambda value: value > 0)] = 25.0
    """MiB of gradients that are sent together by `ring`, `tree` and `hierarchical`; a larger leaf goes alone."""

    nccl_algo: Annotated[str, _one_of(NCCL_ALGORITHMS)] = "auto"
    """The algorithm of NCCL's all-reduce on NVIDIA GPUs, where `layout.reduce` is `auto`: NCCL_ALGO of the environment. `auto`:
    NCCL chooses. `ring`. `tree`: double binary trees. `nvls`, `collnetdirect` and `collnetchain` need switches that add. NCCL
    refuses what the hardware does not have."""

    nccl_protocol: Annotated[str, _one_of(NCCL_PROTOCOLS)] = "auto"
    """NCCL's protocol: NCCL_PROTO of the environment. `auto`: NCCL chooses. `simple`: for bandwidth. `ll`: for latency, at a
    quarter to a half of the bandwidth. `ll128`: both, but wrong numbers where the hardware does not store 128 bytes at once,
    so leave that choice to NCCL."""

    strategy: Annotated[str, _one_of(STRATEGIES)] = "manual"
    """Who chooses the layout. `manual`: it is what these fields say. `auto`: a new run chooses `data`, `replica`, `tensor`,
    `zero`, `microbatches`, `stages`, `schedule`, `chunks` and `train.remat` for its devices, as `jaxtrain plan` does
    (docs/planning.md). A field that you set stays. The choice is stored, and kept while the devices stay the same."""

    keep: Annotated[tuple, _must_be(f"names among {', '.join(CHOSEN_FIELDS)}", _are_chosen_fields)] = ()
    """Fields that `strategy=auto` keeps though they have their default, such as ('zero', 'remat'). The command line puts
    those there that a flag or a file sets; from Python they are named here."""

    memory_limit: Annotated[float, _between(0, 1e6)] = 0.0
    """GiB of a device that `strategy=auto` and `jaxtrain plan` may use. 0 is what JAX takes of a GPU, and on a CPU the memory
    of the host, divided by its devices."""

    trace_step: Annotated[int, _at_least(0)] = 0
    """The step of a start, from 1, whose operations are timed for `jaxtrain layout --schedule-plot SVG --trace RUN`. It waits
    for each of them, so it is slower than the others. 0 is off."""

    def _validate(self) -> None:
        if self.boundaries and self.stages == 1:
            raise ConfigError(
                f"config.layout.boundaries={self.boundaries}: there is one stage; set config.layout.stages."
            )
        for rule in self.rules:
            ok = isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], tuple)
            _require(ok, "layout.rules", rule, "a pair ('regex', (axis or None per dim, ...))")
            _require_regex("layout.rules", rule[0])
            axes = [axis for axis in rule[1] if axis is not None]
            known = all(axis in ("data", "tensor") for axis in axes) and len(set(axes)) == len(axes)
            _require(known, "layout.rules", rule, "made of 'data', 'tensor' and None, each axis at most once")

    @property
    def bucket_bytes(self) -> int:
        """`reduce_bucket` in bytes."""
        return int(self.reduce_bucket * 2**20)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Section):
    """What is kept, and where a run starts from."""

    _prefix = "checkpoint."

    every: Annotated[str, _duration(minutes=True)] = "1 epoch"
    """Time between two checkpoints. "0" saves only the best and the last."""

    keep: Annotated[int, _at_least(1)] = 2
    """How many of the latest checkpoints are kept, beside the best one and the milestones."""

    best: Annotated[str, _one_of(BEST_BY)] = "val_accuracy"
    """Which figure of the validation decides what the best weights are: the highest `val_accuracy` or `val_top5`, or the lowest
    `val_loss`. It is that of the moving average of the weights, where the run keeps one."""

    milestone_every: Annotated[str, _duration()] = "0"
    """Time between two milestones: checkpoints that are kept for good. "0" is off."""

    resume: Annotated[str, _must_be("auto, latest, best, a step, epoch:N, a path or none", bool)] = "auto"
    """Where the run starts from. `auto`: the newest checkpoint of the work directory, or nothing if there is none. `latest`:
    the newest, which must be there. `best`: the one that is best by `checkpoint.best`. A number: that step. `epoch:12`: the
    end of that epoch, counted from 1. A path: a checkpoint or work directory of another run, or RUN/checkpoints/best for
    its best one. `none`: nothing, a fresh run."""

    allow_changes: bool = False
    """Lets a run go on although settings that change its numbers differ from the stored ones."""

    def _validate(self) -> None:
        _require_local("checkpoint.resume", self.resume, self.resume)


def _are_callbacks(values: tuple) -> bool:
    known = all(isinstance(value, str) and (value in CALLBACKS or ":" in value) for value in values)
    return known and len(set(values)) == len(values)


@dataclasses.dataclass(frozen=True)
class CallbacksConfig(_Section):
    """What is called while the run trains (docs/callbacks.md). It changes no number of a step."""

    _prefix = "callbacks."

    names: Annotated[
        tuple,
        _must_be(
            f"a tuple of {', '.join(CALLBACKS)}, or of your own package.module:Class, each at most once", _are_callbacks
        ),
    ] = ()
    """The callbacks, in the order in which they are called. `early_stopping`: ends the run when the validation gets no better.
    `swa`: averages the weights of the last epochs (Izmailov 2018). Or your own `package.module:Class`, made with the config."""

    patience: Annotated[int, _at_least(1)] = 5
    """Validations in a row without a better `checkpoint.best` after which `early_stopping` ends the run."""

    min_delta: Annotated[float, _at_least(0)] = 0.0
    """By how much more than this a figure must be better than the best one, for `early_stopping`."""

    swa_start: Annotated[float, _between(0.0, 1.0)] = 0.75
    """The share of the run after which `swa` adds the weights at each end of an epoch to its average."""


def _are_sinks(values: tuple) -> bool:
    return all(value in SINKS for value in values) and len(set(values)) == len(values)


@dataclasses.dataclass(frozen=True)
class SinksConfig(_Section):
    """Where rows of metrics are sent, beside the files of the work directory (docs/sinks.md)."""

    _prefix = "sinks."

    names: Annotated[tuple, _must_be(f"a tuple of {', '.join(SINKS)}, each at most once", _are_sinks)] = ()
    """The sinks: `wandb` (Weights & Biases), `mlflow`, `trackio`. Each needs the extra of jaxtrain that has its name. One that
    fails or hangs neither stops nor slows the run."""

    project: Annotated[str, _must_be("the name of a project", bool)] = "jaxtrain"
    """The project of W&B and Trackio, and the experiment of MLflow, that the run belongs to."""

    close_seconds: Annotated[float, _must_be("above 0 seconds", lambda value: value > 0)] = 10.0
    """Seconds that all sinks together have at the end of a start to send what is left."""


@dataclasses.dataclass(frozen=True)
class TelemetryConfig(_Section):
    """What a run measures of its machine and of itself while it trains."""

    _prefix = "telemetry."

    every: Annotated[float, _at_least(0)] = 5.0
    """Seconds between two looks at the GPUs and the host, beside the training in every process. 0 is off."""

    probe_every: Annotated[int, _at_least(-1)] = -1
    """Steps between two probes, in which each device alone computes a short program, so that a slow one is named. A process
    probes less often where that would take more than half a percent of its time. 0 is off. -1 is 50, and off on a CPU, whose
    devices share its cores."""

    port: Annotated[int, _between(0, 65536)] = 0
    """The port, on the loopback interface alone, where process 0 shows the latest numbers to Prometheus (`/metrics`). 0 is
    none."""

    images: Annotated[int, _at_least(0)] = 0
    """How many examples a new run shows in TensorBoard as its model sees them in the first step, augmented. 0 is none."""

    histograms_every: Annotated[int, _at_least(0)] = 0
    """Steps between two histograms of each layer's weights in TensorBoard. 0 is off."""


@dataclasses.dataclass(frozen=True)
class ProfileConfig(_Section):
    """Which steps are profiled (docs/profiling.md). It changes no number of the run."""

    _prefix = "profile."

    steps: Annotated[tuple, _must_be("two steps from 1 on, the first and the last of the window", _is_window)] = ()
    """The first and the last step that are profiled, such as (100, 105): a trace, and a summary of the dearest operations,
    in `profile` of the work directory. () profiles none, unless a signal asks for it."""

    length: Annotated[int, _at_least(1)] = 5
    """How many steps the process profiles that gets the signal SIGUSR2."""


@dataclasses.dataclass(frozen=True)
class CostConfig(_Section):
    """What devices cost."""

    _prefix = "cost."

    per_gpu_hour: Annotated[float, _between(0, 1e9)] = 0.0
    """The price of a GPU an hour, in any currency. The run then says what it cost: in `result.json`, `jaxtrain goodput` and
    `jaxtrain status`. 0 is no price."""


@dataclasses.dataclass(frozen=True)
class Config(_Section):
    """A whole run."""

    seed: Annotated[int, _SEED] = 0
    """Decides the initial weights, the order of the examples, augmentation and dropout. Python and NumPy are seeded with it
    too."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    layout: LayoutConfig = LayoutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    callbacks: CallbacksConfig = CallbacksConfig()
    sinks: SinksConfig = SinksConfig()
    profile: ProfileConfig = ProfileConfig()
    cost: CostConfig = CostConfig()

    def _validate(self) -> None:
        batch, parts, groups = self.data.global_batch, self.layout.microbatches, self.model.bn_groups
        if self.data.batch_per_device:
            return  # the global batch is decided and checked once the devices are known (`training.setup.resolve_for_machine`)
        self.check_batch(batch, parts, groups)

    @staticmethod
    def check_batch(batch: int, parts: int, groups: int) -> None:
        """Checks that the batch divides into its microbatches and into its BatchNorm groups.

        Args:
          batch: examples of the global batch.
          parts: microbatches; 0 is not decided yet.
          groups: BatchNorm groups.

        Raises:
          ConfigError: naming the nearest batches that divide.
        """
        for name, count in (("layout.microbatches", max(parts, 1)), ("model.bn_groups", groups)):
            if batch % count:
                raise ConfigError(
                    f"config.data.global_batch={batch} does not divide into config.{name}={count} equal parts; "
                    f"the nearest that do {are_listed(nearest_multiples(batch, count))}."
                )


SECTIONS: Mapping[str, type[_Section]] = types.MappingProxyType(
    {f.name: f.default.__class__ for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default)}  # type: ignore[misc]
)


def nearest_multiples(number: int, unit: int) -> list[int]:
    """The multiples of `unit` next to `number`, below and above it; 0 is none."""
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple]


def are_listed(numbers: Sequence[int]) -> str:
    """The end of a sentence: "is 8", or "are 8 and 16"."""
    return f"{'are' if len(numbers) > 1 else 'is'} {' and '.join(map(str, numbers))}"


# --------------------------------------------------------------------------------------------------------- conversion


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts, as stored in `config.json`."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Rebuilds and checks a `Config`. Raises `ConfigError` for an unknown key, a wrong type or a bad value."""
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


def nested_dicts(values: Any) -> dict[str, Any]:
    """Nested dicts from nested mappings, such as a `ConfigDict`."""
    return {k: nested_dicts(v) if isinstance(v, Mapping) or hasattr(v, "items") else v for k, v in values.items()}


def tuples_to_lists(value: Any) -> Any:
    """A field's value as JSON returns it: it has no tuples, so a stored (1, 2) comes back as [1, 2]."""
    return [tuples_to_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'data.name': ..., ...}: one entry a field."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def flat_keys() -> list[str]:
    """Every field's dotted name."""
    return list(flatten(to_dict(Config())))


# -------------------------------------------------------------------------------------------------------- explanation


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """What there is to know of one field: `type` in words, `allowed` "" where the type says all, `meaning` on one line."""

    type: str
    default: Any
    allowed: str
    meaning: str


def explain() -> dict[str, FieldInfo]:
    """Every field by its dotted name, in the order of `flat_keys`."""
    source = _source()
    found = {}
    for section in (Config, *SECTIONS.values()):
        meanings = _strings_below_fields(source[section.__name__])
        for name, (wanted, rule) in _annotations(section).items():
            if wanted not in SECTIONS.values():
                words = f"{wanted.__name__} ({_TYPE_WORDS[wanted]})"
                default = getattr(section(), name)
                allowed = rule.words if rule else ""
                found[section._prefix + name] = FieldInfo(words, default, allowed, meanings.get(name, ""))
    return {key: found[key] for key in flat_keys()}


def explain_sections() -> dict[str, str]:
    """What each section is for, by its name."""
    source = _source()
    return {name: " ".join((ast.get_docstring(source[s.__name__]) or "").split()) for name, s in SECTIONS.items()}


def _source() -> dict[str, ast.ClassDef]:
    """The classes of this module as they are written.

    Python evaluates a string below a field and drops it, so the source is where it can be read. `inspect` asks the
    module's loader for it, which also has it in an installed wheel, in a zip file and under `python -OO`. As the
    `metadata` of a field a meaning would need no parsing, but would stand inside a call, where editors do not show it.
    """
    module = ast.parse(inspect.getsource(sys.modules[__name__]))
    return {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}


def _strings_below_fields(section: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, below in itertools.pairwise(section.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found
