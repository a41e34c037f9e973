"""Decides which settings may change when a run resumes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxtrain.config import Config, flatten, to_dict, tuples_to_lists

_FREE = re.compile(
    r"layout\..*|checkpoint\..*|telemetry\..*|callbacks\..*|sinks\..*|profile\..*|cost\..*"
    r"|train\.(log_every|eval_every|eval_examples|steps_per_call|remat|deterministic|hang_seconds|nonfinite_skips|rollbacks)"
    r"|train\.(spike_threshold|check_replicas_every)"
    # batch_per_device only ever set the global batch at the first start; the stored global batch is what counts
    # what skip_bad leaves out is seen in the data set's fingerprint
    r"|data\.(dir|workers|residency|prepare_.*|batch_per_device|skip_bad)"
)
_LENGTH = re.compile(r"train\.(epochs|steps)")
Kind = Literal["free", "length", "numbers"]


@dataclasses.dataclass(frozen=True)
class Change:
    """One setting that differs from the stored one."""

    key: str
    stored: Any
    new: Any
    kind: Kind
    """`free`: it changes where, how fast or how often, and no number of the run. `length`: free if every step so far would
    have had the same learning rate. `numbers`: it changes the run's numbers."""

    def __str__(self) -> str:
        return f"config.{self.key}: {self.stored!r} -> {self.new!r}"


def changes(stored: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Settings that differ between two configs (nested dicts), in the order of `Config`'s fields.

    A missing key has its default: a config that an older version stored has fewer fields.
    """
    defaults = flatten(to_dict(Config()))
    before, after = (defaults | flatten(values) for values in (stored, new))
    differing = []
    for key in dict.fromkeys([*defaults, *before, *after]):
        pair = before.get(key), after.get(key)
        if tuples_to_lists(pair[0]) != tuples_to_lists(pair[1]):
            kind = "free" if key == "data.name" and may_be_one_data_set(*pair) else kind_of(key)
            differing.append(Change(key, *pair, kind))
    return differing


def may_be_one_data_set(name: Any, other: Any) -> bool:
    """Whether two values of `data.name` may mean the same data: a folder may have moved. Its fingerprint then tells."""
    return name == other or all(str(value).startswith("folder:") for value in (name, other))


def kind_of(key: str) -> Kind:
    """Whether the field `key` may change on resume; see `Change`."""
    if _FREE.fullmatch(key):
        return "free"
    return "length" if _LENGTH.fullmatch(key) else "numbers"


def refused(changes: Iterable[Change], *, same_rates: bool) -> list[Change]:
    """The changes that a resumed run may not make without `checkpoint.allow_changes`.

    same_rates: whether every step so far has the same learning rate under both lengths.
    """
    return [c for c in changes if c.kind == "numbers" or (c.kind == "length" and not same_rates)]


def refuse_text(path: Path, refused: Iterable[Change], *, foreign: bool = False) -> str:
    """A sentence for `WorkdirError`: which settings differ, and what to do.

    Args:
      path: the work directory; or a checkpoint of another run.
      refused: the changes.
      foreign: whether `path` is a checkpoint of another run, from which this one should start.
    """
    keys = ", ".join(map(str, refused))
    what, other = ("checkpoint", "keep its values") if foreign else ("work directory", "choose another with --workdir")
    return (
        f"The {what} {path} belongs to a run with another config ({keys}); {other}, "
        "or go on with the new values with --config.checkpoint.allow_changes=true."
    )
