"""Assembles a run from its config: settings of JAX, data, layout, task. Compiles nothing and changes no file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxtrain import optim as optimizers
from jaxtrain.config import Config, DataConfig, Duration, without_effect
from jaxtrain.data import sources
from jaxtrain.data.record import record
from jaxtrain.data.sources import Dataset
from jaxtrain.distributed import processes
from jaxtrain.distributed.processes import first_on_process_zero
from jaxtrain.errors import ConfigError, EnvironmentMismatchError
from jaxtrain.models import registry
from jaxtrain.optim import loss_fn, make, schedule
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import Device, batch_ways, make_mesh
from jaxtrain.parallel.split import Split
from jaxtrain.precision import policy, resolve
from jaxtrain.stages import make_split, microbatches
from jaxtrain.state import TrainState, initial_state
from jaxtrain.task import Task, make_task

log = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run computes and where.

    init: makes the fresh state; pure, of no arguments. steps: where the run ends. split: the pipeline stages' layers.
    """

    config: Config
    dataset: Dataset
    layout: Layout
    task: Task
    init: Callable[[], TrainState]
    steps: int
    split: Split | None = None

    @property
    def data_record(self) -> dict[str, Any]:
        """What the run remembers of its data set, for those that go on from it or evaluate it."""
        inputs = self.task.preprocess
        return record(
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


def decide(config: Config, stored: Config | None, devices: list[Device]) -> Config:
    """Fills in what depends on the machine, at the first start; a resumed run keeps what was decided then (`stored`)."""
    ways = batch_ways(make_mesh(config.layout, devices))
    precision, batch = config.train.precision, config.data.global_batch
    if precision == "auto":
        precision = stored.train.precision if stored else resolve("auto", jax.default_backend())
    if config.data.batch_per_device:
        batch = stored.data.global_batch if stored else config.data.batch_per_device * ways
    Config.check_batch(batch, config.layout.microbatches, config.model.bn_groups)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, precision=precision),
        data=dataclasses.replace(config.data, global_batch=batch),
    )


@contextlib.contextmanager
def settings(config: Config) -> Iterator[None]:
    """JAX's process-wide settings for this run, and the seeds of Python and NumPy; JAX's are given back afterwards.

    The transfer guard forbids implicit transfers to and between devices: each would stop the loop for a round trip. It is
    set for the whole process, since the context manager of the same name would miss other threads.
    """
    random.seed(config.seed)
    np.random.seed(config.seed)
    wanted: dict[str, object] = {
        "jax_enable_x64": config.train.precision == "f64" or _jax_setting("jax_enable_x64"),
        "jax_threefry_partitionable": True,  # or a layout would change the random numbers
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # pipelines have many small programs
    }
    if not _jax_setting("jax_compilation_cache_dir"):
        wanted["jax_compilation_cache_dir"] = str(Path.home() / ".cache" / "jaxtrain" / "xla")
    with _jax_config(wanted):
        yield


@contextlib.contextmanager
def no_implicit_transfers() -> Iterator[None]:
    """Inside, an implicit transfer from host to device or between devices raises, on every thread."""
    with _jax_config({f"jax_transfer_guard_{way}": "disallow" for way in ("host_to_device", "device_to_device")}):
        yield


