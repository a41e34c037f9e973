"""The collectives of a compiled step by themselves: what its communication takes where nothing is computed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.host.backend import on_cpu
from jaxtrain.parallel.collective_cost import wire_bytes
from jaxtrain.parallel.gpu_program import Collective, read_program
from jaxtrain.parallel.mesh import AXES
from jaxtrain.training.compiled import CompiledRun

_ITEM = 4  # bytes of a number, f32


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A collective of a step.

    Attributes:
      kind: `all-reduce`, ...
      axes: of the mesh, that it goes over.
      times: how often a step runs it.
      arrays: bytes of each array of its result.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    arrays: tuple[int, ...]

    def sent(self, mesh: Mesh) -> float:
        """Bytes that a device sends in a step for it, in a ring."""
        members = math.prod(mesh.shape[axis] for axis in self.axes)
        return self.times * wire_bytes(self.kind, sum(self.arrays), members)

    def messages(self, mesh: Mesh) -> int:
        """One after the other in a step for it, in rings; on a CPU those of one array after those of another."""
        hops = math.prod(mesh.shape[axis] for axis in self.axes) - 1
        arrays = len(self.arrays) if on_cpu(mesh.devices.flat) else 1
        return self.times * arrays * hops * (2 if self.kind == "all-reduce" else 1)


def traffic_of(compiled: CompiledRun) -> list[Traffic]:
    """The collectives of one step without pipeline stages, as the compiled programs have them, in their order."""
    mesh, microbatches = compiled.run.layout.mesh, compiled.run.layout.config.microbatches
    found = []
    for name, program in compiled.step.programs.items():
        if name == "call":  # several steps; they are measured one by one
            continue
        calls = microbatches if name == "gradients" else 1
        for each in read_program(str(program.as_text()), mesh).collectives:
            found.append(_traffic(each, calls))
    return [each for each in found if math.prod(mesh.shape[axis] for axis in each.axes) > 1]


def _traffic(collective: Collective, calls: int) -> Traffic:
    return Traffic(collective.kind, collective.axes, collective.times * calls, collective.arrays)


class Replay:
    """Programs of the collectives alone. Of several processes each makes one, and calls it as often."""

    def __init__(self, traffic: list[Traffic], mesh: Mesh):
        """Compiles them, and runs each once."""
        self._cpu = on_cpu(mesh.devices.flat)
        made: Mapping[Traffic, Any] = {}
        for each in dict.fromkeys(traffic):
            made |= {each: _program(each, mesh)}
        self._calls = [(made[each], each.times) for each in traffic]
        self.seconds()

    def seconds(self) -> float:
        """Seconds of one step's collectives, one after the other; on a CPU each is waited for, as in `bench comm`."""
        began = time.perf_counter()
        results: Any = ()
        for (compiled, arguments), times in self._calls:
            for _ in range(times):
                results = compiled(*arguments)
                if self._cpu:
                    jax.block_until_ready(results)
        jax.block_until_ready(results)
        return time.perf_counter() - began


def _program(traffic: Traffic, mesh: Mesh) -> tuple[Any, list[jax.Array]]:
    """The compiled collective, and its arguments: f32 [devices, k], a row a device."""
    members = math.prod(mesh.shape[axis] for axis in traffic.axes)
    sharding = NamedSharding(mesh, P(AXES))

    def collective(*rows: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(row[None] for row in _call(traffic, members, [row[0] for row in rows]))

    def argument(size: int) -> jax.Array:
        shape = (mesh.size, _numbers(traffic.kind, size, members))
        return jax.make_array_from_callback(shape, sharding, lambda index: np.ones((1, shape[1]), np.float32))

    arguments = [argument(size) for size in traffic.arrays]
    specs = (P(AXES),) * len(arguments)
    program = jax.jit(jax.shard_map(collective, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))
    return program.lower(*arguments).compile(), arguments


def _numbers(kind: str, size: int, members: int) -> int:
    """How many f32 numbers a device gives for a result of `size` bytes."""
    result = max(math.ceil(size / _ITEM), 1)
    if kind == "all-gather":
        return max(result // members, 1)
    if kind == "reduce-scatter":
        return result * members
    return math.ceil(result / members) * members if kind == "all-to-all" else result


def _call(traffic: Traffic, members: int, rows: list[jax.Array]) -> Iterator[jax.Array]:
    """The results, from the rows of one device."""
    axes = traffic.axes
    if traffic.kind == "all-reduce":
        yield from jax.lax.psum(rows, axes)
        return
    for row in rows:
        if traffic.kind == "all-gather":
            yield jax.lax.all_gather(row, axes, tiled=True)
        elif traffic.kind == "reduce-scatter":
            yield jax.lax.psum_scatter(row, axes, tiled=True)
        elif traffic.kind == "all-to-all":
            yield jax.lax.all_to_all(row, axes, 0, 0, tiled=True)
        else:  # collective-permute, collective-broadcast: each device to its neighbour
            yield jax.lax.ppermute(row, axes, [(i, (i + 1) % members) for i in range(members)])
