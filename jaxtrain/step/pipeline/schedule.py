"""Pipeline schedules: the order in which each stage runs its forwards and backwards. Imports no JAX.

There are GPipe, 1F1B and interleaved 1F1B. The orders are those of Megatron-LM
(megatron/core/pipeline_parallel/schedules.py).

The model is cut into V = S x C contiguous chunks, C on each of S stages. Chunk k lives on stage k % S. The batch is cut
into M microbatches. F(k, m) is the forward of chunk k on microbatch m, B(k, m) its backward:

    F(k, m) needs F(k-1, m); B(k, m) needs F(k, m) and B(k+1, m).

Under every schedule a chunk runs its forwards, and its backwards, in the order of the microbatches. So gradients are
always added in the same order.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtrain.config import PIPELINE_SCHEDULES as SCHEDULES
from jaxtrain.config import are_listed, nearest_multiples
from jaxtrain.errors import ConfigError, JaxtrainError
from jaxtrain.host.text import did_you_mean


class ScheduleError(JaxtrainError):
    """A schedule omits an operation, runs one twice or on the wrong stage, or its stages would wait forever."""


class Op(NamedTuple):
    """One chunk's forward or backward on one microbatch.

    Attributes:
      kind: "F" (forward) or "B" (backward).
      chunk: of the model, counted from 0.
      microbatch: counted from 0.
    """

    kind: str
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}(chunk {self.chunk}, microbatch {self.microbatch})"


@dataclasses.dataclass(frozen=True)
class PipelineSchedule:
    """The operations of one step.

    Attributes:
      name: one of `SCHEDULES`.
      stages: S, how many.
      chunks: C, how many on each stage.
      microbatches: M, how many.
      ops: for each stage, its operations in order.
    """

    name: str
    stages: int
    chunks: int
    microbatches: int
    ops: tuple[tuple[Op, ...], ...]

    @property
    def model_chunks(self) -> int:
        """V, the number of chunks of the whole model."""
        return self.stages * self.chunks

    def stage_of(self, chunk: int) -> int:
        """The stage that `chunk` lives on."""
        return chunk % self.stages

    def needs(self, op: Op) -> tuple[Op, ...]:
        """The operations whose results `op` needs."""
        if op.kind == "F":
            return (Op("F", op.chunk - 1, op.microbatch),) if op.chunk else ()
        forward = Op("F", op.chunk, op.microbatch)
        return (forward, Op("B", op.chunk + 1, op.microbatch)) if op.chunk < self.model_chunks - 1 else (forward,)


# ---------------------------------------------------------------------------------------------------------- schedules


def make_pipeline_schedule(name: str, stages: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """The schedule of a run.

    Args:
      name: one of `SCHEDULES`.
      stages: S.
      microbatches: M.
      chunks: C, on each stage; more than 1 only for interleaved 1F1B.

    Raises:
      ConfigError: there is no such schedule, or the numbers do not fit it.
    """
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

    Stage s begins with (C - 1) S + 2 (S - s - 1) forwards: those before its last chunk runs for the first time, and one
    for each transfer of that microbatch to the last stage and of its gradient back. With one chunk a stage this is
    1F1B.

    Args:
      stages: S.
      microbatches: M, a multiple of S.
      chunks: C, on each stage.

    Raises:
      ConfigError: S does not divide M, or a number is less than 1.
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


# ------------------------------------------------------------------------------------------------------- order and time


def replay(
    schedule: PipelineSchedule, seconds: Callable[[Op], float], transfer: float = 0.0
) -> list[tuple[float, float, int, Op]]:
    """Simulates a schedule: each operation runs as soon as its stage is free and its inputs have arrived.

    Args:
      schedule: the operations.
      seconds: how long an operation takes.
      transfer: seconds between a result and its arrival on another stage. The stages can compute meanwhile.

    Returns:
      (start, end, stage, operation) of every operation, in seconds; sorted by start, then by stage.

    Raises:
      ScheduleError: stages wait for each other forever.
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
    # The sort is stable: operations of a stage that start together, since one takes no time, keep their order.
    return sorted(done, key=lambda event: (event[0], event[2]))


def _deadlock(schedule: PipelineSchedule, position: list[int], blocked: Mapping[int, Op]) -> str:
    """A sentence on the stages that wait for each other in a ring. blocked: for each stage, the operation it waits for."""
    ring, stage = [], min(blocked)
    while stage in blocked and stage not in ring:
        ring.append(stage)
        stage = schedule.stage_of(blocked[stage].chunk)
    ring = ring[ring.index(stage) :] if stage in ring else ring
    waits = (f"stage {s} at {schedule.ops[s][position[s]]} waits for {blocked[s]}" for s in ring)
    return f"schedule {schedule.name!r} deadlocks: {', '.join(waits)}."


def check(schedule: PipelineSchedule) -> None:
    """Raises `ScheduleError` unless every operation runs once, on its chunk's stage, and no stage waits forever."""
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
    """For each stage, the largest number of (chunk, microbatch) whose activations it stores at the same time.

    These are the ones whose forward has run and whose backward has not. GPipe: M. 1F1B: min(M, S - s). Interleaved with
    C > 1: min(C M, (C - 1) S + 2 (S - s - 1) + 1), the forwards of the warm-up and the one before the first backward.
    With C chunks each of them takes 1 / C of the memory.
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
    """The order in which the operations' results are sent between processes; the same on every process.

    By the operations' ends, then forwards before backwards, then by stage. (In the order of their starts, the result of
    a short forward would wait for a long backward that started before it.)
    """
    events = replay(schedule, _typical_seconds)
    return tuple(
        op for _, end, stage, op in sorted(events, key=lambda event: (event[1], event[3].kind != "F", event[2]))
    )


def total_order(schedule: PipelineSchedule) -> tuple[Op, ...]:
    """All operations in one order that keeps every stage's order and every dependency; the same on every process.

    By the operations' starts, then by stage. Raises `ScheduleError` if stages wait for each other forever.
    """
    return tuple(op for _, _, _, op in replay(schedule, _typical_seconds))


def _typical_seconds(op: Op) -> float:
    """A backward takes about twice as long as a forward: it computes the gradients of the weights and of the input."""
    return 1.0 if op.kind == "F" else 2.0
