"""Cuts a model's layers into the contiguous chunks that pipeline stages hold, so that no stage waits long for another.

Chunk k of V = stages x chunks lies on stage k % stages. What a layer costs is measured on the layer itself: the floating
point operations of its forward and backward pass as XLA counts them, the bytes that it must move at least, the bytes that
it keeps for the backward pass, or, when asked, its time.
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
from jaxtrain.host.backend import on_cpu
from jaxtrain.trees import PyTree

# How many operations a device does in the time that it moves a byte: an accelerator (H100, bf16: 990 TFLOP/s, 3.35 TB/s),
# and a core of a CPU.
FLOPS_PER_BYTE = 300
CPU_FLOPS_PER_BYTE = 10

# Bytes that a stage keeps for a byte of parameters: itself, its gradient, and two moments.
_STATE_FACTOR = 4


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs for one microbatch on one device.

    parameters: their number. flops: forward and backward. moved: bytes, at least: parameters, input and output, forward
    and backward. kept: bytes for the backward pass. output: bytes of its output. seconds: measured, or 0.
    """

    name: str
    parameters: int
    parameter_bytes: int
    flops: float
    moved: int
    kept: int
    output: int
    seconds: float = 0.0

    @property
    def cost(self) -> float:
        """In operations: whichever takes longer, computing or moving (the roofline; Williams 2009)."""
        per_byte = CPU_FLOPS_PER_BYTE if on_cpu(jax.devices()) else FLOPS_PER_BYTE
        return max(self.flops, float(self.moved) * per_byte)


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which layers each chunk has. ends: the first layer behind each chunk. costs: of every layer.

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
        return tuple(range(begin, end) for begin, end in zip((0, *self.ends), self.ends, strict=False))

    @property
    def stage_of(self) -> dict[str, int]:
        """The stage of each layer, by its name."""
        return {self.costs[i].name: k % self.stages for k, layers in enumerate(self.chunks) for i in layers}

    def describe(self) -> list[str]:
        """A line for each stage, and one on how even they are."""
        total, lines, shares = sum(self.weights), [], []
        for stage in range(self.stages):
            own = [layers for k, layers in enumerate(self.chunks) if k % self.stages == stage]
            costs = [self.costs[i] for layers in own for i in layers]
            names = ", ".join(
                self.costs[s[0]].name + (f"-{self.costs[s[-1]].name.removeprefix('layers_')}" if len(s) > 1 else "")
                for s in own
            )
            shares.append(sum(self.weights[stage :: self.stages]) / total)
            handed = sum(self.costs[layers[-1]].output for layers in own if layers[-1] + 1 < len(self.costs))
            lines.append(
                f"stage {stage}: {names}, {sum(c.parameters for c in costs):,} parameters, "
                f"{sum(c.flops for c in costs) / 1e9:.3g} GFLOP a microbatch and device, "
                f"hands on {handed / 2**20:.3g} MiB, {shares[-1]:.0%} of the {self.balance}"
            )
        lines.append(
            f"imbalance: the most expensive stage has {max(shares) * self.stages:.2f} times the average {self.balance}"
        )
        return lines


def check_counts(config: LayoutConfig, layers: int) -> None:
    """Raises `ConfigError` for more chunks than layers, or boundaries that are not between layers."""
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
    """Cuts the layers as `config` says: by hand, or such that the most expensive chunk costs as little as it can.

    in_flight: for each stage, how many microbatches it keeps at once; for `balance="memory"`.
    """
    check_counts(config, len(costs))

    def weight(k: int, layers: range) -> float:
        own = [costs[i] for i in layers]
        if config.balance == "time":
            return sum(c.seconds for c in own)
        if config.balance == "memory":
            kept = sum(c.kept for c in own) * in_flight[k % config.stages]
            return float(sum(c.parameter_bytes for c in own) * _STATE_FACTOR + kept)
        return sum(c.cost for c in own)

    if config.boundaries:
        ends = (*config.boundaries, len(costs))
    else:
        ends = balanced_ends(len(costs), config.stages * config.chunks, weight)
    weights = tuple(weight(k, range(*span)) for k, span in enumerate(zip((0, *ends), ends, strict=False)))
    return Partition(config.stages, ends, tuple(costs), config.balance, weights)


