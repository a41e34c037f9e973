"""In which order each pipeline stage runs its forwards and backwards: GPipe, 1F1B and interleaved 1F1B. Imports no JAX.

The model is cut into V = S x C contiguous chunks, C on each of S stages; chunk k lives on stage k % S. The batch is cut into M
microbatches. F(k, m) is the forward of chunk k on microbatch m, B(k, m) its backward:

    F(k, m) needs F(k-1, m); B(k, m) needs F(k, m) and B(k+1, m).

Under every schedule a chunk runs its forwards, and its backwards, in the order of the microbatches: gradients are summed in one
order, whatever the schedule. Orders are those of Megatron-LM (megatron/core/pipeline_parallel/schedules.py).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtrain.config import PIPELINE_SCHEDULES as SCHEDULES
from jaxtrain.config import are_listed, did_you_mean, nearest_multiples
from jaxtrain.errors import ConfigError, JaxtrainError


class ScheduleError(JaxtrainError):
    """A schedule leaves an operation out, runs one twice or on the wrong stage, or would wait forever."""


class Op(NamedTuple):
    """One chunk's forward ("F") or backward ("B") on one microbatch; both are counted from 0."""

    kind: str
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}(chunk {self.chunk}, microbatch {self.microbatch})"


@dataclasses.dataclass(frozen=True)
class PipelineSchedule:
    """The work of one step. chunks: on each stage. ops[s]: what stage s runs, in order."""

    name: str
    stages: int
    chunks: int
    microbatches: int
    ops: tuple[tuple[Op, ...], ...]

    @property
    def model_chunks(self) -> int:
        """V, the chunks that the whole model is cut into."""
        return self.stages * self.chunks

    def stage_of(self, chunk: int) -> int:
        """Where `chunk` lives."""
        return chunk % self.stages

    def needs(self, op: Op) -> tuple[Op, ...]:
        """The operations whose results `op` takes."""
        if op.kind == "F":
            return (Op("F", op.chunk - 1, op.microbatch),) if op.chunk else ()
        own = Op("F", op.chunk, op.microbatch)
        return (own, Op("B", op.chunk + 1, op.microbatch)) if op.chunk < self.model_chunks - 1 else (own,)


# ---------------------------------------------------------------------------------------------------------- schedules


