"""What a collective should take, by formulas. Everything that comes out of here is *modelled*.

A message of b bytes takes alpha + b / beta over a link of latency alpha and bandwidth beta (Hockney 1994). Among n devices,
for a result of S bytes on each device:

| collective | algorithm | hops | bytes that a device sends |
| -- | -- | -- | -- |
| all-reduce | ring: reduce-scatter, all-gather (Patarasuk and Yuan 2009) | 2 (n - 1) | 2 (n - 1) / n S |
| all-gather | ring (Thakur, Rabenseifner and Gropp 2005) | n - 1 | (n - 1) / n S |
| reduce-scatter | ring; S is the shard | n - 1 | (n - 1) S |
| all-to-all | pairwise exchange (Thakur et al. 2005) | n - 1 | (n - 1) / n S |
| collective-broadcast | pipelined chain: what limits is the first device, which sends all | n - 1 | S |
| collective-permute | each device to one other | 1 | S |

The bytes are those of nccl-tests' "bus bandwidth" (doc/PERFORMANCE.md). Additions cost nothing.
"""

from __future__ import annotations

from jaxtrain.host.links import Link


def collective_seconds(kind: str, size: float, inside: int, across: int, within: Link, between: Link) -> float:
    """Modelled seconds of one collective over `inside` devices of each of `across` hosts.

    Where both are above 1 it is done in turns, first within the hosts, then between them, then within them again. So an
    all-reduce is a reduce-scatter inside, an all-reduce across of 1 / inside of the bytes, and an all-gather inside. The
    reduce-scatter has the first two turns, the all-gather the last two. An all-to-all has nothing to save: it exchanges all
    bytes inside, then all across. Of a permutation the slowest pair decides. Turns do not overlap here; NCCL overlaps some.

    Args:
      kind: `all-reduce`, ..., as in the table above.
      size: bytes of its result on each device (`gpu_program.Collective.bytes`): of an all-gather the whole, of a
        reduce-scatter the shard.
      inside: devices of a host that take part.
      across: hosts that take part.
      within: the link between devices of a host.
      between: the link of each device to another host.

    Returns:
      Seconds; 0 for a single device.
    """
    if kind == "collective-permute" and across > 1:
        return _seconds(kind, size, across, between)
    near = size * across if kind == "reduce-scatter" else size
    far = size / inside if kind in ("all-reduce", "all-gather") else size
    return _seconds(kind, near, inside, within) + _seconds(kind, far, across, between)


def reduce_seconds(
    algorithm: str, size: float, data: int, replica: int, local: int, within: Link, between: Link
) -> float:
    """Modelled seconds of an all-reduce by `parallel.reduce`, over `replica` x `data` devices.

    A message waits for the slowest of those that are sent with it, which goes between hosts if any does.

    Args:
      algorithm: `ring`, `tree` or `hierarchical`.
      size: bytes of the sum.
      data: size of the axis `data`, the inner one.
      replica: size of the axis `replica`.
      local: how many neighbours among these devices a host has.
      within: the link between devices of a host.
      between: the link of each device to another host.
    """
    n = data * replica

    def link(reach: int) -> Link:
        return between if reach > local else within

    def ring(size: float, devices: int, reach: int) -> float:
        return 2 * (devices - 1) * (link(reach).latency + size / devices / link(reach).bandwidth)

    if algorithm == "ring":
        return ring(size, n, n)
    if algorithm == "hierarchical":
        return ring(size, data, data) + ring(size / data, replica, n)
    power = 1 << (n.bit_length() - 1)
    steps = [(2 * distance, size * distance / power) for distance in map((1).__lshift__, range(power.bit_length() - 1))]
    steps += [(n, size)] * (power < n)
    return sum(2 * (link(reach).latency + sent / link(reach).bandwidth) for reach, sent in steps)


def wire_bytes(kind: str, size: float, devices: int) -> float:
    """Bytes that each device sends in one collective with a result of `size` bytes (the table above)."""
    return _traffic(kind, size, devices)[1]


def _seconds(kind: str, size: float, devices: int, link: Link) -> float:
    hops, sent = _traffic(kind, size, devices)
    return hops * link.latency + sent / link.bandwidth


def _traffic(kind: str, size: float, devices: int) -> tuple[int, float]:
    """Hops, one after the other, and the bytes that each device sends in all of them."""
    steps = devices - 1
    hops, sent = {
        "all-reduce": (2 * steps, 2 * steps / devices * size),
        "all-gather": (steps, steps / devices * size),
        "reduce-scatter": (steps, steps * size),
        "all-to-all": (steps, steps / devices * size),
        "collective-broadcast": (steps, size),
        "collective-permute": (1, size),
    }[kind]
    return (hops, sent) if steps else (0, 0.0)
