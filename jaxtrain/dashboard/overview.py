"""The row of a run in the overview: how it is, and what it is. Read from its files alone."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from jaxtrain.errors import WorkdirError
from jaxtrain.host.folder import Folder
from jaxtrain.host.redaction import without_logins
from jaxtrain.jobs.queue import DONE, ENDED, RUNNING, STOPPED, Entry
from jaxtrain.jobs.run_status import DAMAGED, read_status
from jaxtrain.observability.metrics_files import EpochRow

FILES = {
    "config.json": stat.S_ISREG, "manifest.json": stat.S_ISREG, "metrics.jsonl": stat.S_ISREG,
    "metrics.csv": stat.S_ISREG, "lock.json": stat.S_ISREG, "starts": stat.S_ISDIR, "events.jsonl": stat.S_ISREG,
    "layout.json": stat.S_ISREG, "result.json": stat.S_ISREG, "checkpoints": stat.S_ISDIR, "evaluation": stat.S_ISDIR,
    "logs": stat.S_ISDIR,
}  # fmt: skip
"""What is watched of a run, and what it must be."""

_MOST_CSV = 4 << 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One run, or one job of the local queue that has no run. None: not known."""

    id: str
    """In addresses: a digest of the name, so that no address is a path."""
    kind: str
    """`run` or `job`."""
    name: str
    """The run's path below the root, or the job's id."""
    state: str
    """As of `RunStatus`, or `waiting`."""
    reason: str = ""
    """Why it is in that state, in a sentence."""
    step: int = 0
    last_step: int | None = None
    epoch: int | None = None
    """From 0."""
    epochs: int | None = None
    seconds_left: float | None = None
    loss: float | None = None
    """Of training, latest."""
    accuracy: float | None = None
    """In [0, 1]; so are the next two."""
    val_accuracy: float | None = None
    best: float | None = None
    """The highest of validation."""
    devices: str = ""
    host: str = ""
    seen: float | None = None
    """When it has given a sign of life last, in seconds since 1970."""
    began: float | None = None
    """When its first start did."""
    code: int | None = None
    """The exit code of its latest start."""
    gpu_hours: float | None = None
    cost: float | None = None
    recipe: str = ""
    model: str = ""
    dataset: str = ""
    seed: int | None = None
    group: str = ""
    """The folder above it, below the root."""
    job: str | None = None
    """The job of the local queue that it is."""


def run_id(name: str) -> str:
    """What a run is called in addresses."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def job_row(entry: Entry) -> Row | None:
    """The row of a job; None where it runs or has done well: then its run says more."""
    state = entry.state()
    if state.status in (RUNNING, DONE, STOPPED):
        return None
    seen = (state.ended if state.status in ENDED else state.submitted) or None
    reason = without_logins(state.reason)
    return Row(
        run_id(f"job {entry.id}"), "job", entry.id, state.status, reason, seen=seen, code=state.code, job=entry.id
    )


def run_row(folder: Folder, found: Mapping[str, os.stat_result], job: Entry | None) -> Row:
    """The row of a run.

    Args:
      folder: its work directory.
      found: what of `FILES` it has.
      job: of the local queue, where it is one.
    """
    name = folder.path.name if folder.name == "." else folder.name
    group = str(PurePosixPath(name).parent) if "/" in name else ""
    row = Row(run_id(folder.name), "run", name, DAMAGED, group=group, job=job.id if job else None)
    if strange := unlike_a_run(folder, found):
        return dataclasses.replace(row, reason=strange)
    status = read_status(folder.path)
    values = {
        field.name: getattr(status, field.name) for field in dataclasses.fields(status) if hasattr(row, field.name)
    }
    row = dataclasses.replace(row, **values, **_described(folder), best=_best(folder))
    return _finite(dataclasses.replace(row, reason=without_logins(row.reason)))


def unlike_a_run(folder: Folder, found: Mapping[str, os.stat_result]) -> str:
    """Why its files are not read, in a sentence: one is a link, or a pipe; "" where all is as it should be."""
    for name, is_kind in FILES.items():
        if name in found and not is_kind(found[name].st_mode):
            what = "a link, and none is followed" if stat.S_ISLNK(found[name].st_mode) else "not what a run writes"
            return f"{name} is {what}."
    starts = Folder(folder.root, f"{folder.name}/starts") if "starts" in found else None
    if starts and not all(stat.S_ISREG(each.st_mode) for each in starts.stats(starts.names()).values()):
        return "starts holds what is no file."
    return ""


def _described(folder: Folder) -> dict[str, Any]:
    """What its config and its first start say."""
    found: dict[str, Any] = {}
    with contextlib.suppress(WorkdirError, TypeError, KeyError, AttributeError):
        config = folder.read_json("config.json")
        found["seed"] = config["seed"]
        found["model"], found["dataset"] = str(config["model"]["name"]), str(config["data"]["name"])
        found["epochs"] = None if config["train"]["steps"] else config["train"]["epochs"]
    with contextlib.suppress(WorkdirError, TypeError, KeyError, AttributeError, ValueError, IndexError):
        found["recipe"] = _recipe(folder.read_json("manifest.json")["starts"][0]["command"])
    with contextlib.suppress(WorkdirError, TypeError, KeyError, IndexError, AttributeError):
        first = next(name for name in folder.names("starts") if name.endswith(".json"))
        found["began"] = float(folder.read_json(f"starts/{first}")["began"])
    return found


def _recipe(command: Sequence[str]) -> str:
    """The recipe that a command line names."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--config" or word.startswith("--config="):
            recipe = following if word == "--config" else word.partition("=")[2]
            return PurePosixPath(recipe.partition(":")[0]).name.removesuffix(".py")
    return ""


def _best(folder: Folder) -> float | None:
    """The highest accuracy of validation in metrics.csv."""
    try:
        lines = folder.read("metrics.csv", _MOST_CSV).decode("utf-8", "replace").split("\n")
    except OSError:
        return None
    rows = [row for line in lines[1:-1] if ",val," in line and (row := EpochRow.parse(line))]
    return max((row.accuracy for row in rows if math.isfinite(row.accuracy)), default=None)


def _finite(row: Row) -> Row:
    """A number that a damaged file has made infinite is not known."""
    bad = [
        field.name
        for field in dataclasses.fields(row)
        if isinstance(value := getattr(row, field.name), float) and not math.isfinite(value)
    ]
    return dataclasses.replace(row, **dict.fromkeys(bad))
