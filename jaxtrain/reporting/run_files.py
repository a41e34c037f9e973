"""Reads the files of a run for a report. One that is not as it should be becomes a sentence; no report fails for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import read_json
from jaxtrain.runs.record import RunRecord

_T = TypeVar("_T")
_MISSHAPEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


def made_from(path: Path, make: Callable[[Any], _T], problems: list[str]) -> _T | None:
    """What `make` gives for the content of a JSON file; None where there is none, or it is damaged.

    Args:
      path: the file.
      make: raises an ordinary error where the content has not the shape that it should have.
      problems: gets a sentence about a damaged file.
    """
    try:
        content = read_json(path)
        return None if content is None else make(content)
    except WorkdirError as error:
        problems.append(str(error))
    except _MISSHAPEN as error:
        problems.append(f"{path} is damaged ({type(error).__name__}: {error}).")
    return None


def of_each(
    runs: Sequence[RunRecord], name: str, make: Callable[[Any], _T], problems: list[str]
) -> list[tuple[RunRecord, _T]]:
    """What `made_from` gives for the file of this name of each run, where there is one."""
    made = ((run, made_from(Path(run.path) / name, make, problems)) for run in runs)
    return [(run, found) for run, found in made if found is not None]


def not_recorded(runs: Sequence[RunRecord], having: Sequence[RunRecord], what: str) -> list[str]:
    """A sentence where some runs have not recorded something."""
    missing = [run.name for run in runs if run not in having]
    if not missing:
        return []
    names = "any run" if len(missing) == len(runs) else ", ".join(missing)
    return [f"{what}: not recorded by {names}."]
