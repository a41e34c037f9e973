"""What the time of profiled steps went into, as text: the dearest operations, the layers, the collectives."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from jaxtrain.observability.op_times import OpRun, Trace, length, overlap, union
from jaxtrain.observability.rendering import percent
from jaxtrain.parallel.gpu_program import COLLECTIVES, Origin, instruction_origins, module_name
from jaxtrain.training.cadence import READ_BEHIND

Origins = Mapping[tuple[str, str], Origin]
"""By the program's and the instruction's name."""

SETTLE = READ_BEHIND + 2
"""Calls of the step that a breakdown leaves out: those dispatched at once, while nothing was under way, and one more."""

_DEAREST = 10
_Key = TypeVar("_Key")


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps that were profiled, in which process, and on which kind of device."""

    steps: range
    process: int
    device_kind: str


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """What a device did in a step, in seconds, mean over steps and devices. The parts are the step.

    Attributes:
      step: all of it.
      compute: it computed, and no collective ran.
      overlap: a collective ran, and it computed beside.
      communication: a collective ran and nothing else; it waits for the other devices too.
      idle: neither.
    """

    step: float
    compute: float
    overlap: float
    communication: float
    idle: float

    @classmethod
    def mean(cls, of: Sequence[Breakdown]) -> Breakdown:
        """Of several processes' devices."""
        return cls(*map(statistics.fmean, zip(*map(dataclasses.astuple, of), strict=True)))

    def scaled(self, by: float) -> Breakdown:
        """The same shares of a step that takes `by` times as long."""
        return Breakdown(*(by * each for each in dataclasses.astuple(self)))

    @property
    def collectives(self) -> float:
        """Collectives, with and without something beside them."""
        return self.overlap + self.communication

    @property
    def busy(self) -> float:
        """All operations."""
        return self.compute + self.collectives


def origins_of(programs: Iterable[str]) -> Origins:
    """The origins of all instructions of some programs, given as HLO texts.

    Two programs of one name may have an instruction of one name; where it is of two layers, its layer is "several".
    """
    found: dict[tuple[str, str], Origin] = {}
    for text in programs:
        for name, origin in instruction_origins(text).items():
            key = module_name(text), name
            before = found.setdefault(key, origin)
            if before.layer != origin.layer:
                found[key] = dataclasses.replace(origin, layer="several")
    return found


def breakdown(trace: Trace, steps: int, origins: Origins, *, one_device: bool = False) -> Breakdown | None:
    """Where the time of a step went.

    Steps in full flow count (`steady`).

    Args:
      trace: of the window.
      steps: that it is of.
      origins: of the operations of the step's programs; what is not in them is told by its name.
      one_device: whether all devices count as one, which computes where any of them does: they share a CPU's cores.

    Returns:
      The parts; None where the trace has no operations.
    """
    if not trace.runs:
        return None
    span = steady(trace, steps)
    devices = [trace.runs] if one_device else _by_device(trace.runs)
    parts = [_parts_within(of_device, span, origins) for of_device in devices]
    compute, both, communication = (statistics.fmean(column) / span.steps / 1e9 for column in zip(*parts, strict=True))
    step = (span.end - span.begin) / span.steps / 1e9
    return Breakdown(step, compute, both, communication, step - compute - both - communication)


@dataclasses.dataclass(frozen=True)
class Span:
    """The steps of a trace that count, and the times between which they were."""

    steps: int
    begin: float
    end: float


def steady(trace: Trace, steps: int) -> Span:
    """The steps in full flow; all of them where there are none.

    The first calls of a window begin with nothing under way (`SETTLE`). After the last ones nothing more is dispatched, so
    that the host waits for nothing but them.

    Args:
      trace: with runs of operations.
      steps: that it is of.
    """
    full = trace.known[SETTLE - 1 : len(trace.known) - READ_BEHIND]
    if len(full) > 1:
        return Span(sum(each.steps for each in full[1:]), full[0].time, full[-1].time)
    ends = [run.end for run in trace.runs] + [each.time for each in trace.known]
    return Span(steps, min(run.begin for run in trace.runs), max(ends))


