"""A report as one page of HTML. Styles, scripts and numbers are in it: it fetches nothing, and opens from a disk."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain import charts
from jaxtrain.host.text import printable
from jaxtrain.observability.rendering import percent, size
from jaxtrain.reporting.blocks import Bars, Block, Dots, Pictures, Plot, Section, Sentences
from jaxtrain.reporting.table import Table, is_number
from jaxtrain.runs.comparison import figure, number

_HERE, _CHARTS = Path(__file__).parent, Path(charts.__file__).parent
_STYLES = (_CHARTS / "uPlot.min.css", _CHARTS / "charts.css", _HERE / "report.css")
_SCRIPTS = (_CHARTS / "uPlot.iife.min.js", _CHARTS / "charts.js", _HERE / "report.js")
_FILLS = 10  # of report.css
_LONG = 60  # letters of a cell


def page(title: str, about: str, sections: Sequence[Section]) -> str:
    """The page.

    Args:
      title: its heading.
      about: what stands below it.
      sections: in their order.
    """
    plots = [block for section in sections for block in section.blocks if isinstance(block, Plot)]
    theme = (_HERE / "theme.js").read_text("utf-8")
    style = "\n".join(path.read_text("utf-8") for path in _STYLES)
    script = "\n".join(path.read_text("utf-8") for path in _SCRIPTS)
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(style)}",
            f"script-src {_hash(theme)} {_hash(script)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    links = "".join(f'<a href="#{_anchor(s)}">{_text(s.title)}</a>' for s in sections)
    numbers = iter(range(len(plots)))
    body = "\n".join(_section(section, numbers) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{style}</style>
<script>{theme}</script>
</head>
<body>
<header><div><h1>{_text(title)}</h1><p class="about">{_text(about)}</p></div>
<button type="button" id="theme">Light or dark</button></header>
<nav aria-label="Sections">{links}</nav>
<main>
{body}
</main>
<script type="application/json" id="report-data">{_json([_plot(plot) for plot in plots])}</script>
<script>{script}</script>
</body>
</html>
"""


def _text(value: object) -> str:
    """Any text from outside: nothing in it is mark-up, and nothing moves the direction of writing."""
    return html.escape(printable(value))


