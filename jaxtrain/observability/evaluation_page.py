"""The report of an evaluation as one page of HTML, which fetches nothing and runs no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtrain.host.text import printable

_MOST_COLUMNS = 40  # a larger confusion matrix fits no screen: the page has its most frequent confusions alone
_CONFUSIONS = 30
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: left; }
td.n { text-align: right; }
.matrix td { text-align: right; min-width: 2.2rem; }
.matrix th.top { writing-mode: vertical-rl; transform: rotate(180deg); }
.worst { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 9rem; font-size: 13px; overflow-wrap: anywhere; }
img { width: 8rem; height: 8rem; object-fit: contain; image-rendering: pixelated; background: #eee; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def evaluation_page(title: str, about: Mapping[str, object], report: Mapping[str, Any]) -> str:
    """The page.

    Args:
      title: its heading.
      about: what was evaluated, a row for each.
      report: `EvaluationReport.to_json(pictures=True)`.
    """
    calibration = report["calibration"]
    numbers = {
        "examples": f"{report['examples']:,}", "accuracy": _share(report["accuracy"]), "top-5": _share(report["top5"]),
        "loss": _share(report["loss"]), "expected calibration error": _share(calibration["expected_calibration_error"]),
    }  # fmt: skip
    names = [each["class"] for each in report["classes"]]
    parts = [
        _table((), [(key, value) for key, value in {**about, **numbers}.items()]),
        "<h2>Classes, the worst first</h2>",
        _table(
            ("class", "examples", "accuracy"),
            [
                (each["class"], f"{each['examples']:,}", _share(each["accuracy"]))
                for each in sorted(
                    report["classes"], key=lambda each: 2 if each["accuracy"] is None else each["accuracy"]
                )
            ],
        ),
        "<h2>Confusions</h2>",
        _table(("examples", "of the class", "were taken for"), _confusions(names, report["confusion"])),
        _matrix(names, report["confusion"]) if len(names) <= _MOST_COLUMNS else "",
        "<h2>Calibration</h2>",
        "<p>Of the examples with a confidence in a bin, the mean confidence and the share that is right. ECE = &Sigma; "
        "|B<sub>m</sub>| / n &middot; |acc(B<sub>m</sub>) &minus; conf(B<sub>m</sub>)| (Guo et al. 2017, arXiv:1706.04599, "
        "equation 3).</p>",
        _table(
            ("confidence", "examples", "mean confidence", "accuracy"),
            [
                (
                    f"{b['low']:.3f} to {b['high']:.3f}",
                    f"{b['examples']:,}",
                    _share(b["confidence"]),
                    _share(b["accuracy"]),
                )
                for b in calibration["bins"]
            ],
        ),
        "<h2>The highest losses</h2>",
        f'<div class="worst">{"".join(map(_figure, report["worst"]))}</div>',
    ]
    head = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>"
    )
    return f"{head}\n<body><h1>{_text(title)}</h1>\n{chr(10).join(parts)}\n</body></html>\n"


def _text(value: object) -> str:
    """Any text from outside: nothing in it is mark-up, and nothing moves the direction of writing."""
    return html.escape(printable(value))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the cells of numbers are aligned to the right."""
    top = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    lines = [top, *("".join(map(_cell, row)) for row in rows)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines if line)}</table>"


def _cell(value: object) -> str:
    text = str(value)
    number = text == "-" or text.replace(",", "").replace(".", "").isdigit()
    return f"<td{' class=n' if number else ''}>{_text(text)}</td>"


def _confusions(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> list[tuple[str, str, str]]:
    """The most frequent ones: how many, the right class, the wrong one."""
    wrong = [(n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if n and i != j]
    wrong.sort(key=lambda found: (-found[0], found[1:]))
    return [(f"{n:,}", names[i], names[j]) for n, i, j in wrong[:_CONFUSIONS]]


def _matrix(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """The matrix: a row for each right class, a column for each answer, the darker the larger its share of the row."""
    top = "".join(f'<th class="top">{_text(name)}</th>' for name in names)
    rows = []
    for name, counts in zip(names, confusion, strict=True):
        total = max(sum(counts), 1)
        cells = "".join(
            f'<td style="background:rgba(40,110,180,{0.7 * n / total:.3f})">{n:,}</td>' if n else "<td></td>"
            for n in counts
        )
        rows.append(f"<tr><th>{_text(name)}</th>{cells}</tr>")
    body = f"<tr><th></th>{top}</tr>{''.join(rows)}"
    return f'<h3>Rows: the right class; columns: the answer</h3><table class="matrix">{body}</table>'


def _figure(example: Mapping[str, Any]) -> str:
    where = example["file"] or f"example {example['index']}"
    caption = (
        f"{_text(example['label'])}, taken for {_text(example['predicted'])} ({_share(example['confidence'])}); loss "
        f"{_share(example['loss'])}<br>{_text(where)}"
    )
    return f'<figure><img alt="" src="{_text(example["picture"])}"><figcaption>{caption}</figcaption></figure>'
