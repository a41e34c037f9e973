"""How the parts of runs lay on their devices: mesh, bytes of a device, pipeline stages and their timeline."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import reading
from jaxtrain.observability.rendering import size
from jaxtrain.reporting.blocks import Bars, Block, Pictures, Section, Sentences
from jaxtrain.reporting.run_files import not_recorded, of_each
from jaxtrain.reporting.table import Table
from jaxtrain.runs.record import RunRecord


def layout_section(runs: Sequence[RunRecord], problems: list[str]) -> Section:
    """A row for each layout that runs had, bars of what a device stores, the stages, and the pipeline's planned step."""
    found = of_each(runs, "layout.json", _checked, problems)
    missing = not_recorded(runs, [run for run, _ in found], "Layout")
    if not found:
        return Section("Layout", ())
    layouts: dict[str, tuple[dict[str, Any], list[RunRecord]]] = {}
    for run, layout in found:
        layouts.setdefault(json.dumps(layout, sort_keys=True), (layout, []))[1].append(run)
    named = [(_names(of), layout, of) for layout, of in layouts.values()]
    trees = list(dict.fromkeys(tree for _, layout, _ in named for tree in layout["bytes_per_device"]))
    rows = [
        [
            name,
            layout["devices"],
            " x ".join(f"{axis} {length}" for axis, length in layout["mesh"].items() if length > 1) or "one device",
            layout["zero"],
            layout["microbatches"],
            layout["parameters"],
            *(size(layout["bytes_per_device"].get(tree) or 0) for tree in trees),
        ]
        for name, layout, _ in named
    ]
    columns = [
        "runs",
        "devices",
        "mesh",
        "ZeRO",
        "microbatches",
        "parameters",
        *(f"{tree}, a device" for tree in trees),
    ]
    blocks: list[Block] = [Table.of("Layouts, and the bytes that a device stores", columns, rows)]
    blocks.append(
        Bars(
            "State that a device stores",
            "bytes",
            tuple((name, layout["bytes_per_device"]) for name, layout, _ in named),
        )
    )
    for name, layout, of in named:
        blocks += _stages(name if len(named) > 1 else "", layout, Path(of[0].path))
    texts = [*missing, *(f"{name}: {each}" for name, layout, _ in named for each in layout["warnings"])]
    return Section("Layout", (*blocks, *([Sentences(tuple(texts))] if texts else [])))


def _checked(layout: Mapping[str, Any]) -> dict[str, Any]:
    """The layout, with the types that are relied on. Raises an ordinary error where it is another thing."""
    trees, stages = layout["bytes_per_device"], layout["bytes_by_stage"]
    return {
        **{name: int(layout[name]) for name in ("parameters", "devices", "zero", "microbatches")},
        "mesh": {str(axis): int(length) for axis, length in layout["mesh"].items()},
        "bytes_per_device": {str(tree): int(count) for tree, count in trees.items()},
        "bytes_by_stage": {str(tree): [int(count) for count in _in_order(counts)] for tree, counts in stages.items()},
        **{name: [str(each) for each in layout.get(name) or ()] for name in ("stages", "warnings")},
    }


def _in_order(counts: Any) -> list[Any]:
    """The counts of the stages: a list, or a mapping from a stage's number."""
    return [counts[key] for key in sorted(counts, key=int)] if isinstance(counts, Mapping) else list(counts)


def _stages(name: str, layout: Mapping[str, Any], folder: Path) -> list[Block]:
    """What each pipeline stage stores, what it is, and the timeline of a step."""
    stages, by_stage = layout["stages"], layout["bytes_by_stage"]
    if not stages:
        return []
    front = f"{name}: " if name else ""
    counts = range(max((len(values) for values in by_stage.values()), default=0))
    rows = tuple(
        (f"stage {i}", {tree: values[i] for tree, values in by_stage.items() if i < len(values)}) for i in counts
    )
    cells = [[i, *(size(values[i]) if i < len(values) else None for values in by_stage.values())] for i in counts]
    blocks: list[Block] = [
        Bars(f"{front}state of each stage", "bytes", rows),
        Table.of(f"{front}state of each stage", ["stage", *by_stage], cells),
        Sentences(tuple(stages)),
    ]
    try:
        with reading(folder / "schedule.svg"):
            picture = (folder / "schedule.svg").read_bytes()
    except WorkdirError:
        return blocks
    url = f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"  # in an <img>, so that nothing in it runs
    return [*blocks, Pictures(((f"{front}a step's timeline, as it is planned (simulated)", url),), wide=True)]


def _names(runs: Sequence[RunRecord]) -> str:
    names = [run.name for run in runs]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
