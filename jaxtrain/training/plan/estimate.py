"""Memory and time of a layout by formulas: from the layers' footprints, the layout's table and a model of the links.

Memory is that of the device that needs most. Time is modelled, not measured: each layer takes as long as its products at
`PRODUCT_SHARE` of the peak rate or their bytes at `BANDWIDTH_SHARE` of the memory's, whichever is longer, and its other
kernels their bytes or their starts (the roofline model; Williams 2009). Collectives run beside nothing, so that links count
for as much as they can.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

from jaxtrain.host.links import Link
from jaxtrain.host.targets import products_per_second
from jaxtrain.parallel.collective_cost import collective_seconds, reduce_seconds, wire_bytes
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.reduce import messages, sent_bytes
from jaxtrain.step.footprint import Footprint
from jaxtrain.training.plan.candidates import Legal, cut_of, in_flight
from jaxtrain.training.plan.problem import Machine, Problem

PRODUCT_SHARE = 0.5
BANDWIDTH_SHARE = 0.85
KERNEL_SECONDS = 3e-6
"""Assumptions, to be replaced by measurements on a GPU."""
COLLECTIVE_SECONDS = 8.4e-6
"""What a collective takes before its first hop: NCCL's `baseLatencies`, ring, Simple (src/graph/tuning.cc)."""