def _hash(text: str) -> str:
    """The source of a style or a script that is in the page itself, for its security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON inside a <script>: no text in it can end the element or begin a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _section(section: Section, numbers: Any) -> str:
    """A section; the plots in it get the next of `numbers`, in one grid."""
    parts, in_grid = [], False
    for block in section.blocks:
        is_plot = isinstance(block, Plot)
        if is_plot and not in_grid:
            parts.append('<div class="plots">')
        elif in_grid and not is_plot:
            parts.append("</div>")
        in_grid = is_plot
        parts.append(f'<div class="plot" data-plot="{next(numbers)}"></div>' if is_plot else _block(block))
    parts.append("</div>" if in_grid else "")
    has_plots = any(isinstance(block, Plot) for block in section.blocks)
    controls = '<div class="toolbar" hidden></div>' if section.title == "Curves" else ""
    noscript = "<noscript><p>The curves need JavaScript.</p></noscript>" if has_plots else ""
    head = f"<h2>{_text(section.title)}</h2>{noscript}{controls}"
    return f'<section id="{_anchor(section)}">{head}{"".join(parts)}</section>'


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Bars):
        return _bars(block)
    if isinstance(block, Dots):
        return _dots(block)
    if isinstance(block, Pictures):
        figures = "".join(
            f'<figure><img alt="{_text(caption)}" src="{_text(url)}"><figcaption>{_text(caption)}</figcaption></figure>'
            for caption, url in block.items
        )
        return f'<div class="pictures{" wide" if block.wide else ""}">{figures}</div>'
    if isinstance(block, Sentences) and len(block.texts) > 1:
        return f"<ul>{''.join(f'<li>{_text(text)}</li>' for text in block.texts)}</ul>"
    return "".join(f"<p>{_text(text)}</p>" for text in block.texts) if isinstance(block, Sentences) else ""


def _table(table: Table) -> str:
    numbers = [all(is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]
    shown = [' class="n"' if number else "" for number in numbers]
    top = "".join(f"<th{form}>{_text(name)}</th>" for form, name in zip(shown, table.columns, strict=True))
    rows = "".join(
        f"<tr>{''.join(f'<td{_form(form, text)}>{_text(text)}</td>' for form, text in zip(shown, row, strict=True))}</tr>"
        for row in table.rows
    )
    head = f"<caption>{_text(table.caption)}</caption><thead><tr>{top}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _form(form: str, text: str) -> str:
    """The class of a cell: a long text may be broken."""
    return ' class="long"' if len(text) > _LONG else form


def _bars(bars: Bars) -> str:
    """Bars as SVG: a policy that allows no style attributes allows these."""
    totals = [sum(values.values()) for _, values in bars.rows]
    longest = max(totals, default=0) or 1
    parts = [part for part in bars.parts if any(values.get(part) for _, values in bars.rows)]
    shown = (lambda value: size(int(value))) if bars.unit == "bytes" else percent
    rows = []
    for (label, values), total in zip(bars.rows, totals, strict=True):
        pieces, at = [], 0.0
        for place, part in enumerate(parts):
            value = values.get(part) or 0
            width = 1000 * value / longest
            told = f"{_text(part)}: {shown(value)}"
            pieces.append(
                f'<rect class="fill-{place % _FILLS}" x="{at:.2f}" width="{width:.2f}" height="10"><title>{told}</title></rect>'
            )
            at += width
        said = ", ".join(f"{part} {shown(values[part])}" for part in parts if values.get(part))
        head = f'<svg viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="{_text(said)}">'
        picture = f"{head}{''.join(pieces)}</svg>"
        total_ = f'<span class="total">{shown(total)}</span>' if bars.unit == "bytes" else ""
        rows.append(
            f'<div class="bar"><span class="label" title="{_text(label)}">{_text(label)}</span>{picture}{total_}</div>'
        )
    keys = "".join(
        f'<span><i class="key-{place % _FILLS}"></i>{_text(part)}</span>' for place, part in enumerate(parts)
    )
    caption = f"<figcaption>{_text(bars.caption)}</figcaption>"
    return f'<figure class="bars">{caption}{"".join(rows)}<div class="keys">{keys}</div></figure>'  # fmt: skip


def _dots(dots: Dots) -> str:
    """Dots as SVG, placed by shares of its width."""
    values = [value for _, spread in dots.rows for value in spread.values]
    values += [s.mean + sign * (s.deviation or 0) for _, s in dots.rows for sign in (-1, 1)]
    low, high = min(values), max(values)
    width = (high - low) or abs(high) or 1.0

    def at(value: float) -> str:
        return f"{3 + 94 * (value - low) / width:.2f}%"

    rows = []
    for place, (label, spread) in enumerate(dots.rows):
        left, right = (at(spread.mean + sign * (spread.deviation or 0)) for sign in (-1, 1))
        marks = f'<line class="spread" x1="{left}" x2="{right}" y1="50%" y2="50%"/>'
        marks += f'<line class="mean" x1="{at(spread.mean)}" x2="{at(spread.mean)}" y1="15%" y2="85%"/>'
        for value in spread.values:
            told = f"<title>{figure(value, dots.name)}</title>"
            marks += f'<circle class="fill-{place % 8}" cx="{at(value)}" cy="50%" r="4.5">{told}</circle>'
        said = _text(f"{label}: {', '.join(figure(value, dots.name) for value in spread.values)}")
        name = f'<span class="label" title="{_text(label)}">{_text(label)}</span>'
        total = f'<span class="total">{_text(number(spread, dots.name))}</span>'
        rows.append(f'<div class="bar">{name}<svg role="img" aria-label="{said}">{marks}</svg>{total}</div>')
    ends = f"<span>{figure(low, dots.name)}</span><span>{figure(high, dots.name)}</span>"
    axis = f'<div class="bar"><span></span><span class="ends">{ends}</span><span class="total"></span></div>'
    caption = f"<figcaption>{_text(dots.caption)}</figcaption>"
    return f'<figure class="bars dots">{caption}{"".join(rows)}{axis}</figure>'


def _plot(plot: Plot) -> dict[str, Any]:
    """As report.js takes it."""

    def curves(of: Sequence[Any]) -> list[dict[str, Any]]:
        made = []
        for curve in of:
            values = {"label": printable(curve.label), "slot": curve.slot, "x": curve.x, "y": curve.y}
            made.append(values | ({"low": curve.low, "high": curve.high} if curve.low else {}))
        return made

    marks = [{"x": each["x"], "kind": each["kind"], "label": printable(each["label"])} for each in plot.marks]
    return {
        "title": plot.title, "unit": plot.unit, "curves": curves(plot.curves), "together": curves(plot.together),
        "marks": marks, "logarithmic": plot.logarithmic, "x": plot.x,
    }  # fmt: skip
