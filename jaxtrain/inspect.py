"""Describes a run without training it: shapes, placements, bytes. Reads no data that is not there."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jaxtrain.config import Config
from jaxtrain.data import sources
from jaxtrain.data.sources import Dataset
from jaxtrain.engine import layout_table
from jaxtrain.parallel.layout import bytes_per_device
from jaxtrain.run import decide, make_run, select_devices, settings


@dataclasses.dataclass(frozen=True)
class _Outline:
    """A source of known size whose examples are not there."""

    count: int
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise LookupError(f"an outline has no examples (asked for {len(indices)})")


def _outline(config: Config) -> Dataset:
    """The data set's sizes: of CIFAR without its files, of others by loading them."""
    classes = {"cifar10": 10, "cifar100": 100}.get(config.data.name)
    if classes is None:
        return sources.load(config.data, image_size=config.data.image_size)
    held_out = round(50_000 * config.data.validation)
    train = min(config.data.examples or 50_000, 50_000 - held_out)
    names = tuple(map(str, range(classes)))
    return Dataset(
        name=config.data.name,
        train=_Outline(train, (32, 32, 3)),
        validation=_Outline(held_out, (32, 32, 3)),
        test=_Outline(10_000, (32, 32, 3)),
        num_classes=classes,
        class_names=names,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        fingerprint="outline",
    )


def describe_layout(config: Config, num_devices: int = 0) -> dict[str, Any]:
    """The sharding table as plain values.

    Returns:
      `parameters` (their number), `mesh` (size of each axis), `bytes_per_device` (by tree), and `leaves`: for each `tree`,
      `path` (with the tree in front), `shape`, `dtype`, `spec` (axis or None for each dim; a list where a dim has several),
      `stage`, `bytes_per_device`, `note`.
    """
    devices = select_devices(num_devices)
    config = decide(config, None, devices)
    with settings(config):
        run = make_run(config, _outline(config), devices)
        table = layout_table(run.layout, jax.eval_shape(run.init))
    leaves = [
        {
            "tree": tree,
            "path": f"{tree}/{leaf.path}".rstrip("/"),
            "shape": list(leaf.shape),
            "dtype": leaf.dtype,
            "spec": [*leaf.spec, *[None] * (len(leaf.shape) - len(leaf.spec))],
            "stage": leaf.stage,
            "bytes_per_device": leaf.bytes_per_device,
            "note": leaf.note,
        }
        for tree, placements in table.items()
        for leaf in placements
    ]
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in table["params"]),
        "mesh": dict(run.layout.mesh.shape),
        "bytes_per_device": {tree: bytes_per_device(placements) for tree, placements in table.items()},
        "leaves": leaves,
    }