_COMBINED = (
    30 << 20
)  # bytes of gradients that XLA reduces together; assumed (4 to 6 reductions were seen in compiled steps)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a layout needs, by formulas.

    Attributes:
      microbatches: how many.
      remat: `train.remat`.
      memory: bytes of a device by cause: params, optimizer, gradients, activations, data.
      seconds: of a step by cause: products, memory, kernels, update, communication (by axis), idle.
      wire: bytes that a device sends in a step, by axis.
    """

    microbatches: int
    remat: str
    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    wire: Mapping[str, float]

    @property
    def peak(self) -> int:
        """Bytes of a device."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """Modelled seconds of a step."""
        return math.fsum(self.seconds.values())

    @property
    def limit(self) -> str:
        """What takes most of the step."""
        return max(self.seconds, key=lambda name: self.seconds[name])


@dataclasses.dataclass(frozen=True)
class _Span:
    """Contiguous layers on one device, for one microbatch.

    Attributes:
      stored: bytes that wait for the backward pass, from one program.
      peak: bytes that are held at most, with those and the gradients of the later layers.
      products: seconds of matrix products and convolutions.
      memory: seconds of the other kernels' traffic.
      kernels: seconds of starting kernels.
    """

    stored: int
    peak: int
    products: float
    memory: float
    kernels: float

    @property
    def seconds(self) -> float:
        return self.products + self.memory + self.kernels


def _own_reduction(legal: Legal, times: float, whole: float, local: int, machine: Machine) -> tuple[float, float]:
    """Bytes sent in a step, and seconds, of `layout.reduce`.

    Args:
      legal: the layout.
      times: how often in a step.
      whole: bytes of the gradients.
      local: how many neighbours of the devices that hold the batch a host has.
      machine: gives the links.
    """
    config, shape = legal.layout.config, (legal.axes.data, legal.axes.replica)
    buckets = max(1.0, whole / config.bucket_bytes)
    each = reduce_seconds(config.reduce, whole / buckets, *shape, local, machine.within, machine.between)
    if machine.target.platform != "cpu":
        each += messages(config.reduce, *shape) * COLLECTIVE_SECONDS
    return times * sent_bytes(config.reduce, whole, *shape)[0], times * buckets * each


def _reductions(layout: Layout, count: int) -> float:
    """How often a step reduces gradients: once for each of `count` microbatches; once for what a device adds up and compresses
    itself; and for weights of its own in one of `optim.sync_every` steps.
    """
    return 1 / layout.sync_every if layout.accumulates_by_device else count


class Estimator:
    """Estimates the layouts of one problem."""

    def __init__(self, problem: Problem):
        self.problem = problem
        target, precision = problem.machine.target, problem.config.train.precision
        self._flops = products_per_second(target.teraflops, precision) * PRODUCT_SHARE
        self._bandwidth = target.bandwidth * BANDWIDTH_SHARE
        # A CPU starts no kernels: its operations are calls.
        self._start = 0.0 if target.platform == "cpu" else KERNEL_SECONDS
        self._start_collective = 0.0 if target.platform == "cpu" else COLLECTIVE_SECONDS
        self._split: dict[int, dict[str, tuple[int, int]]] = {}

    def estimate(self, legal: Legal, count: int, remat: str) -> Estimate:
        """What the layout needs with `count` microbatches and `train.remat=remat`."""
        ways, stages = legal.axes.ways, legal.axes.stages
        self._learn_split(legal)
        examples = self.problem.batch // (count * ways)
        spans = self._spans(legal, count, examples, remat)
        wire, communication = self._communication(legal, count, examples)
        slowest = max(spans, key=lambda span: span.seconds)
        busy = slowest.seconds * count * (legal.axes.chunks if stages > 1 else 1)
        idle = busy * (stages - 1) / (count * legal.axes.chunks) if stages > 1 else 0.0
        share = count * (legal.axes.chunks if stages > 1 else 1)
        seconds = {
            "products": slowest.products * share,
            "memory": slowest.memory * share,
            "kernels": slowest.kernels * share,
            "update": self._update_seconds(legal),
            **communication,
            "idle": idle,
        }
        return Estimate(count, remat, self._memory(legal, count, examples, spans), seconds, wire)

    # ----------------------------------------------------------------------------------------------------- layers

    def _spans(self, legal: Legal, count: int, examples: int, remat: str) -> list[_Span]:
        """The chunks' layers; without stages there is one chunk.

        In a program for several GPUs rematerialization saves nothing: XLA runs what is computed again before the weights'
        gradients, and those last (docs/planning.md).
        """
        tensor = legal.axes.tensor
        if legal.axes.stages == 1:
            several = legal.axes.ways > 1 and self.problem.machine.target.platform == "cuda"
            late = several and not self.problem.has_batch_norm
            span = self._span(0, self.problem.layers, examples, remat, tensor, whole=True, late=late)
            if several and remat != "none":
                plain = self._span(0, self.problem.layers, examples, "none", tensor, whole=True, late=late)
                span = dataclasses.replace(span, stored=plain.stored, peak=plain.peak)
            return [span]
        cut = cut_of(self.problem, legal.axes, count)
        return [self._span(c.start, c.stop, examples, remat, tensor, whole=False, late=False) for c in cut.chunks]

    @functools.cache  # noqa: B019  an estimator lives as long as its plan
    def _span(self, begin: int, end: int, examples: int, remat: str, tensor: int, *, whole: bool, late: bool) -> _Span:
        """The layers from `begin` to `end`.

        Args:
          begin: the first layer.
          end: the last one plus one.
          examples: of one device and microbatch.
          remat: `train.remat`.
          tensor: size of the axis.
          whole: forward and backward are one program, in which XLA chooses what is stored; else JAX does.
          late: XLA computes the weights' gradients after the whole backward pass. So it does where they are reduced over
            devices and no BatchNorm waits for sums of the batch (docs/planning.md).
        """
        rows = self.problem.footprints(examples, remat)
        layers = [(rows[0], 1.0, 0)] if begin == 0 else []
        layers += [(rows[i + 1], self._kept_share(i, tensor), self._gradient_bytes(i)) for i in range(begin, end)]
        stored, before, peak = 0.0, [], 0.0
        for k, (each, share, _) in enumerate(layers):
            before.append(stored)
            peak = max(peak, stored + each.forward.peak * share)
            follows = layers[k + 1][0].keeps_input if k + 1 < len(layers) else False
            stored += (each.stored + each.output * (each.keeps_output or follows)) * share
        later = 0
        for (each, share, gradients), held in zip(reversed(layers), reversed(before), strict=True):
            peak = max(peak, held + each.backward.peak * share + later)
            later += gradients if whole else 0
        if late:
            peak = max(peak, stored + sum(each.late * share for each, share, _ in layers))
        if not whole and remat == "none":
            costs = self.problem.costs_at(examples)
            stored = sum(costs[i].residuals * self._kept_share(i, tensor) for i in range(begin, end))
            peak = max(peak, stored)
        times = [self._layer_seconds(each, share) for each, share, _ in layers]
        return _Span(round(stored), round(peak), *(math.fsum(t) for t in zip(*times, strict=True)))

    def _layer_seconds(self, each: Footprint, share: float) -> tuple[float, float, float]:
        products = memory = kernels = 0.0
        for part in (each.forward, each.backward):
            products += max(part.flops / self._flops, part.product_bytes / self._bandwidth) * share
            memory += (part.moved - part.product_bytes) / self._bandwidth * share
            kernels += part.kernels * self._start
        return products, memory, kernels

    @functools.cache  # noqa: B019
    def _kept_share(self, layer: int, tensor: int) -> float:
        """Of a layer's work and activations, the part that a device has: what the tensor axis does not split, it has whole."""
        if tensor == 1:
            return 1.0
        split, total = self._split_share(layer, tensor)
        return 1.0 - (1.0 - 1.0 / tensor) * (split / total if total else 0.0)

    @functools.cache  # noqa: B019
    def _split_share(self, layer: int, tensor: int) -> tuple[int, int]:
        """Elements of the layer's kernels that the tensor axis splits, and of all."""
        name = self.problem.costs[layer].name
        return self._split[tensor].get(name, (0, 1))

    def _learn_split(self, legal: Legal) -> None:
        """Keeps which kernels the layout's tensor axis splits."""
        if legal.axes.tensor in self._split:
            return
        shares: dict[str, tuple[int, int]] = {}
        for leaf in legal.table["params"]:
            if len(leaf.shape) > 1:
                name, size = leaf.path.split("/")[0], math.prod(leaf.shape)
                split, total = shares.get(name, (0, 0))
                shares[name] = (split + size * ("tensor" in leaf.compute_spec), total + size)
        self._split[legal.axes.tensor] = shares

    def _gradient_bytes(self, layer: int) -> int:
        return self.problem.costs[layer].parameter_bytes

    # ----------------------------------------------------------------------------------------------------- memory

    def _memory(self, legal: Legal, count: int, examples: int, spans: list[_Span]) -> dict[str, int]:
        """Bytes by cause, of the stage that needs most."""
        stages, by_tree = legal.axes.stages, legal.bytes
        batch = self.problem.resident_bytes + 2 * self.problem.image_bytes * examples * count
        flights = in_flight(legal.axes, count) if stages > 1 else (1,)
        parts = []
        for stage in range(stages):
            mine = [span for k, span in enumerate(spans) if k % stages == stage]
            stored = max(span.stored for span in mine)
            transient = max(max(span.peak - span.stored, 0) for span in mine)
            gathered = self._gathered(legal, stage)
            parts.append(
                {
                    "params": by_tree["params"][stage] + gathered,
                    "optimizer": sum(
                        by_tree[tree][stage] for tree in ("opt_state", "ema", "batch_stats", "communication")
                    ),
                    "gradients": self._gradients(legal, count, stage),
                    "activations": stored * flights[stage] + transient,
                    "data": batch if stage == 0 else 0,
                }
            )
        return max(parts, key=lambda part: sum(part.values()))

    def _gathered(self, legal: Legal, stage: int) -> int:
        """Bytes of parameters that ZeRO-3 holds gathered: a layer's, twice; those of a stage; with `layout.reduce` all."""
        if not legal.layout.shards("params"):
            return 0
        if legal.axes.stages > 1 or legal.layout.by_device:
            chunks = legal.layout.chunks or ([cost.name for cost in self.problem.costs],)
            names = {name for k, chunk in enumerate(chunks) if k % legal.axes.stages == stage for name in chunk}
            return sum(c.parameter_bytes for c in self.problem.costs if c.name in names) // legal.axes.tensor
        return 2 * max(c.parameter_bytes for c in self.problem.costs) // legal.axes.tensor

    def _gradients(self, legal: Legal, count: int, stage: int) -> int:
        """The accumulator; in a step of one microbatch the gradients themselves are among what is held at the peak."""
        if count == 1 and legal.axes.stages == 1:
            return 0
        return legal.bytes["gradients"][stage]

    # ------------------------------------------------------------------------------------------------------- time

    def _update_seconds(self, legal: Legal) -> float:
        """Reading and writing the state and reading the gradients twice, for their norm and for the update."""
        state = sum(max(legal.bytes[tree].values()) for tree in ("params", "opt_state", "ema", "communication"))
        gradients = max(legal.bytes["gradients"].values())
        return (2 * state + 2 * gradients) / self._bandwidth

    def _communication(self, legal: Legal, count: int, examples: int) -> tuple[dict[str, float], dict[str, float]]:
        """Bytes sent in a step by axis, and seconds by cause."""
        axes, wire, seconds = legal.axes, {}, {}

        layers = self.problem.layers / axes.stages

        def add(
            axis: str, kind: str, size: float, members: int, stride: int, times: float, pieces: float = layers
        ) -> None:
            """pieces: how many collectives there are; of gathered parameters and of activations one for each layer."""
            inside, across = self._spread(axes.stages, members, stride)
            within, between = self.problem.machine.within, self.problem.machine.between
            each = self._start_collective + collective_seconds(kind, size / pieces, inside, across, within, between)
            cost = times * pieces * each
            wire[axis] = wire.get(axis, 0.0) + times * wire_bytes(kind, size, members)
            seconds[f"{axis} collectives"] = seconds.get(f"{axis} collectives", 0.0) + cost

        shards = axes.data if legal.layout.shards("params") else 1
        whole = max(legal.bytes["params"].values()) * shards
        joined = max(1.0, min(layers, whole / _COMBINED))
        gathers = count * (1 if axes.stages > 1 or legal.layout.by_device else 2)
        times = _reductions(legal.layout, count)
        if legal.layout.by_device and legal.layout.config.reduce != "auto":
            wire["data"], seconds["data collectives"] = _own_reduction(
                legal, times, whole, self._spread(axes.stages, axes.ways, axes.tensor)[0], self.problem.machine
            )
        elif not legal.layout.by_device and axes.data > 1 and axes.zero >= 2 and (count > 1 or axes.zero == 3):
            add("data", "reduce-scatter", whole / axes.data, axes.data, axes.tensor, count, joined)
            if axes.replica > 1:
                add("replica", "all-reduce", whole / axes.data, axes.replica, axes.tensor * axes.data, count, joined)
        elif axes.ways > 1:
            add("data", "all-reduce", whole, axes.ways, axes.tensor, times, joined)
        if axes.data > 1 and axes.zero == 3:
            add("data", "all-gather", whole, axes.data, axes.tensor, gathers)
        elif axes.data > 1 and axes.zero in (1, 2):
            add("data", "all-gather", whole, axes.data, axes.tensor, 1, joined)
        if axes.tensor > 1:
            times, reduced = self._tensor_reductions(legal, examples)
            if times:
                add("tensor", "all-reduce", reduced, axes.tensor, 1, 2 * count, times)
        if axes.stages > 1:
            sent = max(
                self.problem.costs_at(examples)[c.stop - 1].output
                for c in cut_of(self.problem, axes, count).chunks[:-1]
            )
            link = self._stage_link(axes.stages)
            wire["stage"] = 2.0 * sent * count * axes.chunks
            seconds["stage transfers"] = 2.0 * count * axes.chunks * (link.latency + sent / link.bandwidth)
        return wire, seconds

    def _tensor_reductions(self, legal: Legal, examples: int) -> tuple[float, float]:
        """How many reductions a pass of a stage has over the tensor axis, and their bytes.

        There is one behind each kernel whose inputs are split: its result, as large as the layer's output.
        """
        costs = {cost.name: cost for cost in self.problem.costs_at(examples)}
        split = [leaf for leaf in legal.table["params"] if len(leaf.shape) > 1 and "tensor" in leaf.compute_spec[:-1]]
        sizes = [costs[leaf.path.split("/")[0]].output for leaf in split]
        return len(sizes) / legal.axes.stages, sum(sizes) / legal.axes.stages

    def _spread(self, stages: int, members: int, stride: int) -> tuple[int, int]:
        """Of `members` devices that are `stride` apart in a stage: how many a host has, and over how many hosts they are."""
        target, placement = self.problem.machine.target, self.problem.asked.layout.stage_placement
        local = target.per_host
        if stages > 1 and placement == "spread" and target.per_host % stages == 0:
            local = target.per_host // stages
        inside = max(math.gcd(members, max(local // stride, 1)), 1)
        return inside, members // inside

    def _stage_link(self, stages: int) -> Link:
        target, machine = self.problem.machine.target, self.problem.machine
        spread = self.problem.asked.layout.stage_placement == "spread" and target.per_host % stages == 0
        return machine.within if target.hosts == 1 or spread else machine.between
