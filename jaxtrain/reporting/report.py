"""Makes the report of runs: a page, Markdown and JSON with the same numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jaxtrain
from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import atomic_write, writing
from jaxtrain.observability.rendering import short_duration
from jaxtrain.reporting.blocks import Block, Dots, Section, Sentences
from jaxtrain.reporting.classes import classes_section
from jaxtrain.reporting.comparison_tables import runs_table, tables
from jaxtrain.reporting.curves import curves_section
from jaxtrain.reporting.environment import environment_section
from jaxtrain.reporting.layouts import layout_section
from jaxtrain.reporting.markdown import markdown
from jaxtrain.reporting.page import page
from jaxtrain.reporting.scaling_tables import scaling_section
from jaxtrain.reporting.times import times_section
from jaxtrain.runs.comparison import Comparison, compare_records, figure
from jaxtrain.runs.record import RunRecord, find_folders, read_records

_SCALING = "scaling.json"
_ABSENT = {
    "Time and bottleneck": "Time: no run has recorded where it went.",
    "Scaling": "Scaling: jaxtrain scale measures it; name its directory beside the runs.",
    "Layout": "Layout: the runs have not recorded it; runs of this version do.",
    "Classes": "Classes: jaxtrain evaluate RUN --report keeps an evaluation in the run.",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found of some runs, and where it was written."""

    title: str
    comparison: Comparison
    sections: tuple[Section, ...]
    html: Path
    """The page; beside it are `report.md` and `report.json`."""

    @property
    def summary(self) -> tuple[str, ...]:
        """Its sentences."""
        return next(block.texts for block in self.sections[0].blocks if isinstance(block, Sentences))

    def to_json(self) -> dict[str, Any]:
        """In types that JSON has."""
        return {
            "title": self.title,
            "jaxtrain": jaxtrain.__version__,
            "summary": list(self.summary),
            "comparison": self.comparison.to_json(),
            "sections": [section.to_json() for section in self.sections],
        }


def report(
    runs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "reports",
    *,
    by: str = "",
    title: str = "",
) -> Report:
    """Writes `report.html`, `report.md` and `report.json` about runs. Reads their files alone.

    Args:
      runs: work directories, directories with runs in them, patterns such as `runs/lr*`, and what `jaxtrain scale` has written.
      output: the directory that they are written into; made if need be.
      by: the figure that decides which runs are best; see `comparison.compare`.
      title: of the report; "": the names of the runs.

    Raises:
      WorkdirError: a name leads to no run and to no study, or `output` cannot be written.
      ConfigError: no run has the figure `by`.
    """
    names = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    studies = [file for name in names for file in _study(Path(name))]
    others = [name for name in names if not _study(Path(name)) or _has_runs(name)]
    if not names:
        raise WorkdirError("No run was named; name work directories of runs.")
    records = read_records(find_folders(others))
    comparison = compare_records(records, by=by)
    title = title or _title(records, studies)
    sections = _sections(comparison, studies)
    folder = Path(output).expanduser().absolute()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    made = Report(title, comparison, tuple(sections), folder / "report.html")
    when = time.strftime("%Y-%m-%d %H:%M")
    atomic_write(folder / "report.json", json.dumps(made.to_json(), allow_nan=False) + "\n")
    atomic_write(folder / "report.md", markdown(title, sections))
    atomic_write(made.html, page(title, f"jaxtrain {jaxtrain.__version__}, {when}", sections))
    return made


def _study(path: Path) -> list[Path]:
    """The file of a scaling study that a name leads to; nothing where it is none."""
    if path.name.endswith(".json") and path.is_file():
        return [path]
    return [path / _SCALING] if (path / _SCALING).is_file() else []


def _has_runs(name: str | os.PathLike[str]) -> bool:
    """Whether there are runs beside the study."""
    if not Path(name).is_dir():
        return False
    try:
        return bool(find_folders(name))
    except WorkdirError:
        return False


def _title(records: Sequence[RunRecord], studies: Sequence[Path]) -> str:
    if not records:
        return f"Scaling: {studies[0].parent.name}"
    return f"Run {records[0].name}" if len(records) == 1 else f"{len(records)} runs"


def _sections(comparison: Comparison, studies: Sequence[Path]) -> list[Section]:
    """All of them, the summary first."""
    runs, problems, rest = comparison.runs, [], []
    summary = _results(comparison) if runs else []
    if runs:
        times, said = times_section(runs)
        classes, about_classes = classes_section(runs, problems)
        if len(runs) > 1:
            warnings = [Sentences(comparison.warnings)] if comparison.warnings else []
            rest.append(Section("Comparison", (*_dots(comparison), *tables(comparison)[:-1], *warnings)))
        rest += [curves_section(comparison), times]
        summary += [*said, *about_classes]
    scaling, bottleneck = scaling_section(studies, problems)
    rest.append(scaling)
    summary += bottleneck
    if runs:
        rest += [layout_section(runs, problems), classes, environment_section(runs, problems)]
    blocks: list[Block] = [Sentences(tuple(summary))]
    if runs:
        blocks.append(runs_table(comparison))
    if problems:
        blocks.append(Sentences(tuple(f"Left out: {each}" for each in dict.fromkeys(problems))))
    absent = [_ABSENT[section.title] for section in rest if not section.blocks and section.title in _ABSENT]
    if absent and runs:
        rest.append(Section("Not in this report", (Sentences(tuple(absent)),)))
    return [Section("Summary", tuple(blocks)), *(section for section in rest if section.blocks)]


def _dots(comparison: Comparison) -> list[Block]:
    """Each seed's figure; nothing where no group has several."""
    rows = [
        (group.label, group.spreads[comparison.by]) for group in comparison.groups if comparison.by in group.spreads
    ]
    if all(spread.n == 1 for _, spread in rows):
        return []
    return [
        Dots(f"{comparison.by}: a dot for each run; the bar is mean ± standard deviation", comparison.by, tuple(rows))
    ]


def _results(comparison: Comparison) -> list[str]:
    """How the runs ended, and which are best."""
    runs = comparison.runs
    if len(runs) == 1:
        return _of_one_run(runs[0])
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    differing = ", ".join(comparison.differing) or "nothing but the seed"
    return [f"{len(runs)} runs ({counts}) that differ in {differing}.", *comparison.sentences()]


def _of_one_run(run: RunRecord) -> list[str]:
    known = [(name, run.figures[name]) for name in ("val/accuracy", "test/accuracy", "val/loss") if name in run.figures]
    took = f" in {short_duration(run.figures['wall_seconds'], 1)}" if "wall_seconds" in run.figures else ""
    figures = ", ".join(f"{name} {figure(value, name)}" for name, value in known)
    weights = "its best weights have" if run.complete else "its best validation so far:"
    said = [f"{run.name} is {run.state} after {run.step:,} steps{took}{f'; {weights} {figures}' if figures else ''}."]
    if "throughput" in run.figures:
        said.append(f"It trained at {figure(run.figures['throughput'], 'throughput')} images/s.")
    bad = run.stability
    if bad.spikes or bad.skipped_updates or bad.lost_steps:
        counts = f"{bad.spikes} spikes, {bad.skipped_updates} skipped updates, {bad.lost_steps} steps done again"
        said.append(f"It was not steady: {counts}.")
    return said + ([f"It ended thus: {run.reason}"] if not run.complete and run.reason else []) + list(run.problems)
