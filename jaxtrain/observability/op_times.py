"""Reads a profile that JAX has written: when each operation ran, on which device, and when steps were done."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

READ = "read metrics"
"""What a profile calls the host's wait for the numbers of a call of the step."""

_CONTAINERS = ("while", "call", "conditional")  # what they run has events of its own


@dataclasses.dataclass(frozen=True)
class OpRun:
    """One run of an operation on a device. Times are in nanoseconds of the trace's own clock."""

    device: str
    module: str
    """The program's name, such as `jit_step`."""
    name: str
    """The instruction's, such as `fusion.12`."""
    begin: float
    end: float
    busy: float
    """Nanoseconds without those of the operations that ran inside this one."""

    @property
    def contains_others(self) -> bool:
        """Whether it is no work of its own: a loop, a call, a branch, whose operations are runs themselves."""
        return self.name.startswith(_CONTAINERS)


@dataclasses.dataclass(frozen=True)
class Known:
    """The moment at which the host knew the numbers of a call of the step."""

    time: float
    steps: int
    """That the call has made."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a profile has. Times are in nanoseconds of its own clock.

    Attributes:
      runs: of operations.
      known: of each call of the step, in their order.
    """

    runs: list[OpRun]
    known: list[Known]


def read_trace(path: Path) -> Trace:
    """All runs of operations in a file `*.xplane.pb`, of a GPU or of a CPU.

    On a CPU an operation may be handed to other threads; the event of its end, in whichever of them, then says when it was
    done.
    """
    runs: list[OpRun] = []
    known: list[Known] = []
    for plane in ProfileData.from_file(str(path)).planes:
        on_gpu = plane.name.startswith("/device:")
        threads: list[list[Any]] = []
        ends: dict[Any, float] = {}
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):  # what was derived of the streams would count twice
                continue
            events = []
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    events.append((event.start_ns, event.duration_ns, event.name, stats))
                elif event.name.startswith("end: "):
                    ends[stats["_c"]] = event.start_ns + event.duration_ns
                elif event.name == READ:
                    known.append(Known(event.start_ns + event.duration_ns, int(stats["steps"])))
            threads.append(events)
        for events in threads:
            runs += _of_thread(events, ends, plane.name if on_gpu else "")
    return Trace(runs, sorted(known, key=lambda each: each.time))


def _of_thread(events: list[Any], ends: dict[Any, float], plane: str) -> Iterator[OpRun]:
    """The runs of a thread or a stream. ends: by the number that the event of an operation and that of its end share."""
    events.sort(key=lambda event: (event[0], -event[1]))
    inside = [0.0] * len(events)  # of each event, the time of those directly inside it
    open_events: list[int] = []
    for number, (begin, duration, _, _) in enumerate(events):
        while open_events and begin >= events[open_events[-1]][0] + events[open_events[-1]][1]:
            open_events.pop()
        if open_events:
            inside[open_events[-1]] += duration
        open_events.append(number)
    for (begin, duration, _, stats), within in zip(events, inside, strict=True):
        name = str(stats["hlo_op"])
        end, busy = begin + duration, duration - within
        done = ends[stats["_p"]] if stats.get("_p") in ends else end
        device = plane or f"CPU {stats.get('device_ordinal', 0)}"
        run = OpRun(device, str(stats.get("hlo_module", "")), name, begin, end, max(busy, 0.0))
        yield dataclasses.replace(run, end=done, busy=done - begin) if done > end and not run.contains_others else run


Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times as disjoint intervals, in their order."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def length(intervals: Sequence[Interval]) -> float:
    """How long disjoint intervals are together."""
    return sum(end - begin for begin, end in intervals)


def overlap(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """How long both run at once. Each: disjoint intervals."""
    return length(first) + length(second) - length(union(itertools.chain(first, second)))
