"""Which layouts a run may have on a number of devices: those that it accepts, and why it refuses the others."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxtrain.config import LayoutConfig
from jaxtrain.errors import ConfigError
from jaxtrain.parallel.layout import Layout, Placement, bytes_by_stage
from jaxtrain.parallel.mesh import AXES
from jaxtrain.step.communication import initial_communication
from jaxtrain.step.pipeline import partition
from jaxtrain.step.pipeline.partition import Partition
from jaxtrain.step.pipeline.plan import microbatches
from jaxtrain.training.plan.problem import Problem
from jaxtrain.training.setup import check_sync

_REMATS = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Axes:
    """A layout but for its microbatches and rematerialization.

    Attributes:
      stages: pipeline stages.
      replica: size of the axis `replica`.
      data: size of the axis `data`.
      tensor: size of the axis `tensor`.
      zero: ZeRO stage.
      schedule: of the pipeline.
      chunks: a stage.
    """

    stages: int
    replica: int
    data: int
    tensor: int
    zero: int
    schedule: str
    chunks: int

    @property
    def ways(self) -> int:
        """How many shards the batch is split into."""
        return self.replica * self.data


@dataclasses.dataclass(frozen=True)
class Refused:
    """Axes that the run refuses.

    Attributes:
      axes: which.
      why: in about five words.
    """

    axes: Axes
    why: str


@dataclasses.dataclass(frozen=True)
class Legal:
    """Axes that the run accepts.

    Attributes:
      axes: which.
      layout: with placements, over a mesh without devices.
      table: where every leaf lies, by tree, with the gradients' accumulator.
      microbatches: the numbers of microbatches that the batch divides into.
      remats: the values of `train.remat` to choose from.
    """

    axes: Axes
    layout: Layout
    table: dict[str, list[Placement]]
    microbatches: tuple[int, ...]
    remats: tuple[str, ...]

    @functools.cached_property
    def bytes(self) -> dict[str, dict[int, int]]:
        """Bytes of a device, by tree and stage."""
        return {tree: bytes_by_stage(leaves, self.axes.stages) for tree, leaves in self.table.items()}


def candidates(problem: Problem) -> Iterator[Legal | Refused]:
    """Every layout of the machine's devices that keeps the kept fields, in a fixed order."""
    asked, devices = problem.asked.layout, problem.machine.target.devices

    def values(name: str, options: Sequence[Any]) -> Sequence[Any]:
        value = getattr(asked, name)
        return [value] if name in problem.kept and value != -1 else options

    for stages in values("stages", _divisors(devices)):
        for tensor in values("tensor", [t for t in _divisors(devices) if t <= problem.machine.target.per_host]):
            if devices % (stages * tensor):
                continue
            ways = devices // (stages * tensor)
            for replica in values("replica", _divisors(ways)):
                for zero in values("zero", (0, 1, 2, 3)):
                    for schedule, chunks in _schedules(problem, stages):
                        axes = Axes(stages, replica, ways // replica, tensor, zero, schedule, chunks)
                        if (
                            ways % replica
                            or _is_repeated(axes, problem)
                            or axes.data not in values("data", (axes.data,))
                        ):
                            continue
                        yield _checked(problem, axes)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _schedules(problem: Problem, stages: int) -> list[tuple[str, int]]:
    asked, kept = problem.asked.layout, problem.kept
    if stages == 1:
        return [(asked.schedule, asked.chunks)]
    if kept & {"schedule", "chunks"}:
        chunks = max(asked.chunks, 2) if "chunks" not in kept and asked.schedule == "interleaved_1f1b" else asked.chunks
        return [(asked.schedule, chunks)]
    return [("1f1b", 1), ("gpipe", 1), ("interleaved_1f1b", 2)]


def _is_repeated(axes: Axes, problem: Problem) -> bool:
    """Whether other axes do the same: ZeRO with nothing to shard over; replicas without ZeRO, which are data parallel."""
    if "zero" not in problem.kept and axes.data == 1 and axes.zero > 0:
        return True
    return "replica" not in problem.kept and axes.replica > 1 and axes.zero == 0


def _checked(problem: Problem, axes: Axes) -> Legal | Refused:
    if axes.stages * axes.chunks > problem.layers:
        return Refused(axes, f"only {problem.layers} layers to split")
    if problem.batch % axes.ways:
        return Refused(axes, f"batch does not divide by {axes.ways}")
    counts = _microbatch_counts(problem, axes)
    if not counts:
        return Refused(axes, _no_microbatches(problem, axes))
    layout = layout_of(problem, axes, counts[0])
    try:
        check_sync(problem.config, layout, problem.has_batch_norm)
    except ConfigError:
        return Refused(axes, f"not with optim.sync_every={layout.sync_every}")
    try:
        table = _table(problem, layout)
    except ConfigError as error:
        if "splits no layer" in str(error):
            return Refused(axes, f"tensor={axes.tensor} splits no layer")
        raise
    if why := _without_effect(layout, table):
        return Refused(axes, why)
    remats = (problem.asked.train.remat,) if "remat" in problem.kept else _REMATS
    return Legal(axes, layout, table, counts, remats)


def _table(problem: Problem, layout: Layout) -> dict[str, list[Placement]]:
    """Where every leaf lies. It does not depend on the schedule; on replicas where each shard of the batch keeps leaves.

    Raises `ConfigError` as `Layout.table`.
    """
    replicas = layout.mesh.shape["replica"] if layout.accumulates_by_device else 1
    key = (replicas, layout.mesh.shape["data"], layout.mesh.shape["tensor"], layout.config.zero, layout.chunks)
    if key not in problem.tables:
        task, state = problem.run.task, dataclasses.replace(problem.state, communication=())
        kept = jax.eval_shape(functools.partial(initial_communication, task, layout, seed=0), state)
        gradients = layout.gradients(task.groups.trained(state.params))
        problem.tables[key] = layout.table(dataclasses.replace(state, communication=kept)) | {"gradients": gradients}
    return problem.tables[key]


def layout_of(problem: Problem, axes: Axes, count: int) -> Layout:
    """The layout, over a mesh without devices; with stages, the layers are cut as the run cuts them.

    Args:
      problem: what is planned.
      axes: of the layout.
      count: of microbatches.
    """
    config = dataclasses.replace(
        problem.asked.layout, **dataclasses.asdict(axes), microbatches=count, strategy="manual", keep=()
    )
    mesh: Any = AbstractMesh((axes.stages, axes.replica, axes.data, axes.tensor), AXES)
    run = problem.run
    exchange = {"compress": run.layout.compress, "sync_every": run.layout.sync_every}
    layout = Layout(mesh, config, config.rules + run.task.model.tensor_rules, **exchange)
    if axes.stages == 1:
        return layout
    cut = cut_of(problem, axes, count)
    return dataclasses.replace(layout, chunks=tuple(tuple(cut.costs[i].name for i in layers) for layers in cut.chunks))


def cut_of(problem: Problem, axes: Axes, count: int) -> Partition:
    """Which layers each chunk has. Arguments: as of `layout_of`."""
    config: LayoutConfig = dataclasses.replace(problem.asked.layout, **dataclasses.asdict(axes), microbatches=count)
    flights = in_flight(axes, count) if config.balance == "memory" else (1,) * axes.stages
    key = (axes.stages, axes.chunks, problem.batch / (count * axes.ways), flights)
    if key not in problem.cuts:
        problem.cuts[key] = partition.make_partition(config, problem.costs_at(key[2]), flights)
    return problem.cuts[key]


def in_flight(axes: Axes, count: int) -> tuple[int, ...]:
    """For each stage, of how many (chunk, microbatch) it stores activations at once: `schedule.in_flight`, by its formula."""
    stages, chunks = axes.stages, axes.chunks
    if axes.schedule == "gpipe":
        return (count,) * stages
    if chunks == 1:
        return tuple(min(count, stages - stage) for stage in range(stages))
    return tuple(min(chunks * count, (chunks - 1) * stages + 2 * (stages - stage - 1) + 1) for stage in range(stages))


def _microbatch_counts(problem: Problem, axes: Axes) -> tuple[int, ...]:
    asked, mixes = problem.asked.layout.microbatches, problem.run.task.preprocess.mixes
    groups = problem.config.model.bn_groups if problem.has_batch_norm else 0
    if "microbatches" in problem.kept:
        config = dataclasses.replace(problem.asked.layout, **dataclasses.asdict(axes))
        options = [microbatches(config, problem.batch, axes.ways, groups, even=mixes)] if asked == 0 else [asked]
    else:
        options = _divisors(math.gcd(problem.batch // axes.ways, groups))
    return tuple(count for count in options if _takes(problem, axes, count))


def _takes(problem: Problem, axes: Axes, count: int) -> bool:
    """Whether the batch divides into `count` microbatches: `Layout.check_batch`, and what mixup and the schedule need."""
    if problem.batch % (count * axes.ways) or (problem.has_batch_norm and problem.config.model.bn_groups % count):
        return False
    if problem.run.task.preprocess.mixes and count > 1 and problem.batch // count % 2:
        return False
    return axes.stages == 1 or axes.schedule != "interleaved_1f1b" or count % axes.stages == 0


def _no_microbatches(problem: Problem, axes: Axes) -> str:
    if axes.stages > 1 and axes.schedule == "interleaved_1f1b":
        return f"no {axes.stages} microbatches for its schedule"
    if problem.has_batch_norm and "microbatches" in problem.kept:
        return "a microbatch holds whole bn_groups"
    return "batch does not divide into microbatches"


def _without_effect(layout: Layout, table: dict[str, list[Placement]]) -> str:
    """Why the audit of the run would refuse the layout: ZeRO that shards no leaf of a tree; or ""."""
    for tree in ("opt_state", "gradients", "params"):
        leaves = table[tree]
        sharded = any("data" in leaf.spec for leaf in leaves)
        if layout.shards(tree) and not sharded and any(math.prod(leaf.shape) > 1 for leaf in leaves):
            return f"no leaf of {tree} divides by {layout.mesh.shape['data']}"
    return ""
