"""How the runs below a directory are, read from their files. Runs no code of theirs, follows no link, changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrain.checkpoint import lease
from jaxtrain.errors import InterruptedRunError, PreemptedError, WorkdirError
from jaxtrain.host.files import parse_json, read_json
from jaxtrain.observability.goodput import Goodput, StartTimes, goodput, read_last_start, read_starts
from jaxtrain.workdir import Workdir

RUNNING, DONE, STOPPED, FAILED, DIED, DAMAGED = "running", "done", "stopped", "failed", "died", "damaged"

_TAIL_BYTES = 1 << 14  # of metrics.jsonl; a row has 300
_STOPPED_CODES = (PreemptedError.exit_code, InterruptedRunError.exit_code, 143)


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """One run. None: not known, or there is no such thing yet."""

    path: str
    state: str
    """`running`; `done`; `stopped` (saved, and may go on); `failed`; `died` without a word; `damaged` (it cannot be read)."""
    reason: str = ""
    """How it ended, in a sentence."""
    step: int = 0
    last_step: int | None = None
    """Where it is to end."""
    epoch: int | None = None
    """From 0."""
    loss: float | None = None
    """Of training, latest."""
    accuracy: float | None = None
    """Of training, latest; so is the next of validation."""
    val_accuracy: float | None = None
    seconds_left: float | None = None
    """At the pace of this start; while it runs."""
    seen: float | None = None
    """When it has given a sign of life last, in seconds since 1970."""
    devices: str = ""
    """As in `8 x NVIDIA H100`."""
    host: str = ""
    pid: int | None = None
    """Of process 0, while it runs."""
    born: str = ""
    """When that was started (`start_ticks`)."""
    code: int | None = None
    """The exit code of the latest start."""
    gpu_hours: float | None = None
    """Of all its starts; None on a CPU."""
    cost: float | None = None
    """Of these, at `cost.per_gpu_hour`."""


def is_run(folder: Path) -> bool:
    """Whether `folder` is the work directory of a run."""
    workdir = Workdir(folder)
    return workdir.config.is_file() and (workdir.starts.is_dir() or workdir.checkpoints.is_dir())


def find_runs(root: Path) -> Iterator[Path]:
    """The work directories below `root`, or itself. Does not look into runs, hidden directories and links.

    Raises `WorkdirError` where `root` cannot be read.
    """
    if not root.is_dir():
        raise WorkdirError(f"{root} is no directory; choose another --root.")
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError:  # deleted meanwhile, or not for this user
            continue
        if is_run(folder):
            yield folder
            continue
        below = sorted(
            entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        )
        folders += [folder / name for name in reversed(below)]


def read_status(path: Path) -> RunStatus:
    """How the run of a work directory is; `damaged`, with the reason, where its files cannot be read."""
    try:
        return _read_status(path)
    except (WorkdirError, OSError) as error:
        return RunStatus(str(path), DAMAGED, str(error))


def _read_status(path: Path) -> RunStatus:
    workdir, holder = Workdir(path), lease.look(path)
    start = read_last_start(workdir.starts)
    lives = holder is not None and holder.lives
    if start is None:
        state, reason = (RUNNING, "") if lives else (DIED, "It ended before its first step.")
    else:
        state, reason = _state(start, lives)
    last = start.last_step if start else 0
    spent = _spent(workdir.starts) if start else None
    rows = _latest_rows(workdir.metrics_jsonl)
    training, validation = (next((row for row in rows if row["phase"] == phase), {}) for phase in ("train", "val"))
    return RunStatus(
        str(path),
        state,
        reason,
        step=start.step if start else 0,
        last_step=last or None,
        epoch=_number(training, "epoch"),
        loss=_number(training, "loss"),
        accuracy=_number(training, "accuracy"),
        val_accuracy=_number(validation, "accuracy"),
        seconds_left=_seconds_left(start) if start and lives else None,
        seen=start.began + start.wall if start else None,
        devices=_devices(workdir.manifest),
        host=(holder.owner.host if holder and lives else start.host if start else ""),
        pid=holder.owner.pid if holder and lives else None,
        born=holder.owner.born if holder and lives else "",
        code=start.end.code if start and start.end and not lives else None,
        gpu_hours=(spent.gpu_hours or None) if spent else None,
        cost=spent.cost if spent else None,
    )


def _spent(starts: Path) -> Goodput | None:
    """What all starts took; None where the file of an earlier one is damaged."""
    with contextlib.suppress(WorkdirError):
        return goodput(read_starts(starts))
    return None


def _state(start: StartTimes, lives: bool) -> tuple[str, str]:
    if lives:
        return RUNNING, ""
    end = start.end
    if end is None:
        return (
            DIED,
            f"It ended without a word on {start.host or 'a host unknown'}: it was killed, or its host went down.",
        )
    if end.code is None:
        return DIED, end.message
    if end.code == 0:
        return DONE, ""
    return (STOPPED if end.code in _STOPPED_CODES else FAILED), end.message


def _seconds_left(start: StartTimes) -> float | None:
    """At the mean pace of the start, evaluations and saves included; None before its first step."""
    steps = start.step - start.first_step
    seconds = start.wall - sum(start.seconds[name] for name in ("start", "compile") if name in start.seconds)
    return (start.last_step - start.step) * seconds / steps if steps > 0 and start.last_step else None


def _latest_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of metrics.jsonl, the latest first. A row that is being written is left out."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL_BYTES, 0))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in reversed(lines[1 if size > _TAIL_BYTES else 0 :]):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("phase"), str):
            rows.append(row)
    return rows


def _number(row: dict[str, Any], name: str) -> Any:
    value = row.get(name)
    return value if type(value) in (int, float) else None


def _devices(path: Path) -> str:
    """What the latest start ran on."""
    try:
        kinds = read_json(path)["starts"][-1]["devices"]["kinds"]
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    except (WorkdirError, TypeError, KeyError, IndexError, AttributeError):
        return ""


def here(status: RunStatus) -> bool:
    """Whether it runs on this host."""
    return status.host == socket.gethostname()


def age(status: RunStatus) -> float:
    """Seconds since its last sign of life."""
    return max(time.time() - (status.seen or 0.0), 0.0)
