"""The one device mesh: axes `stage`, `replica`, `data`, `tensor`."""

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
    """Sizes of `AXES`. `data=-1` fills the devices. Raises `ConfigError` unless their product is `num_devices`."""
    fixed = config.stages * config.replica * config.tensor
    data = config.data if config.data > 0 else max(num_devices // fixed, 1)
    if fixed * data == num_devices:
        return (config.stages, config.replica, data, config.tensor)
    found = f"layout.replica={config.replica} x layout.data={config.data} x layout.tensor={config.tensor}"
    names = "replica and tensor"
    if config.stages > 1:
        found, names = f"layout.stages={config.stages} x {found}", f"stages, {names}"
    if num_devices % fixed == 0:
        fix = f"use --config.layout.data={num_devices // fixed}" + (
            f" or --devices {fixed * data}" if fixed * data < num_devices else ""
        )
    else:
        product = _nearest_divisors(fixed, num_devices)
        fix = f"the nearest products of {names} that divide {num_devices} are {' and '.join(map(str, product))}"
    raise ConfigError(f"config.{found} needs {fixed * data} devices but the run has {num_devices}; {fix}.")


def _nearest_divisors(value: int, total: int) -> list[int]:
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below, above = [d for d in divisors if d < value], [d for d in divisors if d > value]
    return below[-1:] + above[:1]


def make_mesh(config: LayoutConfig, devices: Sequence[Device]) -> Mesh:
    """The mesh over `devices`, in their order: `tensor` neighbours are next to each other, then `data`, then `replica`.

    Pipeline stages take their devices as `stage_placement` says: `spread` gives each stage the same share of every
    process, where that divides, so that activations stay in their process; else a stage takes neighbouring devices.
    """
    shape = mesh_shape(config, len(devices))
    if config.stages > 1 and config.stage_placement == "spread":
        devices = _spread(devices, config.stages)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _spread(devices: Sequence[Device], stages: int) -> list[Device]:
    """`devices` reordered so that every stage has a part of each process; as they are where that does not divide."""
    by_process: dict[int, list[Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    if any(len(own) % stages for own in by_process.values()):
        return list(devices)
    parts = [np.array(own).reshape(stages, -1) for own in by_process.values()]
    return [device for stage in range(stages) for part in parts for device in part[stage]]


def stage_mesh(mesh: Mesh, stage: int) -> Mesh:
    """The devices of one stage, as a mesh with the same axes. A mesh of one stage is its own."""
    if mesh.shape["stage"] == 1:
        return mesh
    return Mesh(mesh.devices[stage : stage + 1], AXES, axis_types=mesh.axis_types)


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