def _parts_within(runs: Iterable[OpRun], span: Span, origins: Origins) -> tuple[float, float, float]:
    """Nanoseconds of (computing alone, both, collectives alone)."""
    split: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for run in runs:
        if run.end > span.begin and run.begin < span.end and not run.contains_others:
            split[_origin(run.module, run.name, origins).kind in COLLECTIVES].append(
                (max(run.begin, span.begin), min(run.end, span.end))
            )
    collectives, others = union(split[True]), union(split[False])
    both = overlap(collectives, others)
    return length(others) - both, both, length(collectives) - both


def summary(window: Window, trace: Trace, origins: Origins) -> str:
    """The text of `summary.txt`.

    Args:
      window: the steps.
      trace: of them.
      origins: of the operations of the step's programs.
    """
    what = f"steps {window.steps[0]} to {window.steps[-1]} of process {window.process}"
    devices, parts = len(_by_device(trace.runs)), breakdown(trace, len(window.steps), origins)
    if not parts:
        return f"{what}: the trace has no operations of {window.device_kind} devices.\n"
    span, step = steady(trace, len(window.steps)), parts.step
    lines = [
        f"{what}, on {devices} x {window.device_kind}: {1e3 * step:.3f} ms a step while profiled",
        f"a device ran operations for {1e3 * parts.busy:.3f} ms of a step ({percent(parts.busy / step)})",
        f"and collectives for {1e3 * parts.collectives:.3f} ms ({percent(parts.collectives / step)}), for "
        f"{1e3 * parts.communication:.3f} ms of them nothing else",
        "",
        f"The {_DEAREST} dearest operations, and below the layers. Times are of a step on a device, mean over the devices.",
        "",
    ]
    seconds: collections.defaultdict[tuple[str, str], float] = collections.defaultdict(float)
    for run in trace.runs:
        if span.begin <= run.begin < span.end:
            seconds[run.module, run.name] += run.busy / 1e9 / span.steps / devices
    rows = []
    by_layer: collections.defaultdict[str, float] = collections.defaultdict(float)
    for (module, name), each in _largest_first(seconds):
        origin = _origin(module, name, origins)
        by_layer[origin.layer] += each
        rows.append((*_cells(each, step), origin.layer, origin.operation, origin.kind, f"{module}/{name}"))
    lines += _table(("ms", "share", "layer", "operation", "kind", "name in the trace"), rows[:_DEAREST])
    layers = [(*_cells(each, step), layer or "(none)") for layer, each in _largest_first(by_layer)]
    return "\n".join([*lines, "", *_table(("ms", "share", "layer"), layers), ""])


def _largest_first(seconds: Mapping[_Key, float]) -> list[tuple[_Key, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])


def _by_device(runs: Iterable[OpRun]) -> list[list[OpRun]]:
    found: collections.defaultdict[str, list[OpRun]] = collections.defaultdict(list)
    for run in runs:
        found[run.device].append(run)
    return list(found.values())


def _origin(module: str, name: str, origins: Origins) -> Origin:
    """The origin of an operation; its name says its kind where nothing else does: `all-reduce-start.12` is an all-reduce.

    What a program calls by itself has JAX's name: `ppermute.3` is a collective-permute.
    """
    found = origins.get((module, name), Origin(name.partition(".")[0], "", ""))
    return dataclasses.replace(found, kind=found.kind.removesuffix("-start").removesuffix("-done"))


def _cells(seconds: float, step: float) -> tuple[str, str]:
    return f"{1e3 * seconds:.3f}", percent(seconds / step)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns two spaces apart, numbers to the right."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    right = ("ms", "share")
    return [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ).rstrip()
        for row in table
    ]
