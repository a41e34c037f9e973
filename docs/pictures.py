"""Draws the pictures of the documents. From the root of the repository:

    python docs/pictures.py              # writes docs/layouts.svg, docs/curves.svg and docs/schedules.svg
    python docs/pictures.py runs/quick   # takes the curves from the `metrics.csv` of that run of the quickstart from now on

The same tree gives the same files: the rows of a run are kept in `docs/quickstart_metrics.csv`, and nothing is trained.
"""

from __future__ import annotations

import csv
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.recipes import resolve
from jaxtrain.step.pipeline.plot import svg
from jaxtrain.step.pipeline.schedule import make_pipeline_schedule
from jaxtrain.step.pipeline.timeline import simulate
from jaxtrain.training.layout_report import describe_layout

DOCS = Path(__file__).resolve().parent
METRICS = DOCS / "quickstart_metrics.csv"
DEVICES = 8

# Light colours stand in the elements, so that a reader without CSS shows them too; the card is opaque on any page.
LIGHT = {
    "card": "#ffffff", "edge": "#d5d9de", "ink": "#1c2128", "soft": "#59626d", "empty": "#eceef1", "grid": "#dfe3e8",
    "blue": "#0072b2", "orange": "#d55e00", "green": "#009e73",
}  # fmt: skip
DARK = {
    "card": "#161b22", "edge": "#3a424c", "ink": "#e6e9ed", "soft": "#9aa4b0", "empty": "#2b333d", "grid": "#303843",
    "blue": "#56b4e9", "orange": "#f0883e", "green": "#3fbf93",
}  # fmt: skip
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
WIDTH, PAD = 960, 24  # px


def pictures() -> dict[str, str]:
    """The text of each picture, by its file's name. Needs `DEVICES` devices; they may be simulated."""
    with METRICS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {"layouts.svg": layouts(), "curves.svg": curves(rows), "schedules.svg": schedules()}


# ------------------------------------------------------------------------------------------------------- svg elements


def card(title: str, height: float, body: Iterator[str]) -> str:
    """A standalone SVG for light and dark pages."""
    css = "".join(f".{name}{{fill:{colour}}}.{name}-line{{stroke:{colour}}}" for name, colour in DARK.items())
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="{FONT}" font-size="12">',
        f"<title>{title}</title>",
        f"<style>@media (prefers-color-scheme:dark){{{css}}}</style>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" class="card edge-line" '
        f'fill="{LIGHT["card"]}" stroke="{LIGHT["edge"]}"/>',
        *body,
        "</svg>",
        "",
    ))  # fmt: skip


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    return f'<rect {place} class="{colour}" fill="{LIGHT[colour]}"/>'


