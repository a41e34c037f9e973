"""Decides, leaf by leaf, where a run's weights come from; an error for whatever was not expected. Reads no values."""

from __future__ import annotations

import collections
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from jaxtrain.errors import WeightsError
from jaxtrain.weights import architecture
from jaxtrain.weights.architecture import Architecture
from jaxtrain.weights.naming import NAMINGS, RECOMPUTED, Naming
from jaxtrain.weights.rows import Row, Shape, same
from jaxtrain.weights.tensors import Tensor

OWN = "jaxtrain"
"""The label of files that have our own paths as names."""
_OWN_TREES = ("params/", "batch_stats/")
_HEAD = ("/linear/kernel", "/linear/bias")
Fate = Literal["loaded", "resized", "new"]


class HasTensors(Protocol):
    """What has a table of tensors: a file of weights, or a checkpoint."""

    @property
    def path(self) -> Path:
        """For the errors."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By name."""
        ...


@dataclasses.dataclass(frozen=True)
class Match:
    """Where one of our leaves comes from. note: why it is resized or new, or ""."""

    row: Row
    shape: Shape
    fate: Fate = "loaded"
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Matched:
    """Where all leaves come from.

    label: whose names the file has. title: what model it holds. matches: of every leaf of ours. ignored: names in the file
    that hold no weights.
    """

    label: str
    title: str
    matches: tuple[Match, ...]
    ignored: tuple[str, ...]

    def of(self, fate: Fate) -> list[Match]:
        """The leaves with this fate."""
        return [match for match in self.matches if match.fate == fate]


def recognised(names: Iterable[str]) -> Naming | None:
    """Whose names these are; None for those of nobody that is known."""
    known = set(names)
    return next((naming for naming in NAMINGS if known.issuperset(naming.signature)), None)


def has_own_names(names: Iterable[str]) -> bool:
    """Whether these are paths of our own trees."""
    return all(name.startswith(_OWN_TREES) for name in names)


def shapes_in(file: HasTensors) -> dict[str, Shape]:
    """The shape of each tensor by its name."""
    return {name: tensor.shape for name, tensor in file.tensors.items()}


def architecture_in(file: HasTensors, naming: Naming) -> Architecture:
    """What model a recognised file holds. Raises `WeightsError` where its shapes are those of none."""
    try:
        return naming.read(shapes_in(file))
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{file.path} has {naming.label}'s names of a {naming.family}, but not all that such a model has ({error})."
        ) from None


def match(file: HasTensors, model_name: str, depths: tuple[int, ...], ours: Mapping[str, Shape]) -> Matched:
    """Finds the tensors of a file for a run's leaves.

    Args:
      file: of weights.
      model_name: `model.name` of the run.
      depths: `model.depths` of the run.
      ours: the shapes of its leaves by path, `params/...` and `batch_stats/...`.

    Raises:
      WeightsError: the file holds another model, more or less than the model has, or what is none.
    """
    shapes, naming = shapes_in(file), recognised(file.tensors)
    if has_own_names(shapes):
        label, title, rows = OWN, "weights of jaxtrain", [Row(path, (path,), same) for path in ours]
    elif naming is None:
        raise WeightsError(_unknown(file))
    else:
        theirs = architecture_in(file, naming)
        label, title, rows = naming.label, theirs.title, naming.rows(theirs)
        if architecture.family_of(model_name) == "":
            raise WeightsError(
                f"{file.path} is {title}, and config.model.name={model_name!r} is no {naming.family}; set "
                f"--config.model.name={theirs.name or naming.family}, or give weights with jaxtrain's own names."
            )
        if found := architecture.difference(theirs, architecture.of_run(model_name, depths, ours)):
            raise WeightsError(f"{file.path} is {title}, and the run's model is {found}.")
    used = {name for row in rows for name in row.theirs}
    rest = [name for name in shapes if name not in used]
    _require_all(file, rows, rest)
    head = _last_layer(ours)
    matches = [_matched(file, row, shapes, ours[row.ours], is_last=row.ours.split("/")[1] == head) for row in rows]
    ignored = [name for name in rest if name.endswith(RECOMPUTED)]
    if extra := [name for name in rest if name not in ignored]:
        raise WeightsError(
            f"{file.path} is {title}, and holds {len(extra)} tensors that such a model does not have: "
            f"{_with_nearest(extra, used)}."
        )
    for each in matches:
        if each.fate != "new":
            _check_dtype(file, each.row)
    return Matched(label, title, tuple(matches), tuple(ignored))


