"""A report as Markdown: its sentences and tables. Curves and pictures are in the page alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from jaxtrain.host.text import printable
from jaxtrain.reporting.blocks import Block, Plot, Section, Sentences
from jaxtrain.reporting.table import Table, is_number

_MARKUP = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^(?=[#+-])")


def markdown(title: str, sections: list[Section]) -> str:
    """The text of the file."""
    lines = [f"# {_text(title)}", ""]
    for section in sections:
        lines += [f"## {_text(section.title)}", ""]
        for block in section.blocks:
            lines += _lines(block)
    return "\n".join(lines)


def _lines(block: Block) -> Iterator[str]:
    if isinstance(block, Sentences):
        yield from (f"- {_text(text)}" if len(block.texts) > 1 else _text(text) for text in block.texts)
        yield ""
    elif isinstance(block, Table):
        numbers = [all(is_number(row[i]) for row in block.rows) for i in range(len(block.columns))]
        yield f"**{_text(block.caption)}**"
        yield ""
        yield _row(block.columns)
        yield f"|{'|'.join('--:' if each else '--' for each in numbers)}|"
        yield from map(_row, block.rows)
        yield ""
    elif isinstance(block, Plot):
        yield f"(Plot in the page: {_text(block.title)}.)"
        yield ""


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _text(text: str) -> str:
    """Text in which nothing is mark-up."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKUP.sub(lambda found: f"\\{found[0]}", plain)
