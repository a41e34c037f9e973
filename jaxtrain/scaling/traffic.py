"""The collectives of a compiled step: how many messages and bytes a device sends in it."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import Mesh

from jaxtrain.host.backend import on_cpu
from jaxtrain.parallel.collective_cost import wire_bytes
from jaxtrain.parallel.gpu_program import Collective, read_program
from jaxtrain.training.compiled import CompiledRun


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
