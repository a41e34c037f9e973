"""An all-reduce whose result is known: finds devices, links, drivers and builds of jax that add wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.errors import EnvironmentMismatchError

START_NUMBERS = 1 << 20  # f32 numbers of each device in the test of a run's start: 4 MiB


def all_reduce(devices: Sequence[Any], numbers: int) -> np.ndarray:
    """Adds a row of known numbers of each device. Of several processes each must call it.

    Args:
      devices: of all processes, in the same order on each.
      numbers: how many numbers a device has.

    Returns:
      The sums, f32 [this process's devices, numbers]: one row a device, in the order of `devices`.
    """
    mesh = Mesh(np.asarray(devices), ("all",))
    sharding = NamedSharding(mesh, P("all"))

    def row_of(index: Any) -> np.ndarray:
        device = index[0].start or 0
        return _factors(len(devices))[device : device + 1, None] * _ramp(numbers)

    rows = jax.make_array_from_callback((len(devices), numbers), sharding, row_of)
    add = jax.shard_map(lambda row: jax.lax.psum(row, "all"), mesh=mesh, in_specs=P("all"), out_specs=P("all"))
    shards = sorted(jax.jit(add)(rows).addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def exact_sums(devices: int, numbers: int) -> np.ndarray:
    """What every device must have after `all_reduce` over so many devices, f32 [numbers]."""
    return _factors(devices).sum() * _ramp(numbers)


def _ramp(numbers: int) -> np.ndarray:
    return np.arange(numbers, dtype=np.float32) % 251


def _factors(devices: int) -> np.ndarray:
    """f32 [devices]: neighbours differ. They are small, so that f32 holds the sums of thousands of devices exactly."""
    return 1 + np.arange(devices, dtype=np.float32) % 8


@dataclasses.dataclass(frozen=True)
class WrongSums:
    """How many sums are wrong, and the first of them: on which device (a row), what it is, and what it must be."""

    count: int
    device: int
    value: float
    exact: float


def wrong_sums(sums: np.ndarray, devices: int) -> WrongSums | None:
    """Compares what `all_reduce` returned, over so many devices, with `exact_sums`; None where all are right."""
    exact = exact_sums(devices, sums.shape[1])
    wrong = np.argwhere(sums != exact)
    if not len(wrong):
        return None
    device, number = map(int, wrong[0])
    return WrongSums(len(wrong), device, float(sums[device, number]), float(exact[number]))


def check_all_devices() -> None:
    """Tests the all-reduce over the devices of all processes. Raises `EnvironmentMismatchError` where a sum is wrong.

    The step uses the all-reduce too. (gloo's reduce-scatter, which it does not use, returns wrong numbers for some arrays of
    16 MiB and more: jax issue 40830.)
    """
    count = jax.device_count()
    sums = all_reduce(jax.devices(), START_NUMBERS)
    if (wrong := wrong_sums(sums, count)) is not None:
        raise EnvironmentMismatchError(
            f"The start-up self-test failed on process {jax.process_index()}: an all-reduce over {count} devices gave "
            f"{wrong.count} wrong numbers of {sums.size}, the first {wrong.value:g} for {wrong.exact:g}. Do not train with "
            "this network or build of jax."
        )
