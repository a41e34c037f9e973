"""The best and the worst classes of evaluated runs, and the examples with the highest losses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.reporting.blocks import Block, Pictures, Section, Sentences
from jaxtrain.reporting.run_files import made_from
from jaxtrain.reporting.table import Table
from jaxtrain.runs.record import RunRecord

_WORST, _BEST, _PICTURES = 10, 5, 12
_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")


class _Evaluation(NamedTuple):
    run: str
    split: str
    report: Mapping[str, Any]
    classes: list[tuple[str, int, float]]
    """Name, examples and accuracy, the worst first; without those that have no example."""


def classes_section(runs: Sequence[RunRecord], problems: list[str]) -> tuple[Section, list[str]]:
    """What `jaxtrain evaluate RUN --report` has found of each run and split; and a sentence for the summary."""
    found = [each for run in runs for each in _evaluations(run, problems)]
    if not found:
        return Section("Classes", ()), []
    blocks: list[Block] = []
    said = []
    for each in found:
        front, worst = f"{each.run}, {each.split} split", each.classes
        totals = [each.report[name] for name in ("accuracy", "top5", "loss")]
        totals.append(each.report["calibration"]["expected_calibration_error"])
        columns = ["examples", "accuracy", "top-5", "loss", "expected calibration error"]
        blocks.append(Table.of(f"{front}: all examples", columns, [[each.report["examples"], *map(_share, totals)]]))
        confusions = _confusions([row["class"] for row in each.report["classes"]], each.report["confusion"])
        best = sorted(worst[_WORST:], key=lambda row: -row[2])[:_BEST]
        for name, rows in (("the worst classes", worst[:_WORST]), ("the best classes", best)):
            if rows:
                cells = [[label, n, _share(accuracy), confusions.get(label)] for label, n, accuracy in rows]
                columns = ["class", "examples", "accuracy", "most often taken for"]
                blocks.append(Table.of(f"{front}: {name}", columns, cells))
        if len(found) <= 3 and (pictures := _pictures(each.report["worst"])):
            blocks += [Sentences((f"{front}: the examples with the highest losses.",)), Pictures(pictures)]
        if worst:
            label, n, accuracy = worst[0]
            said.append(
                f"On the {each.split} split, {each.run} is worst at the class {label}: {_share(accuracy)} of {n:,} examples."
            )
    return Section("Classes", tuple(blocks)), said if len(said) <= 2 else []  # fmt: skip


def _evaluations(run: RunRecord, problems: list[str]) -> list[_Evaluation]:
    files = sorted((Path(run.path) / "evaluation").glob("*.json"))
    made = (
        made_from(file, lambda report, name=file.stem: _evaluation(run.name, name, report), problems) for file in files
    )
    return [each for each in made if each is not None]


def _evaluation(run: str, split: str, report: Mapping[str, Any]) -> _Evaluation:
    rows = [(str(row["class"]), int(row["examples"]), row["accuracy"]) for row in report["classes"]]
    classes = sorted((row for row in rows if row[2] is not None), key=lambda row: row[2])
    if not isinstance(report["calibration"]["expected_calibration_error"], float) or len(report["confusion"]) != len(
        rows
    ):
        raise ValueError("it is no report of an evaluation")
    return _Evaluation(run, split, report, classes)


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _confusions(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> dict[str, str]:
    """For each class with errors, the wrong class that it is most often taken for, and how often."""
    found = {}
    for i, counts in enumerate(confusion):
        n, j = max(((n, -j) for j, n in enumerate(counts) if j != i), default=(0, 0))
        if n:
            found[names[i]] = f"{names[-j]} ({n:,})"
    return found


def _pictures(worst: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"{row['label']}, taken for {row['predicted']}; loss {_share(row['loss'])}", row["picture"])
        for row in worst[:_PICTURES]
        if isinstance(row.get("picture"), str) and _PICTURE.fullmatch(row["picture"])
    )
