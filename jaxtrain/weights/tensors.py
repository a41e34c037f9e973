"""What the table of a file of weights says, and the checks that every format shares."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np

MOST_TENSORS = 4_000
"""A ResNet-152 has 930. The table of so many takes 3 MB."""
MOST_DIMS = 8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor: its type, shape, and where its bytes begin in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Where its bytes end in the file."""
        return self.offset + self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Found:
    """The table of a file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def require(condition: object, what: str) -> None:
    """Raises `ValueError` with `what` unless the condition holds."""
    if not condition:
        raise ValueError(what)


def shown(name: object) -> str:
    """A name from a file, as a sentence can hold it."""
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:77]}..."


def checked_shape(name: str, shape: object) -> tuple[int, ...]:
    """`shape` as a tuple. Raises `ValueError` unless it is at most eight whole numbers, none below 0."""
    good = (
        isinstance(shape, (list, tuple)) and len(shape) <= MOST_DIMS and all(type(n) is int and n >= 0 for n in shape)
    )
    require(good, f"{shown(name)} has the shape {shown(shape)}, which none can have")
    assert isinstance(shape, (list, tuple))
    return tuple(shape)


def refuse_overlaps(tensors: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` where two tensors share bytes."""
    in_order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].end))
    for (one, first), (two, second) in itertools.pairwise(in_order):
        require(first.end <= second.offset, f"{shown(one)} and {shown(two)} share bytes of the file")