@contextlib.contextmanager
def _jax_config(wanted: Mapping[str, object]) -> Iterator[None]:
    before = {name: _jax_setting(name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _jax_setting(name: str) -> Any:
    return getattr(jax.config, name)


def check_names(config: Config) -> None:
    """Raises `ConfigError` for a model, data set, optimizer or loss that there is not; touches no data and no device."""
    registry.find(config.model.name)
    sources.check_name(config.data)
    make(config.optim, optax.constant_schedule(0.0))
    loss_fn(config.optim.loss)


def load_data(config: DataConfig, needed: str = "", drawn: Sequence[str] | None = None) -> Dataset:
    """The data set, prepared if need be by process 0 while the others wait (by each, with `data.prepare_per_host`).

    needed, drawn: as of `sources.load`.
    """
    first_on_process_zero(
        f"prepare the data set {config.name}",
        functools.partial(sources.prepare, config),
        config.prepare_timeout * 60,
        every_process=config.prepare_per_host,
    )
    dataset = sources.load(config, image_size=config.image_size, needed=needed, drawn=drawn)
    of_first = processes.from_process_zero("the data set", dataset.fingerprint, config.prepare_timeout * 60)
    if dataset.fingerprint != of_first:
        raise EnvironmentMismatchError(
            f"Process {processes.index()} on {socket.gethostname()} found another data set {config.name} than process 0 (its "
            f"fingerprint is {dataset.fingerprint[:12]}, not {of_first[:12]}); give all hosts the same files."
        )
    for note in dataset.notes if processes.index() == 0 else ():
        log.warning("data %s: %s", dataset.name, note)
    return dataset


def make_run(
    config: Config, dataset: Dataset, devices: list[Device], *, start_step: int = 0, start_example: int = 0
) -> Run:
    """Everything that follows from the config and the data set. Raises `ConfigError` for what does not fit together."""
    mesh = make_mesh(config.layout, devices)
    types = policy(config.train.precision)
    side = config.data.image_size or dataset.train.shape[0]
    channels = dataset.train.shape[2]
    shape = (side, side, channels)
    classes = config.model.num_classes or dataset.num_classes
    if classes < dataset.num_classes:
        raise ConfigError(f"config.model.num_classes={classes}: the data set {dataset.name} has {dataset.num_classes}.")
    model = registry.build(config.model, shape, classes, types.compute_dtype, types.param_dtype)
    steps = total_steps(config, len(dataset.train), start_step, start_example)
    rate = make_schedule(config, len(dataset.train), start_step, start_example)
    mean, std = (config.data.mean, config.data.std) if config.data.mean else (dataset.mean, dataset.std)
    task = make_task(config, model, rate, side=side, classes=classes, mean=mean, std=std)
    init = functools.partial(initial_state, config.seed, model, task.optimizer, types, shape, ema=config.optim.ema > 0)
    state = jax.eval_shape(init)
    if not jax.tree.leaves(state.params):
        raise ConfigError(
            f"config.model.name={config.model.name!r}: none of its layers ({len(model.layers)}) has parameters, so that "
            "there is nothing to train; at least one must."
        )
    has_batch_norm, batch, groups = (
        bool(jax.tree.leaves(state.batch_stats)),
        config.data.global_batch,
        config.model.bn_groups,
    )
    parts = microbatches(config.layout, batch, batch_ways(mesh), groups * has_batch_norm, even=task.preprocess.mixes)
    config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, microbatches=parts))
    layout = Layout(mesh, config.layout, config.layout.rules + model.tensor_rules)
    layout.check_batch(batch, groups, has_batch_norm)
    if task.preprocess.mixes and parts > 1 and batch // parts % 2:
        raise ConfigError(
            f"config.layout.microbatches={parts}: mixup and cutmix mix neighbours, so that a microbatch needs an even number "
            f"of examples, and config.data.global_batch={batch} gives each {batch // parts}."
        )
    split = None
    if layout.stages > 1:
        split = make_split(
            config.layout,
            model,
            state.params,
            state.batch_stats,
            (batch // parts, *shape),
            types.compute_dtype,
            max(groups // parts, 1),
            batch_ways(mesh),
        )
        names = tuple(tuple(split.costs[i].name for i in layers) for layers in split.slices)
        layout = dataclasses.replace(layout, slices=names)
    return Run(config, dataset, layout, task, init, steps, split)


def unused_settings(run: Run) -> list[str]:
    """A sentence for each setting that was changed from its default and can have no effect on this run."""
    config, data, optim, layout = run.config, run.config.data, run.config.optim, run.config.layout
    found = optimizers.unused_settings(optim)
    if data.augmentation not in ("light", "heavy"):
        found += without_effect("data", data, ["crop_padding"], f"data.augmentation={data.augmentation!r} does not pad")
    if layout.stages == 1:
        fields = ("schedule", "chunks", "balance", "stage_placement", "trace_step")
        found += without_effect("layout", layout, fields, "there is one stage")
    if not jax.tree.leaves(jax.eval_shape(run.init).batch_stats):
        found += without_effect("model", config.model, ["bn_groups"], f"{config.model.name} has no BatchNorm")
    evaluates = Duration.parse(config.train.eval_every, "config.train.eval_every").value > 0
    if evaluates and not len(run.dataset.validation):
        found += without_effect("train", config.train, ["eval_every"], "there is no validation split")
    return found


def total_steps(config: Config, train_examples: int, start_step: int = 0, start_example: int = 0) -> int:
    """The step at which the run ends: `train.steps`, or the epochs that are left after `start_example` examples."""
    if config.train.steps:
        return config.train.steps
    left = max(config.train.epochs * train_examples - start_example, 0)
    return start_step + -(-left // config.data.global_batch)


def make_schedule(config: Config, train_examples: int, start_step: int = 0, start_example: int = 0) -> optax.Schedule:
    """The learning rate as a function of the step.

    A run whose length is in epochs counts examples: after `start_step` steps of another batch size it goes on from where
    `start_example` examples are on the curve. One whose length is in steps counts steps.
    """
    batch, warmup = config.data.global_batch, warmup_steps(config, train_examples)
    if config.train.steps:
        return schedule(config.optim, config.train.steps, warmup, batch)
    rate = schedule(config.optim, -(-config.train.epochs * train_examples // batch), warmup, batch)
    ahead = start_example / batch - start_step
    return (lambda step: rate(step + ahead)) if ahead else rate


def warmup_steps(config: Config, train_examples: int) -> int:
    """`optim.warmup` in steps."""
    duration = Duration.parse(config.optim.warmup, "config.optim.warmup")
    return duration.steps(train_examples, config.data.global_batch)
