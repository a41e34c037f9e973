"""The tables of a study, as plain values: one for each kind and mode, never mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtrain.config import Config
from jaxtrain.scaling.measuring import MEASURED, PARTS, SIMULATED, Point
from jaxtrain.scaling.study import STRONG
from jaxtrain.scaling.targets import CompiledPoint, ModelledPoint

MODELLED, COMPILED = "modelled", "compiled"

_DIGITS = 6  # significant, of a figure in a table
_SHARES = (*(f"{name} %" for name in PARTS), "profile off %")
_SPEED = ("examples/s", "ideal examples/s", "speed-up", "efficiency %", "epoch s", "whole run s")


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")


def of_points(mode: str, points: Sequence[Point], config: Config, kind: str, what: str) -> dict[str, Any]:
    """The table of what was measured, or simulated.

    Args:
      mode: `strong` or `weak`.
      points: the base first.
      config: of the run, whose length the last column is of.
      kind: `measured` or `simulated`.
      what: a device is, such as `process`.
    """
    base, rows = points[0], []
    for point in points:
        times = 1.0 if kind == SIMULATED else point.devices / base.devices  # simulated ones share the base's cores
        epoch = point.traffic.train_examples
        speed = _speed(point.throughput, base.throughput * times, point.speedup, times, epoch, config, base.batch)
        step = point.step
        parts = {**dict.fromkeys(PARTS), **point.parts}
        shares = [_share(part, step.median) for part in parts.values()] + [_share(point.profile_off, 1.0)]
        rows.append([point.devices, point.batch, 1e3 * step.median, 1e3 * step.least, 1e3 * step.most, *speed, *shares])
    columns = [what, "global batch", "step ms", "least ms", "most ms", *_SPEED, *_SHARES]
    return _table(kind, mode, columns, rows)


def of_model(mode: str, points: Sequence[ModelledPoint], config: Config, examples: int) -> dict[str, Any]:
    """The table of what was modelled. examples: of the training split."""
    base, rows = points[0], []
    for point in points:
        throughput, times = point.batch / point.seconds, point.devices / base.devices
        ideal = base.batch / base.seconds * times
        speedup = throughput * base.seconds / base.batch
        speed = _speed(throughput, ideal, speedup, times, examples, config, base.batch)
        shares = [_share(part, point.seconds) for part in point.parts.values()]
        fits = {True: "yes", False: "no", None: "perhaps"}[point.fits]
        rows.append([point.devices, point.batch, 1e3 * point.seconds, *speed, *shares, point.peak_bytes / 2**30, fits])
    parts = ("compute %", "communication %", "BatchNorm %", "bubble %")
    return _table(MODELLED, mode, ["GPUs", "global batch", "step ms", *_SPEED, *parts, "peak GiB", "fits"], rows)


def of_programs(mode: str, points: Sequence[CompiledPoint]) -> dict[str, Any]:
    """The table of what was compiled."""
    rows = [
        [
            point.devices, point.batch, point.peak_bytes / 2**30, point.usable_bytes / 2**30,
            "yes" if point.peak_bytes <= point.usable_bytes else "no",
            point.kernels, point.gigabytes, point.collectives, point.sent_bytes / 1e6,
        ]
        for point in points
    ]  # fmt: skip
    columns = [
        "GPUs", "global batch", "peak GiB", "of GiB", "fits", "kernels", "GB moved", "collectives", "a GPU sends MB",
    ]  # fmt: skip
    return _table(COMPILED, mode, columns, rows)


def _table(kind: str, mode: str, columns: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    stays = "the global batch" if mode == STRONG else "the batch of a device"
    caption = f"{mode} scaling ({stays} stays); {_MEANING[kind]}"
    plain = [[_rounded(value) if isinstance(value, float) else value for value in row] for row in rows]
    return {"kind": kind, "scaling": mode, "caption": caption, "columns": columns, "rows": plain}


_MEANING: Mapping[str, str] = {
    MEASURED: "real devices or real processes, each pinned to cores of its own, made these steps",
    SIMULATED: "CPU devices of one process, which share its cores: it shows what the layout costs, not what it gains, so "
    "ideal is what one device does with the same global batch",
    MODELLED: "formulas of the planner, nothing was run; input and host are not in them",
    COMPILED: "what XLA made for these GPUs, nothing was run",
}


def _speed(
    throughput: float, ideal: float, speedup: float, times: float, examples: int, config: Config, batch: int
) -> list[float]:
    """The columns `_SPEED`. times: how many times the base's devices. examples: of an epoch. batch: of the base."""
    whole = config.train.steps * batch if config.train.steps else config.train.epochs * examples
    return [throughput, ideal, speedup, 100 * speedup / times, examples / throughput, whole / throughput]


def _share(part: float | None, seconds: float) -> float | None:
    return None if part is None else 100 * part / seconds


def formatted(column: str, value: Any) -> str:
    """A cell for a person."""
    if value is None:
        return "-"
    if not isinstance(value, (int, float)):
        return str(value)
    return next((form(value) for end, form in _FORMS.items() if column.endswith(end)), f"{value:,}")


_FORMS: Mapping[str, Callable[[float], str]] = {
    " %": lambda value: f"{value:.1f}",
    " ms": lambda value: f"{value:.2f}" if value < 100 else f"{value:,.0f}",
    "examples/s": lambda value: f"{value:,.0f}" if value >= 10 else f"{value:.2f}",
    "speed-up": lambda value: f"{value:.2f}",
    " s": lambda value: f"{value:.1f}" if value < 100 else f"{value:,.0f}",
    "GiB": lambda value: f"{value:.3g}",
    "MB": lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}",
    "moved": lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}",
}
