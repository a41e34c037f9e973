"""Successive halving: which settings go on at a rung. A function of what the runs have recorded.

Jamieson, Talwalkar (2016), "Non-stochastic best arm identification and hyperparameter optimization", algorithm 1: of n settings
the floor(n / eta) best go on. The length, and with it the schedule of the learning rate, is that of the whole run throughout:
a run is paused at a rung, and goes on from its checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.host.files import parse_json, reading
from jaxtrain.jobs.run_status import is_run
from jaxtrain.observability.goodput import read_starts
from jaxtrain.sweeps.spec import Halving
from jaxtrain.sweeps.store import Decision
from jaxtrain.workdir import Workdir


def share_of(halving: Halving, rung: int) -> float:
    """The part of a run's length at which `rung`, from 1, is decided."""
    return float(halving.eta) ** (rung - 1 - halving.rungs)


def rung_step(share: float, steps: int) -> int:
    """The step of a run of `steps` from which on its next validation decides."""
    return math.ceil(share * steps - 1e-9)


def figure_at(folder: Path, share: float, metric: str) -> float | None:
    """The figure of the validation that decides, of the average of the weights where the run keeps one.

    It is the first validation from the rung on; of a run that is complete and did not come so far, the last.

    Returns:
      None where the run has not come so far; NaN where the figure is not finite.
    """
    workdir = Workdir(folder)
    if not is_run(folder) or not workdir.metrics_jsonl.exists():
        return None
    steps = max(start.last_step for start in read_starts(workdir.starts))
    if not steps:  # none of its starts came so far as to know it
        return None
    step, name = rung_step(share, steps), metric.removeprefix("val_")
    with reading(workdir.metrics_jsonl):
        lines = workdir.metrics_jsonl.read_bytes().split(b"\n")
    validations = [row for row in map(_row, lines) if row is not None and row["phase"] == "val"]
    reached = [row for row in validations if row["step"] >= step]
    if not reached and workdir.result.is_file():  # `early_stopping` has ended it before
        reached = validations[-1:]
    if not reached:
        return None
    value = reached[0][f"ema_{name}"] if f"ema_{name}" in reached[0] else reached[0][name]
    return float(value) if value is not None else math.nan


def _row(line: bytes) -> dict[str, Any] | None:
    """A row; None for one that was being written when the run was killed."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"phase", "step"} <= row.keys() else None


def decide(halving: Halving, rung: int, figures: Mapping[str, Sequence[float | None]]) -> Decision:
    """Ranks settings by the mean of their figure over the seeds.

    A setting of which a seed failed, or whose figure is not finite, comes last. Of equal ones the first of the plan is kept.

    Args:
      halving: how many go on, and by which figure.
      rung: from 1.
      figures: of each setting, one a seed; None for a run that failed.
    """
    means: dict[str, float | None] = {}
    for setting, values in figures.items():
        finite = [value for value in values if value is not None and math.isfinite(value)]
        means[setting] = statistics.fmean(finite) if len(finite) == len(values) else None
    sign = 1 if halving.metric == "val_loss" else -1
    ranked = sorted(means, key=lambda setting: math.inf if (mean := means[setting]) is None else sign * mean)
    kept = ranked[: max(len(ranked) // halving.eta, 1)]
    return Decision(rung, share_of(halving, rung), means, tuple(kept))
