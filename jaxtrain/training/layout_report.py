"""Describes a run without training it: shapes, placements, bytes. Reads no data that is not there."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.config import Config
from jaxtrain.data import registry
from jaxtrain.data.augment import train_inputs
from jaxtrain.errors import ConfigError
from jaxtrain.host.files import parse_json
from jaxtrain.host.paths import require_local
from jaxtrain.models.layers import Context
from jaxtrain.parallel.layout import Placement, bytes_by_stage, bytes_per_device
from jaxtrain.parallel.mesh import Device
from jaxtrain.step.pipeline import schedule as schedules
from jaxtrain.step.pipeline.plot import svg
from jaxtrain.step.pipeline.schedule import Op
from jaxtrain.step.pipeline.timeline import Event, Timeline, simulate
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.setup import RunSpec, make_run_spec, resolve_for_machine, unused_settings
from jaxtrain.training.startup_report import idle_stages, layout_table


def describe_layout(config: Config, devices: list[Device]) -> dict[str, Any]:
    """The sharding table as plain values.

    Args:
      config: the run's.
      devices: of all hosts; they need not be there (`parallel.topology.target_devices`).

    Returns:
      `parameters` (their number), `devices`, `mesh` (size of each axis), `zero`, `bytes_per_device` (by tree), and `leaves`:
      for each `tree`, `path` (with the tree in front), `shape`, `dtype`, `spec` (axis or None for each dim; a list where a
      dim has several), `stage`, `bytes_per_device`, `note`, and for a trained parameter `rate`, what the learning rate is
      multiplied by (0 for all else). With pipeline stages also `bytes_by_stage` (by tree, then stage), `stages` (a line about
      each); `microbatches` is their number. `warnings`: what a user should know, among it settings that have no effect.
    """
    run, table = _planned(config, devices)
    with settings(run.config):
        return describe(run, table)


def _planned(config: Config, devices: list[Device]) -> tuple[RunSpec, dict[str, list[Placement]]]:
    config = resolve_for_machine(config, None, devices)
    with settings(config):
        run = make_run_spec(config, registry.outline(config.data, image_size=config.data.image_size), devices)
        state = jax.eval_shape(run.init, 0)
        _trace(run, state)
        return run, layout_table(run, state)


def _trace(run: RunSpec, state: TrainState) -> None:
    """Traces a microbatch's forward pass, so that what training refuses there is refused here. Computes nothing."""
    task, microbatches = run.task, run.config.layout.microbatches
    size = run.config.data.global_batch // microbatches

    def forward(params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        example, key = jnp.arange(size, dtype=jnp.int32), jax.random.key(0)
        inputs, targets = train_inputs(task.preprocess, images, labels, example, key)
        context = Context(example=example, train=True, bn_groups=max(task.bn_groups // microbatches, 1))
        logits, _ = task.model.apply(params, batch_stats, inputs, context, key)
        return task.loss(logits, targets)

    images = jax.ShapeDtypeStruct((size, *run.dataset.train.shape), jnp.uint8)
    jax.eval_shape(forward, state.params, state.batch_stats, images, jax.ShapeDtypeStruct((size,), jnp.int32))


def overview(run: RunSpec, table: Mapping[str, list[Placement]]) -> dict[str, Any]:
    """The sums of `describe_layout`, `zero` and the number of `devices`: what a run records of its layout."""
    layout, stages = run.layout.config, run.layout.stages
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in table["params"]),
        "devices": run.layout.mesh.size,
        "mesh": dict(run.layout.mesh.shape),
        "zero": layout.zero,
        "bytes_per_device": {tree: bytes_per_device(placements) for tree, placements in table.items()},
        "bytes_by_stage": {tree: bytes_by_stage(placements, stages) for tree, placements in table.items()},
        "microbatches": layout.microbatches,
        "stages": run.partition.describe() if run.partition else [],
    }


def describe(run: RunSpec, table: Mapping[str, list[Placement]]) -> dict[str, Any]:
    """What `describe_layout` returns."""
    groups = run.task.groups
    leaves = [
        {
            "tree": tree,
            "path": f"{tree}/{leaf.path}".rstrip("/"),
            "shape": list(leaf.shape),
            "dtype": leaf.dtype,
            "spec": [*leaf.spec, *[None] * (len(leaf.shape) - len(leaf.spec))],
            "stage": leaf.stage,
            "bytes_per_device": leaf.bytes_per_device,
            "note": leaf.note,
            "rate": groups.rate(leaf.path) if tree == "params" and groups.is_trained(leaf.path) else 0.0,
        }
        for tree, placements in table.items()
        for leaf in placements
    ]
    return overview(run, table) | {
        "warnings": [
            *filter(None, [idle_stages(run, jax.eval_shape(run.init, 0))]),
            *run.dataset.notes,
            *unused_settings(run),
        ],
        "leaves": leaves,
    }


# ----------------------------------------------------------------------------------------------------------- schedules

# What a device does a second in a drawing without measured times (an H100 computes in bf16 at about half of its peak).
_NOMINAL_FLOPS = 5e14


def draw_schedule(config: Config, devices: list[Device], traced: str | Path = "") -> str:
    """An SVG of the pipeline's planned step; with `traced`, a work directory, also of its recorded step, beside it.

    The plan takes what each chunk costs from the layers' operations at 500 TFLOP/s, or from the recorded step where there
    is one.

    Args:
      config: the run's.
      devices: of all hosts.
      traced: the work directory of a run that recorded a step (`layout.trace_step`).

    Raises:
      ConfigError: there are no stages, or no record.
    """
    run, _ = _planned(config, devices)
    if run.partition is None:
        raise ConfigError("config.layout.stages=1: there is no schedule to draw; use --config.layout.stages=2 or more.")
    if not traced:
        return planned_svg(run)
    title, schedule = _titled_schedule(run)
    measured = read_trace(traced)
    found = collections.defaultdict(list)
    for event in measured.events:
        found[event.op.kind, event.op.chunk].append(event.end - event.start)
    chunks = range(schedule.model_chunks)
    if {event.op for event in measured.events} != {op for ops in schedule.ops for op in ops}:
        raise ConfigError(
            f"{traced} holds a step of other stages or microbatches than {title}; give the --config settings of that run."
        )
    forward, backward = ([statistics.median(found[kind, k]) for k in chunks] for kind in "FB")
    planned = simulate(schedule, forward, backward)
    return svg([(f"planned from the measured costs: {title}", planned), (f"measured: {traced}", measured)])


def planned_svg(run: RunSpec) -> str:
    """An SVG of the pipeline's planned step, by the layers' operations; '' where there are no stages."""
    if run.partition is None:
        return ""
    title, schedule = _titled_schedule(run)
    costs = [sum(run.partition.costs[i].cost for i in layers) / _NOMINAL_FLOPS for layers in run.partition.chunks]
    return svg([(f"planned: {title}", simulate(schedule, [c / 3 for c in costs], [2 * c / 3 for c in costs]))])


def _titled_schedule(run: RunSpec) -> tuple[str, schedules.PipelineSchedule]:
    layout = run.config.layout
    schedule = schedules.make_pipeline_schedule(layout.schedule, layout.stages, layout.microbatches, layout.chunks)
    return f"{layout.schedule}, {layout.stages} stages, {layout.microbatches} microbatches", schedule


def read_trace(workdir: str | Path) -> Timeline:
    """The step that a run recorded (`layout.trace_step`). Raises `ConfigError` where there is none."""
    require_local(workdir, f"--trace {workdir}", ConfigError)
    paths = sorted((Path(workdir) / "logs").glob("pipeline_trace_*.json"))
    try:
        rows = [row for path in paths for row in parse_json(path.read_bytes())]
        events = [
            Event(
                Op(row["kind"], row["chunk"], row["microbatch"]), row["stage"], float(row["start"]), float(row["end"])
            )
            for row in rows
        ]
        stages = 1 + max((int(event.stage) for event in events), default=0)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{Path(workdir) / 'logs'} holds a recorded step that cannot be read ({error}).") from None
    if not rows:
        raise ConfigError(f"{workdir} holds no recorded step; train with --config.layout.trace_step=5, for example.")
    return Timeline(stages, tuple(events))
