"""A scaling study (`jaxtrain scale` writes `scaling.json`) as a section of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.reporting.blocks import Block, Curve, Plot, Section, Sentences
from jaxtrain.reporting.run_files import made_from
from jaxtrain.reporting.table import Table

_THROUGHPUT = "examples/s"


def scaling_section(files: Sequence[Path], problems: list[str]) -> tuple[Section, list[str]]:
    """The tables of each study, of which each says whether it is measured, compiled, simulated or modelled."""
    made = [found for file in files if (found := made_from(file, _blocks, problems))]
    return Section("Scaling", tuple(block for blocks, _ in made for block in blocks)), [
        text for _, text in made if text
    ]


def _blocks(study: Mapping[str, Any]) -> tuple[list[Block], str]:
    """The blocks of a study, and the sentence about its bottleneck."""
    bottleneck = _texts(study.get("bottleneck"))
    texts = [str(study["title"]), *bottleneck]
    texts += [text for name in ("advice", "fits", "notes") for text in _texts(study.get(name))]
    tables = [Table.of(f"{each['kind']}: {each['caption']}", each["columns"], each["rows"]) for each in study["tables"]]
    plots = [plot for each in study["tables"] if (plot := _plot(each))]
    return [Sentences(tuple(texts)), *plots, *tables], " ".join(bottleneck)


def _plot(table: Mapping[str, Any]) -> Plot | None:
    """Throughput over the number of devices, with the ideal; None for a table without it."""
    columns = table["columns"]
    curves = []
    for slot, name in enumerate((_THROUGHPUT, f"ideal {_THROUGHPUT}")):
        if name in columns:
            points = [(row[0], row[columns.index(name)]) for row in table["rows"]]
            curves.append(
                Curve(name, [float(x) for x, _ in points], [None if y is None else float(y) for _, y in points], slot)
            )
    if not curves:
        return None
    return Plot(f"{table['kind']}: {table['caption'].partition(';')[0]}", "", tuple(curves), x=str(columns[0]))


def _texts(value: Any) -> list[str]:
    """A sentence, a list of them, or what has names, as sentences."""
    if value is None or value == "":
        return []
    if isinstance(value, Mapping):
        return [f"{name}: {text}" for name, each in value.items() for text in _texts(each)]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [f"{value:.4g}" if isinstance(value, float) else str(value)]
