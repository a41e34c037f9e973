"""Step time and images/s per model and layout, and what a device holds at most.

A layout's simulated devices share this machine's cores: its time shows what the layout costs, not what it would gain.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from benchmarks.common import Spread, block_seconds, settings, start, synthetic
from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig
from jaxtrain.step.pipeline.schedule import in_flight
from jaxtrain.step.pipeline.train_step import PipelineTrainStep
from jaxtrain.step.train_step import TrainStep

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
    "data 4, zero 2": (LayoutConfig(zero=2), 4),
    "data 4, zero 3": (LayoutConfig(zero=3), 4),
    "replica 2, data 2, zero 3": (LayoutConfig(replica=2, zero=3), 4),
    "data 2, tensor 2": (LayoutConfig(tensor=2), 4),
    "stages 2, microbatches 4": (LayoutConfig(stages=2, microbatches=4), 2),
    "stages 4, microbatches 4": (LayoutConfig(stages=4, microbatches=4), 4),
    "stages 2, microbatches 4, data 2, zero 2": (LayoutConfig(stages=2, microbatches=4, zero=2), 4),
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
        peak = peak_bytes(engine.step)
        spread = Spread.of(block_seconds(run, engine, state, steps, REPEATS))
    return {
        "name": name,
        "batch": batch,
        "devices": devices,
        "seconds": dataclasses.asdict(spread),
        "images_per_second": batch / spread.median,
        "peak_bytes_per_device": peak,
    }


def peak_bytes(step: TrainStep) -> int:
    """What the fullest device holds at most during a step, by XLA's memory analysis of the compiled programs."""
    if isinstance(step, PipelineTrainStep):
        return max(_stage_peak(step, stage) for stage in step.stages)
    sizes: list[Any] = [program.memory_analysis() for program in step.programs.values()]
    return max(
        s.argument_size_in_bytes + s.temp_size_in_bytes + s.output_size_in_bytes - s.alias_size_in_bytes for s in sizes
    )


def _stage_peak(step: PipelineTrainStep, stage: int) -> int:
    """State, sums, data, what the backward pass needs of each microbatch in flight, and the largest program's temporaries."""
    sizes = {name: program.memory_analysis() for name, program in step.programs.items()}
    update = sizes[f"stage {stage}: update"]
    held, most = update.argument_size_in_bytes, update.temp_size_in_bytes  # of the update: state and sums
    for index, each in step.chunks.items():
        if each.chunk.stage == stage:
            forward, backward, zeros = (sizes[f"chunk {index}: {name}"] for name in ("forward", "backward", "zeros"))
            incoming = backward.output_size_in_bytes - zeros.output_size_in_bytes  # its gradient, of the same size
            data = forward.argument_size_in_bytes - incoming - (0 if each.prepare else _parameter_bytes(each.forward))
            held += data + (forward.output_size_in_bytes + incoming) * in_flight(step.schedule)[stage]
            most = max(most, forward.temp_size_in_bytes, backward.temp_size_in_bytes)
    return held + most


def _parameter_bytes(forward: jax.stages.Compiled) -> int:
    leaves, places = (jax.tree.leaves(tree[0][0]) for tree in (forward.args_info, forward.input_shardings))
    sizes = (
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(leaves, places, strict=True)
    )
    return sum(sizes)


__all__ = ["peak_bytes", "per_layout", "per_model"]
