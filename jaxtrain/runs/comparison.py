"""Compares runs: in which settings they differ, which are best, and whether by more than seeds differ."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtrain.errors import ConfigError
from jaxtrain.host.text import did_you_mean
from jaxtrain.runs.record import RunRecord, Stability, find_folders, read_records
from jaxtrain.runs.settings import differing, short_names, shown
from jaxtrain.runs.spread import Difference, Spread, difference, shown_confidence

_BY = (
    "val/accuracy",
    "test/accuracy",
    "train/loss",
)  # what decides where nobody says: never the test, if there is another
_LESS_IS_BETTER = ("loss", "wall_seconds", "gpu_hours", "cost")
_MOST_IN_LABEL = 3
_MOST_SAID = 4


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that are equal but for the seed."""

    label: str
    """Its values of the settings that differ, such as `learning_rate=0.05`; the run's name or a number where that is long."""
    settings: Mapping[str, Any]
    """Those values, by dotted name."""
    runs: tuple[RunRecord, ...]
    spreads: Mapping[str, Spread]
    """By figure; of the complete runs alone."""
    stability: Stability
    """The sum over all its runs."""

    @property
    def complete(self) -> int:
        """How many of its runs trained to their end."""
        return sum(run.complete for run in self.runs)

    @property
    def counted(self) -> str:
        """Of how many runs the means are: `2 of 3 runs (1 failed)`."""
        states = [run.state for run in self.runs if not run.complete]
        others = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        if not others:
            return "1 run" if self.complete == 1 else f"{self.complete} runs"
        return f"{self.complete} of {len(self.runs)} runs ({others})"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several runs side by side."""

    by: str
    """The figure that decides."""
    less_is_better: bool
    differing: tuple[str, ...]
    """Dotted names of the settings that differ, without the seed."""
    groups: tuple[Group, ...]
    """The best first; at the end those without a complete run."""
    differences: Mapping[str, Difference]
    """Of the best group from each other that has the figure, by the other's label."""
    unread: tuple[RunRecord, ...]
    """Runs whose config cannot be read, so that they are in no group."""
    warnings: tuple[str, ...]
    """Sentences: what makes the comparison weaker than it looks."""

    @property
    def runs(self) -> list[RunRecord]:
        """All runs, in the order of the groups."""
        return [*(run for group in self.groups for run in group.runs), *self.unread]

    def sentences(self) -> list[str]:
        """Who won, and by how much against the spread over seeds."""
        ranked = [group for group in self.groups if self.by in group.spreads]
        if not ranked:
            return [f"No complete run has {self.by}, so nothing is compared."]
        best = ranked[0]
        spread = best.spreads[self.by]
        said = [f"{best.label}: {self.by} {number(spread, self.by)} over {best.counted}."]
        if len(ranked) > 1:
            word = "lowest" if self.less_is_better else "highest"
            said = [f"{best.label} has the {word} {self.by}: {number(spread, self.by)} over {best.counted}."]
        others = ranked[1:]
        verdicts = [self.differences[group.label].verdict for group in others]
        said += [self._against(group) for group in (others if len(others) <= _MOST_SAID else others[:1])]
        if len(others) > _MOST_SAID:
            counts = f"{verdicts.count('larger')} are worse by more than the spread over seeds"
            said.append(f"Of the {len(others)} others, {counts}; {verdicts.count('within')} are within it.")
        if "unknown" in verdicts:
            said.append("Where a side has one complete run, nothing can be said about the spread over seeds.")
        return said

    def _against(self, group: Group) -> str:
        """A sentence about the best group and another."""
        found = self.differences[group.label]
        text = f"From {group.label} ({number(group.spreads[self.by], self.by)}) it differs by {figure(found.value, self.by)}"
        if found.low is None or found.high is None:
            return f"{text}."
        confidence = shown_confidence(found.confidence)
        interval = f"{confidence} interval {figure(found.low, self.by)} to {figure(found.high, self.by)}"
        if found.verdict == "within":
            return f"{text} ({interval}): within the spread over seeds, so these runs do not tell the two apart."
        return f"{text} ({interval}): larger than the spread over seeds."

    def to_json(self) -> dict[str, Any]:
        """In types that JSON has."""
        return {
            "by": self.by,
            "less_is_better": self.less_is_better,
            "differing": list(self.differing),
            "sentences": self.sentences(),
            "warnings": list(self.warnings),
            "groups": [
                {
                    "label": group.label,
                    "settings": dict(group.settings),
                    "runs": [run.name for run in group.runs],
                    "complete": group.complete,
                    "figures": {name: dataclasses.asdict(spread) | {"n": spread.n} for name, spread in group.spreads.items()},
                    "stability": dataclasses.asdict(group.stability),
                }
                for group in self.groups
            ],
            "differences": {label: dataclasses.asdict(found) for label, found in self.differences.items()},
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }  # fmt: skip


