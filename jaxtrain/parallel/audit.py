"""Compares what the layout asked for with what was built: bytes on the devices and collectives in the compiled programs."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from jaxtrain.errors import JaxtrainError
from jaxtrain.parallel.layout import Layout, Placement, bytes_per_device
from jaxtrain.parallel.mesh import batch_ways
from jaxtrain.trees import PyTree

_COLLECTIVE = re.compile(r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_REDUCING = ("all-reduce", "reduce-scatter")
_UPDATING = re.compile(r"(.*: )?(update|measure|judge|finish)")


class AuditError(JaxtrainError):
    """A layout setting that should have had an effect had none, or a leaf lies elsewhere than the table says."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """bytes_per_device: by tree, read from the devices. collectives: how many of each kind are in each program."""

    bytes_per_device: Mapping[str, int]
    collectives: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]


def audit(layout: Layout, table: Mapping[str, list[Placement]], state: PyTree, step: Any) -> Audit:
    """Raises `AuditError` with the setting's or the leaf's name; what cannot have an effect here becomes a note.

    table: `Layout.table(state)` and the gradient accumulator's placements under "gradients". state: the arrays.
    step: the compiled step (`jaxtrain.step.train_step.MeshTrainStep`, or the pipeline's).
    """
    trees = {f.name: jax.tree.leaves(getattr(state, f.name)) for f in dataclasses.fields(state)}
    held = {name: _check_tree(name, leaves, table[name]) for name, leaves in trees.items()}
    programs, after = step.programs, step.after
    for name in trees:
        _check_shardings(layout, f"{name} after a step", getattr(after, name), table[name])
    if step.accumulator is not None:
        _check_shardings(layout, "gradients", step.accumulator, table["gradients"])
        held["gradients"] = bytes_per_device(table["gradients"])
    collectives = {
        name: collections.Counter(count_collectives(program.as_text() or "")) for name, program in programs.items()
    }
    every = sum(collectives.values(), collections.Counter())
    gradients = sum(
        (found for name, found in collectives.items() if not _UPDATING.fullmatch(name)), collections.Counter()
    )
    shape, zero, notes = layout.mesh.shape, layout.config.zero, []

    if batch_ways(layout.mesh) > 1 and not any(every[kind] for kind in _REDUCING):
        raise AuditError(
            f"layout.replica={shape['replica']}, layout.data={shape['data']}: no program reduces the gradients."
        )
    if shape["tensor"] > 1 and not gradients:
        raise AuditError(f"layout.tensor={shape['tensor']} had no effect: the gradient program has no collective.")
    if zero and shape["data"] == 1:
        notes.append(f"layout.zero={zero} has nothing to shard over: layout.data=1.")
    elif zero:
        for tree, least in (("opt_state", 1), ("gradients", 2), ("params", 3)):
            sharded = any("data" in leaf.spec for leaf in table[tree])
            if zero >= least and table[tree] and not sharded and any(math.prod(leaf.shape) > 1 for leaf in table[tree]):
                raise AuditError(
                    f"layout.zero={zero} had no effect on {tree}: no leaf divides by data={shape['data']}."
                )
        if not every["all-gather"] and any("data" in leaf.spec for leaf in table["opt_state"]):
            raise AuditError(f"layout.zero={zero} had no effect: no program gathers what is sharded.")
        if not any("data" in leaf.spec for name in (*trees, "gradients") for leaf in table[name]):
            notes.append(
                f"layout.zero={zero} has nothing to shard: the optimizer keeps no state and there is no average."
            )
        if zero >= 2 and step.accumulator is None:
            same = "it acts as zero=1" if zero == 2 else "the gradients stay whole for the moment before the update"
            notes.append(
                f"layout.zero={zero} shards the gradient accumulator, and with microbatches=1 there is none: {same} "
                "(on a GPU, XLA may still turn all-reduce and slice into reduce-scatter)."
            )
    return Audit(held, collectives, tuple(notes))


def count_collectives(hlo: str) -> dict[str, int]:
    """How often each collective stands in an optimized HLO text."""
    return dict(collections.Counter(match[1] for match in _COLLECTIVE.finditer(hlo)))


def held_bytes(leaf: jax.Array) -> int:
    """The most bytes that one of this process's devices holds of `leaf`."""
    held = collections.Counter()
    for shard in leaf.addressable_shards:
        held[shard.device] += shard.data.nbytes
    return max(held.values(), default=0)


def _check_tree(name: str, leaves: list[jax.Array], places: list[Placement]) -> int:
    for leaf, place in zip(leaves, places, strict=True):
        if leaf.addressable_shards and held_bytes(leaf) != place.bytes_per_device:
            raise AuditError(
                f"{name}/{place.path} holds {held_bytes(leaf)} bytes per device; the layout's {place.spec} means "
                f"{place.bytes_per_device}."
            )
    return bytes_per_device(places)


def _check_shardings(layout: Layout, name: str, shardings: PyTree, places: list[Placement]) -> None:
    """Where a compiled program leaves its results."""
    for sharding, place in zip(jax.tree.leaves(shardings), places, strict=True):
        if not sharding.is_equivalent_to(layout.sharding(place.spec, place.stage), len(place.shape)):
            raise AuditError(f"{name}: {place.path} lies as {sharding}; the layout says {place.spec}.")
