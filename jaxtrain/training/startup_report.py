"""What a run says at its start: layout, batch, memory, optimizer."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable

import jax

from jaxtrain.config import Config
from jaxtrain.data.base import SPLITS
from jaxtrain.host.nccl import chosen
from jaxtrain.observability.rendering import size
from jaxtrain.optim.schedules import peak_learning_rate, warmup_steps
from jaxtrain.parallel.layout import Layout, Placement, bytes_per_device
from jaxtrain.parallel.mesh import batch_ways
from jaxtrain.step.pipeline.plan import microbatches
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.results import parts_evaluated
from jaxtrain.training.setup import RunSpec, unused_settings

log = logging.getLogger("jaxtrain")


def layout_table(run: RunSpec, state: TrainState) -> dict[str, list[Placement]]:
    """Where every leaf lies, by tree: the state's, and the gradient accumulator's as `gradients`."""
    return run.layout.table(state) | {"gradients": run.layout.gradients(run.task.groups.trained(state.params))}


def summary(run: RunSpec, table: dict[str, list[Placement]], where: str) -> list[str]:
    """The layout and the batch, in the lines that the log has at the start; for the arguments see `headlines`."""
    mesh, config, optim = run.layout.mesh, run.config, run.config.optim
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    held = ", ".join(
        f"{tree} {size(bytes_per_device(leaves))}" for tree, leaves in table.items() if bytes_per_device(leaves)
    )
    batch, count = config.data.global_batch, config.layout.microbatches
    ways = mesh.shape["replica"] * mesh.shape["data"]
    lines = [
        f"model: {config.model.name}, {sum(_elements(leaf) for leaf in table['params']):,} parameters, "
        f"{config.train.precision}; {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}), zero {config.layout.zero}",
        f"batch: {batch} global, {batch // jax.process_count()} a process, {batch // ways} a device, "
        f"{batch // count // ways} a device and microbatch ({count})",
        f"memory per device at rest: {held}",
        *([f"collectives: {collectives(run.layout)}"] if mesh.size > 1 else []),
        f"optimizer: {optim.name}, peak learning rate {peak_learning_rate(optim, batch):g} ({optim.learning_rate:g} at a batch "
        f"of {optim.lr_reference_batch}, scaling {optim.lr_scaling}), {optim.schedule}",
        *finetuning(run, table),
        *(run.partition.describe() if run.partition else []),
        f"data: {config.data.name}, {len(run.dataset.train)} train, {len(run.dataset.validation)} validation, "
        f"{len(run.dataset.test)} test; {where}; {run.steps} steps",
    ]
    return lines + notes(table)


def headlines(run: RunSpec, table: dict[str, list[Placement]], where: str) -> list[str]:
    """What a run is, in the lines that a screen has for it; the log has those of `summary`.

    Args:
      run: what is trained.
      table: of `layout_table`.
      where: where batches come from.
    """
    mesh, config, data, count = run.layout.mesh, run.config, run.dataset, run.config.layout.microbatches
    axes = "".join(f", {name} {size}" for name, size in mesh.shape.items() if size > 1)
    held = sum(bytes_per_device(leaves) for leaves in table.values())
    width = f" width {config.model.width}" if config.model.width else ""
    return [
        f"{config.model.name}{width}, {sum(_elements(leaf) for leaf in table['params']):,} parameters, "
        f"{config.train.precision}; {config.optim.name}, learning rate "
        f"{peak_learning_rate(config.optim, config.data.global_batch):g}, {config.optim.schedule}",
        f"{config.data.name}: {len(data.train):,} train, {len(data.validation):,} validation, {len(data.test):,} test; "
        f"{run.steps:,} steps of {config.data.global_batch}{f' in {count} microbatches' if count > 1 else ''}",
        f"{mesh.size} x {mesh.devices.flat[0].device_kind}{axes}, zero {config.layout.zero}; "
        f"{size(held)} a device at rest; data {where}",
        *finetuning(run, table),
        *(run.partition.describe() if run.partition else []),
        *notes(table),
    ]


def finetuning(run: RunSpec, table: dict[str, list[Placement]]) -> list[str]:
    """What is trained where not all of it is, and the rates of the layers where they differ; else []."""
    groups, optim, lines = run.task.groups, run.config.optim, []
    trained = [leaf for leaf in table["params"] if groups.is_trained(leaf.path)]
    if len(trained) < len(table["params"]):
        count, total = (sum(map(_elements, leaves)) for leaves in (trained, table["params"]))
        lines.append(f"trained: {count:,} of {total:,} parameters; the others are frozen (jaxtrain layout --leaves)")
    if run.task.frozen_stats:
        every = {leaf.path.rpartition("/")[0] for leaf in table["batch_stats"]}
        lines.append(f"BatchNorms that keep their running statistics: {len(run.task.frozen_stats)} of {len(every)}")
    if not optim.layer_decay == optim.head_rate == 1:
        rates = {leaf.path.split("/", 1)[0]: groups.rate(leaf.path) for leaf in trained}
        lines.append("learning rate times: " + ", ".join(f"{rate:.3g} {layer}" for layer, rate in rates.items()))
    return lines


def collectives(layout: Layout) -> str:
    """What carries the collectives of a run of several devices, and how its gradients are added up."""
    platform, config = layout.mesh.devices.flat[0].platform, layout.config
    carrier = {"cpu": "gloo" if jax.process_count() > 1 else "XLA:CPU's, in this process", "gpu": "NCCL"}
    text: str = carrier.get(platform) or platform
    if platform == "gpu" and (told := chosen()):
        text += f" ({told})"
    if not layout.by_device:
        return f"{text}; gradients by XLA's"
    by = "XLA's" if config.reduce == "auto" else f"{config.reduce}, in buckets of {config.reduce_bucket:g} MiB"
    if layout.trains_by_device:
        return f"{text}; weights are averaged every {layout.sync_every} steps, by {by}"
    if layout.compress == "none":
        return f"{text}; gradients by {by}"
    return f"{text}; gradients once a step, compressed by {layout.compress}, what is sent whole by {by}"


def notes(table: dict[str, list[Placement]]) -> list[str]:
    """What is worth saying of leaves, each once; gradients are as their parameters."""
    return once_each(
        (f"{tree}/{leaf.path}", leaf.note) for tree, leaves in table.items() if tree != "gradients" for leaf in leaves
    )


def once_each(notes_of: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each note but '', with the first leaf that it concerns and how many more there are.

    notes_of: pairs of a leaf's path and its note.
    """
    found: dict[str, list[str]] = {}
    for path, note in notes_of:
        if note:
            found.setdefault(note, []).append(path)
    more = {note: len(paths) - 1 for note, paths in found.items()}
    return [
        f"{paths[0]}{f' and {more[note]} other leaves' if more[note] else ''}: {note}" for note, paths in found.items()
    ]


