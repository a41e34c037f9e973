"""Measures a study: real steps of several runs in turns, and the parts of a step each by itself.

At each number of devices there are three runs: the `base` (the smallest number), the `whole`, and the `alone` ones, in which
each device does its part of the work and sends nothing. They make their steps in turns, so that what else the machine does
hits all of them alike. The parts of a step are measured apart, and what they do not explain is said (docs/scaling.md).
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
from jaxtrain.scaling.protocol import COLLECTIVES, LINK, Block, Job, LinkFit, Ready
from jaxtrain.scaling.study import Study
from jaxtrain.step.pipeline.timeline import ideal_bubble

MEASURED, SIMULATED = "measured", "simulated"
PARTS = ("compute", "communication", "input", "bubble", "host")

_WARM_UP = 2  # steps before anything is measured, beside those that settle a block
_BLOCK_SECONDS = 1.5
_LEAST_STEPS, _MOST_STEPS = 4, 40

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
      parts: seconds of a step by `PARTS`; None where one is not known.
      steps: of a block.
      traffic: what the run said of itself.
    """

    devices: int
    batch: int
    step: Spread
    speedup: float
    parts: Mapping[str, float | None]
    steps: int
    traffic: Ready

    @property
    def throughput(self) -> float:
        """Examples a second."""
        return self.batch / self.step.median

    @property
    def unexplained(self) -> float | None:
        """Seconds of a step that the parts do not explain; below 0 where they are more. None where one is not known."""
        if any(value is None for value in self.parts.values()):
            return None
        return self.step.median - math.fsum(value for value in self.parts.values() if value is not None)


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

    def alone(self, config: Config, count: int, folder: str) -> list[Job]:
        """Processes that do at the same time what each of `count` devices does, and send nothing; of GPUs one."""
        if not self.cores:
            return [Job(config, f"{folder}/alone", simulated=self.kind == SIMULATED)]
        return [Job(config, f"{folder}/alone_{i}", cores=self.cores[i]) for i in range(count)]


@dataclasses.dataclass
class _Turns:
    """What the runs of one number of devices said, by round: seconds of the step, and of its parts."""

    base: list[list[Block]] = dataclasses.field(default_factory=list)
    whole: list[list[Block]] = dataclasses.field(default_factory=list)
    alone: list[list[Block]] = dataclasses.field(default_factory=list)
    collectives: list[float] = dataclasses.field(default_factory=list)


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
        if count > 1:
            examples = batch if machine.kind == SIMULATED else batch // study.ways(count)
            jobs["alone"] = machine.alone(study.alone(mode, count, examples), count, folder)
        crews = {name: stack.enter_context(started(each)) for name, each in jobs.items()}
        for crew in crews.values():
            crew.wait()
        for crew in crews.values():
            slowest = max(block.seconds for block in crew.tell(_WARM_UP))
        block = steps or min(max(math.ceil(_BLOCK_SECONDS / slowest), _LEAST_STEPS), _MOST_STEPS)
        turns = _take_turns(crews, repeats, block, lambda text: said(f"{what}: {text}"))
        link = crews["whole"].tell(LINK)[0] if count > 1 and machine.kind == MEASURED else None
        ready = crews["whole"].ready[0]
        base_ready = crews["base"].ready[0] if "base" in crews else ready
    whole, base = _seconds(turns.whole), _seconds(turns.base or turns.whole)
    speedup = statistics.median(b / base_batch * batch / w for w, b in zip(whole, base, strict=True))
    parts = _parts(study, machine, count, turns, ready)
    point = Point(count, batch, Spread.of(whole), speedup, parts, block, ready)
    own = _clock_parts(turns.base or turns.whole)
    return point, Point(study.base, base_batch, Spread.of(base), 1.0, own, block, base_ready), link


def _take_turns(crews: Mapping[str, Crew], repeats: int, steps: int, said: Said) -> _Turns:
    turns = _Turns()
    for repeat in range(repeats):
        said(f"repeat {repeat + 1} of {repeats}")
        for name, crew in crews.items():
            getattr(turns, name).append(crew.tell(steps))
        if "alone" in crews and crews["whole"].ready[0].collectives is not None:
            turns.collectives.append(max(crews["whole"].tell(COLLECTIVES)))
    return turns


def _seconds(rounds: Sequence[Sequence[Block]]) -> list[float]:
    """Of a step, by round: of the slowest process."""
    return [max(block.seconds for block in blocks) for blocks in rounds]


def _clock_parts(rounds: Sequence[Sequence[Block]]) -> dict[str, float | None]:
    """The parts of a step of one device: by the run's clock alone."""
    host, waits = _median(rounds, "host"), _median(rounds, "input")
    seconds = statistics.median(_seconds(rounds))
    return {"compute": seconds - waits - host, "communication": 0.0, "input": waits, "bubble": 0.0, "host": host}


def _median(rounds: Sequence[Sequence[Block]], name: str) -> float:
    """The median over the rounds, each of the slowest process."""
    return statistics.median(max(getattr(block, name) for block in blocks) for blocks in rounds)


def _parts(study: Study, machine: Machine, count: int, turns: _Turns, ready: Ready) -> dict[str, float | None]:
    """Seconds of a step by part, each measured by itself."""
    if not turns.alone:
        return _clock_parts(turns.whole)
    layout = study.config.layout
    compute = statistics.median(_slowest_of_each(blocks) for blocks in turns.alone)
    bubble: float | None = 0.0
    if machine.kind == SIMULATED:  # all devices' work was done on the same cores, by one
        bubble = None if layout.stages > 1 else 0.0
    else:
        compute *= ready.imbalance / (layout.stages * layout.tensor)
    if layout.stages > 1 and machine.kind == MEASURED:
        idle = ideal_bubble(layout.schedule, layout.stages, ready.microbatches, layout.chunks)
        bubble = compute * idle / (1 - idle)
    return {
        "compute": compute,
        "communication": statistics.median(turns.collectives) if turns.collectives else None,
        "input": _median(turns.whole, "input"),
        "bubble": bubble,
        "host": _median(turns.whole, "host"),
    }


def _slowest_of_each(blocks: Sequence[Block]) -> float:
    """Seconds of a step without its input and host: the mean over steps of the slowest process, which the others wait for."""
    rows = [[seconds - block.input - block.host for seconds in block.steps] for block in blocks]
    return max(statistics.mean(max(row) for row in zip(*rows, strict=True)), 0.0)
