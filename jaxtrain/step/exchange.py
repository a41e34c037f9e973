"""The exchange of compressed gradients, once a step: `optim.compress`, and what its error feedback keeps."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtrain.config import OptimConfig
from jaxtrain.parallel.compressors import COMPRESSORS as ROUNDING
from jaxtrain.parallel.compressors import compressed_leaves
from jaxtrain.parallel.error_feedback import (
    Leaves,
    compression_rate,
    powersgd,
    randomk,
    rank_of,
    topk,
    unless_not_finite,
)
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import BATCH_AXES, batch_ways
from jaxtrain.parallel.reduce import reduce_leaves
from jaxtrain.precision import at_least_f32, scale_factor
from jaxtrain.step.gradients import GradientSums
from jaxtrain.step.task import Task
from jaxtrain.step.train_state import COMPRESS, TrainState, role_key
from jaxtrain.trees import PyTree, by_path, nested


def initial_exchange(layout: Layout, optim: OptimConfig, trained: PyTree, seed: int | jax.Array) -> PyTree:
    """What the exchange keeps from step to step, before the first one; () where it keeps nothing.

    Args:
      layout: of the run.
      optim: the config's section.
      trained: the trained parameters.
      seed: of the run.

    Returns:
      residual: what each of the n shards of the batch has not sent, of each leaf that is compressed: zeros [n, ...].
      basis: under `powersgd`, the bases that it begins with, drawn at random: [1, c, r] of a leaf [..., c], or one for each
        device that the tensor axis splits the leaf over.
    """
    if not layout.accumulates_by_device or optim.compress in ROUNDING or optim.compress == "none":
        return ()
    leaves, ways = by_path(trained), batch_ways(layout.mesh)
    leaves = {path: leaf for path, leaf in leaves.items() if _is_compressed(layout, optim, path, leaf)}
    residual = {path: jnp.zeros((ways, *leaf.shape), at_least_f32(leaf.dtype)) for path, leaf in leaves.items()}
    if optim.compress != "powersgd":
        return {"residual": nested(residual)}
    key, basis = role_key(seed, COMPRESS), {}
    for number, (path, leaf) in enumerate(leaves.items()):
        shape = _shape_on_device(layout, path, leaf)
        shards = math.prod(leaf.shape) // math.prod(shape)
        drawn = jax.random.normal(jax.random.fold_in(key, number), (shape[-1], rank_of(shape, optim.compress_rank)))
        basis[path] = jnp.broadcast_to(drawn, (shards, *drawn.shape)).astype(residual[path].dtype)
    return {"residual": nested(residual), "basis": nested(basis)}


@jax.named_scope("exchange")
def exchange(task: Task, layout: Layout, state: TrainState, sums: GradientSums, seed: jax.Array) -> GradientSums:
    """`sums` with gradients that are added up over the shards of the batch, and with what the exchange keeps now.

    The loss scale is taken out for the exchange: a residual is of the gradients themselves.

    Args:
      task: gives the settings of `optim`.
      layout: of the run, or of a pipeline stage.
      state: before the update.
      sums: gradients [n, ...], of each shard of the batch.
      seed: int32 [], of the run.
    """
    gradients, structure = by_path(sums.gradients), jax.tree.structure(sums.gradients)
    scale = functools.partial(scale_factor, state.loss_scale)
    gradients = {path: leaf / scale(leaf.dtype) for path, leaf in gradients.items()}
    held = {name: by_path(tree) for name, tree in (state.communication or {}).items()}
    residual, basis = held.get("residual", {}), held.get("basis", {})
    key = jax.random.fold_in(role_key(seed, COMPRESS), state.step)

    one = {path: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for path, leaf in gradients.items()}
    specs = {path: layout.place("computing", path, leaf.shape, leaf.dtype).spec for path, leaf in one.items()}
    compressed = [path for path, leaf in one.items() if _is_compressed(layout, task.optim, path, leaf)]
    exchanger = _Exchanger(task.optim, layout, specs, frozenset(compressed))
    places: Any = (
        {path: P(BATCH_AXES, *specs[path]) for path in gradients},
        {path: P(BATCH_AXES, *specs[path]) for path in residual},
        {path: P("tensor" if leaf.shape[0] > 1 else None) for path, leaf in basis.items()},
    )
    by_hand = {"mesh": layout.mesh, "check_vma": False}
    mapped = jax.shard_map(exchanger, in_specs=(*places, P(), P()), out_specs=(specs, *places[1:]), **by_hand)
    totals, residual, basis = mapped(gradients, residual, basis, key, state.step)
    totals = [totals[path] * scale(totals[path].dtype) for path in gradients]
    kept = {name: nested(leaves) for name, leaves in (("residual", residual), ("basis", basis)) if name in held}
    return dataclasses.replace(sums, gradients=structure.unflatten(totals), communication=kept or ())


@dataclasses.dataclass(frozen=True)
class _Exchanger:
    """What each device does, inside `jax.shard_map` over all axes.

    Attributes:
      optim: the config's section.
      layout: gives the reduction, and the size of the buckets.
      specs: of the gradients, without the dim of the shards.
      compressed: the paths of the leaves that are compressed. The others are sent whole.
    """

    optim: OptimConfig
    layout: Layout
    specs: dict[str, P]
    compressed: frozenset[str]

    def __call__(
        self, gradients: Leaves, residual: Leaves, basis: Leaves, key: jax.Array, step: jax.Array
    ) -> tuple[Leaves, Leaves, Leaves]:
        """The sums, the new residuals and the new bases; all but the sums with a first dim of 1, as they come."""
        mine = {path: leaf[0] for path, leaf in gradients.items()}
        held = {path: leaf[0] for path, leaf in residual.items()}, {path: leaf[0] for path, leaf in basis.items()}

        def compressing(mine: Leaves, residual: Leaves, basis: Leaves) -> tuple[Leaves, Leaves, Leaves]:
            return self._compress(mine, residual, basis, key)

        def whole(mine: Leaves, residual: Leaves, basis: Leaves) -> tuple[Leaves, Leaves, Leaves]:
            return self._add_up(mine), residual, basis

        if self.optim.compress_warmup:
            found = jax.lax.cond(step < self.optim.compress_warmup, whole, compressing, mine, *held)
        else:
            found = compressing(mine, *held)
        sums, *held = found
        residual, basis = ({path: leaf[None] for path, leaf in leaves.items()} for leaves in held)
        return sums, residual, basis

    def _compress(self, mine: Leaves, residual: Leaves, basis: Leaves, key: jax.Array) -> tuple[Leaves, Leaves, Leaves]:
        optim, bucket_bytes = self.optim, self.layout.config.bucket_bytes
        small = {path: leaf for path, leaf in mine.items() if path in self.compressed}
        sums = self._add_up({path: leaf for path, leaf in mine.items() if path not in self.compressed})
        if not small:
            return sums, residual, basis
        if optim.compress in ROUNDING:
            return sums | self._round(small, key), residual, basis
        values = {path: residual[path] + leaf.astype(residual[path].dtype) for path, leaf in small.items()}
        if optim.compress == "topk":
            totals, sent = topk(values, optim.compress_ratio, BATCH_AXES, bucket_bytes)
        elif optim.compress == "randomk":
            totals, sent = randomk(values, optim.compress_ratio, key, self._add_up, bucket_bytes)
        else:
            totals, sent, basis = powersgd(values, basis, self._add_up)
        totals = unless_not_finite(totals, values, BATCH_AXES)
        totals = {path: leaf.astype(small[path].dtype) for path, leaf in totals.items()}
        return sums | totals, {path: values[path] - sent[path] for path in values}, basis

    def _add_up(self, leaves: Leaves) -> Leaves:
        """The sums, whole, by `layout.reduce`."""
        config = self.layout.config
        if config.reduce == "auto" or not leaves:
            return jax.lax.psum(leaves, BATCH_AXES)
        sums = reduce_leaves(list(leaves.values()), config.reduce, BATCH_AXES, config.bucket_bytes)
        return dict(zip(leaves, sums, strict=True))

    def _round(self, leaves: Leaves, key: jax.Array) -> Leaves:
        """What the tensor axis does not split must be rounded alike on all of its devices, so it is in buckets of its own."""
        sums = {}
        for split in (False, True):
            some = {path: leaf for path, leaf in leaves.items() if ("tensor" in self.specs[path]) == split}
            found = compressed_leaves(
                list(some.values()),
                self.optim.compress,
                BATCH_AXES,
                self.layout.config.bucket_bytes,
                jax.random.fold_in(key, split),
            )
            sums |= dict(zip(some, found, strict=True))
        return sums


def _is_compressed(layout: Layout, optim: OptimConfig, path: str, leaf: Any) -> bool:
    """Whether `optim.compress` shrinks a leaf enough to be worth it. leaf: the whole leaf, array or shape."""
    shape = _shape_on_device(layout, path, leaf)
    rate = compression_rate(optim.compress, shape, optim.compress_ratio, optim.compress_rank)
    return rate >= optim.compress_min_rate and rate > 1


def _shape_on_device(layout: Layout, path: str, leaf: Any) -> tuple[int, ...]:
    """The shape of a device's part of a leaf in computing: a device compresses what it has."""
    spec = layout.place("computing", path, leaf.shape, leaf.dtype).spec
    return tuple(size // (layout.mesh.shape[axis] if axis else 1) for size, axis in zip(leaf.shape, spec, strict=True))
