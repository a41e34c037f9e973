"""Assembles a run from its config: settings of JAX, data, layout, task. Compiles nothing and changes no file."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import socket
from collections.abc import Callable, Sequence

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtrain.config import Config, DataConfig, OptimConfig, TrainConfig, are_listed, nearest_multiples, without_effect
from jaxtrain.data import registry as datasets
from jaxtrain.data.augment import check_own_augmentation, own_augmentation
from jaxtrain.data.base import CROPPED, Dataset, Outline, count_classes, underlying
from jaxtrain.data.record import DatasetRecord
from jaxtrain.distributed import coordination
from jaxtrain.distributed.coordination import first_on_process_zero
from jaxtrain.durations import Duration
from jaxtrain.errors import ConfigError, EnvironmentMismatchError
from jaxtrain.host.backend import on_cpu
from jaxtrain.models import registry as models
from jaxtrain.optim import optimizers
from jaxtrain.optim.losses import balanced_weights, check_own_loss, loss_fn
from jaxtrain.optim.optimizers import make_optimizer
from jaxtrain.optim.param_groups import unused_rates
from jaxtrain.optim.schedules import make_schedule, total_steps
from jaxtrain.parallel.layout import Layout, check_batch
from jaxtrain.parallel.mesh import Device, batch_ways, make_mesh
from jaxtrain.precision import precision_policy, resolve_precision
from jaxtrain.step.communication import InitialState
from jaxtrain.step.pipeline.partition import Partition
from jaxtrain.step.pipeline.plan import microbatches, partition_model
from jaxtrain.step.task import Task, make_task
from jaxtrain.step.train_state import TrainState, initial_state
from jaxtrain.training.pretrained_settings import with_weights_settings
from jaxtrain.trees import path_of

log = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """What a run computes and where.

    init: makes the fresh state from a seed, int32 [], and from weights that are given (`initial_state`); pure. steps: where
    the run ends. partition: the pipeline stages' layers.
    """

    config: Config
    dataset: Dataset
    layout: Layout
    task: Task
    init: Callable[..., TrainState]
    steps: int
    partition: Partition | None = None

    @property
    def evaluation_batch(self) -> int:
        """Examples of a batch of the evaluation: as many as a microbatch has."""
        return self.config.data.global_batch // self.layout.config.microbatches

    def num_evaluation_batches(self, split: str) -> int:
        """How many batches an evaluation of a split has."""
        examples = min(len(getattr(self.dataset, split)), self.config.train.eval_examples or math.inf)
        return math.ceil(examples / self.evaluation_batch)

    @property
    def data_record(self) -> DatasetRecord:
        """What the run remembers of its data set, for those that go on from it or evaluate it."""
        inputs = self.task.preprocess
        return DatasetRecord.of(
            self.dataset,
            image_size=inputs.image_size,
            num_classes=inputs.num_classes,
            mean=inputs.mean,
            std=inputs.std,
        )


def select_devices(count: int) -> list[Device]:
    """The first `count` devices of each process, or all of them for 0. Raises `ConfigError` if there are fewer."""
    if not count:
        return jax.devices()
    here = jax.local_device_count()
    if count > here:
        raise ConfigError(
            f"--devices {count}: this host has {here} ({jax.default_backend()}); --simulate-devices {count} makes CPU ones."
        )
    by_process: dict[int, list[Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    return [device for devices in by_process.values() for device in devices[:count]]


def resolve_for_machine(config: Config, stored: Config | None, devices: list[Device]) -> Config:
    """Fills in what depends on the machine, at the first start; a resumed run keeps what was decided then.

    Args:
      config: as the user gave it.
      stored: the config of the run so far; None for a fresh run.
      devices: those that the run uses.

    Raises:
      ConfigError: the batch does not divide, or the layout does not fit the devices.
      WeightsError: `model.init_from` is no file of weights.
    """
    if config.layout.strategy == "auto":
        raise ConfigError(
            "config.layout.strategy='auto': jaxtrain train chooses the layout, and jaxtrain plan shows what it would choose; "
            "what works on one layout needs --config.layout.strategy=manual."
        )
    config = with_weights_settings(config, stored)
    ways = batch_ways(make_mesh(config.layout, devices))
    precision, batch = config.train.precision, config.data.global_batch
    if precision == "auto":
        precision = stored.train.precision if stored else resolve_precision("auto", devices[0].platform)
    if config.data.batch_per_device:
        batch = stored.data.global_batch if stored else config.data.batch_per_device * ways
    Config.check_batch(batch, config.layout.microbatches, config.model.bn_groups)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, precision=precision),
        data=dataclasses.replace(datasets.absolute(config.data), global_batch=batch),
    )


def check_names(config: Config) -> None:
    """Raises `ConfigError` for a model, data set, augmentation, optimizer or loss that there is not.

    Touches no data and no device.
    """
    models.find(config.model.name)
    datasets.check_name(config.data)
    own_augmentation(config.data.augmentation)
    make_optimizer(config.optim, optax.constant_schedule(0.0))
    loss_fn(config.optim.loss)


def load_data(config: DataConfig, needed: str = "", drawn: Sequence[str] | None = None) -> Dataset:
    """The data set, prepared if need be by process 0 while the others wait (by each, with `data.prepare_per_host`).

    Args:
      config: which data set.
      needed: the one split that must be there; "" for all (see `data.registry.load`).
      drawn: the splits that a run had drawn from training.

    Raises:
      DataError: it is missing or damaged.
      EnvironmentMismatchError: the processes see different data.
    """
    first_on_process_zero(
        f"prepare the data set {config.name}",
        functools.partial(datasets.prepare, config),
        config.prepare_timeout * 60,
        every_process=config.prepare_per_host,
    )
    dataset = datasets.load(config, image_size=config.image_size, needed=needed, drawn=drawn)
    of_first = coordination.broadcast_str("the data set", dataset.fingerprint, config.prepare_timeout * 60)
    if dataset.fingerprint != of_first:
        raise EnvironmentMismatchError(
            f"Process {coordination.index()} on {socket.gethostname()} found another data set {config.name} than process 0 "
            f"(its fingerprint is {dataset.fingerprint[:12]}, not {of_first[:12]}); give all hosts the same files."
        )
    for note in dataset.notes if coordination.index() == 0 else ():
        log.warning("data %s: %s", dataset.name, note)
    return dataset


def make_run_spec(
    config: Config, dataset: Dataset, devices: list[Device], *, start_step: int = 0, start_example: int = 0
) -> RunSpec:
    """Everything that follows from the config and the data set.

    Args:
      config: of the run, resolved for this machine.
      dataset: what is trained on.
      devices: those that the run uses.
      start_step: the step that the run goes on from.
      start_example: the examples consumed by then.

    Raises:
      ConfigError: settings, model and data do not fit together.
    """
    types = precision_policy(config.train.precision)
    side = config.data.image_size or dataset.train.shape[0]
    channels = dataset.train.shape[2]
    shape = (side, side, channels)
    classes = config.model.num_classes or dataset.num_classes
    if classes < dataset.num_classes:
        raise ConfigError(f"config.model.num_classes={classes}: the data set {dataset.name} has {dataset.num_classes}.")
    model = models.build(config.model, shape, classes, types.compute_dtype, types.param_dtype)
    steps = total_steps(config, len(dataset.train), start_step, start_example)
    rate = make_schedule(config, len(dataset.train), start_step, start_example)
    task = make_task(
        config,
        model,
        rate,
        side=side,
        classes=classes,
        mean=dataset.mean,
        std=dataset.std,
        dtype=types.compute_dtype,
        class_weights=_class_weights(config, dataset, classes),
    )
    batch = config.data.global_batch
    check_own_augmentation(task.preprocess, jax.ShapeDtypeStruct((batch, *dataset.train.shape), np.uint8))
    check_own_loss(config.optim.loss, jax.ShapeDtypeStruct((batch, classes), task.sums_dtype))
    init = functools.partial(initial_state, task=task, policy=types, input_shape=shape)
    state = jax.eval_shape(init, 0)
    if not jax.tree.leaves(state.params):
        raise ConfigError(
            f"config.model.name={config.model.name!r}: none of its layers ({len(model.layers)}) has parameters, so that "
            "there is nothing to train; at least one must."
        )
    config, layout, partition = _lay_out(config, make_mesh(config.layout, devices), task, state, shape)
    return RunSpec(config, dataset, layout, task, InitialState(init, task, layout), steps, partition)


def _class_weights(config: Config, dataset: Dataset, classes: int) -> tuple[float, ...]:
    """`optim.class_weights` as a number for each of the model's classes; () where all are alike."""
    name, numbers = config.optim.class_weights, config.optim.numbered_class_weights
    if name == "balanced" and isinstance(underlying(dataset.train), Outline):
        return (1.0,) * classes  # nothing is trained on an outline
    if name == "balanced":
        counts = count_classes(dataset.train, classes)
        if counts is None:
            raise ConfigError(
                f"config.optim.class_weights='balanced': the labels of {dataset.name} are only known once all its images are "
                "read; give a number for each class instead, such as '1,2.5,0.5'."
            )
        return balanced_weights(counts)
    if numbers and len(numbers) != classes:
        raise ConfigError(
            f"config.optim.class_weights={name!r}: has {len(numbers)} numbers, and must have one for each of the {classes} "
            "classes."
        )
    return numbers


