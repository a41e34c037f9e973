"""Compiles the program that adds up in one way, and counts the bytes that it sends against the formula."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.parallel.audit import AuditError
from jaxtrain.parallel.bench.methods import AXES, Method
from jaxtrain.parallel.collective_cost import wire_bytes
from jaxtrain.parallel.gpu_program import permuted_bytes, read_program
from jaxtrain.parallel.mesh import Device
from jaxtrain.parallel.topology import lowering_for


@dataclasses.dataclass(frozen=True)
class Case:
    """A sum to measure.

    Attributes:
      method: how it is added up.
      replica: size of the slow axis.
      data: size of the other one.
      numbers: f32 numbers on each device.
    """

    method: Method
    replica: int
    data: int
    numbers: int

    @property
    def bytes(self) -> int:
        """Of the sum."""
        return 4 * self.numbers

    @property
    def messages(self) -> int:
        """That follow one another."""
        return self.method.messages(self.replica, self.data)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled case.

    Attributes:
      case: what was compiled.
      compiled: x f32 [devices, k], a row a device -> the sum in each row.
      sharding: of x.
      sent: bytes that the busiest device sends, as counted in the program.
      collectives: how many of each (kind, bytes of the result).
    """

    case: Case
    compiled: Any
    sharding: NamedSharding
    sent: float
    collectives: dict[tuple[str, int], int]

    def figures(self) -> dict[str, Any]:
        """Plain values, by the names of `jaxtrain bench comm --csv`."""
        case = self.case
        return {
            "reduce": case.method.reduce,
            "compress": case.method.compress,
            "replica": case.replica,
            "data": case.data,
            "bytes": case.bytes,
            "messages": case.messages,
            "sent_bytes": round(self.sent),
            "collectives": described(self.collectives),
        }


def compile_case(case: Case, devices: Sequence[Device]) -> Program:
    """Compiles the program for the first `replica` x `data` of `devices`, which need not be there.

    Raises:
      AuditError: the program does not send what the formula says.
    """
    n = case.replica * case.data
    mesh = Mesh(np.array(devices[:n]).reshape(case.replica, case.data), AXES, axis_types=(AxisType.Auto,) * 2)

    def of_device(row: jax.Array) -> jax.Array:
        return case.method.add_up(row[0], jax.random.key(0))[None]

    sharding = NamedSharding(mesh, P(AXES))
    rows = jax.ShapeDtypeStruct((n, case.numbers), jnp.float32, sharding=sharding)
    add_up = jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False))
    with lowering_for(devices[0]):
        compiled = add_up.lower(rows).compile()
    sent, collectives = sent_by(str(compiled.as_text()), mesh)
    wanted = case.method.wire(case.numbers, case.replica, case.data)
    if not math.isclose(sent, wanted):
        raise AuditError(
            f"The program of {case.method.name} over {case.replica} x {case.data} devices sends {sent:,.0f} bytes a device and "
            f"should send {wanted:,.0f}; its collectives are {described(collectives)}. This version of XLA made others of them."
        )
    return Program(case, compiled, sharding, sent, collectives)


def sent_by(hlo: str, mesh: Mesh) -> tuple[float, dict[tuple[str, int], int]]:
    """The bytes that the busiest device sends in one call, and how many collectives there are of each (kind, bytes).

    Messages between pairs of devices are counted device by device, other collectives as rings.

    Args:
      hlo: the text of `Compiled.as_text()`.
      mesh: of the program.
    """
    sent = float(max(permuted_bytes(hlo).values(), default=0))
    found: collections.Counter[tuple[str, int]] = collections.Counter()
    for each in read_program(hlo, mesh).collectives:
        found[each.kind, each.bytes] += each.times
        if each.kind != "collective-permute":
            members = math.prod(mesh.shape[axis] for axis in each.axes)
            sent += each.times * wire_bytes(each.kind, each.bytes, members)
    return sent, dict(found)


def described(collectives: dict[tuple[str, int], int]) -> str:
    """Such as "14 x collective-permute of 131,072 B"."""
    return ", ".join(f"{count} x {kind} of {size:,} B" for (kind, size), count in collectives.items()) or "none"
