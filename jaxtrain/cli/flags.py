"""Flags of other trainers. Some are taken, and the run says which field each one is; for others there is a hint.

`--yaml FILE` holds fields of the config, and the same names as those flags.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxtrain.config import SECTIONS, flat_keys
from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import did_you_mean, nearest
from jaxtrain.recipes import unknown_field


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag that is another name of a field, or of an option of jaxtrain."""

    target: str
    """The field's dotted name, or the option."""
    value: str = "{}"
    """The value that the target gets; {} stands for what was written. Without {} the flag takes no value."""
    alone: str = ""
    """The value where none is written; "": one must be."""

    def words(self, text: str) -> str:
        """The same on jaxtrain's own command line."""
        name = self.target if self.target.startswith("--") else f"--config.{self.target}"
        return f"{name}={self.value.format(text)}"


FLAGS = {
    "--epochs": Flag("train.epochs"),
    "--data-dir": Flag("data.dir"),
    "--output-dir": Flag("--workdir"),
    "--global-batch-size": Flag("data.global_batch"),
    "--resume": Flag("checkpoint.resume", alone="latest"),
    "--no-amp": Flag("train.precision", "f32"),
    "--seed": Flag("seed"),
    "--num-workers": Flag("data.workers"),
    "--save-frequency": Flag("checkpoint.milestone_every", "{} epochs"),
    "--deterministic": Flag("train.deterministic", "true"),
}

