"""One run as its files say it is: how it ended, its settings, its figures, how steadily it trained. Nothing is run."""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.config import Config, flatten, to_dict, tuples_to_lists
from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import NOT_THERE, parse_json, read_json, reading
from jaxtrain.host.redaction import redact_values
from jaxtrain.jobs.run_status import DAMAGED, DONE, find_runs, is_run, read_status
from jaxtrain.observability.goodput import Goodput, goodput, read_starts
from jaxtrain.runs.series import MetricsLog, metrics_of
from jaxtrain.workdir import Workdir

_SPLITS = {"val": "validation", "test": "test"}  # as a figure's name has them, and as result.json does
_NUMBERS = ("accuracy", "loss", "top5")


@dataclasses.dataclass(frozen=True)
class Stability:
    """What went wrong on the way, over all starts of a run."""

    spikes: int = 0
    """Of the loss or of the gradient norm (`train.spike_threshold`)."""
    skipped_updates: int = 0
    """Refused, because they were not finite."""
    lost_steps: int = 0
    """Done again after a roll-back or a kill."""
    starts: int = 0

    def __add__(self, other: Stability) -> Stability:
        names = [field.name for field in dataclasses.fields(self)]
        return Stability(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What the files of one run say."""

    path: str
    name: str
    """Its path below the directory that all runs of a comparison are in."""
    state: str
    """As in `jobs.run_status`: `done`, `running`, `stopped`, `failed`, `died`, `damaged`."""
    reason: str
    """How it ended, in a sentence."""
    step: int
    settings: Mapping[str, Any]
    """By dotted name. Those that an older config lacks have their defaults; logins in addresses are left out. Empty where
    the config cannot be read. `devices` is what it ran on, as in `8 x NVIDIA H100`: it decides how fast a run was."""
    figures: Mapping[str, float]
    """Finite numbers by name, such as `val/accuracy`; see `read_record`."""
    stability: Stability
    problems: tuple[str, ...]
    """Sentences: files that cannot be read."""

    @property
    def complete(self) -> bool:
        """Whether it trained to its end: only then do its figures count in a mean."""
        return self.state == DONE

    @property
    def seed(self) -> int | None:
        """Its `seed`; None where its config cannot be read."""
        return self.settings.get("seed")


def find_folders(names: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The work directories that are meant, each once, in the order in which they were named.

    Args:
      names: of runs, of directories with runs in them, or patterns as a shell has them (`runs/lr*`).

    Raises:
      WorkdirError: a name leads to no run.
    """
    found: dict[Path, None] = {}
    for name in [names] if isinstance(names, str | os.PathLike) else names:
        text = os.fspath(name)
        here = [Path(text)] if text and Path(text).exists() else [Path(path) for path in sorted(glob.glob(text))]
        runs = [run for path in here if path.is_dir() for run in ([path] if is_run(path) else find_runs(path))]
        if not runs:
            raise WorkdirError(f"{text!r} is no run, and there is none in it; name work directories of runs.")
        found |= dict.fromkeys(runs)
    return list(found)


def read_records(folders: Sequence[Path]) -> list[RunRecord]:
    """The records of runs. What cannot be read stands in their `problems`; it never raises for it."""
    paths = [folder.absolute() for folder in folders]
    top = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    return [read_record(path, str(path.relative_to(top))) for path in paths]


def read_record(folder: Path, name: str) -> RunRecord:
    """The record of one run.

    Its figures are `val/accuracy`, `val/loss`, `val/top5` and the same of `test`: of the best weights, of their average where
    that was chosen (`result.json`); with `last/` in front those of the last weights. A run that is not complete has the best
    validation so far. `train/loss` and `train/accuracy` are of the last logged step. `throughput` is in images a second,
    of the last start; `goodput` a share; `wall_seconds`, `gpu_hours` and `cost` are of all starts.
    """
    workdir, status, problems = Workdir(folder), read_status(folder), []

    def read(path: Path) -> Mapping[str, Any]:
        try:
            values = read_json(path)
        except WorkdirError as error:
            problems.append(str(error))
            return {}
        if values is not None and not isinstance(values, dict):
            problems.append(f"{path} is damaged (it holds no JSON object).")
        return values if isinstance(values, dict) else {}

    stored = read(workdir.config)
    settings = flatten(to_dict(Config())) | flatten(stored) if stored else {}
    result, metrics, spent = read(workdir.result), read_metrics(folder), None
    try:
        spent = goodput(read_starts(workdir.starts))
    except WorkdirError as error:
        problems.append(str(error))
    if metrics is None or not metrics.columns():
        problems.append(f"{workdir.metrics_jsonl} has no metrics.")
    figures = _figures(result, metrics, spent)
    hardware = {"devices": status.devices} if settings and status.devices else {}
    return RunRecord(
        path=str(folder),
        name=name,
        state=status.state,
        reason=status.reason,
        step=status.step,
        settings=redact_values({key: tuples_to_lists(value) for key, value in settings.items()} | hardware),
        figures={key: float(value) for key, value in figures.items() if _is_finite(value)},
        stability=_stability(read_rows(workdir.bad_batches), spent),
        problems=tuple(dict.fromkeys([*problems, *([status.reason] if status.state == DAMAGED else [])])),
    )


def read_metrics(folder: Path) -> MetricsLog | None:
    """The metrics of a run, with all evaluations; None where its file cannot be read. Of a huge one, some training rows."""
    metrics = metrics_of(folder)
    try:
        metrics.refresh()
        while metrics.complete < 1:
            metrics.refresh()
    except OSError:
        return None
    return metrics


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one a line; lines that are none, such as one that is being written, are left out."""
    try:
        with reading(path):
            lines = path.read_bytes().split(b"\n") if path.exists() else []
    except (WorkdirError, *NOT_THERE):
        return []
    rows = []
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _figures(result: Mapping[str, Any], metrics: MetricsLog | None, spent: Goodput | None) -> dict[str, Any]:
    figures = _of_rows(metrics) if metrics else {}
    if isinstance(best := result.get("best"), dict) and isinstance(last := result.get("last"), dict):
        ending = "_ema" if best.get("weights") == "ema" else ""
        for front, weights in (("", best), ("last/", last)):
            for phase, split in _SPLITS.items():
                of = weights.get(split + ending)
                figures |= {f"{front}{phase}/{name}": of.get(name) for name in _NUMBERS} if isinstance(of, dict) else {}
    if result.get("throughput"):
        figures["throughput"] = result["throughput"]
    if spent:
        figures |= {"goodput": spent.share, "wall_seconds": spent.wall}
        figures |= {"gpu_hours": spent.gpu_hours or None, "cost": spent.cost}
    return figures


def _of_rows(metrics: MetricsLog) -> dict[str, Any]:
    """The last training step, the median throughput, and the validation with the highest accuracy so far."""
    columns = ("train/loss", "train/accuracy", "train/throughput", *(f"val/{name}" for name in _NUMBERS))
    found = metrics.series(columns, points=sys.maxsize)
    figures = {name: series.y[-1] for name, series in found.items() if name.startswith("train/")}
    if figures.pop("train/throughput", None) is not None:
        rates = found["train/throughput"].y
        figures["throughput"] = float(np.median(rates[np.isfinite(rates)])) if np.isfinite(rates).any() else math.nan
    accuracies = found.get("val/accuracy")
    if accuracies is not None and np.isfinite(accuracies.y).any():
        step = accuracies.x[np.nanargmax(accuracies.y)]
        evaluations = ((name, found[name]) for name in found if name.startswith("val/"))
        figures |= {name: series.y[series.x == step][-1] for name, series in evaluations if step in series.x}
    return figures


def _stability(bad: Sequence[Mapping[str, Any]], spent: Goodput | None) -> Stability:
    """Counts what `observability.anomaly` has said; a start that did a step again may have said it twice."""
    texts = [text for _, text in dict.fromkeys((json.dumps(row.get("step")), str(row.get("text"))) for row in bad)]
    return Stability(
        spikes=sum(" is a spike: " in text for text in texts),
        skipped_updates=sum(" was refused: " in text for text in texts),
        lost_steps=spent.lost_steps if spent else 0,
        starts=spent.starts if spent else 0,
    )
