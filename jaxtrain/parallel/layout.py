"""The layout: a sharding for every leaf of the state, decided in one table (`Layout.table`).

A leaf has two PartitionSpecs. *Computing*: what the tensor-parallel rules say. The forward and backward pass see
parameters and gradients this way. *Storing*: the same, with the `data` axis added to one more dim. Only the trees that
ZeRO shards have that (Rajbhandari 2020):

    zero   optimizer state, EMA   gradient accumulator   parameters at rest
    0      whole                  whole                  whole
    1      data                   whole                  whole
    2      data                   data                   whole
    3      data                   data                   data

With pipeline stages, a leaf of a layer lives only on the devices of that layer's stage. What belongs to no layer (the
step, an optimizer's counts, the loss scale) lives on all devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config import LayoutConfig, are_listed, nearest_multiples
from jaxtrain.errors import ConfigError
from jaxtrain.parallel.mesh import BATCH_AXES, batch_ways, stage_mesh
from jaxtrain.trees import PyTree, path_of

Rule = tuple[str, tuple[str | None, ...]]

# From which `zero` on a tree carries the data axis. Trees that are not named here are never sharded over it.
ZERO_FROM: Mapping[str, int] = {"opt_state": 1, "ema": 1, "gradients": 2, "params": 3}

# Where ZeRO should shard a leaf and cannot, the leaf is reported by name from this size on.
LARGE_LEAF_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one leaf lives: one row of the table.

    Attributes:
      path: in its tree, such as 'layers_03/attn/qkv/kernel'.
      shape: of the whole leaf.
      dtype: its name.
      spec: the PartitionSpec at rest.
      compute_spec: the PartitionSpec in the forward and backward pass.
      bytes_total: of the whole leaf.
      bytes_per_device: of one device's shard at rest.
      stage: the coordinate on the mesh axis `stage`, or `None` for what every stage has.
      note: why a rule or ZeRO left the leaf whole, or "".
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    compute_spec: P
    bytes_total: int
    bytes_per_device: int
    stage: int | None = 0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place leaves on it.

    Attributes:
      mesh: the devices.
      config: `Config.layout`, with no field left to be chosen.
      rules: pairs of a regex over a leaf's path and an axis or `None` for each dim. The user's come first, then the
        model's. The first match wins.
      chunks: the names of the layers ('layers_03', ...) in each chunk of the model; chunk k lives on stage k % stages.
        () without pipeline stages.
      compress: `optim.compress`, how gradients are compressed when they are added up.
      sync_every: `optim.sync_every`, how many steps a shard of the batch trains its own weights.
    """

    mesh: Mesh
    config: LayoutConfig
    rules: tuple[Rule, ...] = ()
    chunks: tuple[tuple[str, ...], ...] = ()
    compress: str = "none"
    sync_every: int = 1

    # -------------------------------------------------------------------------------------------------- single leaves

    def place(self, tree: str, path: str, shape: tuple[int, ...], dtype: Any) -> Placement:
        """The placement of one leaf.

        Args:
          tree: which tree of the state it is in: `params`, `opt_state`, `gradients`, ...
          path: of the leaf in that tree.
          shape: of the whole leaf.
          dtype: of the leaf.

        Raises:
          ConfigError: the rule for this path has another number of dims.
        """
        compute, note = self._tensor_spec(path, shape)
        spec = compute
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        if self.shards(tree):
            spec = self._with_data(path, compute, shape)
            if spec == compute and size >= LARGE_LEAF_BYTES:
                note = f"no dim divides by data={self.mesh.shape['data']}: kept whole"
        return Placement(
            path, shape, str(dtype), P(*spec), P(*compute), size, size // self._ways(spec), self._stage(path), note
        )

    def place_by_device(self, path: str, shape: tuple[int, ...], dtype: Any) -> Placement:
        """The placement of a leaf that each of the n shards of the batch has for itself: [n, ...], as in computing.

        Args:
          path: of the leaf that it mirrors.
          shape: of one of the n.
          dtype: of the leaf.
        """
        one, ways = self.place("computing", path, shape, dtype), batch_ways(self.mesh)
        spec = P(BATCH_AXES, *one.spec)
        return dataclasses.replace(
            one, shape=(ways, *shape), spec=spec, compute_spec=spec, bytes_total=one.bytes_total * ways
        )

    def shards(self, tree: str) -> bool:
        """Whether ZeRO shards the tree over the `data` axis. An axis of one device has nothing to shard.

        Nor has an accumulator that each shard of the batch has for itself.
        """
        if tree == "gradients" and self.accumulates_by_device:
            return False
        return self.config.zero >= ZERO_FROM.get(tree, 99) and self.mesh.shape["data"] > 1

    @property
    def gathers_params(self) -> bool:
        """Whether each layer gathers its parameters where it uses them, in the forward and in the backward pass (ZeRO-3).

        True on a `data` axis of one device too. There is nothing to gather there, but without the wrapper around its layers
        XLA rounds differently: the numbers of an fp16 run changed.
        """
        return self.config.zero >= ZERO_FROM["params"]

    @property
    def by_device(self) -> bool:
        """Whether a device computes its own examples alone; its gradients are then added up by `parallel.reduce`, or later."""
        return (self.config.reduce != "auto" and batch_ways(self.mesh) > 1) or self.accumulates_by_device

    @property
    def accumulates_by_device(self) -> bool:
        """Whether a device adds up its own microbatches' gradients alone: they are compressed once a step, or stay there."""
        return (self.compress != "none" or self.sync_every > 1) and batch_ways(self.mesh) > 1

    @property
    def trains_by_device(self) -> bool:
        """Whether each shard of the batch has weights of its own between two syncs."""
        return self.sync_every > 1 and batch_ways(self.mesh) > 1

    def _stage(self, path: str) -> int | None:
        """The stage of the layer that `path` belongs to; `None` for what belongs to no layer and lives on all stages."""
        if self.stages == 1:
            return 0
        return next((self.stage_of[name] for name in path.split("/") if name in self.stage_of), None)

    def _ways(self, spec: tuple[str | None, ...]) -> int:
        """How many shards `spec` makes."""
        return math.prod(self.mesh.shape[axis] for axis in spec if axis)

    def _rule(self, path: str) -> tuple[str | None, ...] | None:
        return next((spec for pattern, spec in self.rules if re.search(pattern, path)), None)

    def _tensor_spec(self, path: str, shape: tuple[int, ...]) -> tuple[tuple[str | None, ...], str]:
        """The PartitionSpec for computing, and a note where a rule could not be followed."""
        whole, ways = (None,) * len(shape), self.mesh.shape["tensor"]
        rule = self._rule(path) if shape else None  # an optimizer may keep a scalar for a parameter
        if rule is None:
            return whole, ""
        if len(rule) != len(shape):
            raise ConfigError(f"config.layout.rules: {rule} has {len(rule)} dims but {path} has shape {shape}.")
        if ways == 1:
            return whole, ""
        for dim, axis in enumerate(rule):
            if axis == "tensor" and shape[dim] % ways:
                return whole, f"{shape[dim]} does not divide by tensor={ways}: kept whole"
        return tuple(axis if axis == "tensor" else None for axis in rule), ""

    def _with_data(self, path: str, compute: tuple[str | None, ...], shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """Adds `data` to the dim that a rule names, or else to the largest dim that divides (of equal ones, the last)."""
        ways = self.mesh.shape["data"]
        free = [d for d in range(len(shape)) if compute[d] is None and shape[d] >= ways and shape[d] % ways == 0]
        if not free:
            return compute
        rule = self._rule(path) or ()
        named = [d for d in free if d < len(rule) and rule[d] == "data"]
        dim = named[0] if named else max(free, key=lambda d: (shape[d], d))
        return tuple("data" if d == dim else axis for d, axis in enumerate(compute))

    # ---------------------------------------------------------------------------------------------------------- trees

    def table(self, state: PyTree) -> dict[str, list[Placement]]:
        """The placements of every leaf of `state` (a dataclass of trees, of shapes or of arrays), by tree.

        A leaf of another tree that mirrors a parameter (a momentum, the EMA) is placed by that parameter's path and
        shape.

        Raises:
          ConfigError: a rule of the config matches no parameter, or `layout.tensor` splits none.
        """
        params = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
        trees = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        placements = {
            name: [
                self._place_like(params, name, path_of(path), leaf)
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            ]
            for name, tree in trees.items()
        }
        self._check_rules(placements["params"])
        return placements

    def gradients(self, params: PyTree) -> list[Placement]:
        """The placements of the gradient accumulator's leaves, in the order of the leaves of `params`."""
        place = self.place_by_device if self.accumulates_by_device else functools.partial(self.place, "gradients")
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return [place(path_of(path), leaf.shape, leaf.dtype) for path, leaf in leaves]

    def _place_like(self, params: dict[str, Any], tree: str, path: str, leaf: Any) -> Placement:
        """The placement of a leaf by the parameter that it mirrors: the one whose path its own ends with."""
        keys = path.split("/")
        suffixes = ["/".join(keys[i:]) for i in range(len(keys))]
        if tree == "communication":
            owner = next((s for s in suffixes if s in params), path)
            placement = _place_communication(self, keys[0], owner, leaf)
        else:
            owner = next((s for s in suffixes if s in params and params[s].shape == leaf.shape), path)
            placement = self.place(tree, owner, leaf.shape, leaf.dtype)
        return dataclasses.replace(placement, path=path)

    def _check_rules(self, params: list[Placement]) -> None:
        """Raises `ConfigError` for a rule of the config, or for tensor parallelism, without an effect on `params`."""
        for pattern, _ in self.config.rules:
            if not any(re.search(pattern, leaf.path) for leaf in params):
                raise ConfigError(
                    f"config.layout.rules: {pattern!r} matches no parameter; see `jaxtrain layout` for their paths."
                )
        ways = self.mesh.shape["tensor"]
        if ways > 1 and not any("tensor" in leaf.compute_spec for leaf in params):
            why = (
                "; ".join(f"{leaf.path}: {leaf.note}" for leaf in params if leaf.note)
                or "it has no rule for this model"
            )
            raise ConfigError(
                f"config.layout.tensor={ways} splits no layer ({why}); use tensor=1 or give config.layout.rules."
            )

    def shardings(self, state: PyTree) -> PyTree:
        """A tree like `state` with the `NamedSharding` at rest of every leaf."""
        table = self.table(state)
        trees = {}
        for field in dataclasses.fields(state):
            structure = jax.tree.structure(getattr(state, field.name))
            trees[field.name] = structure.unflatten(
                [self.sharding(leaf.spec, leaf.stage) for leaf in table[field.name]]
            )
        return dataclasses.replace(state, **trees)

    # ---------------------------------------------------------------------------------------------------------- devices

    def sharding(self, spec: P = P(), stage: int | None = None) -> NamedSharding:
        """A `NamedSharding` on one stage's devices, or on all devices if `stage` is `None`. Replicated without a spec."""
        return NamedSharding(self.mesh if stage is None else stage_mesh(self.mesh, stage), spec)

    @functools.cached_property
    def stage_of(self) -> dict[str, int]:
        """The stage of each layer, by the layer's name."""
        return {name: self.stage_of_chunk(k) for k, names in enumerate(self.chunks) for name in names}

    @property
    def stages(self) -> int:
        """How many pipeline stages there are."""
        return self.mesh.shape["stage"]

    def stage_of_chunk(self, chunk: int) -> int:
        """The stage that chunk number `chunk` of the model lives on."""
        return chunk % self.stages

    def on_stage(self, stage: int) -> Layout:
        """The layout of what lives on one stage: the same rules, on that stage's devices."""
        return dataclasses.replace(self, mesh=stage_mesh(self.mesh, stage), chunks=())

    @property
    def batch(self) -> NamedSharding:
        """Of arrays [microbatches, examples, ...]: every microbatch is split over `replica` and `data`."""
        return self.sharding(P(None, BATCH_AXES))

    @property
    def images(self) -> NamedSharding:
        """Of images [microbatches, examples, ...]: the same, on the first stage's devices, since no other stage needs them."""
        return self.sharding(P(None, BATCH_AXES), 0)

    @property
    def examples(self) -> NamedSharding:
        """Of arrays [examples, ...]: one microbatch, split over `replica` and `data`."""
        return self.sharding(P(BATCH_AXES))


def check_batch(layout: Layout, global_batch: int, bn_groups: int, has_batch_norm: bool) -> None:
    """Checks that the batch divides into microbatches, and these over the devices.

    Args:
      layout: of the run.
      global_batch: examples in a batch.
      bn_groups: BatchNorm groups in a batch.
      has_batch_norm: whether the model has BatchNorm layers. A microbatch must then hold whole groups.

    Raises:
      ConfigError: it does not divide.
    """
    microbatches, ways = layout.config.microbatches, batch_ways(layout.mesh)
    if global_batch % (microbatches * ways):
        raise ConfigError(
            f"config.data.global_batch={global_batch} does not divide by layout.microbatches={microbatches} x {ways} batch "
            f"shards (layout.replica={layout.mesh.shape['replica']} x layout.data={layout.mesh.shape['data']}); "
            f"the nearest that do {are_listed(nearest_multiples(global_batch, microbatches * ways))}."
        )
    if has_batch_norm and bn_groups % microbatches:
        raise ConfigError(
            f"config.model.bn_groups={bn_groups} does not divide by config.layout.microbatches={microbatches}, so a "
            f"microbatch would not hold whole BatchNorm groups; use --config.model.bn_groups={microbatches} (this changes "
            "the run's numbers) or --config.layout.microbatches=1."
        )


def _place_communication(layout: Layout, kind: str, owner: str, leaf: Any) -> Placement:
    """The placement of a leaf of `TrainState.communication`.

    Args:
      layout: of the run.
      kind: `local` and `residual`, which each shard of the batch has for itself; `basis`, which all have, [1, ...] or one for
        each device that the tensor axis splits the owner over; `outer`, which ZeRO shards as a state of the optimizer.
      owner: the path of the parameter that the leaf mirrors.
      leaf: array or shape.
    """
    if kind == "outer":
        return layout.place("opt_state", owner, leaf.shape, leaf.dtype)
    if kind != "basis":
        return layout.place_by_device(owner, leaf.shape[1:], leaf.dtype)
    spec, size = P("tensor" if leaf.shape[0] > 1 else None), math.prod(leaf.shape) * leaf.dtype.itemsize
    stage = layout.place("computing", owner, (), leaf.dtype).stage
    return Placement(owner, leaf.shape, str(leaf.dtype), spec, spec, size, size // leaf.shape[0], stage)


def over_steps(sharding: Any) -> NamedSharding:
    """The sharding of arrays with `sharding` that are stacked along a new first dim."""
    return NamedSharding(sharding.mesh, P(None, *sharding.spec))


def bytes_per_device(placements: list[Placement]) -> int:
    """Bytes of one tree on a device; with stages, on a device of the stage that holds the most."""
    stages = 1 + max((leaf.stage or 0 for leaf in placements), default=0)
    return max(bytes_by_stage(placements, stages).values())


def bytes_by_stage(placements: list[Placement], stages: int) -> dict[int, int]:
    """Bytes of one tree on a device, by stage; with what every stage has."""
    return {
        stage: sum(leaf.bytes_per_device for leaf in placements if leaf.stage in (None, stage))
        for stage in range(stages)
    }
