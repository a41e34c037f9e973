"""A scaling study (`jaxtrain scale` writes `scaling.json`) as a section of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.reporting.blocks import Block, Section, Sentences
from jaxtrain.reporting.run_files import made_from
from jaxtrain.reporting.table import Table


def scaling_section(files: Sequence[Path], problems: list[str]) -> tuple[Section, list[str]]:
    """The tables of each study, of which each says whether it is measured, compiled, simulated or modelled."""
    made = [found for file in files if (found := made_from(file, _blocks, problems))]
    return Section("Scaling", tuple(block for blocks, _ in made for block in blocks)), [
        text for _, text in made if text
    ]


def _blocks(study: Mapping[str, Any]) -> tuple[list[Block], str]:
    """The blocks of a study, and the sentence about its bottleneck."""
    blocks: list[Block] = []
    for table in study["tables"]:
        blocks.append(Table.of(f"{table['kind']}: {table['caption']}", table["columns"], table["rows"]))
    texts = [
        str(study["title"]),
        *_texts(study.get("fits")),
        *_texts(study.get("bottleneck")),
        *_texts(study.get("advice")),
    ]
    return [Sentences(tuple(texts)), *blocks], " ".join(_texts(study.get("bottleneck")))


def _texts(value: Any) -> list[str]:
    """A sentence, a list of them, or what has names, as sentences."""
    if value is None or value == "":
        return []
    if isinstance(value, Mapping):
        return [f"{name}: {text}" for name, each in value.items() for text in _texts(each)]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [f"{value:.4g}" if isinstance(value, float) else str(value)]
