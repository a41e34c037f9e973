"""Checks that the layout's settings had an effect.

Compares what the layout says with what was built: the bytes on the devices, where the compiled programs leave their
results, and their collectives.
"""

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
from jaxtrain.parallel.reduce import messages
from jaxtrain.trees import PyTree

_COLLECTIVE = re.compile(r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_REDUCING = ("all-reduce", "reduce-scatter")
_EXCHANGES = {"bf16": ("all-to-all", "all-gather"), "int8": ("all-to-all", "all-gather"), "topk": ("all-gather",)}
_UPDATE_PROGRAMS = re.compile(r"(.*: )?(update|measure|decide|finish)")  # the others compute gradients


class AuditError(JaxtrainError):
    """A layout setting had no effect where it should have one, a leaf is not where the table says, or other bytes are sent."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was built.

    Attributes:
      bytes_per_device: of each tree, by name; read from the devices.
      collectives: how many collectives of each kind each program has, by the program's name and the kind.
      notes: a sentence for each setting that cannot have an effect here.
    """

    bytes_per_device: Mapping[str, int]
    collectives: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]


def audit(layout: Layout, table: Mapping[str, list[Placement]], state: PyTree, step: Any) -> Audit:
    """Compares the state's arrays and the compiled step with the layout.

    Args:
      layout: of the run.
      table: `Layout.table(state)`, and the placements of the gradient accumulator under "gradients".
      state: the arrays of the state.
      step: the compiled step: `jaxtrain.step.train_step.MeshTrainStep`, or the pipeline's.

    Raises:
      AuditError: a setting had no effect, or a leaf is not where it should be. The message names it. A setting that
        cannot have an effect here only gives a note.
    """
    trees = {f.name: jax.tree.leaves(getattr(state, f.name)) for f in dataclasses.fields(state)}
    held = {name: _check_tree(name, leaves, table[name]) for name, leaves in trees.items()}
    if step.accumulator is not None:
        held["gradients"] = bytes_per_device(table["gradients"])
    return Audit(held, *audit_programs(layout, table, step))


def audit_programs(
    layout: Layout, table: Mapping[str, list[Placement]], step: Any
) -> tuple[dict[str, collections.Counter[str]], tuple[str, ...]]:
    """The part of `audit` that needs no arrays: the `collectives` and `notes` of `Audit`.

    Args:
      layout: of the run.
      table: as of `audit`.
      step: the compiled step.

    Raises:
      AuditError: as `audit` does.
    """
    programs, after = step.programs, step.after
    for field in dataclasses.fields(after):
        _check_shardings(layout, f"{field.name} after a step", getattr(after, field.name), table[field.name])
    if step.accumulator is not None:
        _check_shardings(layout, "gradients", step.accumulator, table["gradients"])
    collectives = {
        name: collections.Counter(count_collectives(program.as_text() or "")) for name, program in programs.items()
    }
    _check_reductions(layout, collectives)
    return collectives, tuple(_check_zero(layout, table, collectives, step.accumulator is not None))


def _check_reductions(layout: Layout, collectives: Mapping[str, collections.Counter[str]]) -> None:
    """Data and tensor parallelism need collectives. Raises `AuditError` where there are none."""
    shape, total = layout.mesh.shape, sum(collectives.values(), collections.Counter())
    gradients = sum(
        (counts for name, counts in collectives.items() if not _UPDATE_PROGRAMS.fullmatch(name)), collections.Counter()
    )
    if batch_ways(layout.mesh) > 1 and not any(total[kind] for kind in _REDUCING):
        raise AuditError(
            f"layout.replica={shape['replica']}, layout.data={shape['data']}: no program reduces the gradients."
        )
    if layout.accumulates_by_device:
        wanted = _EXCHANGES.get(layout.compress, ())
        if missing := [kind for kind in wanted if not total[kind]]:
            raise AuditError(f"optim.compress={layout.compress} had no effect: no program has an {missing[0]}.")
    elif layout.by_device:
        wanted = messages(layout.config.reduce, shape["data"], shape["replica"])
        if gradients["collective-permute"] < wanted:
            raise AuditError(
                f"layout.reduce={layout.config.reduce} had no effect: the gradient programs have "
                f"{gradients['collective-permute']} messages (collective-permute), and one bucket needs {wanted}."
            )
    if shape["tensor"] > 1 and not gradients:
        raise AuditError(f"layout.tensor={shape['tensor']} had no effect: the gradient program has no collective.")


def _check_zero(
    layout: Layout,
    table: Mapping[str, list[Placement]],
    collectives: Mapping[str, collections.Counter[str]],
    has_accumulator: bool,
) -> list[str]:
    """Notes on what `layout.zero` cannot shard here. Raises `AuditError` where it should shard something and does not."""
    zero, data, notes = layout.config.zero, layout.mesh.shape["data"], []
    if not zero:
        return notes
    if data == 1:
        return [f"layout.zero={zero} has nothing to shard over: layout.data=1."]
    sharded = {tree for tree, leaves in table.items() if any("data" in leaf.spec for leaf in leaves)}
    for tree in ("opt_state", "gradients", "params"):
        if layout.shards(tree) and tree not in sharded and any(math.prod(leaf.shape) > 1 for leaf in table[tree]):
            raise AuditError(f"layout.zero={zero} had no effect on {tree}: no leaf divides by data={data}.")
    if (
        "opt_state" in sharded
        and not layout.trains_by_device
        and not any(counts["all-gather"] for counts in collectives.values())
    ):
        raise AuditError(f"layout.zero={zero} had no effect: no program gathers what is sharded.")
    if not sharded:
        notes.append(f"layout.zero={zero} has nothing to shard: the optimizer keeps no state and there is no average.")
    if layout.shards("gradients") and not has_accumulator:
        same = "it acts as zero=1" if zero == 2 else "the gradients stay whole for the moment before the update"
        notes.append(
            f"layout.zero={zero} shards the gradient accumulator, and with microbatches=1 there is none: {same} "
            "(on a GPU, XLA may still turn all-reduce and slice into reduce-scatter)."
        )
    return notes


def count_collectives(hlo: str) -> dict[str, int]:
    """How often each kind of collective occurs in an optimized HLO text, by its name."""
    return dict(collections.Counter(match[1] for match in _COLLECTIVE.finditer(hlo)))


def held_bytes(leaf: jax.Array) -> int:
    """Bytes of `leaf` on the device of this process that holds the most of it."""
    held = collections.Counter()
    for shard in leaf.addressable_shards:
        held[shard.device] += shard.data.nbytes
    return max(held.values(), default=0)


def _check_tree(name: str, leaves: list[jax.Array], placements: list[Placement]) -> int:
    """The bytes per device of the tree `name`. Raises `AuditError` where a leaf takes more or fewer than the table says."""
    for leaf, placement in zip(leaves, placements, strict=True):
        if leaf.addressable_shards and held_bytes(leaf) != placement.bytes_per_device:
            raise AuditError(
                f"{name}/{placement.path} holds {held_bytes(leaf)} bytes per device; the layout's {placement.spec} means "
                f"{placement.bytes_per_device}."
            )
    return bytes_per_device(placements)


def _check_shardings(layout: Layout, name: str, shardings: PyTree, placements: list[Placement]) -> None:
    """Raises `AuditError` where a compiled program leaves a result elsewhere than the table says."""
    for sharding, placement in zip(jax.tree.leaves(shardings), placements, strict=True):
        if not sharding.is_equivalent_to(layout.sharding(placement.spec, placement.stage), len(placement.shape)):
            raise AuditError(f"{name}: {placement.path} lies as {sharding}; the layout says {placement.spec}.")
