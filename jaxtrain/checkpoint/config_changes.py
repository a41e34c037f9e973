"""Which settings may change when a run resumes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxtrain.config import Config, flatten, to_dict, tuples_to_lists

_FREE = re.compile(
    r"layout\..*|checkpoint\..*|train\.(log_every|eval_every|steps_per_call|remat|deterministic|hang_seconds|nonfinite_skips|rollbacks)"
    r"|train\.(spike_threshold|check_replicas_every)"
    # batch_per_device only ever set the global batch at the first start; the stored global batch is what counts
    r"|data\.(dir|workers|residency|prepare_.*|batch_per_device)"
)
_LENGTH = re.compile(r"train\.(epochs|steps)")
Kind = Literal["free", "length", "numbers"]


@dataclasses.dataclass(frozen=True)
class Change:
    """One setting that differs from the stored one.

    kind: `free` (where, how fast, how often: no number of the run moves), `length` (free where no step already run
    would have had another learning rate), `numbers` (the run would no longer be the same run).
    """

    key: str
    stored: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"config.{self.key}: {self.stored!r} -> {self.new!r}"


def changes(stored: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Settings that differ between two configs (nested dicts), in the order of `Config`'s fields.

    A key that one side lacks has its default there: a config stored by an older version knows fewer fields.
    """
    defaults = flatten(to_dict(Config()))
    before, after = (defaults | flatten(values) for values in (stored, new))
    found = []
    for key in dict.fromkeys([*defaults, *before, *after]):
        pair = before.get(key), after.get(key)
        if tuples_to_lists(pair[0]) != tuples_to_lists(pair[1]):
            found.append(Change(key, *pair, kind_of(key)))
    return found


def kind_of(key: str) -> Kind:
    """Whether the field `key` may change on resume; see `Change`."""
    if _FREE.fullmatch(key):
        return "free"
    return "length" if _LENGTH.fullmatch(key) else "numbers"


def refused(found: Iterable[Change], *, same_rates: bool) -> list[Change]:
    """The changes that a resumed run may not make without `checkpoint.allow_changes`.

    same_rates: whether every step already run has the same learning rate under the new length as under the stored one.
    """
    return [c for c in found if c.kind == "numbers" or (c.kind == "length" and not same_rates)]


def refuse_text(path: Path, found: Iterable[Change], *, foreign: bool = False) -> str:
    """One sentence for `WorkdirError`: which keys differ, and what to do.

    path: the work directory, or the checkpoint of another run that this one should start from (`foreign`).
    """
    keys = ", ".join(map(str, found))
    what, other = ("checkpoint", "keep its values") if foreign else ("work directory", "choose another with --workdir")
    return (
        f"The {what} {path} belongs to a run with another config ({keys}); {other}, "
        "or go on with the new values with --config.checkpoint.allow_changes=true."
    )