def balanced_ends(layers: int, chunks: int, cost: Callable[[int, range], float]) -> tuple[int, ...]:
    """The ends of `chunks` contiguous, non-empty chunks of `layers` whose most expensive is cheapest; then the most even ones.

    cost: of the layers as chunk k. Dynamic programming over (chunk, end), O(chunks x layers^2).
    """

    @functools.cache
    def best(k: int, end: int) -> tuple[float, float, tuple[int, ...]]:
        """The most expensive chunk, the sum of squares, and the ends, of chunks 0..k over the layers before `end`."""
        if k == 0:
            first = cost(0, range(end))
            return first, first**2, (end,)
        found = []
        for begin in range(k, end):
            largest, squares, ends = best(k - 1, begin)
            own = cost(k, range(begin, end))
            found.append((max(largest, own), squares + own**2, (*ends, end)))
        return min(found)

    return best(chunks - 1, layers)[2]


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One layer as a function `(params, x) -> y` with the shapes of its arguments.

    key: equal for layers that cost the same. first: whether x are the images, whose gradient nobody needs. share: how much
    of x a device has of a microbatch, at most 1.
    """

    name: str
    function: Callable[[PyTree, jax.Array], jax.Array]
    params: PyTree
    x: jax.ShapeDtypeStruct
    key: Hashable
    first: bool
    share: float = 1.0


def measure(calls: Sequence[LayerCall], *, timed: bool) -> list[LayerCost]:
    """The cost of each layer. Lowers each kind of layer once; with `timed` also compiles and runs it, on process 0."""
    known: dict[tuple[Hashable, bool], LayerCost] = {}
    for call in calls:
        if (call.key, call.first) not in known:
            known[call.key, call.first] = _measure(call, timed=timed)
    costs = [dataclasses.replace(known[call.key, call.first], name=call.name) for call in calls]
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
        y, pullback = forward(params, x)
        return y, pullback(cotangent)

    # Counted before XLA optimizes: on a CPU a convolution becomes a call whose operations are not counted.
    y = jax.eval_shape(call.function, call.params, call.x)
    shapes = (call.params, call.x, y)
    analysis: Any = jax.jit(both).lower(*shapes).cost_analysis()
    flops = float(analysis["flops"]) if "flops" in analysis else 0.0  # a layer may only move data
    residuals = jax.eval_shape(forward, call.params, call.x)[1]
    weights, leaves = _nbytes(call.params), jax.tree.leaves(call.params)
    output = round(_nbytes(y) * call.share)
    moved = 3 * (weights + round(_nbytes(call.x) * call.share) + output)
    kept = round(max(_nbytes(residuals) - weights, 0) * call.share)
    seconds = _seconds(forward, shapes) if timed and jax.process_index() == 0 else 0.0
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    return LayerCost(call.name, count, weights, flops * call.share, moved, kept, output, seconds * call.share)


def _nbytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _seconds(forward: Callable[..., Any], shapes: PyTree, repeats: int = 5) -> float:
    """The fastest of a few runs on one device: the time that other work on the machine disturbed least.

    In two programs, as a stage runs them: the first writes what the second reads and adds to the gradients so far.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def backward(sums: PyTree, pullback: Callable[..., PyTree], cotangent: jax.Array) -> PyTree:
        gradients, *cotangents = pullback(cotangent)
        return jax.tree.map(jnp.add, sums, gradients), cotangents

    first = jax.jit(forward)
    params, x, cotangent = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)
    sums, times = jax.tree.map(jnp.zeros_like, params), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        y, pullback = first(params, x)
        sums, cotangents = backward(sums, pullback, cotangent)
        jax.block_until_ready((y, sums, cotangents))
        times.append(time.perf_counter() - began)
    return min(times[1:])
