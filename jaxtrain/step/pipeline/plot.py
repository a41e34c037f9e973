"""Draws the timelines of pipeline schedules as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from jaxtrain.step.pipeline.schedule import Op
from jaxtrain.step.pipeline.timeline import Timeline

_WIDTH, _PAD, _LABELS = 960, 20, 58  # px; the labels are those of the stages, left of the boxes
_LEFT, _RIGHT = _PAD + _LABELS, _WIDTH - _PAD
_TITLE, _ROW, _BOX, _AXIS, _GAP, _LEGEND = 30, 22, 18, 20, 20, 18  # px, heights
_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"

_BASE = {"F": (0x00, 0x72, 0xB2), "B": (0xE6, 0x9F, 0x00)}  # blue and orange of Okabe and Ito 2008
_LIGHTEST = 0.6  # how far towards white a stage's last chunk is
# The elements have the light colours as attributes, for viewers without CSS. The card is opaque on a page of any
# colour.
_LIGHT = {
    "card": "#ffffff",
    "edge": "#d5d9de",
    "ink": "#1c2128",
    "soft": "#59626d",
    "idle": "#eceef1",
    "grid": "#c3c9d0",
}
_DARK = {
    "card": "#161b22",
    "edge": "#3a424c",
    "ink": "#e6e9ed",
    "soft": "#9aa4b0",
    "idle": "#262d36",
    "grid": "#4a535e",
}
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def svg(panels: Sequence[tuple[str, Timeline]]) -> str:
    """A standalone SVG of titled timelines: a row for each stage, and a box for each operation with its microbatch.

    All panels have the same time scale. Blue is forward, orange backward, grey idle; a stage's later chunks are
    lighter. A box has its operation and times as a tooltip. The same panels always give the same text.

    Raises:
      ValueError: there is no panel.
    """
    if not panels:
        raise ValueError("svg needs at least one panel")
    span = max(timeline.makespan for _, timeline in panels) or 1.0
    scale, unit = next(((s, u) for s, u in _UNITS if span >= s), _UNITS[-1])
    shades = 1 + max((e.op.chunk // t.stages for _, t in panels for e in t.events), default=0)
    heights = [_TITLE + t.stages * _ROW + _AXIS + _GAP for _, t in panels]
    height = _PAD + sum(heights) + _LEGEND + _PAD
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" font-family="{_FONT}" font-size="12">',
        f"<title>{_text('Pipeline schedules: ' + ', '.join(title for title, _ in panels))}</title>",
        f"<style>@media (prefers-color-scheme:dark){{{_css(_DARK)}}}</style>",
        f'<rect class="card edge-line" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="8" '
        f'fill="{_LIGHT["card"]}" stroke="{_LIGHT["edge"]}"/>',
    ]
    y = _PAD
    for (title, timeline), tall in zip(panels, heights, strict=True):
        out += _panel(title, timeline, y, span, scale, unit, shades)
        y += tall
    out += _legend(y, shades)
    return "\n".join((*out, "</svg>", ""))


def _panel(
    title: str, timeline: Timeline, y: float, span: float, scale: float, unit: str, shades: int
) -> Iterator[str]:
    def x(seconds: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * seconds / span

    numbers = f"makespan {_quantity(timeline.makespan / scale)} {unit} · bubble {timeline.bubble:.1%}"
    yield (
        f'<text x="{_PAD}" y="{y + 15}"><tspan font-size="14" font-weight="600" {_fill("ink")}>{_text(title)}</tspan>'
        f'<tspan dx="12" {_fill("soft")}>{numbers}</tspan></text>'
    )
    top, bottom = y + _TITLE, y + _TITLE + timeline.stages * _ROW
    for stage in range(timeline.stages):
        row = top + stage * _ROW
        yield f'<text x="{_PAD}" y="{row + 13}" {_fill("soft")}>stage {stage}</text>'
        width = _number(x(timeline.makespan) - _LEFT)
        yield f'<rect x="{_LEFT}" y="{row}" width="{width}" height="{_BOX}" {_fill("idle")}/>'
    labels = []
    digits = max((len(str(event.op.microbatch)) for event in timeline.events), default=1)
    for event in timeline.events:
        start, end = event.start - timeline.start, event.end - timeline.start
        row, colour = top + event.stage * _ROW, _shade(event.op, timeline.stages, shades)
        tip = f"{event.op} on stage {event.stage}: {_quantity(start / scale)} to {_quantity(end / scale)} {unit}"
        wide = x(end) - x(start)
        gap = 0.8 if wide > 3 else 0.0  # tells neighbours apart; hair-thin boxes need all of their width
        yield (
            f'<rect class="op" x="{_number(x(start))}" y="{row}" width="{_number(wide - gap)}" height="{_BOX}" '
            f'fill="{_hex(colour)}"><title>{tip}</title></rect>'
        )
        if wide >= 6.5 * digits + 2:  # by the longest number: boxes of one width are labelled all or none
            at = _number(x(start) + (wide - gap) / 2)
            labels.append(f'<text x="{at}" y="{row + 13}" fill="{_on(colour)}">{event.op.microbatch}</text>')
    yield from ('<g font-size="11" text-anchor="middle" pointer-events="none">', *labels, "</g>")
    yield f'<text x="{_PAD}" y="{bottom + 14}" {_fill("soft")}>{unit}</text>'
    yield f'<path class="grid-line" d="M{_LEFT} {bottom}H{_RIGHT}" stroke="{_LIGHT["grid"]}"/>'
    for value, label in _ticks(span / scale):
        at = _number(x(value * scale))
        anchor = "end" if x(value * scale) > _RIGHT - 12 else "middle"
        yield f'<path class="grid-line" d="M{at} {bottom}v4" stroke="{_LIGHT["grid"]}"/>'
        yield f'<text x="{at}" y="{bottom + 16}" font-size="11" text-anchor="{anchor}" {_fill("soft")}>{label}</text>'


def _legend(y: float, shades: int) -> Iterator[str]:
    x = float(_LEFT)
    for kind, name in (("F", "forward"), ("B", "backward")):
        for local in range(shades):
            colour = _hex(_shade(Op(kind, local, 0), 1, shades))
            yield f'<rect x="{_number(x)}" y="{y}" width="14" height="14" rx="2" fill="{colour}"/>'
            x += 16
        yield f'<text x="{_number(x + 4)}" y="{y + 11.5}" {_fill("soft")}>{name}</text>'
        x += 4 + 7 * len(name) + 18
    yield f'<rect x="{_number(x)}" y="{y}" width="14" height="14" rx="2" {_fill("idle")}/>'
    note = "the number is the microbatch" + ("; a lighter shade is a later chunk of the stage" if shades > 1 else "")
    yield f'<text x="{_number(x + 20)}" y="{y + 11.5}" {_fill("soft")}>idle</text>'
    yield f'<text x="{_RIGHT}" y="{y + 11.5}" text-anchor="end" {_fill("soft")}>{note}</text>'


def _css(colours: dict[str, str]) -> str:
    fills = "".join(f".{name}{{fill:{colours[name]}}}" for name in ("card", "ink", "soft", "idle"))
    return fills + "".join(f".{name}-line{{stroke:{colours[name]}}}" for name in ("edge", "grid"))


def _fill(name: str) -> str:
    return f'class="{name}" fill="{_LIGHT[name]}"'


def _shade(op: Op, stages: int, shades: int) -> tuple[int, ...]:
    """The colour of `op`: the base for a stage's first chunk, and towards white for its later ones."""
    white = _LIGHTEST * (op.chunk // stages) / max(shades - 1, 1)
    return tuple(round(part + (255 - part) * white) for part in _BASE[op.kind])


def _hex(colour: tuple[int, ...]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _on(colour: tuple[int, ...]) -> str:
    """White or near black, whichever has the higher contrast on `colour` (WCAG 2.1's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#ffffff" if luminance < 0.18 else "#1c2128"


def _ticks(span: float) -> Iterator[tuple[float, str]]:
    """About eight round values from 0 to `span`, and their labels."""
    rough = span / 8
    power = math.floor(math.log10(rough))
    step = next(times * 10.0**power for times in (1, 2, 5, 10) if times * 10.0**power >= rough * (1 - 1e-9))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    for i in range(math.floor(span / step + 1e-9) + 1):
        yield i * step, f"{i * step:.{decimals}f}"


def _quantity(value: float) -> str:
    """With three digits: 123, 12.3, 1.23."""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def _number(value: float) -> str:
    """A coordinate in px."""
    return f"{max(value, 0.0):.2f}".rstrip("0").rstrip(".")


def _text(text: str) -> str:
    return escape("".join(letter if letter.isprintable() else " " for letter in text))
