"""What the time of profiled steps went into, as text: the dearest operations, the layers, the collectives."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from jaxtrain.observability.op_times import OpRun, length, overlap, union
from jaxtrain.observability.rendering import percent
from jaxtrain.parallel.gpu_program import COLLECTIVES, Origin, instruction_origins, module_name

Origins = Mapping[tuple[str, str], Origin]
"""By the program's and the instruction's name."""

_DEAREST = 10
_Key = TypeVar("_Key")


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps that were profiled, how long they took, in which process, and on which kind of device."""

    steps: range
    seconds: float
    process: int
    device_kind: str


@dataclasses.dataclass(frozen=True)
class CollectiveTime:
    """Seconds of a step on a device in which a collective ran, mean over the devices. It waits for the others too."""

    seconds: float
    alone: float
    """Of these, those in which the device computed nothing."""


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


def collective_time(runs: Sequence[OpRun], steps: int) -> CollectiveTime:
    """How long collectives took. steps: that the runs are of."""
    times = []
    for of_device in _by_device(runs):
        split: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for run in of_device:
            split[_is_collective(run.name)].append((run.begin, run.end))
        collectives, others = union(split[True]), union(split[False])
        times.append((length(collectives), length(collectives) - overlap(collectives, others)))
    if not times:
        return CollectiveTime(0.0, 0.0)
    whole, alone = (statistics.fmean(column) / steps / 1e9 for column in zip(*times, strict=True))
    return CollectiveTime(whole, alone)


def summary(window: Window, runs: Sequence[OpRun], origins: Origins) -> str:
    """The text of `summary.txt`.

    Args:
      window: the steps.
      runs: the operations of the trace.
      origins: of the operations of the step's programs.
    """
    steps, devices = len(window.steps), _by_device(runs)
    step = window.seconds / steps
    lines = [
        f"steps {window.steps[0]} to {window.steps[-1]} of process {window.process}, on {len(devices)} x {window.device_kind}: "
        f"{1e3 * step:.3f} ms a step while profiled",
    ]
    if not devices:
        return "\n".join([*lines, "The trace has no operations of these devices.", ""])
    collectives = collective_time(runs, steps)
    busy = statistics.fmean(length(union((run.begin, run.end) for run in of)) for of in devices) / 1e9 / steps
    lines += [
        f"a device ran operations for {1e3 * busy:.3f} ms of a step ({percent(busy / step)})",
        f"and collectives for {1e3 * collectives.seconds:.3f} ms ({percent(collectives.seconds / step)}), for "
        f"{1e3 * collectives.alone:.3f} ms of them nothing else",
        "",
        f"The {_DEAREST} dearest operations, and below the layers. Times are of a step on a device, mean over the devices.",
        "",
    ]
    seconds: collections.defaultdict[tuple[str, str], float] = collections.defaultdict(float)
    for run in runs:
        seconds[run.module, run.name] += run.busy / 1e9 / steps / len(devices)
    rows = []
    by_layer: collections.defaultdict[str, float] = collections.defaultdict(float)
    for (module, name), each in _largest_first(seconds):
        origin = origins.get((module, name), Origin(_kind(name), "", ""))
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


def _kind(name: str) -> str:
    """What an instruction does, as its name says it: `all-reduce.12` is an all-reduce."""
    return name.partition(".")[0]


def _is_collective(name: str) -> bool:
    return _kind(name).removesuffix("-start").removesuffix("-done") in COLLECTIVES


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
