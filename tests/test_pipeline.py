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


def layout(
    schedule: str = "1f1b", stages: int = 2, data: int = 1, zero: int = 0, parts: int = 4, **more
) -> LayoutConfig:
    chunks = 2 if schedule == "interleaved_1f1b" else 1
    return LayoutConfig(
        data=data, zero=zero, stages=stages, schedule=schedule, chunks=chunks, microbatches=parts, **more
    )


# Two layers a slice where four stages hold two each.
DEEPER = {
    "mlp": {"model.depths": (15,)},
    "resnet": {"model.depths": (4, 4, 4, 2)},
    "swin": {"model.depths": (4, 4, 4, 2)},
}


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
    "1f1b-2-tensor2": layout("1f1b", 2, 2, 1, tensor=2),
}
# All of the table with the cheapest model; of the others what differs in kind.
COVERED = [("mlp", name) for name in TABLE]
COVERED += [("resnet", name) for name in ("gpipe-2", "1f1b-4-zero2", "interleaved-2-zero2", "1f1b-2-hybrid")]
COVERED += [("swin", name) for name in ("1f1b-2-zero3", "interleaved-2-zero2", "1f1b-2-tensor2")]
COVERED += [("vgg", "1f1b-4-zero2")]


@pytest.mark.parametrize(
    ("model", "name"), [pytest.param(*pair, marks=pytest.mark.xdist_group(f"deep {pair[0]}")) for pair in COVERED]
)
def test_stages_change_no_number(model, name):
    found = parity.numbers(parity.run(model, TABLE[name], **DEEP[model]))
    parity.assert_equal(found, reference(model), 1e-12)


EVERYTHING = list(itertools.product(("gpipe", "1f1b", "interleaved_1f1b"), (2, 3, 4), (1, 2), (0, 1, 2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "stages", "data", "zero"), EVERYTHING)
@pytest.mark.parametrize("model", grouped(parity.MODELS))
def test_the_whole_table(model, schedule, stages, data, zero):
    """With at least two layers a slice, but for VGG, whose eleven layers are too few for that with 4 x 2 slices."""
    deeper, parts = schedule == "interleaved_1f1b", 6 if stages == 3 else 4
    found = parity.numbers(parity.run(model, layout(schedule, stages, data, zero, parts), **fields_of(model, deeper)))
    parity.assert_equal(found, larger_reference(model, deeper), 1e-12)


def fields_of(model: str, deeper: bool) -> dict[str, object]:
    """A batch, and BatchNorm groups, that four and six microbatches divide."""
    more = DEEPER.get(model, {}) if deeper else DEEP[model]
    groups = {"model.bn_groups": 12} if model in ("resnet", "vgg") else {}
    return {"data.global_batch": 96, "data.examples": 96, **groups, **more}


@functools.cache
def larger_reference(model: str, deeper: bool) -> dict[str, np.ndarray]:
    return parity.numbers(parity.run(model, LayoutConfig(data=1), **fields_of(model, deeper)))