def _last_layer(ours: Mapping[str, Shape]) -> str:
    return max(path.split("/")[1] for path in ours if path.startswith("params/"))


def _require_all(file: HasTensors, rows: list[Row], rest: list[str]) -> None:
    """Raises `WeightsError` where a tensor is missing; a head may be, as a whole. rest: names that no row has."""
    last = max(row.ours.split("/")[1] for row in rows)
    head = [name for row in rows if row.ours.split("/")[1] == last and row.ours.endswith(_HEAD) for name in row.theirs]
    missing = [name for row in rows for name in row.theirs if name not in file.tensors]
    if missing and missing != head:
        raise WeightsError(f"{file.path} lacks {_with_nearest(missing, rest)}.")


def _matched(file: HasTensors, row: Row, shapes: Mapping[str, Shape], shape: Shape, *, is_last: bool) -> Match:
    """Where one leaf comes from. is_last: whether it is in the model's last layer."""
    wanted = row.form_of(shape).theirs
    of_head = is_last and row.ours.endswith(_HEAD)
    if row.theirs[0] not in shapes:
        return Match(row, shape, "new", "the file has no head")
    found = shapes[row.theirs[0]]
    other = [name for name in row.theirs if shapes[name] != wanted]
    if not other:
        return Match(row, shape)
    if of_head and len(found) == len(wanted) and _but_for_classes(found, wanted, row):
        classes = (found[-1], shape[-1]) if row.form is same else (found[0], shape[-1])
        return Match(row, shape, "new", f"the file has {classes[0]} classes and the run {classes[1]}")
    if row.table and len(found) == 2 and found[1] == shape[1] and _side(found) and _side(shape):
        return Match(row, shape, "resized", f"{_side(found)} x {_side(found)} to {_side(shape)} x {_side(shape)}")
    raise WeightsError(
        f"{file.path}: {other[0]} is {list(shapes[other[0]])}, and would have to be {list(wanted)} for {row.ours} of the run."
    )


def _but_for_classes(found: Shape, wanted: Shape, row: Row) -> bool:
    """Whether two shapes of a head's leaf differ in the number of classes alone."""
    dim = len(found) - 1 if row.form is same else 0
    return found[:dim] + found[dim + 1 :] == wanted[:dim] + wanted[dim + 1 :]


def _side(shape: Shape) -> int:
    """The side of a table of relative positions [side^2, heads]; 0 where it is no square of an odd one."""
    side = round(shape[0] ** 0.5)
    return side if side**2 == shape[0] and side % 2 else 0


def _check_dtype(file: HasTensors, row: Row) -> None:
    for name in row.theirs:
        dtype = file.tensors[name].dtype
        if dtype.kind not in "fV":  # NumPy has bfloat16 as a void
            raise WeightsError(f"{file.path}: {name} is of {dtype}, and weights are floats.")


def _with_nearest(names: list[str], known: Iterable[str]) -> str:
    """The first of `names`, each with the name that is most like it."""
    known = list(known)
    shown = []
    for name in names[:3]:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _unknown(file: HasTensors) -> str:
    names = list(file.tensors)
    first = collections.Counter(name.partition(".")[0] for name in names)
    begin = next(iter(first))
    stripped = [name.partition(".")[2] for name in names]
    if len(first) == 1 and recognised(stripped) is not None:
        return f"{file.path}: all names begin with {begin}., without which they would be known; save it without."
    return (
        f"{file.path} holds no model that is known (its names are {', '.join(names[:3])}, ...); VGG, ResNet and Swin of "
        "torchvision, timm and transformers are, and what has jaxtrain's own names."
    )
