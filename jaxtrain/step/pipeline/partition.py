"""Partitions a model's layers into the contiguous chunks of the pipeline stages, so that all stages cost about the same.

Chunk k of V = stages x chunks lives on stage k % stages. The cost of a layer is measured on the layer itself: the
floating point operations of its forward and backward pass as XLA counts them, the bytes that it must move at least, the
bytes that it stores for the backward pass, or, for `balance="time"`, the seconds that it takes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.config import LayoutConfig
from jaxtrain.errors import ConfigError
from jaxtrain.trees import PyTree

# Floating point operations in the time that moving one byte takes: on an accelerator (an H100 in bf16 has 990 TFLOP/s
# and 3.35 TB/s), and on a core of a CPU.
FLOPS_PER_BYTE = 300
CPU_FLOPS_PER_BYTE = 10

# Bytes on a stage for each byte of parameters: the parameter, its gradient, and two moments of the optimizer.
_STATE_FACTOR = 4


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs for one microbatch on one device.

    Attributes:
      name: of the layer.
      parameters: how many.
      parameter_bytes: their bytes.
      flops: floating point operations, forward and backward.
      moved: bytes that it must move at least: parameters, input and output, forward and backward.
      residuals: bytes that it stores for the backward pass.
      output: bytes of its output.
      seconds: forward and backward; 0 if not measured.
      flops_per_byte: operations in the time that moving one byte takes.
    """

    name: str
    parameters: int
    parameter_bytes: int
    flops: float
    moved: int
    residuals: int
    output: int
    seconds: float = 0.0
    flops_per_byte: int = FLOPS_PER_BYTE

    @property
    def cost(self) -> float:
        """In floating point operations: computing or moving, whichever takes longer (the roofline model; Williams 2009)."""
        return max(self.flops, float(self.moved) * self.flops_per_byte)


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which layers each chunk has.

    Attributes:
      stages: how many.
      ends: for each chunk, the number of its last layer plus one.
      costs: of every layer.
      balance: `layout.balance`, what was balanced.
      weights: of each chunk, in the unit of `balance` (operations, bytes or seconds).
    """

    stages: int
    ends: tuple[int, ...]
    costs: tuple[LayerCost, ...]
    balance: str
    weights: tuple[float, ...]

    @property
    def chunks(self) -> tuple[range, ...]:
        """The layers of each chunk."""
        return _ranges(self.ends)

    @property
    def stage_of(self) -> dict[str, int]:
        """The stage of each layer, by its name."""
        return {self.costs[i].name: k % self.stages for k, layers in enumerate(self.chunks) for i in layers}

    def describe(self) -> list[str]:
        """A line for each stage, and one on how much their costs differ."""
        total, lines, shares = sum(self.weights), [], []
        for stage in range(self.stages):
            chunks = [layers for k, layers in enumerate(self.chunks) if k % self.stages == stage]
            costs = [self.costs[i] for layers in chunks for i in layers]
            names = ", ".join(
                self.costs[c[0]].name + (f"-{self.costs[c[-1]].name.removeprefix('layers_')}" if len(c) > 1 else "")
                for c in chunks
            )
            shares.append(sum(self.weights[stage :: self.stages]) / total)
            sent = sum(self.costs[layers[-1]].output for layers in chunks if layers[-1] + 1 < len(self.costs))
            lines.append(
                f"stage {stage}: {names}, {sum(c.parameters for c in costs):,} parameters, "
                f"{sum(c.flops for c in costs) / 1e9:.3g} GFLOP a microbatch and device, "
                f"hands on {sent / 2**20:.3g} MiB, {shares[-1]:.0%} of the {self.balance}"
            )
        lines.append(
            f"imbalance: the most expensive stage has {max(shares) * self.stages:.2f} times the average {self.balance}"
        )
        return lines


def check_counts(config: LayoutConfig, layers: int) -> None:
    """Raises `ConfigError` if there are more chunks than layers, or if `layout.boundaries` does not fit `layers` layers."""
    chunks = config.stages * config.chunks
    if config.schedule == "interleaved_1f1b" and config.chunks == 1:
        raise ConfigError(
            "config.layout.chunks=1: interleaved_1f1b needs several a stage; use --config.layout.chunks=2."
        )
    if chunks > layers:
        what = f"config.layout.stages={config.stages}"
        what += f" x layout.chunks={config.chunks}" if config.chunks > 1 else ""
        raise ConfigError(f"{what} makes {chunks} chunks, but the model has {layers} layers; use at most {layers}.")
    if not config.boundaries:
        return
    if len(config.boundaries) != chunks - 1:
        raise ConfigError(
            f"config.layout.boundaries={config.boundaries!r}: {chunks} chunks need {chunks - 1}, the first layer of each "
            "chunk but the first."
        )
    if config.boundaries[0] < 1 or config.boundaries[-1] >= layers:
        raise ConfigError(
            f"config.layout.boundaries={config.boundaries!r}: must lie between 1 and {layers - 1}, the model's last layer."
        )


def make_partition(config: LayoutConfig, costs: Sequence[LayerCost], in_flight: Sequence[int]) -> Partition:
    """Cuts the layers at `layout.boundaries`, or else such that the most expensive chunk costs as little as possible.

    Args:
      config: the section `layout`.
      costs: of every layer.
      in_flight: for each stage, how many microbatches' activations it stores at the same time; for `balance="memory"`.

    Raises:
      ConfigError: see `check_counts`.
    """
    check_counts(config, len(costs))

    def weight(k: int, layers: range) -> float:
        """The cost of `layers` as chunk k, in the unit of `balance`."""
        chunk = [costs[i] for i in layers]
        if config.balance == "time":
            return sum(layer.seconds for layer in chunk)
        if config.balance == "memory":
            residuals = sum(layer.residuals for layer in chunk) * in_flight[k % config.stages]
            return float(sum(layer.parameter_bytes for layer in chunk) * _STATE_FACTOR + residuals)
        return sum(layer.cost for layer in chunk)

    if config.boundaries:
        ends = (*config.boundaries, len(costs))
    else:
        ends = balanced_ends(len(costs), config.stages * config.chunks, weight)
    weights = tuple(weight(k, layers) for k, layers in enumerate(_ranges(ends)))
    return Partition(config.stages, ends, tuple(costs), config.balance, weights)


def _ranges(ends: Sequence[int]) -> tuple[range, ...]:
    """The layers of each chunk, from the chunks' ends."""
    return tuple(range(begin, end) for begin, end in zip((0, *ends), ends, strict=False))


