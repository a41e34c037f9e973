"""A comparison as tables: for `jaxtrain compare`, and for reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxtrain.observability.rendering import short_duration
from jaxtrain.reporting.table import Table
from jaxtrain.runs.comparison import Comparison, Group, figure, number
from jaxtrain.runs.settings import short_names, shown
from jaxtrain.runs.spread import shown_confidence

_FIGURES = ("val/accuracy", "val/loss", "test/accuracy", "test/loss", "train/loss")
_SPEED = ("throughput", "goodput", "wall_seconds", "gpu_hours", "cost")
_TITLES = {"throughput": "images/s", "wall_seconds": "seconds", "gpu_hours": "GPU hours"}
_VERDICTS = {"larger": "larger than the spread", "within": "within the spread", "unknown": "nothing can be said"}


def tables(comparison: Comparison) -> list[Table]:
    """Results, speed and stability by group; the differences from the best; the runs."""
    found = [_results(comparison), _speed(comparison)]
    if comparison.differences:
        found.append(_differences(comparison))
    return [*found, runs_table(comparison)]


def _head(comparison: Comparison) -> list[str]:
    names = short_names(comparison.differing)
    return [names[key] for key in comparison.differing] or ["settings"]


def _settings(comparison: Comparison, group: Group) -> list[str]:
    return [shown(group.settings[key]) for key in comparison.differing] or ["the same"]


def _having(comparison: Comparison, names: Iterable[str]) -> list[str]:
    return [name for name in names if any(name in group.spreads for group in comparison.groups)]


def _spread(group: Group, name: str) -> str:
    return number(group.spreads[name], name) if name in group.spreads else ""


def _results(comparison: Comparison) -> Table:
    names = _having(comparison, dict.fromkeys((comparison.by, *_FIGURES)))
    rows = [
        [*_settings(comparison, group), group.counted, *(_spread(group, name) for name in names)]
        for group in comparison.groups
    ]
    return Table.of(
        f"Results, the best {comparison.by} first: mean ± standard deviation over seeds",
        [*_head(comparison), "runs", *names],
        rows,
    )


def _speed(comparison: Comparison) -> Table:
    names = _having(comparison, _SPEED)
    counts = ("spikes", "skipped updates", "steps done again", "starts", "not complete")
    rows = [
        [
            *_settings(comparison, group),
            *(_spread(group, name) for name in names),
            group.stability.spikes,
            group.stability.skipped_updates,
            group.stability.lost_steps,
            group.stability.starts,
            f"{len(group.runs) - group.complete} of {len(group.runs)}",
        ]
        for group in comparison.groups
    ]
    columns = [*_head(comparison), *(_TITLES.get(name, name) for name in names), *counts]
    return Table.of("Speed: mean ± standard deviation; stability: counts over all runs", columns, rows)


def _differences(comparison: Comparison) -> Table:
    by, best = comparison.by, comparison.groups[0]
    rows = []
    for label, found in comparison.differences.items():
        interval = ""
        if found.low is not None and found.high is not None:
            interval = f"{figure(found.low, by)} to {figure(found.high, by)}"
        rows.append(
            [label, figure(found.value, by), interval, shown_confidence(found.confidence), _VERDICTS[found.verdict]]
        )
    caption = f"{by} of {best.label}, less that of each other (Welch's interval)"
    return Table.of(caption, ["other", "difference", "interval", "confidence", "against the spread over seeds"], rows)


def runs_table(comparison: Comparison) -> Table:
    """A row a run, also of those that count in no mean."""
    names = [name for name in ("val/accuracy", "test/accuracy", "train/loss") if _any(comparison, name)]
    labels = {run.path: group.label for group in comparison.groups for run in group.runs}
    rows: list[list[Any]] = [
        [
            run.name,
            labels.get(run.path),
            run.seed,
            run.state,
            run.step,
            *(figure(run.figures[name], name) if name in run.figures else None for name in names),
            figure(run.figures["throughput"], "throughput") if "throughput" in run.figures else None,
            short_duration(run.figures["wall_seconds"], 1) if "wall_seconds" in run.figures else None,
            " ".join([*([] if run.complete else [run.reason]), *run.problems]) or None,
        ]
        for run in comparison.runs
    ]
    columns = ["run", "settings", "seed", "state", "step", *names, "images/s", "time", "what is wrong"]
    wanted = [i for i, name in enumerate(columns) if name != "what is wrong" or any(row[i] for row in rows)]
    return Table.of("Runs", [columns[i] for i in wanted], [[row[i] for i in wanted] for row in rows])


def _any(comparison: Comparison, name: str) -> bool:
    return any(name in run.figures for run in comparison.runs)
