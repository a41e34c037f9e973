"""One and two processes with a core each: where a step goes.

    python -m benchmarks.run NAME scale
    python -m benchmarks.cpu.scale                 # prints the tables alone

All of it is `jaxtrain.scale`; docs/scaling.md says what the parts are.
"""

from __future__ import annotations

from typing import Any

from jaxtrain import scale
from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig
from jaxtrain.recipes import change

# name: (model, global batch)
MODELS = {
    "mlp of width 2048": (ModelConfig("mlp", width=2048), 256),
    "resnet18 of width 16": (ModelConfig("resnet18", width=16), 64),
    "resnet18 of width 16, BatchNorm of a process": (ModelConfig("resnet18", width=16, bn_groups=2), 64),
}
REPEATS = 5


def measure() -> list[dict[str, Any]]:
    """For each of MODELS its name, and what `jaxtrain.scale` returns for one and two processes."""
    rows = []
    for name, (model, batch) in MODELS.items():
        optim = OptimConfig(learning_rate=0.01, schedule="constant")
        config = Config(data=DataConfig(global_batch=batch), model=model, optim=optim)
        shrunk = {"data.name": "synthetic", "data.image_size": 32, "data.examples": 2048, "train.precision": "f32"}
        scaled = scale(change(config, **shrunk), (1, 2), how="processes", repeats=REPEATS)
        rows.append({"name": name, **scaled})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: of two processes the step and the shares of its parts."""
    lines = []
    for row in rows:
        for each in row["tables"]:
            two = dict(zip(each["columns"], each["rows"][-1], strict=True))
            shares = {name: two[f"{name} %"] for name in (*PARTS, "profile off")}
            parts = ", ".join(f"{name} {share:.1f} %" for name, share in shares.items() if share is not None)
            name = f"two processes, {row['name']}, {each['scaling']} scaling, batch {two['global batch']}"
            name += f", speed-up {two['speed-up']:.2f}: {parts}"
            lines.append(f"| {name} | {two['step ms']:.1f} ms | {two['least ms']:.1f} - {two['most ms']:.1f} |")
    return lines


PARTS = ("compute", "overlap", "communication", "input", "host")

if __name__ == "__main__":
    print("\n".join(table(measure())))