def warn_of_settings(run: RunSpec) -> None:
    """Process 0 says which settings have no effect, or hardly the one that was meant, and which make less of the run."""
    if jax.process_index() > 0:
        return
    for text in unused_settings(run):
        log.warning("%s", text)
    splits = {split: len(getattr(run.dataset, split)) for split in SPLITS}
    if parts := parts_evaluated(run.config.train.eval_examples, splits):
        log.info("%s", parts)
    if (warmup := warmup_steps(run.config, len(run.dataset.train))) > run.steps:
        text = "config.optim.warmup=%r is %d steps, longer than the run's %d."
        log.warning(text, run.config.optim.warmup, warmup, run.steps)


def idle_stages(run: RunSpec, state: TrainState) -> str:
    """What to say where there are fewer microbatches than stages, or ''. state: shapes."""
    layout, groups, batch = run.layout, run.config.model.bn_groups, run.config.data.global_batch
    stages, count = layout.stages, layout.config.microbatches
    if count >= stages:
        return ""
    how = "work one after the other" if count == 1 else "are idle most of the time"
    chosen = dataclasses.replace(layout.config, microbatches=0)
    best = microbatches(chosen, batch, batch_ways(layout.mesh), 0, even=run.task.preprocess.mixes)
    if best <= count:
        fix = f"config.data.global_batch={batch} does not divide into more"
    elif jax.tree.leaves(run.task.moving(state.batch_stats)) and groups % best:
        fix = (
            f"with config.model.bn_groups={groups} a microbatch holds whole BatchNorm groups only; "
            f"--config.model.bn_groups={best} "
            f"--config.layout.microbatches={best} lets them overlap and changes the run's numbers"
        )
    else:
        fix = f"use --config.layout.microbatches={best}"
    return f"{count} microbatch{'es' if count > 1 else ''} for {stages} pipeline stages: the stages {how}; {fix}."


def one_step_a_call(config: Config) -> str:
    """What to say where `train.steps_per_call` has no effect."""
    if config.layout.stages > 1 or config.layout.microbatches > 1:
        why = "the host drives pipeline stages and microbatches"
    else:
        why = "this model has convolutions, whose gradients XLA:CPU computes 20 to 60 times slower in a loop"
    return (
        f"train.steps_per_call={config.train.steps_per_call} has no effect here, where each call makes one step: {why}."
    )


def _elements(leaf: Placement) -> int:
    return functools.reduce(lambda a, b: a * b, leaf.shape, 1)
