"""The curves of a report: of each run, and of several seeds their mean and range."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.reporting.blocks import Curve, Plot, Section, Sentences
from jaxtrain.runs.comparison import Comparison
from jaxtrain.runs.record import RunRecord, read_metrics, read_rows
from jaxtrain.runs.series import downsample

_POINTS = 1000  # of a curve
_MARKED = ("checkpoint", "roll_back", "anomaly", "slow_device", "gpu")


class _Family(NamedTuple):
    """A quantity, and the columns that show it."""

    title: str
    unit: str
    columns: Mapping[str, str]
    logarithmic: bool = False


_FAMILIES = (
    _Family("loss", "", {"train/loss": "training", "val/loss": "validation", "val/ema_loss": "validation, EMA"}, True),
    _Family(
        "accuracy",
        "share",
        {
            "train/accuracy": "training",
            "val/accuracy": "validation",
            "val/ema_accuracy": "validation, EMA",
            "test/accuracy": "test",
            "test/ema_accuracy": "test, EMA",
        },
    ),
    _Family("learning rate", "", {"train/learning_rate": "learning rate"}, True),
    _Family("gradient norm", "", {"train/grad_norm": "gradient norm"}, True),
    _Family("throughput", "images/s", {"train/throughput": "throughput"}),
)
_Points = tuple[np.ndarray, np.ndarray]  # x and y, f64 [n]


def curves_section(comparison: Comparison) -> Section:
    """Loss, accuracy, learning rate, gradient norm and throughput over the step."""
    runs = comparison.runs
    read = {run.path: _columns(run) for run in runs}
    plots = _of_one_run(runs[0], read[runs[0].path]) if len(runs) == 1 else _of_several(comparison, read)
    if not plots:
        return Section("Curves", (Sentences(("No run has a row of metrics.",)),))
    several = "Lines of several seeds are their mean, with the range of the seeds that trained to their end around it."
    about = "Training values are of single batches; validation and test are of whole splits, as are the tables."
    texts = (about, several) if any(plot.together for plot in plots) else (about,)
    return Section("Curves", (Sentences(texts), *plots))


def _columns(run: RunRecord) -> dict[str, _Points]:
    """The points of the families by column. A step that was done again counts as it was done last."""
    metrics = read_metrics(Path(run.path))
    if metrics is None:
        return {}
    found = metrics.series((column for family in _FAMILIES for column in family.columns), points=sys.maxsize)
    points = {}
    for column, series in found.items():
        steps, last = np.unique(series.x[::-1], return_index=True)
        points[column] = (steps, series.y[::-1][last])
    return points


def _of_one_run(run: RunRecord, read: Mapping[str, _Points]) -> list[Plot]:
    """A plot for each quantity, with a line for each phase."""
    marks = tuple(_marks(run))
    plots = []
    for family in _FAMILIES:
        lines = [(place, column) for place, column in enumerate(family.columns) if column in read]
        curves = tuple(_curve(family.columns[column], place, read[column]) for place, column in lines)
        if curves:
            title = family.title[0].upper() + family.title[1:]
            plots.append(Plot(title, family.unit, curves, marks=marks, logarithmic=family.logarithmic))
    return plots


def _of_several(comparison: Comparison, read: Mapping[str, Mapping[str, _Points]]) -> list[Plot]:
    """A plot for each quantity and phase, with a line for each run, and one for each group of seeds."""
    groups = [(group.label, [run.path for run in group.runs], group.runs) for group in comparison.groups]
    one_group = len(groups) == 1 and not comparison.unread
    plots = []
    for family in _FAMILIES:
        for column, phase in family.columns.items():
            curves, together = [], []
            for place, (label, _, runs) in enumerate(groups):
                having = [run for run in runs if column in read[run.path]]
                for k, run in enumerate(having):
                    curves.append(_curve(run.name, k if one_group else place, read[run.path][column]))
                complete = [read[run.path][column] for run in having if run.complete]
                if len(complete) > 1:
                    together.append(_mean(label, place, complete))
                elif len(having) == 1:
                    together.append(_curve(label, place, read[having[0].path][column]))
            for k, run in enumerate(run for run in comparison.unread if column in read[run.path]):
                curves.append(_curve(run.name, len(groups) + k, read[run.path][column]))
            if not curves or all(len(curve.x) == 1 for curve in curves):
                continue  # one number a run, which the tables have
            alone = family.title == phase
            title = phase[0].upper() + phase[1:] + ("" if alone else f": {family.title}")
            shown = tuple(together) if any(curve.low for curve in together) else ()
            plots.append(Plot(title, family.unit, tuple(curves), shown, logarithmic=family.logarithmic))
    return plots


def _curve(label: str, slot: int, points: _Points) -> Curve:
    x, y = _thinned(*points)
    return Curve(label, x.tolist(), _finite(y), slot)


def _mean(label: str, slot: int, runs: Sequence[_Points]) -> Curve:
    """The mean of several runs at the steps that all of them have, and its range."""
    steps = runs[0][0]
    for x, _ in runs[1:]:
        steps = np.intersect1d(steps, x)
    values = np.stack([y[np.isin(x, steps)] for x, y in runs])  # [runs, steps]
    x, mean, low, high = _thinned(steps, values.mean(0), values.min(0), values.max(0))
    return Curve(f"{label} ({len(runs)} seeds)", x.tolist(), _finite(mean), slot, _finite(low), _finite(high))


def _thinned(x: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """The rows at which a curve of the first column has its points."""
    kept = np.isin(x, downsample(x, columns[0], _POINTS)[0])
    return x[kept], *(column[kept] for column in columns)


def _finite(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _marks(run: RunRecord) -> list[dict[str, Any]]:
    """What happened on the way, for vertical lines: at each step the last of each kind."""
    found = {}
    for row in read_rows(Path(run.path) / "events.jsonl"):
        kind, step = row.get("kind"), row.get("step")
        if kind in _MARKED and type(step) is int:
            found[step, kind] = {"x": step, "kind": kind, "label": str(row.get("message"))}
    return list(found.values())
