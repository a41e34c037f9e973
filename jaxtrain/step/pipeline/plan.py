"""Plans a pipeline: how many microbatches there are, and which layers each stage has."""

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

# Microbatches for each stage where `layout.microbatches=0`. The bubble is then at most a fifth,
# (S - 1) / (4 S + S - 1).
MICROBATCHES_PER_STAGE = 4


def microbatches(config: LayoutConfig, global_batch: int, ways: int, bn_groups: int, *, even: bool) -> int:
    """The number of microbatches: `layout.microbatches`, or for 0 the largest number (up to four a stage) that fits.

    Args:
      config: the section `layout`.
      global_batch: examples in a batch.
      ways: how many shards the batch is split into.
      bn_groups: BatchNorm groups in a batch, which must divide into whole groups a microbatch; 0 without BatchNorm.
      even: whether a microbatch needs an even number of examples.
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
    """The batch that a layer's cost is measured on, for one device.

    Where the device's share of a microbatch holds whole BatchNorm groups, this is the share. A group over several
    devices is measured as one group of the share, which costs the same. That group has at least two examples: BatchNorm
    refuses statistics over one value.

    Args:
      share: examples of a microbatch on one device.
      microbatch: examples in a microbatch.
      bn_groups: BatchNorm groups in a microbatch.

    Returns:
      The number of examples, and of BatchNorm groups in them.
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
    *,
    cpu: bool,
) -> Partition:
    """Cuts the model's layers into the chunks of the stages.

    Args:
      config: the section `layout`.
      model: the layers.
      params: shapes, keyed by layer.
      batch_stats: shapes, keyed by layer.
      input_shape: (B, H, W, C) of the input of a microbatch.
      dtype: of that input.
      bn_groups: BatchNorm groups in a microbatch, at least 1.
      ways: how many shards a microbatch is split into.
      cpu: whether the run's devices are CPUs.

    Raises:
      ConfigError: there are more chunks than layers, or `layout.boundaries` does not fit.
    """
    partition.check_counts(config, len(model.layers))
    plan = schedule.make_pipeline_schedule(config.schedule, config.stages, config.microbatches, config.chunks)
    calls = layer_calls(model, params, batch_stats, input_shape, dtype, bn_groups, ways)
    costs = partition.measure(calls, timed=config.balance == "time", cpu=cpu)
    return partition.make_partition(config, costs, schedule.in_flight(plan))


def layer_calls(
    model: Classifier,
    params: PyTree,
    batch_stats: PyTree,
    input_shape: tuple[int, ...],
    dtype: DTypeLike,
    bn_groups: int,
    ways: int,
) -> list[LayerCall]:
    """Each layer as a function of what one device has of a microbatch; the arguments are those of `partition_model`."""
    share = input_shape[0] // ways
    examples, groups = sample(share, input_shape[0], bn_groups)
    calls, x = [], jax.ShapeDtypeStruct((examples, *input_shape[1:]), dtype)
    example = jnp.arange(examples, dtype=jnp.int32)
    for index, layer in enumerate(model.layers):
        name = layer_name(index)
        layer_params, stats = params.get(name, {}), batch_stats.get(name, {})

        def function(params: PyTree, x: jax.Array, layer: Any = layer, stats: PyTree = stats) -> jax.Array:
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats)
            context = Context(example=example, train=True, bn_groups=groups)
            return layer_function(layer)(params, zeros, x, context, jax.random.key(0))[0]

        calls.append(LayerCall(name, function, layer_params, x, (layer, x.shape), index == 0, share / examples))
        x = jax.eval_shape(function, layer_params, x)
    return calls
