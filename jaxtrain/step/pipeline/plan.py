"""Decides a run's pipeline stages: how many microbatches, and which layers each stage holds."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtrain.config import LayoutConfig
from jaxtrain.models.classifier import Classifier, layer_function, layer_name
from jaxtrain.models.layers import Context
from jaxtrain.step.pipeline import partition, schedule
from jaxtrain.step.pipeline.partition import LayerCall, Partition
from jaxtrain.trees import PyTree

# Microbatches for each stage where `layout.microbatches=0`: the bubble is then a fifth at most, (S - 1) / (4 S + S - 1).
MICROBATCHES_PER_STAGE = 4


def microbatches(config: LayoutConfig, global_batch: int, ways: int, bn_groups: int, *, even: bool) -> int:
    """`layout.microbatches`, or for 0 the most (up to four a stage) that the batch and its BatchNorm groups divide into.

    bn_groups: 0 without BatchNorm. even: whether a microbatch needs an even number of examples.
    """
    if config.microbatches:
        return config.microbatches
    if config.stages == 1:
        return 1
    most = MICROBATCHES_PER_STAGE * config.stages
    whole = math.gcd(global_batch // ways, bn_groups)
    fits = [count for count in range(1, most + 1) if whole % count == 0]
    if even:
        fits = [count for count in fits if global_batch // count % 2 == 0] or [1]
    if config.schedule == "interleaved_1f1b":
        fits = [count for count in fits if count % config.stages == 0] or fits
    return max(fits)


def sample(share: int, microbatch: int, bn_groups: int) -> tuple[int, int]:
    """How many examples, in how many BatchNorm groups, a layer is measured on for a device's `share` of a microbatch.

    The share itself, where it holds whole groups. A group that spans devices is measured as one group of the share, which
    costs the same, but never of a single example: it has more, and BatchNorm refuses statistics over one value.
    """
    whole, rest = divmod(share * bn_groups, microbatch)
    return (max(share, 2), 1) if rest else (share, whole)


def partition_model(
    config: LayoutConfig,
    model: Classifier,
    params: PyTree,
    batch_stats: PyTree,
    input_shape: tuple[int, ...],
    dtype: DTypeLike,
    bn_groups: int,
    ways: int,
) -> Partition:
    """The model's chunks. input_shape: [B, H, W, C] of a microbatch. bn_groups: in it, at least 1. ways: devices it is on."""
    partition.check_counts(config, len(model.layers))
    plan = schedule.make_pipeline_schedule(config.schedule, config.stages, config.microbatches, config.chunks)
    share = input_shape[0] // ways
    examples, groups = sample(share, input_shape[0], bn_groups)
    calls, x = [], jax.ShapeDtypeStruct((examples, *input_shape[1:]), dtype)
    example = jnp.arange(examples, dtype=jnp.int32)
    for index, layer in enumerate(model.layers):
        name = layer_name(index)
        own, stats = params.get(name, {}), batch_stats.get(name, {})

        def function(params: PyTree, x: jax.Array, layer: Any = layer, stats: PyTree = stats) -> jax.Array:
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats)
            context = Context(example=example, train=True, bn_groups=groups)
            return layer_function(layer)(params, zeros, x, context, jax.random.key(0))[0]

        calls.append(LayerCall(name, function, own, x, (layer, x.shape), index == 0, share / examples))
        x = jax.eval_shape(function, own, x)
    costs = partition.measure(calls, timed=config.balance == "time")
    return partition.make_partition(config, costs, schedule.in_flight(plan))