def line(points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> str:
    path = "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return f'<path d="M{path}" fill="none" class="{colour}-line" stroke="{LIGHT[colour]}" stroke-width="{width}"/>'


def text(
    x: float, y: float, words: str, colour: str = "soft", anchor: str = "start", size: int = 12, bold: bool = False
) -> str:
    style = f'text-anchor="{anchor}" font-size="{size}"' + (' font-weight="600"' if bold else "")
    return f'<text x="{number(x)}" y="{number(y)}" {style} class="{colour}" fill="{LIGHT[colour]}">{words}</text>'


# ------------------------------------------------------------------------------------------------------------ layouts

TREES = {
    "params": ("parameters", "blue"),
    "gradients": ("gradients", "orange"),
    "opt_state": ("optimizer state", "green"),
}
ZERO = ("no ZeRO", "ZeRO-1", "ZeRO-2", "ZeRO-3")
LABELS, GAP, TILE, BAR, ROW = 112, 12, 89, 11, 82  # px


def layouts() -> str:
    """What each device of stage 2 x data 2 x tensor 2 stores of an MLP, under ZeRO 0 to 3, from the table of the layout."""
    tables = [described(zero) for zero in range(4)]
    title = f"What each of {DEVICES} devices stores"
    return card(title, 132 + 4 * ROW + 34, _layouts(title, tables))


def described(zero: int) -> dict[str, Any]:
    """What `jaxtrain layout --json` prints."""
    recipe = DOCS.parent / "configs/mlp_synthetic.py:pipeline2,tensor2"
    return describe_layout(resolve(str(recipe), [("layout.zero", str(zero))]).config, jax.devices()[:DEVICES])


def _layouts(title: str, tables: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    mesh = {axis: size for axis, size in tables[0]["mesh"].items() if size > 1}
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    note = f"mesh: {axes}; model: an MLP of {tables[0]['parameters']:,} parameters with AdamW, KiB per device"
    yield text(PAD, 34, title, "ink", size=16, bold=True)
    yield text(PAD, 54, note)
    devices = [dict(zip(mesh, at, strict=True)) for at in coordinates(tuple(mesh.values()))]
    left = [PAD + LABELS + i * (TILE + GAP) + (GAP if device["stage"] else 0) for i, device in enumerate(devices)]
    for stage in range(mesh["stage"]):
        mine = [x for x, device in zip(left, devices, strict=True) if device["stage"] == stage]
        yield text((mine[0] + mine[-1] + TILE) / 2, 84, f"stage {stage}", "ink", "middle", bold=True)
        yield line([(mine[0], 91), (mine[-1] + TILE, 91)], "soft")
    for x, device in zip(left, devices, strict=True):
        yield text(x + TILE / 2, 108, f"data {device['data']}", anchor="middle", size=11)
        yield text(x + TILE / 2, 122, f"tensor {device['tensor']}", anchor="middle", size=11)
    for zero, table in enumerate(tables):
        y = 138 + zero * ROW
        yield text(PAD, y + 18, ZERO[zero], "ink", size=14, bold=True)
        yield text(PAD, y + 35, f"layout.zero={zero}", size=11)
        for x, device in zip(left, devices, strict=True):
            stored = 0
            for at, (tree, (_, colour)) in enumerate(TREES.items()):
                top = y + at * (BAR + 4)
                yield box(x, top, TILE, BAR, "empty")
                for start, end, size in parts(table, tree, device):
                    stored += size
                    yield box(x + TILE * start, top, TILE * (end - start), BAR, colour)
            yield text(x + TILE / 2, y + 3 * (BAR + 4) + 11, f"{stored / 1024:,.0f}", "ink", "middle", size=11)
    x, y = float(PAD + LABELS), 132 + 4 * ROW + 4
    for name, colour in TREES.values():
        yield box(x, y, 14, 12, colour)
        yield text(x + 20, y + 10, name)
        x += 34 + 6.6 * len(name)
    yield text(
        WIDTH - PAD, y + 10, "a bar is the whole model; the coloured part is what the device stores", anchor="end"
    )


def coordinates(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Of the devices of a mesh, the last axis fastest."""
    if not sizes:
        return [()]
    return [(first, *rest) for first in range(sizes[0]) for rest in coordinates(sizes[1:])]


def parts(table: Mapping[str, Any], tree: str, device: Mapping[str, int]) -> Iterator[tuple[float, float, int]]:
    """The parts of a tree that a device stores, a parameter after the other: from, to (shares of the tree) and bytes.

    A parameter is cut into as many parts as the axes of its spec have devices; the tensor parts are cut by `data`. What an
    optimizer keeps of it, Adam two arrays, lies alike and counts together.
    """
    leaves: dict[str, dict[str, Any]] = {}
    for leaf in (leaf for leaf in table["leaves"] if leaf["tree"] == tree and "layers_" in leaf["path"]):
        name = leaf["path"][leaf["path"].index("layers_") :]
        leaves[name] = leaf | {"bytes": leaf["bytes_per_device"] + leaves.get(name, {"bytes": 0})["bytes"]}
    axes = {name: [axis for axis in ("tensor", "data") if axis in leaf["spec"]] for name, leaf in leaves.items()}
    ways = {name: math.prod(table["mesh"][axis] for axis in axes[name]) for name in leaves}
    total = sum(leaf["bytes"] * ways[name] for name, leaf in leaves.items())
    before = 0
    for name, leaf in sorted(leaves.items()):
        if leaf["stage"] == device["stage"]:
            part = 0
            for axis in axes[name]:
                part = part * table["mesh"][axis] + device[axis]
            start = before + part * leaf["bytes"]
            yield start / total, (start + leaf["bytes"]) / total, leaf["bytes"]
        before += leaf["bytes"] * ways[name]


# ------------------------------------------------------------------------------------------------------------- curves

PHASES = {"train": ("training", "blue"), "val": ("validation", "orange")}
TOP, PLOT, PANEL = 88, 190, 412  # px: where the panels begin, their height and width


def curves(rows: Sequence[Mapping[str, str]]) -> str:
    """Loss and accuracy over the epochs, from the rows of a `metrics.csv`."""
    title = "The quickstart: a small ResNet on handwritten digits"
    return card(title, TOP + PLOT + 56, _curves(title, rows))


def _curves(title: str, rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    epochs = 1 + max(int(row["epoch"]) for row in rows)
    test = next(row for row in rows if row["phase"] == "test")
    yield text(PAD, 34, title, "ink", size=16, bold=True)
    yield text(PAD, 54, f"{epochs} epochs; accuracy on the test set {float(test['accuracy']):.1%}")
    x = float(WIDTH - PAD)
    for name, colour in reversed(PHASES.values()):
        x -= 6.6 * len(name)
        yield text(x, 54, name)
        yield line([(x - 28, 50), (x - 8, 50)], colour, 3)
        x -= 48
    for at, (column, high) in enumerate((("loss", max(float(row["loss"]) for row in rows)), ("accuracy", 1.0))):
        yield from _panel(column, high, PAD + 44 + at * (PANEL + 68), rows, epochs)


def _panel(column: str, high: float, left: float, rows: Sequence[Mapping[str, str]], epochs: int) -> Iterator[str]:
    step = next(step for step in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if high / step <= 5)
    top = step * math.ceil(high / step - 1e-9)

    def at(epoch: float, value: float) -> tuple[float, float]:
        return left + (PANEL - 24) * epoch / epochs, TOP + PLOT * (1 - value / top)

    yield text(left - 44, TOP - 8, column, "ink", bold=True)
    for i in range(round(top / step) + 1):
        yield line([at(0, i * step), at(epochs, i * step)], "grid")
        yield text(left - 8, at(0, i * step)[1] + 4, f"{i * step:.2g}", anchor="end", size=11)
    for epoch in range(0, epochs + 1, max(1, epochs // 5)):
        yield text(at(epoch, 0)[0], TOP + PLOT + 18, str(epoch), anchor="middle", size=11)
    yield text(at(epochs / 2, 0)[0], TOP + PLOT + 36, "epochs", anchor="middle")
    for phase, (_, colour) in PHASES.items():
        points = [at(int(row["epoch"]) + 1, float(row[column])) for row in rows if row["phase"] == phase]
        yield line(points, colour, 2)


# ---------------------------------------------------------------------------------------------------------- schedules


def schedules() -> str:
    """The three schedules, 4 stages and 8 microbatches; a microbatch takes 1 s forward and 2 s backward through the model."""
    panels = []
    for name, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)):
        plan = make_pipeline_schedule(name, 4, 8, chunks)
        forward, backward = 1 / plan.model_chunks, 2 / plan.model_chunks
        timeline = simulate(plan, [forward] * plan.model_chunks, [backward] * plan.model_chunks)
        panels.append((f"{name}, {chunks} slice{'s' if chunks > 1 else ''} a stage", timeline))
    return svg(panels)


def main() -> None:
    if len(sys.argv) > 1:
        shutil.copyfile(Path(sys.argv[1]) / "metrics.csv", METRICS)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    for name, picture in pictures().items():
        (DOCS / name).write_text(picture)


if __name__ == "__main__":
    main()
