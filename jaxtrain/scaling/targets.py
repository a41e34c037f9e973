"""A study on GPUs that need not be there: its steps modelled by the planner's formulas, and its programs compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxtrain.config import Config
from jaxtrain.data import registry
from jaxtrain.errors import ConfigError
from jaxtrain.host.targets import Target, parse_target
from jaxtrain.parallel.collective_cost import collective_seconds, reduce_seconds, wire_bytes
from jaxtrain.scaling.study import Study
from jaxtrain.training.plan.estimate import COLLECTIVE_SECONDS
from jaxtrain.training.plan.problem import Machine, Problem
from jaxtrain.training.plan.search import machine_of, make_problem, plan_problem
from jaxtrain.training.target_report import report_on

_COMMUNICATION = ("data collectives", "replica collectives", "tensor collectives", "stage transfers")
_COMPUTE = ("products", "memory", "kernels", "update")
_STATISTICS_BYTES = 4096  # of a BatchNorm's sums, f32, 512 channels: so few that only their latency counts

Said = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ModelledPoint:
    """A run on some GPUs, by formulas.

    Attributes:
      devices: how many.
      batch: examples of the global batch.
      parts: seconds of a step: compute, communication, batch_norm (its reductions, which are waited for), bubble.
      peak_bytes: of a GPU, by the planner's formulas.
      fits: whether that is what a GPU has; None where only compiling could tell.
      sent_bytes: by a GPU in a step.
    """

    devices: int
    batch: int
    parts: Mapping[str, float]
    peak_bytes: int
    fits: bool | None
    sent_bytes: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return math.fsum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class CompiledPoint:
    """The programs of a run on some GPUs.

    Attributes:
      devices: how many.
      batch: examples of the global batch.
      peak_bytes: of a GPU.
      usable_bytes: of a GPU.
      kernels: of a step.
      gigabytes: that a GPU's kernels move in a step, 1e9 bytes.
      collectives: of a step.
      sent_bytes: by a GPU in a step, in rings.
    """

    devices: int
    batch: int
    peak_bytes: int
    usable_bytes: int
    kernels: int
    gigabytes: float
    collectives: int
    sent_bytes: float


def target_of(whole: Target, count: int) -> Target:
    """So many of the target's GPUs: of one host as long as they fit on it, else whole hosts.

    Raises:
      ConfigError: the target has fewer, or the number is of no whole hosts.
    """
    gpu = whole.name.rpartition("x")[2]
    if count > whole.devices:
        raise ConfigError(f"--devices {count}: --target {whole.name} has {whole.devices}; name a larger target.")
    if count <= whole.per_host:
        return parse_target(f"{count}x{gpu}")
    if count % whole.per_host:
        raise ConfigError(
            f"--devices {count}: a host of --target {whole.name} has {whole.per_host} GPUs, so more than that must be a "
            f"multiple of {whole.per_host}."
        )
    return parse_target(f"{count // whole.per_host}x{whole.per_host}x{gpu}")


def train_examples(config: Config) -> int:
    """Of the training split. Reads its outline alone."""
    return len(registry.outline(config.data, image_size=config.data.image_size).train)


def model(study: Study, mode: str, target: Target, links: Sequence[str], said: Said) -> list[ModelledPoint]:
    """The steps of one mode by formulas.

    Raises:
      ConfigError: the run cannot be on such GPUs.
    """
    points, first = [], None
    for count in study.counts:
        said(f"modelled, {mode} scaling, {count:,} GPUs")
        machine = machine_of(target_of(target, count), study.config.layout.memory_limit, links)
        config = study.planned(mode, count)
        if first is None:
            first = make_problem(config, machine)
        problem = first.on(machine).with_batch(config.data.global_batch)
        report = plan_problem(problem, compiled=0, said=lambda _: None)
        points.append(_modelled(problem, report, study.ways(count)))
    return points


def _modelled(problem: Problem, report: Mapping[str, Any], ways: int) -> ModelledPoint:
    row = report["layouts"][0]
    seconds = row["seconds"]
    microbatches = row["fields"]["layout.microbatches"]
    parts = {
        "compute": math.fsum(seconds[name] for name in _COMPUTE),
        "communication": math.fsum(seconds[name] for name in _COMMUNICATION if name in seconds),
        "batch_norm": _statistics_seconds(problem, ways, microbatches, row["mesh"]["stage"]),
        "bubble": seconds["idle"],
    }
    sent = math.fsum(row["wire_bytes"].values())
    return ModelledPoint(report["devices"], problem.batch, parts, row["peak_bytes"], row["fits"], sent)


def _statistics_seconds(problem: Problem, ways: int, microbatches: int, stages: int) -> float:
    """Of BatchNorm's reductions over the batch's shards: a layer has one forward and one backward, and the next one waits.

    The planner leaves them out, since all layouts of a run have them. Each goes by a ring or a tree, whichever is quicker.
    With as many `model.bn_groups` as shards there are none.
    """
    if ways == 1 or problem.config.model.bn_groups // microbatches % ways == 0:
        return 0.0
    moving = jax.tree_util.tree_leaves_with_path(problem.run.task.moving(problem.state.batch_stats))
    layers = sum(getattr(path[-1], "key", "") == "mean" for path, _ in moving)
    machine: Machine = problem.machine
    tensor = problem.config.layout.tensor
    inside = math.gcd(ways, max(machine.target.per_host // tensor, 1))
    ring = collective_seconds("all-reduce", _STATISTICS_BYTES, inside, ways // inside, machine.within, machine.between)
    tree = reduce_seconds("tree", _STATISTICS_BYTES, ways, 1, inside, machine.within, machine.between)
    return 2 * layers / stages * microbatches * (COLLECTIVE_SECONDS + min(ring, tree))


def compile_points(study: Study, mode: str, target: Target, said: Said) -> list[CompiledPoint]:
    """The programs of one mode, compiled for the target. Raises `EnvironmentMismatchError` where that cannot be done here."""
    points = []
    for count in study.counts:
        said(f"compiled, {mode} scaling, {count:,} GPUs")
        config = study.at(mode, count)
        report = report_on(config, target_of(target, count), evaluation=False)
        calls = {name: _calls(name, report["microbatches"]) for name in report["programs"]}
        rows = [(calls[name], each) for name, each in report["programs"].items()]
        collectives = [(times, each) for times, program in rows for each in program["collectives"]]
        mesh = report["mesh"]
        points.append(
            CompiledPoint(
                count,
                config.data.global_batch,
                max(report["peak_bytes"], report["stage_peak_bytes"]),
                report["usable_bytes"] - report["reserve_bytes"],
                sum(times * program["kernels"] for times, program in rows),
                math.fsum(times * program["gigabytes"] for times, program in rows),
                sum(times * each["count"] for times, each in collectives),
                math.fsum(
                    times
                    * each["count"]
                    * wire_bytes(each["kind"], each["bytes"] / each["count"], _members(mesh, each))
                    for times, each in collectives
                ),
            )
        )
    return points


def _calls(name: str, microbatches: int) -> int:
    """How often a step runs a program."""
    if name == "call":  # several steps in one program; `step` is one of them
        return 0
    return microbatches if name == "gradients" or name.endswith(("forward", "backward")) else 1


def _members(mesh: Mapping[str, int], collective: Mapping[str, Any]) -> int:
    return math.prod(mesh[axis] for axis in collective["axes"])
