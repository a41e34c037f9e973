"""Measures a study: real steps of two runs in turns, and the parts of a step in profiles of such steps.

At each number of devices there are two runs, the `base` (the smallest number) and the `whole`. They make their steps in turns,
so that what else the machine does hits both alike. The shares in a profile are taken for those of a step without one; how much
longer a profiled step takes is said (docs/scaling.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence

from jaxtrain.config import Config
from jaxtrain.host.ports import free_port
from jaxtrain.scaling.crew import Crew, started
from jaxtrain.scaling.protocol import LINK, Block, Job, LinkFit, Profile, Ready
from jaxtrain.scaling.study import Study
from jaxtrain.training.profile_summary import Breakdown

MEASURED, SIMULATED = "measured", "simulated"
PARTS = ("compute", "overlap", "communication", "input", "bubble", "host")

_WARM_UP = 2  # steps before anything is measured, beside those that settle a block
_BLOCK_SECONDS = 1.5
_LEAST_STEPS, _MOST_STEPS = 4, 40
_MOST_PROFILED = 100  # steps; each of their operations is an event

Said = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of repeats."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From the repeats themselves."""
        return cls(statistics.median(values), min(values), max(values))


@dataclasses.dataclass(frozen=True)
class Point:
    """A run at one number of devices.

    Attributes:
      devices: how many.
      batch: examples of the global batch.
      step: seconds.
      speedup: examples a second over those of the base, which made its steps in turns with these.
      parts: seconds of a step by `PARTS`; None where one is not known. {} where no profile could be taken.
      profile_off: how much longer the profiled steps took that the parts are of, relative; None without a profile.
      steps: of a block.
      traffic: what the run said of itself.
    """

    devices: int
    batch: int
    step: Spread
    speedup: float
    parts: Mapping[str, float | None]
    profile_off: float | None
    steps: int
    traffic: Ready

    @property
    def throughput(self) -> float:
        """Examples a second."""
        return self.batch / self.step.median


@dataclasses.dataclass(frozen=True)
class Machine:
    """How the devices of a measurement come about.

    Attributes:
      kind: `measured` or `simulated`.
      cores: for each process those that it is pinned to; () for GPUs and for simulated devices.
    """

    kind: str
    cores: tuple[tuple[int, ...], ...] = ()

    def whole(self, config: Config, count: int, folder: str) -> list[Job]:
        """The processes of a run on `count` devices."""
        if not self.cores:
            return [Job(config, f"{folder}/whole_{count}", devices=count, simulated=self.kind == SIMULATED)]
        port = free_port() if count > 1 else 0
        return [Job(config, f"{folder}/whole_{count}", i, count, port, cores=self.cores[i]) for i in range(count)]


@dataclasses.dataclass
class _Turns:
    """What a run said, by round, of each of its processes."""

    blocks: list[list[Block]] = dataclasses.field(default_factory=list)
    profiles: list[list[Breakdown | None]] = dataclasses.field(default_factory=list)


def measure(
    study: Study, mode: str, machine: Machine, repeats: int, steps: int, said: Said
) -> tuple[list[Point], LinkFit | None]:
    """The points of one mode, the base first, and the link of the largest number of devices.

    Args:
      study: what is measured.
      mode: `strong` or `weak`.
      machine: on what.
      repeats: blocks of each run.
      steps: of a block; 0 chooses.
      said: takes a line on what is done now.

    Raises:
      JaxtrainError: a run fails, or its process ends.
    """
    points, bases, link = [], [], None
    for count in study.counts[1:]:
        point, base, link = _measure_at(study, mode, count, machine, repeats, steps, said)
        points.append(point)
        bases.append(base)
    if not bases or study.base > 1:
        first, _, own = _measure_at(study, mode, study.base, machine, repeats, steps, said)
        return [first, *points], link or own
    return [_joined(bases), *points], link


