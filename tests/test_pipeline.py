"""Pipeline stages: the same numbers as one device, and each stage's part on its own devices alone."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import parity
import pytest

from jaxtrain.config import LayoutConfig

# At least two layers a slice, also where four stages hold one each: `interleaved_1f1b` with 2 x 2 slices.
DEEP = {
    "mlp": {"model.depths": (7,)},
    "resnet": {"model.depths": (2, 2, 1, 1)},
    "vgg": {},
    "swin": {"model.depths": (2, 2, 1, 1)},
}


def layout(schedule: str = "1f1b", stages: int = 2, data: int = 1, zero: int = 0, parts: int = 4, **more) -> LayoutConfig:
    chunks = 2 if schedule == "interleaved_1f1b" else 1
    return LayoutConfig(
        data=data, zero=zero, stages=stages, schedule=schedule, chunks=chunks, microbatches=parts, **more
    )


@functools.cache
def reference(model: str) -> dict[str, np.ndarray]:
    return parity.numbers(parity.run(model, LayoutConfig(data=1), **DEEP[model]))


def grouped(names):
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"deep {name}")) for name in names]


TABLE = {
    "gpipe-2": layout("gpipe"),
    "gpipe-3-zero1": layout("gpipe", 3, 2, 1),
    "1f1b-2-zero3": layout("1f1b", 2, 2, 3),
    "1f1b-4-zero2": layout("1f1b", 4, 2, 2),
    "1f1b-3-one-microbatch": layout("1f1b", 3, parts=1),
    "interleaved-2-zero2": layout("interleaved_1f1b", 2, 2, 2),
    "1f1b-2-hybrid": layout("1f1b", 2, 2, 3, replica=2),
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("model", grouped(parity.MODELS))
def test_stages_change_no_number(model, name):
    found = parity.numbers(parity.run(model, TABLE[name], **DEEP[model]))
    parity.assert_equal(found, reference(model), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "stages", "data", "zero"),
    itertools.product(("gpipe", "1f1b", "interleaved_1f1b"), (2, 3, 4), (1, 2), (0, 1, 2, 3)),
)
@pytest.mark.parametrize("model", grouped(parity.MODELS))
def test_the_whole_table(model, schedule, stages, data, zero):
    deeper = {"mlp": (15,), "resnet": (4, 4, 4, 2), "swin": (4, 4, 4, 2)}
    fields = {"model.depths": deeper[model]} if model in deeper else {}
    parts = 6 if stages == 3 else 4
    found = parity.numbers(parity.run(model, layout(schedule, stages, data, zero, parts), **fields))
    parity.assert_equal(found, parity.numbers(parity.run(model, LayoutConfig(data=1), **fields)), 1e-12)
