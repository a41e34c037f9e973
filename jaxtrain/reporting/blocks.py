"""What a report is made of: sections of sentences, tables, plots, bars and pictures. How they look is the renderers' matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.reporting.table import Table
from jaxtrain.runs.spread import Spread


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Text; each a paragraph, or a point of a list where there are several."""

    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a plot. Lists of one length; None where there is no finite value."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    slot: int
    """Which colour of the palette."""
    low: Sequence[float | None] = ()
    """The least of several seeds; empty, as is the next, for one run."""
    high: Sequence[float | None] = ()


@dataclasses.dataclass(frozen=True)
class Plot:
    """Curves over the step, or something else that grows."""

    title: str
    unit: str
    """As charts.js has them: `share`, `seconds`, `images/s`, ..."""
    curves: tuple[Curve, ...]
    """Of each run."""
    together: tuple[Curve, ...] = ()
    """Of each group of several seeds, the mean with its range; empty where no group has several."""
    marks: tuple[Mapping[str, Any], ...] = ()
    """What happened: `x`, `kind`, `label`."""
    logarithmic: bool = False
    """Whether a logarithmic axis can help."""
    x: str = "step"
    """What they are drawn over."""


@dataclasses.dataclass(frozen=True)
class Bars:
    """Stacked horizontal bars of one scale. Their numbers stand in a table beside them."""

    caption: str
    unit: str
    rows: tuple[tuple[str, Mapping[str, float]], ...]
    """For each bar its label, and the values of its parts."""

    @property
    def parts(self) -> list[str]:
        """The names of all parts, in their order."""
        return list(dict.fromkeys(part for _, values in self.rows for part in values))


@dataclasses.dataclass(frozen=True)
class Dots:
    """A row for each group with a dot for each of its runs, over one scale; with their mean and standard deviation."""

    caption: str
    name: str
    """Of the figure."""
    rows: tuple[tuple[str, Spread], ...]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures that are in the report themselves."""

    items: tuple[tuple[str, str], ...]
    """For each its caption and a `data:` URL of an image."""
    wide: bool = False
    """Whether each takes the whole width."""


Block = Sentences | Table | Plot | Bars | Dots | Pictures


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report with a heading."""

    title: str
    blocks: tuple[Block, ...]

    def to_json(self) -> dict[str, Any]:
        """In types that JSON has; without pictures."""
        shown = (block for block in self.blocks if not isinstance(block, Pictures))
        return {
            "title": self.title,
            "blocks": [{"kind": type(b).__name__.lower(), **dataclasses.asdict(b)} for b in shown],
        }