def _joined(bases: Sequence[Point]) -> Point:
    """The base, which was measured again at each number of devices."""
    middle = sorted(bases, key=lambda point: point.step.median)[len(bases) // 2]
    steps = [point.step for point in bases]
    spread = Spread(middle.step.median, min(step.least for step in steps), max(step.most for step in steps))
    return dataclasses.replace(middle, step=spread)


def _measure_at(
    study: Study, mode: str, count: int, machine: Machine, repeats: int, steps: int, said: Said
) -> tuple[Point, Point, LinkFit | None]:
    """The point at `count` devices, the base, and the link."""
    batch, base_batch = study.batch(mode, count), study.batch(mode, study.base)
    what = f"{machine.kind}, {mode} scaling, {count} of {study.counts[-1]} devices"
    said(f"{what}: starting and compiling")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxtrain-scale-", ignore_cleanup_errors=True))
        jobs = {"whole": machine.whole(study.measured(mode, count), count, folder)}
        if count != study.base:
            jobs["base"] = machine.whole(study.measured(mode, study.base), study.base, folder)
        crews = {name: stack.enter_context(started(each)) for name, each in jobs.items()}
        for crew in crews.values():
            crew.wait()
        blocks = {name: _block_of(crew, steps) for name, crew in crews.items()}
        for crew in crews.values():
            crew.tell(Profile(_WARM_UP))  # the first of a process is slower
        turns = _take_turns(crews, repeats, blocks, lambda text: said(f"{what}: {text}"))
        link = crews["whole"].tell(LINK)[0] if count > 1 and machine.kind == MEASURED else None
    named = {name: (turns[name], crew.ready[0]) for name, crew in crews.items()}
    whole, ready = named["whole"]
    base, base_ready = named.get("base", named["whole"])
    seconds, base_seconds = _seconds(whole), _seconds(base)
    speedup = statistics.median(b / base_batch * batch / w for w, b in zip(seconds, base_seconds, strict=True))
    stages = study.config.layout.stages
    parts, base_parts = (_parts(turns, stages, machine.kind) for turns in (whole, base))
    point = Point(count, batch, Spread.of(seconds), speedup, *parts, blocks["whole"], ready)
    base_steps = blocks.get("base", blocks["whole"])
    return point, Point(study.base, base_batch, Spread.of(base_seconds), 1.0, *base_parts, base_steps, base_ready), link


def _block_of(crew: Crew, steps: int) -> int:
    """How many steps a run makes in a block, once it has made its first ones. steps: 0 chooses."""
    slowest = max(block.seconds for block in crew.tell(_WARM_UP))
    return steps or min(max(math.ceil(_BLOCK_SECONDS / slowest), _LEAST_STEPS), _MOST_STEPS)


def _take_turns(crews: Mapping[str, Crew], repeats: int, steps: Mapping[str, int], said: Said) -> dict[str, _Turns]:
    turns = {name: _Turns() for name in crews}
    for repeat in range(repeats):
        said(f"repeat {repeat + 1} of {repeats}")
        for name, crew in crews.items():
            turns[name].blocks.append(crew.tell(steps[name]))
        for name, crew in crews.items():
            turns[name].profiles.append(crew.tell(Profile(min(steps[name], _MOST_PROFILED))))
    return turns


def _seconds(turns: _Turns) -> list[float]:
    """Of a step, by round: of the slowest process."""
    return [max(block.seconds for block in blocks) for blocks in turns.blocks]


def _parts(turns: _Turns, stages: int, kind: str) -> tuple[dict[str, float | None], float | None]:
    """Seconds of a step by part, mean over the processes, and how far the profile is off; ({}, None) without one."""
    step = statistics.median(_seconds(turns))
    found = _typical(turns, step)
    if found is None:
        return {}, None
    profile = found.scaled(step / found.step)
    waits, host = (
        statistics.median(statistics.fmean(getattr(block, name) for block in blocks) for blocks in turns.blocks)
        for name in ("input", "host")
    )
    waits = min(waits, profile.idle)  # what is longer went on while the devices worked
    idle = profile.idle - waits
    bubble: float | None = 0.0
    if stages > 1 and kind == SIMULATED:
        bubble = None  # the cores of a stage that waits compute another one
    elif stages > 1:
        bubble = max(idle - host, 0.0)
    beside = profile.overlap
    if kind == SIMULATED:
        beside = 0.0  # one that computes keeps others waiting in a collective
    parts = {
        "compute": profile.compute + profile.overlap - beside,
        "overlap": beside,
        "communication": profile.communication,
        "input": waits,
        "bubble": bubble,
        "host": idle - (bubble or 0.0),
    }
    return parts, found.step / step - 1


def _typical(turns: _Turns, step: float) -> Breakdown | None:
    """Of the profiles that whose steps took most nearly as long as those without one, the mean over its processes.

    To profile a step may slow it down, sometimes by much: on a CPU it changes which thread waits for which.
    """
    means = [Breakdown.mean([each for each in of_round if each]) for of_round in turns.profiles if any(of_round)]
    return min(means, key=lambda mean: abs(mean.step - step), default=None)
