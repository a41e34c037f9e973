"""Reads the values of leaves from a file, slice by slice, and puts them where the layout has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtrain.errors import WeightsError
from jaxtrain.weights.file import WeightsFile
from jaxtrain.weights.matching import Match, Matched

Index = tuple[slice, ...]


def read(file: WeightsFile, match: Match, index: Index, dtype: np.dtype) -> np.ndarray:
    """A slice of one of our leaves.

    Args:
      file: of weights.
      match: where the leaf comes from.
      index: a slice for each dim of the leaf.
      dtype: of the result.

    Raises:
      WeightsError: there is a value that is not finite, or a variance below 0.
    """
    row = match.row
    if match.fate == "resized":
        table = resized_table(file.array(row.theirs[0]), match.shape[0])
        values = table[index]
    elif row.stack is None:
        values = _slice(file, match, row.theirs[0], index)
    else:
        parts = range(len(row.theirs))[index[row.stack]]
        others = index[: row.stack] + index[row.stack + 1 :]
        values = np.stack([_slice(file, match, row.theirs[part], others) for part in parts], row.stack)
    values = np.ascontiguousarray(values, dtype)
    if not np.isfinite(values).all():
        raise WeightsError(f"{file.path}: {row.theirs[0]} holds values that are not finite in {dtype}.")
    if row.ours.endswith("/var") and (values < 0).any():
        raise WeightsError(f"{file.path}: {row.theirs[0]} holds variances below 0.")
    return values


def _slice(file: WeightsFile, match: Match, name: str, index: Index) -> np.ndarray:
    """The slice `index` of what the tensor `name` is in our dims: of a view of the file, so that no more is read."""
    form = match.row.form_of(match.shape)
    view = file.array(name).reshape(form.split).transpose(form.axes)
    if view.ndim == len(index):
        return view[index]
    joined = view.ndim - len(index) + 1  # dims that are one in ours
    rows = np.unravel_index(np.arange(*index[0].indices(match.shape[0])), view.shape[:joined])
    return view[(*rows, *index[1:])]


def place(file: WeightsFile, matched: Matched, targets: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The leaves that the file has, on the devices: each process reads the parts that its devices hold, and no others.

    Args:
      file: of weights.
      matched: where the leaves come from.
      targets: shape, dtype and sharding of each leaf by its path.
    """
    placed = {}
    for match in matched.matches:
        if match.fate != "new":
            target = targets[match.row.ours]
            placed[match.row.ours] = _placed(file, match, target)
    return placed


def _placed(file: WeightsFile, match: Match, target: Any) -> jax.Array:
    held: dict[Any, np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        key = tuple((s.start, s.stop) for s in index)
        if key not in held:
            held.clear()  # devices that hold the same part follow each other, or it is read again
            held[key] = read(file, match, index, np.dtype(target.dtype))
        return held[key]

    return jax.make_array_from_callback(target.shape, target.sharding, part, dtype=target.dtype)


def resized_table(table: np.ndarray, rows: int) -> np.ndarray:
    """A table of relative positions for another window, by bicubic interpolation as `torch.nn.functional.interpolate`'s.

    So do the original Swin and timm when they load weights of another window.

    Args:
      table: [side^2, heads].
      rows: the square of the new side.

    Returns:
      float64 [rows, heads].
    """
    side, new = round(table.shape[0] ** 0.5), round(rows**0.5)
    weights = _bicubic(side, new)
    square = np.asarray(table, np.float64).reshape(side, side, -1)
    return np.einsum("ai,bj,ijh->abh", weights, weights, square).reshape(rows, -1)


def _bicubic(old: int, new: int) -> np.ndarray:
    """[new, old]: cubic convolution (Keys 1981) with a = -0.75, centres of cells aligned, edges repeated."""
    a = -0.75
    weights = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        first = int(np.floor(at)) - 1
        for j in range(first, first + 4):
            x = abs(at - j)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[i, min(max(j, 0), old - 1)] += near if x <= 1 else far if x < 2 else 0.0
    return weights