def make_pipeline_schedule(name: str, stages: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """The schedule `name`, one of `SCHEDULES`. Raises `ConfigError` where the numbers do not fit it."""
    check_name(name)
    if name == "interleaved_1f1b":
        return interleaved(stages, microbatches, chunks)
    if chunks != 1:
        raise ConfigError(
            f"config.layout.chunks={chunks}: layout.schedule={name} has one chunk a stage; use --config.layout.chunks=1 "
            "or --config.layout.schedule=interleaved_1f1b."
        )
    return gpipe(stages, microbatches) if name == "gpipe" else one_forward_one_backward(stages, microbatches)


def check_name(name: str) -> None:
    """Raises `ConfigError` unless `name` is one of `SCHEDULES`."""
    if name not in SCHEDULES:
        hint = did_you_mean(name, SCHEDULES)
        raise ConfigError(f"config.layout.schedule={name!r}: must be one of {', '.join(SCHEDULES)}.{hint}")


def gpipe(stages: int, microbatches: int) -> PipelineSchedule:
    """All forwards, then all backwards (Huang 2019; backwards in the order of Narayanan 2021, figure 3)."""
    _at_least_one(stages=stages, microbatches=microbatches)
    return _schedule("gpipe", stages, 1, microbatches, (microbatches,) * stages)


def one_forward_one_backward(stages: int, microbatches: int) -> PipelineSchedule:
    """1F1B (PipeDream-Flush; Narayanan 2021, figure 4): S - s - 1 forwards, then a forward and a backward in turn."""
    _at_least_one(stages=stages, microbatches=microbatches)
    return _schedule("1f1b", stages, 1, microbatches, tuple(stages - stage - 1 for stage in range(stages)))


def interleaved(stages: int, microbatches: int, chunks: int) -> PipelineSchedule:
    """Interleaved 1F1B (Narayanan 2021, figure 4): S microbatches through a stage's first chunk, then through its next, ...

    Stage s begins with (C - 1) S + 2 (S - s - 1) forwards: those before its last chunk first runs, and one for each hop of that
    microbatch to the last stage and, as a gradient, back. With one chunk a stage it is 1F1B. Raises `ConfigError` unless S
    divides M.
    """
    _at_least_one(stages=stages, microbatches=microbatches, chunks=chunks)
    if microbatches % stages:
        near = nearest_multiples(microbatches, stages)
        raise ConfigError(
            f"config.layout.microbatches={microbatches}: layout.schedule=interleaved_1f1b needs a multiple of "
            f"layout.stages={stages}; the nearest {are_listed(near)}, use "
            f"--config.layout.microbatches={near[-1]}."
        )
    hops = 1 if chunks == 1 else 2
    warmup = tuple((chunks - 1) * stages + hops * (stages - stage - 1) for stage in range(stages))
    return _schedule("interleaved_1f1b", stages, chunks, microbatches, warmup)


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(
                f"config.layout.{name}={count}: must be at least 1; use --config.layout.{name}=1 or more."
            )


def _schedule(name: str, stages: int, chunks: int, microbatches: int, warmup: tuple[int, ...]) -> PipelineSchedule:
    """warmup: forwards that each stage runs before its first pair of a forward and a backward."""
    ops = tuple(_one_stage(stage, stages, chunks, microbatches, warmup[stage]) for stage in range(stages))
    return PipelineSchedule(name, stages, chunks, microbatches, ops)


def _one_stage(stage: int, stages: int, chunks: int, microbatches: int, warmup: int) -> tuple[Op, ...]:
    # In groups of S microbatches (the last may be smaller when C = 1), each group through every chunk of the stage.
    groups = [range(low, min(low + stages, microbatches)) for low in range(0, microbatches, stages)]
    local = range(stage, stages * chunks, stages)
    forwards = [Op("F", chunk, m) for group in groups for chunk in local for m in group]
    backwards = [Op("B", chunk, m) for group in groups for chunk in reversed(local) for m in group]
    warmup = min(warmup, len(forwards))
    pairs = zip(forwards[warmup:], backwards, strict=False)
    return (*forwards[:warmup], *(op for pair in pairs for op in pair), *backwards[len(forwards) - warmup :])


# ------------------------------------------------------------------------------------------------------ what they mean


def replay(
    schedule: PipelineSchedule, seconds: Callable[[Op], float], transfer: float = 0.0
) -> list[tuple[float, float, int, Op]]:
    """(start, end, stage, operation) of every operation, when each runs as soon as its stage is free and its inputs are there.

    seconds: what an operation takes. transfer: seconds between a result and its arrival on another stage; the stages compute
    meanwhile. The list is sorted by start, then stage. Raises `ScheduleError` where stages wait for each other forever.
    """
    ends: dict[Op, float] = {}
    free, position = [0.0] * schedule.stages, [0] * schedule.stages
    waiting: dict[Op, list[int]] = {}
    runnable, done = deque(range(schedule.stages)), []
    while runnable:
        stage = runnable.popleft()
        for op in schedule.ops[stage][position[stage] :]:
            needs = schedule.needs(op)
            missing = next((need for need in needs if need not in ends), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(stage)
                break
            away = (ends[n] + (0.0 if schedule.stage_of(n.chunk) == stage else transfer) for n in needs)
            start = max(free[stage], *away) if needs else free[stage]
            free[stage] = ends[op] = start + seconds(op)
            position[stage] += 1
            done.append((start, ends[op], stage, op))
            runnable.extend(waiting.pop(op, ()))
    if waiting:
        blocked = {stage: op for op, stages in waiting.items() for stage in stages}
        raise ScheduleError(_deadlock(schedule, position, blocked))
    return sorted(
        done, key=lambda event: (event[0], event[2])
    )  # a stable sort: a stage's order holds at zero seconds too


def _deadlock(schedule: PipelineSchedule, position: list[int], blocked: Mapping[int, Op]) -> str:
    """A sentence with the stages that wait in a ring. blocked: by stage, the operation that it waits for."""
    ring, stage = [], min(blocked)
    while stage in blocked and stage not in ring:
        ring.append(stage)
        stage = schedule.stage_of(blocked[stage].chunk)
    ring = ring[ring.index(stage) :] if stage in ring else ring
    waits = (f"stage {s} at {schedule.ops[s][position[s]]} waits for {blocked[s]}" for s in ring)
    return f"schedule {schedule.name!r} deadlocks: {', '.join(waits)}."


def check(schedule: PipelineSchedule) -> None:
    """Raises `ScheduleError` unless every operation runs once, on its chunk's stage, and the stages' orders can be kept."""
    name, kinds = f"schedule {schedule.name!r}", ("F", "B")
    if len(schedule.ops) != schedule.stages:
        raise ScheduleError(f"{name} has orders for {len(schedule.ops)} stages, but stages={schedule.stages}.")
    chunks, microbatches = range(schedule.model_chunks), range(schedule.microbatches)
    wanted = {Op(kind, chunk, m): None for kind in kinds for chunk in chunks for m in microbatches}
    seen: set[Op] = set()
    for stage, ops in enumerate(schedule.ops):
        for op in ops:
            if op not in wanted:
                size = f"{schedule.model_chunks} chunks and {schedule.microbatches} microbatches"
                raise ScheduleError(f"{name} has {op} on stage {stage}, which is no operation of {size}.")
            if schedule.stage_of(op.chunk) != stage:
                home = schedule.stage_of(op.chunk)
                raise ScheduleError(f"{name} has {op} on stage {stage}, but chunk {op.chunk} lives on stage {home}.")
            if op in seen:
                raise ScheduleError(f"{name} has {op} twice on stage {stage}.")
            seen.add(op)
    missing = next((op for op in wanted if op not in seen), None)
    if missing is not None:
        raise ScheduleError(f"{name} lacks {missing} on stage {schedule.stage_of(missing.chunk)}.")
    replay(schedule, lambda op: 1.0)


def in_flight(schedule: PipelineSchedule) -> tuple[int, ...]:
    """For each stage, the most (chunk, microbatch) at once whose forward is done and whose backward is not.

    GPipe: M. 1F1B: min(M, S - s). Interleaved with C > 1: min(C M, (C - 1) S + 2 (S - s - 1) + 1), the forwards of the warm-up
    and the one before the first backward; each of these holds 1 / C of what one of another schedule does.
    """
    peaks = []
    for ops in schedule.ops:
        held = peak = 0
        for op in ops:
            held += 1 if op.kind == "F" else -1
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)


def transfer_order(schedule: PipelineSchedule) -> tuple[Op, ...]:
    """The order in which what operations make is sent between processes, the same on every process: as they end.

    Of operations that end together the forwards come first. (By their starts a long backward would be waited for by the
    short forwards that end before it.)
    """
    found = replay(schedule, lambda op: 1.0 if op.kind == "F" else 2.0)
    return tuple(op for _, end, stage, op in sorted(found, key=lambda each: (each[1], each[3].kind != "F", each[2])))


def total_order(schedule: PipelineSchedule) -> tuple[Op, ...]:
    """All operations in one order that keeps every stage's order and every dependency; the same on every process.

    By start, where a forward takes one unit of time and a backward two, then by stage. Raises `ScheduleError` on a deadlock.
    """
    return tuple(op for _, _, _, op in replay(schedule, lambda op: 1.0 if op.kind == "F" else 2.0))
