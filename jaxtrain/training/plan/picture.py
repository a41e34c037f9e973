"""A plan as a picture (SVG): memory and time of the layouts, stacked by cause, and the choice of microbatches and remat."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SHOWN = 10
_WIDTH, _LEFT, _BAR, _ROW = 900, 300, 560, 22
_COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#edc948", "#9c755f")  # Tableau 10


def picture(report: Mapping[str, Any]) -> str:
    """An SVG of a report of `search.plan`: the ten best layouts, and for the best one what other microbatches would mean."""
    rows = [row for row in report["layouts"] if row["step_seconds"] is not None][:_SHOWN]
    parts: list[str] = []
    y = 30.0
    y = _bars(
        parts, y, f"GiB a device by formulas, of {report['usable_bytes'] / 2**30:.1f} usable; | compiled", rows,
        [{cause: size / 2**30 for cause, size in row["memory"].items()} for row in rows],
        report["usable_bytes"] / 2**30, [row["peak_bytes"] / 2**30 if row["compiled"] else None for row in rows],
    )  # fmt: skip
    times = [{cause: 1000 * seconds for cause, seconds in row["seconds"].items()} for row in rows]
    y = _bars(parts, y + 30, "ms a step, modelled", rows, times, None, [None] * len(rows))
    y = _front(parts, y + 30, rows[0]["microbatch_grid"], report["usable_bytes"])
    title = f"{report['target']}, global batch {report['global_batch']}, {report['precision']}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 20:.0f}" font-family="sans-serif" '
        f'font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="18" font-size="14">{html.escape(title)}</text>'
    )
    return head + "".join(parts) + "</svg>\n"


def _bars(
    parts: list[str],
    y: float,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    stacks: Sequence[Mapping[str, float]],
    limit: float | None,
    marks: Sequence[float | None],
) -> float:
    """A bar a layout, stacked by cause; returns the y below them. limit: a line. marks: of each bar, a tick."""
    causes = list(dict.fromkeys(cause for stack in stacks for cause, value in stack.items() if value))
    color = {cause: _COLORS[i % len(_COLORS)] for i, cause in enumerate(causes)}
    most = max([sum(stack.values()) for stack in stacks] + [mark for mark in marks if mark] + [1e-12])
    scale = _BAR / most
    parts.append(_text(10, y + 14, title, bold=True))
    x = 10.0
    for cause in causes:
        parts.append(f'<rect x="{x:.0f}" y="{y + 24:.0f}" width="10" height="10" fill="{color[cause]}"/>')
        parts.append(_text(x + 14, y + 33, cause))
        x += 30 + 7 * len(cause)
    y += 44
    for row, stack, mark in zip(rows, stacks, marks, strict=True):
        parts.append(_text(10, y + 14, _name(row)))
        x = float(_LEFT)
        for cause, value in stack.items():
            if value:
                tip = f"<title>{html.escape(cause)}: {value:.3g}</title>"
                width = max(value * scale, 0.5)
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="16" fill="{color[cause]}">{tip}</rect>'
                )
                x += value * scale
        parts.append(_text(x + 4, y + 13, f"{sum(stack.values()):.3g}"))
        if mark is not None:
            at = _LEFT + mark * scale
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y - 2:.0f}" y2="{y + 18:.0f}" stroke="black" stroke-width="2"/>'
            )
        y += _ROW
    if limit is not None and limit <= most:
        at = _LEFT + limit * scale
        top = y - _ROW * len(rows)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top:.0f}" y2="{y:.0f}" stroke="red" stroke-dasharray="4"/>'
        )
    return y


def _front(parts: list[str], y: float, grid: Sequence[Mapping[str, Any]], usable: int) -> float:
    """The best layout's microbatches and remat: memory against time, and the Pareto front; returns the y below."""
    parts.append(
        _text(
            10,
            y + 14,
            "the best layout with other microbatches x remat: GiB a device, ms a step; front in bold",
            bold=True,
        )
    )
    y += 24
    for point in sorted(grid, key=lambda point: (point["peak_bytes"], point["step_seconds"])):
        text = (
            f"{point['microbatches']} x {point['remat']}: {point['peak_bytes'] / 2**30:.2f} GiB, "
            f"{1000 * point['step_seconds']:.1f} ms{'' if point['peak_bytes'] <= usable else ' (does not fit)'}"
        )
        parts.append(_text(20, y + 14, text, bold=on_front(point, grid)))
        y += 18
    return y


def on_front(point: Mapping[str, Any], points: Iterable[Mapping[str, Any]]) -> bool:
    """Whether no other point needs less memory and is at least as fast, or the other way round."""
    mine = (point["peak_bytes"], point["step_seconds"])
    others = ((other["peak_bytes"], other["step_seconds"]) for other in points)
    return not any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in others)


def _name(row: Mapping[str, Any]) -> str:
    fields, mesh = row["fields"], row["mesh"]
    axes = " ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    return f"{axes}, zero {fields['layout.zero']}, {fields['layout.microbatches']} mb, {fields['train.remat']}"


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{weight}>{html.escape(text)}</text>'
