"""Draws measured sums as SVG: time by size, both logarithmic; a line for each way to add up."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from jaxtrain.parallel.bench.measure import Result

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 420, 80, 160, 50, 50  # px, of a panel
_COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#edc948", "#9c755f")  # Tableau 10
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def picture(results: Sequence[Result], title: str) -> str:
    """An SVG with a panel for each mesh: the median seconds of a sum against its bytes.

    Args:
      results: of `measure`, at least one.
      title: above the panels.
    """
    meshes = list(dict.fromkeys((r.program.case.replica, r.program.case.data) for r in results))
    names = list(dict.fromkeys(r.program.case.method.name for r in results))
    color = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(names)}
    parts: list[str] = []
    for i, mesh in enumerate(meshes):
        rows = [r for r in results if (r.program.case.replica, r.program.case.data) == mesh]
        parts += _panel(rows, color, 30 + i * _HEIGHT, f"{mesh[0]} x {mesh[1]} devices (replica x data)")
    height = 40 + len(meshes) * _HEIGHT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="20" font-size="14">{html.escape(title)}</text>'
    )
    return head + "".join(parts) + "</svg>\n"


def _panel(rows: Sequence[Result], color: dict[str, str], y: float, title: str) -> Iterator[str]:
    sizes, times = [r.program.case.bytes for r in rows], [r.median for r in rows]
    left, right = _decades(sizes, 2)
    low, high = _decades(times, 10)

    def at(size: float, seconds: float) -> tuple[float, float]:
        across = (math.log(size) - math.log(left)) / (math.log(right) - math.log(left))
        up = (math.log(seconds) - math.log(low)) / (math.log(high) - math.log(low))
        tall = _HEIGHT - _TOP - _BOTTOM
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), y + _TOP + (1 - up) * tall

    yield f'<text x="{_LEFT}" y="{y + 30:.0f}" font-weight="bold">{html.escape(title)}</text>'
    for size in dict.fromkeys(sizes):
        x, bottom = at(size, low)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{at(size, high)[1]:.1f}" stroke="#dddddd"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{_bytes(size)}</text>'
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        x, level = at(left, 10.0**power)
        yield f'<line x1="{x:.1f}" x2="{at(right, low)[0]:.1f}" y1="{level:.1f}" y2="{level:.1f}" stroke="#dddddd"/>'
        yield f'<text x="{x - 6:.1f}" y="{level + 4:.1f}" text-anchor="end">{_seconds(10.0**power)}</text>'
    for i, (name, shade) in enumerate(color.items()):
        points = [(r.program.case.bytes, r.median) for r in rows if r.program.case.method.name == name]
        path = " ".join(f"{x:.1f},{level:.1f}" for x, level in (at(*point) for point in points))
        yield f'<polyline points="{path}" fill="none" stroke="{shade}" stroke-width="2"/>'
        for point in points:
            x, level = at(*point)
            tip = f"<title>{html.escape(name)}, {_bytes(point[0])}: {_seconds(point[1])}</title>"
            yield f'<circle cx="{x:.1f}" cy="{level:.1f}" r="3" fill="{shade}">{tip}</circle>'
        x, level = _WIDTH - _RIGHT + 20, y + _TOP + 18 * i
        yield f'<rect x="{x}" y="{level:.0f}" width="10" height="10" fill="{shade}"/>'
        yield f'<text x="{x + 14}" y="{level + 9:.0f}">{html.escape(name)}</text>'


def _decades(values: Sequence[float], base: int) -> tuple[float, float]:
    """The powers of `base` around the values; never the same two."""
    low = math.floor(math.log(min(values), base) + 1e-9)
    return float(base) ** low, float(base) ** max(math.ceil(math.log(max(values), base) - 1e-9), low + 1)


def _bytes(size: float) -> str:
    power = min(int(math.log2(size)) // 10, 3)
    return f"{size / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _seconds(value: float) -> str:
    unit, name = next(((unit, name) for unit, name in _UNITS if value >= unit * (1 - 1e-9)), _UNITS[-1])
    return f"{value / unit:.3g} {name}"