def balanced_ends(layers: int, chunks: int, cost: Callable[[int, range], float]) -> tuple[int, ...]:
    """Cuts layers into contiguous, non-empty chunks such that the most expensive chunk costs as little as possible.

    Of several such cuts, the one with the smallest sum of squared costs. Dynamic programming over (chunk, end),
    O(chunks x layers^2).

    Args:
      layers: how many.
      chunks: how many.
      cost: (k, layers) -> the cost of these layers as chunk k.

    Returns:
      For each chunk, the number of its last layer plus one.
    """

    @functools.cache
    def best(k: int, end: int) -> tuple[float, float, tuple[int, ...]]:
        """The most expensive chunk, the sum of squares, and the ends, of chunks 0..k over the layers before `end`."""
        if k == 0:
            first = cost(0, range(end))
            return first, first**2, (end,)
        cuts = []
        for begin in range(k, end):
            largest, squares, ends = best(k - 1, begin)
            last = cost(k, range(begin, end))
            cuts.append((max(largest, last), squares + last**2, (*ends, end)))
        return min(cuts)

    return best(chunks - 1, layers)[2]


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One layer as a function, with the shapes of its arguments.

    Attributes:
      name: of the layer.
      function: (params, x) -> y.
      params: shapes.
      x: the shape of the input, [B, ...].
      key: equal for layers that cost the same.
      first: whether x are the images, which need no gradient.
      share: the costs are those of x times this; below 1 if x has more examples than a device has of a microbatch.
    """

    name: str
    function: Callable[[PyTree, jax.Array], jax.Array]
    params: PyTree
    x: jax.ShapeDtypeStruct
    key: Hashable
    first: bool
    share: float = 1.0


def measure(calls: Sequence[LayerCall], *, timed: bool, cpu: bool) -> list[LayerCost]:
    """The cost of each layer. Layers with the same key are measured once.

    Args:
      calls: the layers.
      timed: process 0 also compiles and runs the layers, and tells the other processes. That is a collective.
      cpu: whether the run's devices are CPUs.
    """
    known: dict[tuple[Hashable, bool], LayerCost] = {}
    for call in calls:
        if (call.key, call.first) not in known:
            known[call.key, call.first] = _measure(call, timed=timed)
    per_byte = CPU_FLOPS_PER_BYTE if cpu else FLOPS_PER_BYTE
    costs = [
        dataclasses.replace(known[call.key, call.first], name=call.name, flops_per_byte=per_byte) for call in calls
    ]
    if timed and jax.process_count() > 1:
        seconds = multihost_utils.broadcast_one_to_all(np.array([c.seconds for c in costs]))
        costs = [dataclasses.replace(c, seconds=float(s)) for c, s in zip(costs, seconds, strict=True)]
    return costs


def _measure(call: LayerCall, *, timed: bool) -> LayerCost:
    def forward(params: PyTree, x: jax.Array) -> tuple[jax.Array, Callable[..., PyTree]]:
        if call.first:
            return jax.vjp(lambda params: call.function(params, x), params)
        return jax.vjp(call.function, params, x)

    # The cotangent is an argument: XLA would make sums of its products with a constant.
    def both(params: PyTree, x: jax.Array, cotangent: jax.Array) -> PyTree:
        y, vjp = forward(params, x)
        return y, vjp(cotangent)

    # Counted before XLA optimizes: on a CPU a convolution becomes a call whose operations are not counted.
    y = jax.eval_shape(call.function, call.params, call.x)
    shapes = (call.params, call.x, y)
    analysis: Any = jax.jit(both).lower(*shapes).cost_analysis()
    flops = float(analysis["flops"]) if "flops" in analysis else 0.0  # a layer may only move data
    residuals = jax.eval_shape(forward, call.params, call.x)[1]
    weights, leaves = _nbytes(call.params), jax.tree.leaves(call.params)
    output = round(_nbytes(y) * call.share)
    moved = 3 * (weights + round(_nbytes(call.x) * call.share) + output)
    residual_bytes = round(max(_nbytes(residuals) - weights, 0) * call.share)
    seconds = _seconds(forward, shapes) if timed and jax.process_index() == 0 else 0.0
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    return LayerCost(call.name, count, weights, flops * call.share, moved, residual_bytes, output, seconds * call.share)


def _nbytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _seconds(forward: Callable[..., Any], shapes: PyTree, repeats: int = 5) -> float:
    """Seconds of the forward and backward pass: the fastest of a few runs on one device, since other work only adds time.

    They are two programs, as on a stage: the first writes residuals, the second reads them and adds to the gradients so
    far.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def backward(sums: PyTree, vjp: Callable[..., PyTree], cotangent: jax.Array) -> PyTree:
        gradients, *cotangents = vjp(cotangent)
        return jax.tree.map(jnp.add, sums, gradients), cotangents

    first = jax.jit(forward)
    params, x, cotangent = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)
    sums, times = jax.tree.map(jnp.zeros_like, params), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        y, vjp = first(params, x)
        sums, cotangents = backward(sums, vjp, cotangent)
        jax.block_until_ready((y, sums, cotangents))
        times.append(time.perf_counter() - began)
    return min(times[1:])
