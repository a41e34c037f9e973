"""Step time and images/s per model and layout.

A layout's simulated devices share this machine's cores: its figure shows what the layout costs, not what it would gain.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.common import Spread, block_seconds, settings, start, synthetic
from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig

# name: (model, batch, steps a block). The sizes are what two cores can pay for.
MODELS: dict[str, tuple[ModelConfig, int, int]] = {
    "mlp": (ModelConfig("mlp"), 128, 50),
    "resnet18": (ModelConfig("resnet18"), 32, 2),
    "resnet50": (ModelConfig("resnet50"), 16, 2),
    "vgg19_bn": (ModelConfig("vgg19_bn"), 32, 2),
    "swin_tiny": (ModelConfig("swin_tiny"), 16, 2),
}
LAYOUTS: dict[str, tuple[LayoutConfig, int]] = {
    "one device": (LayoutConfig(), 1),
    "accumulate 4": (LayoutConfig(microbatches=4), 1),
    "data 4": (LayoutConfig(), 4),
    "data 4, zero 1": (LayoutConfig(zero=1), 4),
    "data 4, zero 3": (LayoutConfig(zero=3), 4),
    "data 2, tensor 2": (LayoutConfig(tensor=2), 4),
}
REPEATS = 5


def _config(model: ModelConfig, batch: int, layout: LayoutConfig) -> Config:
    model = dataclasses.replace(model, bn_groups=layout.microbatches)
    optim = OptimConfig(learning_rate=0.01, schedule="constant")
    return synthetic(
        Config(data=DataConfig(global_batch=batch, augmentation="light"), model=model, optim=optim, layout=layout)
    )


def per_model() -> list[dict[str, Any]]:
    """One device, one microbatch, every model, the light augmentation in the step."""
    return [_measure(name, config, batch, steps, 1) for name, (config, batch, steps) in MODELS.items()]


def per_layout() -> list[dict[str, Any]]:
    """A ResNet-18 of width 16, every layout."""
    model = ModelConfig("resnet18", width=16)
    return [_measure(name, model, 64, 2, count, layout) for name, (layout, count) in LAYOUTS.items()]


def _measure(
    name: str, model: ModelConfig, batch: int, steps: int, devices: int, layout: LayoutConfig | None = None
) -> dict[str, Any]:
    config = _config(model, batch, layout or LayoutConfig())
    with settings(config):
        run, engine, state = start(config, devices)
        spread = Spread.of(block_seconds(run, engine, state, steps, REPEATS))
    return {
        "name": name,
        "batch": batch,
        "seconds": dataclasses.asdict(spread),
        "images_per_second": batch / spread.median,
    }


__all__ = ["per_layout", "per_model"]
