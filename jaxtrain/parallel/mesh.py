"""The device mesh, with the axes `stage`, `replica`, `data` and `tensor`.

`stage`: pipeline stages. `replica`: copies of the state (data parallel). `data`: data parallel, and ZeRO shards the
state over it. `tensor`: tensor parallel.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from jaxtrain.config import LayoutConfig
from jaxtrain.errors import ConfigError

AXES = ("stage", "replica", "data", "tensor")
BATCH_AXES = ("replica", "data")

Device = Any  # jax.Device, which type checkers take for a variable


def mesh_shape(config: LayoutConfig, num_devices: int) -> tuple[int, int, int, int]:
    """The sizes of `AXES`. `data=-1` takes all devices that are left.

    Raises:
      ConfigError: their product is not `num_devices`.
    """
    fixed = config.stages * config.replica * config.tensor
    data = config.data if config.data > 0 else max(num_devices // fixed, 1)
    if fixed * data == num_devices:
        return (config.stages, config.replica, data, config.tensor)
    asked = f"layout.replica={config.replica} x layout.data={config.data} x layout.tensor={config.tensor}"
    names = "replica and tensor"
    if config.stages > 1:
        asked, names = f"layout.stages={config.stages} x {asked}", f"stages, {names}"
    if num_devices % fixed == 0:
        fix = f"use --config.layout.data={num_devices // fixed}" + (
            f" or --devices {fixed * data}" if fixed * data < num_devices else ""
        )
    else:
        product = _nearest_divisors(fixed, num_devices)
        fix = f"the nearest products of {names} that divide {num_devices} are {' and '.join(map(str, product))}"
    raise ConfigError(f"config.{asked} needs {fixed * data} devices but the run has {num_devices}; {fix}.")


def _nearest_divisors(value: int, total: int) -> list[int]:
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below, above = [d for d in divisors if d < value], [d for d in divisors if d > value]
    return below[-1:] + above[:1]


def make_mesh(config: LayoutConfig, devices: Sequence[Device]) -> Mesh:
    """The mesh over `devices`, in their order: neighbours on `tensor` are next to each other, then `data`, then `replica`.

    `config.stage_placement` decides which devices a pipeline stage has. `spread`: the same share of each process, if
    that divides, so that activations stay within a process. Otherwise neighbouring devices.

    Raises:
      ConfigError: the axes do not fit the number of devices.
    """
    shape = mesh_shape(config, len(devices))
    if config.stages > 1 and config.stage_placement == "spread":
        devices = _spread(devices, config.stages)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _spread(devices: Sequence[Device], stages: int) -> list[Device]:
    """`devices`, reordered so that every stage has devices of each process; in their old order if that does not divide."""
    by_process: dict[int, list[Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    if any(len(local) % stages for local in by_process.values()):
        return list(devices)
    by_stage = [np.array(local).reshape(stages, -1) for local in by_process.values()]
    return [device for stage in range(stages) for local in by_stage for device in local[stage]]


def stage_mesh(mesh: Mesh, stage: int) -> Mesh:
    """The devices of one stage, as a mesh with the same axes. A mesh with one stage is returned as it is."""
    if mesh.shape["stage"] == 1:
        return mesh
    return Mesh(mesh.devices[stage : stage + 1], AXES, axis_types=mesh.axis_types)


def batch_ways(mesh: Mesh) -> int:
    """How many shards the batch is split into: one for each coordinate on `replica` and `data`."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
