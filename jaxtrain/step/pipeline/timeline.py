"""Timelines: when each operation of a pipeline schedule runs, simulated or measured. Imports no JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jaxtrain.step.pipeline.schedule import Op, PipelineSchedule, check_name, replay


@dataclasses.dataclass(frozen=True)
class Event:
    """One operation that ran on a stage.

    Attributes:
      op: which.
      stage: where.
      start: in seconds.
      end: in seconds.
    """

    op: Op
    stage: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The operations of a step with their times, simulated or measured.

    Attributes:
      stages: how many there are.
      events: the operations, in any order.
    """

    stages: int
    events: tuple[Event, ...]

    @property
    def start(self) -> float:
        """The first start, in seconds; 0 if there are no events."""
        return min((event.start for event in self.events), default=0.0)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((event.end for event in self.events), default=0.0) - self.start

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds of work on each stage."""
        spans = [[] for _ in range(self.stages)]
        for event in self.events:
            spans[event.stage].append(event.end - event.start)
        return tuple(map(math.fsum, spans))

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they are idle, over the makespan, in [0, 1]."""
        total = self.stages * self.makespan
        return max(0.0, 1.0 - math.fsum(self.busy) / total) if total else 0.0


def simulate(
    schedule: PipelineSchedule, forward: Sequence[float], backward: Sequence[float], transfer: float = 0.0
) -> Timeline:
    """The timeline of a step in which each stage runs its operations in order, as soon as their inputs have arrived.

    Args:
      schedule: the operations.
      forward: seconds of the forward of each of the model's S x C chunks.
      backward: seconds of the backward of each chunk.
      transfer: seconds from one stage to another. The stages can compute meanwhile.

    Raises:
      ScheduleError: stages wait for each other forever.
      ValueError: a cost is missing, negative or not finite.
    """
    for name, costs in (("forward", forward), ("backward", backward)):
        if len(costs) != schedule.model_chunks:
            raise ValueError(f"{name} has {len(costs)} costs: must have {schedule.model_chunks}, one for each chunk")
    if not all(math.isfinite(cost) and cost >= 0 for cost in (*forward, *backward, transfer)):
        raise ValueError("forward, backward and transfer must be finite and at least 0 seconds")
    costs = {"F": forward, "B": backward}
    events = replay(schedule, lambda op: costs[op.kind][op.chunk], transfer)
    return Timeline(schedule.stages, tuple(Event(op, stage, start, end) for start, end, stage, op in events))


def ideal_bubble(name: str, stages: int, microbatches: int, chunks: int = 1) -> float:
    """The bubble if all stages cost the same and transfers cost nothing: (S - 1) / (C M + S - 1) of the makespan.

    Narayanan 2021 gives (S - 1) / (C M), the ratio of the bubble to the time without it.

    Args:
      name: of the schedule.
      stages: S.
      microbatches: M.
      chunks: C, on each stage; it counts only for interleaved 1F1B.

    Raises:
      ConfigError: there is no such schedule.
    """
    check_name(name)
    work = microbatches * (chunks if name == "interleaved_1f1b" else 1)
    return (stages - 1) / (work + stages - 1)
