"""A row of a table of names: one of our leaves, the tensors that hold it elsewhere, and how their dims are arranged.

A form is data, and serves both directions: their tensor, cut into the dims `split` and permuted by `axes`, is our leaf.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """How one of our leaves is stored elsewhere.

    theirs: the shape of their tensor. split: its dims, those of which some are one there cut apart. axes: which dim of
    `split` each dim of ours is; where ours has fewer dims, its first is the product of the first ones.
    """

    theirs: Shape
    split: Shape
    axes: tuple[int, ...]


MakeForm = Callable[[Shape], Form]
"""The form of a leaf of ours, from its shape."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of ours, `params/...` or `batch_stats/...`.

    theirs: its name there; three names where queries, keys and values are stored apart, which ours stacks along `stack`.
    form: of each of `theirs`, from the shape of our leaf (without the dim `stack`).
    table: whether it is a table of relative positions, which another window resizes.
    """

    ours: str
    theirs: tuple[str, ...]
    form: MakeForm
    stack: int | None = None
    table: bool = False

    def form_of(self, shape: Shape) -> Form:
        """The form of each of `theirs`. shape: of our leaf."""
        return self.form(shape if self.stack is None else shape[: self.stack] + shape[self.stack + 1 :])


def same(shape: Shape) -> Form:
    """Nothing is rearranged."""
    return Form(shape, shape, tuple(range(len(shape))))


def convolution(shape: Shape) -> Form:
    """Ours [H, W, in, out], PyTorch's [out, in, H, W]."""
    height, width, inputs, outputs = shape
    theirs = (outputs, inputs, height, width)
    return Form(theirs, theirs, (2, 3, 1, 0))


def linear(shape: Shape) -> Form:
    """Ours [in, out], PyTorch's [out, in]."""
    return Form(shape[::-1], shape[::-1], (1, 0))


def pointwise(shape: Shape) -> Form:
    """Ours [in, out], theirs a convolution [out, in, 1, 1]."""
    inputs, outputs = shape
    return Form((outputs, inputs, 1, 1), (outputs, inputs), (1, 0))


def flattened_map(shape: Shape, channels: int, *, convolutional: bool = False) -> Form:
    """The first linear layer after a map of so many channels: ours has [H, W, C] flattened, PyTorch's [C, H, W].

    Args:
      shape: [H * W * C, out].
      channels: C.
      convolutional: whether theirs is a convolution [out, C, H, W].
    """
    inputs, outputs = shape
    side = math.isqrt(inputs // channels)
    split = (outputs, channels, side, side)
    return Form(split if convolutional else (outputs, inputs), split, (2, 3, 1, 0))


def qkv_kernel(shape: Shape) -> Form:
    """Ours [C, 3, heads, head_dim], theirs [3 * heads * head_dim, C]."""
    channels, three, heads, dim = shape
    return Form((three * heads * dim, channels), (three, heads, dim, channels), (3, 0, 1, 2))


def heads_out(shape: Shape) -> Form:
    """Ours [C, heads, head_dim], theirs [heads * head_dim, C]: the queries alone, or keys, or values."""
    channels, heads, dim = shape
    return Form((heads * dim, channels), (heads, dim, channels), (2, 0, 1))


def heads_in(shape: Shape) -> Form:
    """Ours [heads, head_dim, C], theirs [C, heads * head_dim]."""
    heads, dim, channels = shape
    return Form((channels, heads * dim), (channels, heads, dim), (1, 2, 0))


def joined(shape: Shape) -> Form:
    """Ours of several dims, theirs flattened into one."""
    return Form((math.prod(shape),), shape, tuple(range(len(shape))))


class Rows:
    """Collects the rows of a model's layers. A layer's name is the one that it has in our trees."""

    def __init__(self) -> None:
        self.found: list[Row] = []

    def add(self, ours: str, theirs: str | tuple[str, ...], form: MakeForm = same, **more: int | bool) -> None:
        """A row; `ours` is a path below `params`."""
        names = (theirs,) if isinstance(theirs, str) else theirs
        self.found.append(Row(f"params/{ours}", names, form, **more))  # type: ignore[arg-type]

    def convolution(self, ours: str, theirs: str, *, bias: bool = False) -> None:
        """The kernel of a convolution, and its bias."""
        self.add(f"{ours}/kernel", f"{theirs}.weight", convolution)
        if bias:
            self.add(f"{ours}/bias", f"{theirs}.bias")

    def linear(self, ours: str, theirs: str, form: MakeForm = linear, *, bias: bool = True) -> None:
        """The kernel of a linear layer, and its bias."""
        self.add(f"{ours}/kernel", f"{theirs}.weight", form)
        if bias:
            self.add(f"{ours}/bias", f"{theirs}.bias")

    def norm(self, ours: str, theirs: str, *, statistics: bool = False) -> None:
        """Scale and bias of a norm; the running statistics of a BatchNorm."""
        self.add(f"{ours}/scale", f"{theirs}.weight")
        self.add(f"{ours}/bias", f"{theirs}.bias")
        for name in ("mean", "var") if statistics else ():
            self.found.append(Row(f"batch_stats/{ours}/{name}", (f"{theirs}.running_{name}",), same))


def flattened(channels: int, *, convolutional: bool = False) -> MakeForm:
    """`flattened_map` of a map with so many channels."""
    return functools.partial(flattened_map, channels=channels, convolutional=convolutional)