def compare(runs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, by: str = "") -> Comparison:
    """Compares runs by their files.

    Args:
      runs: work directories, directories with runs in them, or patterns such as `runs/lr*`.
      by: the figure that decides (see `record.read_record`). "": `val/accuracy`, or where no run has that, `test/accuracy`
        or `train/loss`.

    Raises:
      WorkdirError: a name leads to no run.
      ConfigError: no run has the figure `by`.
    """
    return compare_records(read_records(find_folders(runs)), by=by)


def compare_records(records: Sequence[RunRecord], *, by: str = "") -> Comparison:
    """As `compare`, of what was read already."""
    known = dict.fromkeys(name for record in records for name in record.figures)
    if by and by not in known:
        raise ConfigError(
            f"--by {by}: no run has such a figure.{did_you_mean(by, known)} There are: {', '.join(sorted(known)) or 'none'}."
        )
    by = by or next((name for name in _BY if name in known), _BY[0])
    less = by.rpartition("/")[2] in _LESS_IS_BETTER
    readable = [record for record in records if record.settings]
    keys = differing([record.settings for record in readable])
    groups = _groups(readable, keys)

    def rank(group: Group) -> float:
        return group.spreads[by].mean * (1 if less else -1) if by in group.spreads else math.inf

    ranked = sorted(groups, key=rank)
    having = [group for group in ranked if by in group.spreads]
    pairs = max(len(having) * (len(having) - 1) // 2, 1)
    return Comparison(
        by=by,
        less_is_better=less,
        differing=tuple(keys),
        groups=tuple(ranked),
        differences={
            group.label: difference(having[0].spreads[by], group.spreads[by], pairs=pairs) for group in having[1:]
        },
        unread=tuple(record for record in records if not record.settings),
        warnings=tuple(_warnings(groups, pairs)),
    )


def _groups(records: Sequence[RunRecord], keys: Sequence[str]) -> list[Group]:
    """The runs by the values of the settings that differ."""
    members: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        members.setdefault(tuple(shown(record.settings.get(key)) for key in keys), []).append(record)
    short = short_names(keys)
    groups = []
    for place, (values, runs) in enumerate(members.items(), 1):
        pairs = [f"{short[key]}={value}" for key, value in zip(keys, values, strict=True)]
        label = ", ".join(pairs)
        if len(pairs) > _MOST_IN_LABEL:
            label = runs[0].name if len(runs) == 1 else f"settings {place}"
        complete = [run for run in runs if run.complete]
        names = dict.fromkeys(name for run in complete for name in run.figures)
        values_of = {name: [run.figures[name] for run in complete if name in run.figures] for name in names}
        groups.append(
            Group(
                label=label or "all runs",
                settings={key: runs[0].settings.get(key) for key in keys},
                runs=tuple(runs),
                spreads={name: Spread.of(found) for name, found in values_of.items()},
                stability=sum((run.stability for run in runs), Stability()),
            )
        )
    return groups


def _warnings(groups: Sequence[Group], pairs: int) -> Iterable[str]:
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            yield f"{group.label}: some runs have the same seed, so the spread is not that over seeds alone."
    if pairs > 1:
        yield (
            f"{pairs} pairs of settings can be looked at, so each interval is of {shown_confidence(1 - 0.05 / pairs)} "
            "(Bonferroni): together they hold with 95 %."
        )
    if any(0 < group.complete < len(group.runs) for group in groups):
        yield "Means leave out runs that are not complete; where those fail that would do badly, a mean is too good."


def figure(value: float, name: str) -> str:
    """A figure as it is shown: four decimals of a share or a loss, else four digits; three of what is small."""
    last = name.rpartition("/")[2]
    if last in ("accuracy", "top5", "goodput") or (last == "loss" and (abs(value) >= 0.01 or not value)):
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}" if abs(value) >= 0.01 else f"{value:.3g}"


def number(spread: Spread, name: str) -> str:
    """A mean and its standard deviation, with as many decimals."""
    mean = figure(spread.mean, name)
    if spread.deviation is None:
        return mean
    decimals = len(mean.partition(".")[2])
    return f"{mean} ± {figure(spread.deviation, name) if 'e' in mean else f'{spread.deviation:,.{decimals}f}'}"
