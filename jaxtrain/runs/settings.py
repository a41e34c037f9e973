"""Which settings of several runs differ, and which of them can matter to a figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# They say where files are, what is reported and when a run gives up: no figure of a comparison depends on them.
_NO_FIGURE = re.compile(
    r"telemetry\..*|sinks\..*|profile\..*|cost\..*|checkpoint\.(keep|resume|allow_changes)"
    r"|train\.(log_every|hang_seconds)|data\.(dir|prepare_.*)"
)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted names that have not the same value in all runs; without the seed and what no figure depends on.

    A run that does not have a name (what it ran on is not known before it starts) differs from none by that.
    """
    names = dict.fromkeys(key for each in settings for key in each)
    values = {key: [each[key] for each in settings if key in each] for key in names}
    different = (key for key, found in values.items() if any(value != found[0] for value in found))
    return [key for key in different if key != "seed" and not _NO_FIGURE.fullmatch(key)]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name, or the whole name where others have the same last part."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def shown(value: Any) -> str:
    """A setting's value as one writes it: `0.05`, `sgd`, `1,2`; `-` for one that there is not."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(shown, value)) if isinstance(value, list | tuple) else f"{value}"