# Well-known names of timm, torchvision, Lightning and others: the fields, options or commands to use in their place. The
# last name of a field (momentum, nesterov, ...) need not stand here.
_HINTS = {
    "optim.learning_rate": "lr base-lr blr peak-lr",
    "optim.weight_decay": "wd",
    "optim.name": "opt optim optimizer",
    "optim.eps": "opt-eps adam-epsilon",
    "optim.b1, optim.b2": "betas opt-betas",
    "optim.schedule": "sched scheduler lr-scheduler lr-scheduler-type lr-schedule",
    "optim.warmup": "warmup-epochs warmup-steps lr-warmup-epochs num-warmup-steps warmup-ratio",
    "optim.final_scale": "min-lr lr-min eta-min",
    "optim.step_gamma": "gamma lr-gamma decay-rate lr-decay",
    "optim.step_at": "milestones decay-milestones decay-epochs lr-step-size lr-steps",
    "optim.label_smoothing": "smoothing",
    "optim.clip_norm": "clip-grad clip-grad-norm grad-clip gradient-clip gradient-clip-val max-grad-norm grad-clip-norm",
    "optim.ema": "model-ema model-ema-decay ema-decay",
    "optim.loss": "criterion loss-fn",
    "model.name": "arch a model-name net backbone",
    "model.dropout": "drop drop-rate",
    "model.drop_path": "drop-path-rate stochastic-depth-prob",
    "model.num_classes": "nb-classes",
    "model.bn_groups": "sync-bn sync-batchnorm split-bn",
    "data.global_batch, or data.batch_per_device for those of a device": "batch-size b bs batch train-batch-size",
    "data.batch_per_device": "per-device-train-batch-size batch-size-per-gpu micro-batch-size",
    "data.image_size": "img-size input-size train-crop-size val-crop-size crop-size resolution imgsz",
    "data.dir, or data.name=folder:PATH for a folder of images": "data-path data-root root dataset-dir datadir",
    "data.name": "dataset dataset-name",
    "data.augmentation": "aa auto-augment augment ra-magnitude reprob random-erase color-jitter hflip",
    "data.mixup": "mixup-alpha",
    "data.cutmix": "cutmix-alpha",
    "data.workers": "j dataloader-num-workers nworkers",
    "data.examples": "limit-train-batches max-train-samples",
    "data.validation": "val-split validation-split val-size",
    "data.mean, data.std": "normalize",
    "train.epochs": "max-epochs num-epochs num-train-epochs n-epochs nepochs",
    "train.steps": "max-steps num-steps max-train-steps iterations max-iters train-steps",
    "train.precision": "amp fp16 bf16 half mixed-precision tf32 autocast dtype use-amp",
    "train.remat": "grad-checkpointing gradient-checkpointing checkpoint-activations",
    "train.log_every": "log-interval print-freq log-every-n-steps logging-steps log-frequency log-freq",
    "train.eval_every": "val-check-interval check-val-every-n-epoch eval-interval eval-freq eval-steps val-interval",
    "train.eval_examples": "limit-val-batches limit-test-batches max-eval-samples",
    "train.deterministic": "use-deterministic-algorithms",
    "layout.microbatches": "accumulate-grad-batches grad-accum-steps gradient-accumulation-steps accum-iter "
    "accumulation-steps grad-accum",
    "layout.zero": "zero-stage fsdp",
    "layout.tensor": "tensor-parallel-size tp model-parallelism tensor-parallelism",
    "layout.stages": "pipeline-parallel-size pp pipeline-parallelism num-stages",
    "a layout argument of the recipe, such as FILE:zero3": "strategy sharding-strategy parallel-mode",
    "checkpoint.every": "checkpoint-interval save-every save-freq save-steps save-interval checkpoint-freq",
    "checkpoint.keep": "checkpoint-hist save-total-limit save-top-k",
    "checkpoint.resume": "resume-from-checkpoint resume-from ckpt-path ckpt checkpoint load start-epoch initial-checkpoint",
    "--config": "config-file cfg c",
    "--workdir": "output out save-dir log-dir logdir work-dir default-root-dir experiment exp-name checkpoint-dir",
    "--devices": "gpus num-gpus ngpus n-gpu num-devices gpu",
    "--coordinator": "dist-url master-addr init-method rdzv-endpoint",
    "--num-processes": "world-size",
    "--process-id": "rank node-rank",
    "jaxtrain launch --nproc N -- train": "nproc-per-node nproc nnodes num-nodes",
    "--smoke": "fast-dev-run dry-run debug overfit-batches",
    "jaxtrain evaluate RUN": "test-only eval-only evaluate validate",
    "nothing: JAX and XLA decide it": "accelerator backend dist-backend channels-last torchcompile torchscript pin-mem "
    "pin-memory no-cuda local-rank communication-pattern find-unused-parameters",
}
_INSTEAD = {name: place for place, names in _HINTS.items() for name in names.split()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, for --help; `translate` takes them out before argparse sees them."""
    group = parser.add_argument_group("flags of other trainers", "each is another name of a field of the config")
    for option, flag in FLAGS.items():
        takes: dict[str, Any] = {"metavar": "VALUE"} if "{}" in flag.value else {"action": "store_true"}
        if flag.alone:
            takes["nargs"] = "?"
        text = f"the same as {flag.words('VALUE')}" + (f"; without VALUE, {flag.alone}" if flag.alone else "")
        group.add_argument(option, default=argparse.SUPPRESS, help=text, **takes)


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replaces flags of other trainers with jaxtrain's own words.

    Returns:
      The words, and for each flag what it is, such as "--epochs 3 is --config.train.epochs=3".

    Raises:
      ConfigError: a flag lacks its value, or has one although it takes none.
    """
    words, translations = [], []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        option, equals, text = word.partition("=")
        if option not in FLAGS:
            words.append(word)
            continue
        flag = FLAGS[option]
        if "{}" not in flag.value:
            if equals:
                raise ConfigError(f"{word}: {option} takes no value.")
        elif not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
            word = f"{option} {text}"
        elif not equals:
            text = flag.alone
        if "{}" in flag.value and not text:
            raise ConfigError(f"{option} needs a value.")
        words.append(flag.words(text))
        translations.append(f"{word} is {words[-1]}")
    return words, translations


def hint(word: str, known: Iterable[str]) -> str:
    """What to write in place of a flag that a command does not know; "" where nothing comes near.

    Args:
      word: as written, such as "--lr=0.1".
      known: the command's own options.
    """
    option = word.partition("=")[0]
    name = option.lstrip("-").removeprefix("config.")
    ambiguous = ("name", "names")  # several sections have them
    keys = {key.rpartition(".")[2]: key for key in reversed(flat_keys()) if key.rpartition(".")[2] not in ambiguous}
    field = name.replace("-", "_")
    instead = _INSTEAD.get(name.lower().replace("_", "-")) or (field if field in flat_keys() else keys.get(field))
    if instead is None:
        if meant := did_you_mean(option, known):
            return meant
        instead = keys.get(nearest(field, keys))
    if instead is None:
        return " A field of the config is set with --config.KEY=VALUE." if "=" in word else ""
    first = instead.partition(",")[0]
    return f" For {option} use --config.{first}=VALUE{instead[len(first) :]}." if first in flat_keys() else (
        f" For {option} use {instead}."
    )  # fmt: skip


def read_yaml(path: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The fields in a YAML file: nested by section or with dots, and by the names of `FLAGS`, with - or _.

    Returns:
      Pairs (dotted name, text), and for each name that is none of a field what it is.

    Raises:
      ConfigError: the file cannot be read, or has something else in it.
    """
    require_local(path, f"--yaml {path}", ConfigError)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--yaml {path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--yaml {path}: is no YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--yaml {path}: must hold fields of the config, such as `train: {{epochs: 3}}`.")
    pairs: list[tuple[str, str]] = []
    translations: list[str] = []
    try:
        for key, value in _flat(values):
            pairs.append(_field(key, value, translations))
    except ConfigError as error:
        raise ConfigError(f"--yaml {path}: {error}") from error
    return pairs, translations


def _flat(values: dict[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _field(key: str, value: Any, translations: list[str]) -> tuple[str, str]:
    """The dotted name and the text of one entry of a YAML file; `translations` gets what is not plain."""
    key = key.removeprefix("config.")
    if value is None:
        raise ConfigError(f"{key} has no value.")
    text = str(value).lower() if isinstance(value, bool) else str(_tuples(value))
    option = f"--{key.replace('_', '-')}"
    if key in SECTIONS and f"{key}.name" in flat_keys():
        translations.append(f"{key}: {text} is config.{key}.name")
        return f"{key}.name", text
    if key in flat_keys():
        return key, text
    if key in SECTIONS:
        raise ConfigError(f"{key}: {text} is a section; write its fields below it, or {key}.FIELD.")
    if option not in FLAGS or FLAGS[option].target.startswith("--"):
        where = FLAGS[option].target if option in FLAGS else ""
        found = f" It is {where} on the command line." if where else hint(key.rpartition(".")[2], [])
        raise ConfigError(f"config.{key} does not exist.{found}") if found else unknown_field(key)
    flag = FLAGS[option]
    if "{}" not in flag.value and value is not True:
        raise ConfigError(f"{key}: {text}: must be true, or left out.")
    name, _, written = flag.words(text).removeprefix("--config.").partition("=")
    translations.append(f"{key}: {text} is config.{name}={written}")
    return name, written


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
