"""Tables of texts, which a terminal, a page and a Markdown file show alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtrain.host.text import printable

NOTHING = "-"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose cells are as they are shown."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, caption: str, columns: Sequence[object], rows: Sequence[Sequence[object]]) -> Table:
        """Of any cells; see `cell`."""
        return cls(caption, tuple(map(cell, columns)), tuple(tuple(map(cell, row)) for row in rows))

    def to_json(self) -> dict[str, Any]:
        """In types that JSON has."""
        return dataclasses.asdict(self)


def cell(value: object) -> str:
    """A value as a table shows it: whole numbers with separators of thousands, others with four digits, None as a dash."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return printable(value)


def is_number(text: str) -> bool:
    """Whether a cell is a number, with its spread and its unit, so that it is aligned to the right."""
    first = text.lstrip("+-").partition(" ")[0].replace(",", "")
    return text == NOTHING or first.replace(".", "", 1).replace("e-", "").replace("e+", "").rstrip("%").isdecimal()