def _lay_out(
    config: Config, mesh: Mesh, task: Task, state: TrainState, shape: tuple[int, int, int]
) -> tuple[Config, Layout, Partition | None]:
    """The config with the number of microbatches, the layout, and the pipeline stages' layers.

    state: shapes. shape: [H, W, C] of an example.
    """
    model, batch, groups, ways = task.model, config.data.global_batch, config.model.bn_groups, batch_ways(mesh)
    has_batch_norm = bool(jax.tree.leaves(task.moving(state.batch_stats)))
    count = microbatches(config.layout, batch, ways, groups * has_batch_norm, even=task.preprocess.mixes)
    config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, microbatches=count))
    exchange = {"compress": config.optim.compress, "sync_every": config.optim.sync_every}
    layout = Layout(mesh, config.layout, config.layout.rules + model.tensor_rules, **exchange)
    check_batch(layout, batch, groups, has_batch_norm)
    _check_by_device(config, layout, state)
    check_sync(config, layout, has_batch_norm)
    if task.preprocess.mixes and count > 1 and batch // count % 2:
        raise ConfigError(
            f"config.layout.microbatches={count}: mixup and cutmix mix neighbours, so that a microbatch needs an even number "
            f"of examples, and config.data.global_batch={batch} gives each {batch // count}."
        )
    if layout.stages == 1:
        return config, layout, None
    partition = partition_model(
        config.layout,
        model,
        state.params,
        state.batch_stats,
        (batch // count, *shape),
        task.preprocess.dtype,
        max(groups // count, 1),
        ways,
        cpu=on_cpu(mesh.devices.flat),
    )
    names = tuple(tuple(partition.costs[i].name for i in layers) for layers in partition.chunks)
    return config, dataclasses.replace(layout, chunks=names), partition


def _check_by_device(config: Config, layout: Layout, state: TrainState) -> None:
    """Raises `ConfigError` where a device cannot compute its own examples alone, which `layout.reduce` needs. state: shapes."""
    if not layout.by_device:
        return
    reduce, optim = layout.config.reduce, config.optim
    if optim.compress in ("bf16", "int8", "topk") and reduce != "auto":
        raise ConfigError(
            f"config.optim.compress={optim.compress!r} has an exchange of its own in place of config.layout.reduce={reduce!r}: "
            "what it sends cannot be added up on the way; set one of the two, or take randomk or powersgd."
        )
    reduce, off = f"config.layout.reduce={reduce!r}", "--config.layout.reduce=auto"
    if optim.compress != "none":
        reduce, off = f"config.optim.compress={optim.compress!r}", "--config.optim.compress=none"
    if optim.sync_every > 1:
        reduce, off = f"config.optim.sync_every={optim.sync_every}", "--config.optim.sync_every=1"
    if config.model.attention == "pallas":
        raise ConfigError(
            f"{reduce} does not go with config.model.attention='pallas', whose kernel XLA must split; use "
            f"--config.model.attention=plain or {off}."
        )
    statistics: dict[str, set[str]] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(state.batch_stats):
        statistics.setdefault(path_of(path[:-1]), set()).add(path_of(path[-1:]))
    if own := [layer for layer, names in statistics.items() if names != {"mean", "var"}]:
        raise ConfigError(
            f"{reduce}: {own[0]} has statistics of the model's own, which would be those of one device's examples; take "
            f"them from jaxtrain.models.layers.BatchNorm, or use {off}."
        )


def check_sync(config: Config, layout: Layout, has_batch_norm: bool) -> None:
    """Raises `ConfigError` where the shards of the batch cannot train weights of their own."""
    if not layout.trains_by_device:
        return
    optim, ways = config.optim, batch_ways(layout.mesh)
    what = f"config.optim.sync_every={optim.sync_every}"
    if optim.compress != "none":
        raise ConfigError(
            f"{what}: no gradients are sent that config.optim.compress={optim.compress!r} could compress; set one of the two."
        )
    if layout.stages > 1:
        raise ConfigError(
            f"{what} trains whole models by themselves, and config.layout.stages={layout.stages} cuts them; set one of the two "
            "to 1."
        )
    groups = config.model.bn_groups // layout.config.microbatches
    if has_batch_norm and groups > ways and groups % ways:
        raise ConfigError(
            f"config.model.bn_groups={config.model.bn_groups} does not divide by the {ways} shards of the batch, each of which "
            f"trains by itself under {what}; the nearest that do {are_listed(nearest_multiples(groups, ways))}."
        )


def unused_settings(run: RunSpec) -> list[str]:
    """A sentence for each setting that was changed from its default and can have no effect on this run."""
    config, data, optim, layout = run.config, run.config.data, run.config.optim, run.config.layout
    found = optimizers.unused_settings(optim)
    augmentation = f"data.augmentation={data.augmentation!r}"
    if data.augmentation not in ("light", "heavy"):
        found += without_effect("data", data, ["crop_padding"], f"{augmentation} does not pad")
    if data.augmentation != "random_resized_crop":
        found += without_effect("data", data, ["crop_scale", "crop_ratio"], f"{augmentation} takes no random boxes")
    if data.augmentation not in CROPPED:
        found += without_effect("data", data, ["crop_pct"], f"{augmentation} does not crop to a share of the image")
    if run.task.preprocess.own is not None or data.augmentation == "none":
        found += without_effect("data", data, ["flip"], f"{augmentation} does not flip")
    if layout.stages == 1:
        fields = ("schedule", "chunks", "balance", "stage_placement", "trace_step")
        found += without_effect("layout", layout, fields, "there is one stage")
    else:
        found += without_effect("telemetry", config.telemetry, ["histograms_every"], "pipeline stages make none")
    found += _unused_reduction(run.layout, optim, config.train)
    if not config.model.init_from:
        found += without_effect("model", config.model, ["init_sha256"], "config.model.init_from names no file")
    state = jax.eval_shape(run.init, 0)
    found += unused_rates(run.task.groups, state.params)
    if not jax.tree.leaves(state.batch_stats):
        found += without_effect(
            "model", config.model, ["bn_groups", "freeze_bn"], f"{config.model.name} has no BatchNorm"
        )
    elif not jax.tree.leaves(run.task.moving(state.batch_stats)):
        found += without_effect("model", config.model, ["bn_groups"], "all BatchNorms use their running statistics")
    evaluates = Duration.parse(config.train.eval_every, "config.train.eval_every").value > 0
    if evaluates and not len(run.dataset.validation):
        found += without_effect("train", config.train, ["eval_every"], "there is no validation split")
    if not len(run.dataset.validation):
        found += without_effect("checkpoint", config.checkpoint, ["best"], "there is no validation split")
    if "early_stopping" not in config.callbacks.names:
        why = "early_stopping is not in callbacks.names"
        found += without_effect("callbacks", config.callbacks, ["patience", "min_delta"], why)
    if "swa" not in config.callbacks.names:
        found += without_effect("callbacks", config.callbacks, ["swa_start"], "swa is not in callbacks.names")
    if not config.sinks.names:
        found += without_effect("sinks", config.sinks, ["project", "close_seconds"], "sinks.names names none")
    if not (len(run.dataset.validation) or len(run.dataset.test)):
        why = "there is neither a validation nor a test split"
        found += without_effect("train", config.train, ["eval_examples"], why)
    return found


_COMPRESS_FIELDS = ("compress_ratio", "compress_rank", "compress_min_rate", "compress_warmup")
_OUTER_FIELDS = ("outer_rate", "outer_momentum")


def _unused_reduction(layout: Layout, optim: OptimConfig, train: TrainConfig) -> list[str]:
    """The sentences of `unused_settings` on how gradients are added up."""
    config, found = layout.config, []
    if batch_ways(layout.mesh) == 1:
        found += without_effect("layout", config, ["reduce"], "one device has the whole batch")
        fields = ("compress", *_COMPRESS_FIELDS, "sync_every", *_OUTER_FIELDS)
        found += without_effect("optim", optim, fields, "one device has the whole batch")
    elif config.reduce == "hierarchical" and 1 in (config.replica, layout.mesh.shape["data"]):
        why = f"layout.replica={config.replica} x layout.data={layout.mesh.shape['data']} has one level: it acts as 'ring'"
        found += without_effect("layout", config, ["reduce"], why)
    if not layout.by_device:
        found += without_effect("layout", config, ["reduce_bucket"], "XLA packs the gradients")
    if on_cpu(layout.mesh.devices.flat):
        found += without_effect("layout", config, ["nccl_algo", "nccl_protocol"], "a CPU has no NCCL")
    if batch_ways(layout.mesh) == 1:
        return found
    reads = {"topk": ("compress_ratio",), "randomk": ("compress_ratio",), "powersgd": ("compress_rank",)}
    common = ("compress_min_rate", "compress_warmup") if optim.compress != "none" else ()
    unread = set(_COMPRESS_FIELDS).difference(reads.get(optim.compress, ()), common)
    found += without_effect("optim", optim, sorted(unread), f"optim.compress={optim.compress!r} does not read it")
    if layout.trains_by_device:
        why = f"under optim.sync_every={optim.sync_every} the weights that are compared are an average"
        found += without_effect("train", train, ["check_replicas_every"], why)
    if optim.sync_every == 1:
        found += without_effect("optim", optim, _OUTER_FIELDS, "optim.sync_every is 1")
    return found
