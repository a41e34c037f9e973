"""The planner's estimates beside the compiled programs: bytes of a device, for four models under many layouts.

    python -m benchmarks.gpu.plan [--record]

Compiled for eight H100s, without one. It prints the error of each estimate and, with --record, writes
benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxtrain.errors import ConfigError
from jaxtrain.recipes import resolve
from jaxtrain.training.plan.search import plan

TARGET = "8xh100"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vgg19 at 224": ("vgg19_cifar10:224", {"data.global_batch": 1024}),
    "resnet50 at 128": ("resnet50_cifar100", {"data.global_batch": 1024, "data.image_size": 128, "model.bn_groups": 8}),
    "swin_tiny at 32": ("swin_tiny_cifar10", {"data.global_batch": 2048}),
    "mlp": ("mlp_synthetic", {"data.global_batch": 4096, "model.width": 4096}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "zero1": {"layout.zero": 1},
    "zero2, 4 microbatches": {"layout.zero": 2, "layout.microbatches": 4},
    "zero3": {"layout.zero": 3},
    "zero3, 2 replicas": {"layout.zero": 3, "layout.replica": 2},
    "tensor 2": {"layout.tensor": 2},
    "2 stages, 8 microbatches": {"layout.stages": 2, "layout.microbatches": 8},
    "remat full": {"train.remat": "full"},
}
_EVERY_FIELD = ("replica", "tensor", "zero", "microbatches", "stages", "schedule", "chunks", "remat")
RESULTS = Path(__file__).resolve().parents[1] / "results" / "plan.json"


def measure() -> list[dict[str, Any]]:
    """A row for each model and layout: `estimated` and `compiled` bytes of a device."""
    rows = []
    for model, (recipe, changes) in MODELS.items():
        for layout, fields in LAYOUTS.items():
            pairs = [(name, str(value)) for name, value in (changes | fields | {"layout.keep": _EVERY_FIELD}).items()]
            config = resolve(recipe, pairs).config
            try:
                report = plan(config, TARGET, compiled=1)
            except ConfigError as error:
                print(f"{model}, {layout}: {error}", flush=True)
                continue
            row = report["layouts"][0]
            rows.append(
                {
                    "model": model,
                    "layout": layout,
                    "estimated": row["estimated_peak_bytes"],
                    "compiled": row["peak_bytes"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows with their errors."""
    found = Table("model", "layout", "estimated GiB", "compiled GiB", "error", box=None, pad_edge=False)
    for row in rows:
        found.add_row(
            row["model"],
            row["layout"],
            f"{row['estimated'] / 2**30:.2f}",
            f"{row['compiled'] / 2**30:.2f}",
            f"{error(row):+.0%}",
        )
    return found


def error(row: dict[str, Any]) -> float:
    """(estimated - compiled) / compiled."""
    return row["estimated"] / row["compiled"] - 1


def main() -> None:
    """Prints the table; with --record also writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.name}")
    record = parser.parse_args().record
    rows = measure()
    console = Console(width=120)
    console.print(table(rows))
    console.print(f"median of the absolute errors: {statistics.median(abs(error(row)) for row in rows):.0%}")
    if record:
        RESULTS.write_text(json.dumps({"target": TARGET, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
