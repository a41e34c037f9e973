"""All that the page of one run shows beside curves, events and logs. What an older run has not recorded is None."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import stat
from collections.abc import Mapping
from typing import Any

from jaxtrain.config import flatten
from jaxtrain.dashboard.overview import FILES, Row, left_out, unlike_a_run
from jaxtrain.errors import WorkdirError
from jaxtrain.host.folder import Folder, reason
from jaxtrain.host.redaction import redact_values
from jaxtrain.observability.goodput import StartTimes, goodput, read_starts

MOST_EVALUATION = 64 << 20
"""Bytes of an evaluation's report: it holds pictures."""


_ENVIRONMENT = (
    "started", "step", "command", "python", "versions", "git", "hostname", "platform", "cpus", "devices", "environment",
)  # fmt: skip
_LAYOUT = {"mesh": dict, "bytes_per_device": dict, "bytes_by_stage": dict, "stages": list}  # what is drawn of it


def run_details(folder: Folder, row: Row, columns: Mapping[str, list[str]]) -> dict[str, Any]:
    """What the page of a run shows.

    Args:
      folder: its work directory.
      row: of the overview.
      columns: of its metrics, by phase.
    """
    found = folder.stats((*FILES, "schedule.svg"))
    problems = left_out(found)
    latest = _latest_start(folder, problems)
    starts = _starts(folder, problems)
    return {
        "run": dataclasses.asdict(row),
        "config": _config(_read(folder, "config.json", problems), latest),
        "starts": [{"number": number, **dataclasses.asdict(start)} for number, start in enumerate(starts, 1)],
        "goodput": goodput(starts).to_json() if starts else None,
        "layout": _layout(folder, problems),
        "has_schedule": "schedule.svg" in found and stat.S_ISREG(found["schedule.svg"].st_mode),
        "environment": {name: redact_values(latest[name]) for name in _ENVIRONMENT if name in latest} or None,
        "checkpoints": _checkpoints(folder, _read(folder, "result.json", [])),
        "columns": columns,
        "evaluations": [name.removesuffix(".json") for name in folder.names("evaluation") if _is_report(name)],
        "result": _read(folder, "result.json", problems),
        "commands": _commands(folder),
        "problems": list(dict.fromkeys(problems)),
    }


def _is_report(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


def _read(folder: Folder, name: str, problems: list[str]) -> Any:
    """An object of JSON without secrets; None where there is none, and a problem where it cannot be read."""
    try:
        value = folder.read_json(name)
    except WorkdirError as error:
        problems.append(str(error))
        return None
    if value is not None and not isinstance(value, dict):
        problems.append(f"{name} is damaged (it holds no JSON object).")
        return None
    return redact_values(value)


def _layout(folder: Folder, problems: list[str]) -> Any:
    layout = _read(folder, "layout.json", problems)
    if layout is None or all(isinstance(layout.get(name), kind) for name, kind in _LAYOUT.items()):
        return layout
    problems.append("layout.json is damaged (it describes no layout).")
    return None


def _latest_start(folder: Folder, problems: list[str]) -> dict[str, Any]:
    try:
        latest = folder.read_json("manifest.json")["starts"][-1]
        return latest if isinstance(latest, dict) else {}
    except WorkdirError as error:
        problems.append(str(error))
    except (TypeError, KeyError, IndexError):  # none yet, or damaged
        pass
    return {}


def _config(config: Any, latest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields with the origins that the latest start has recorded: a field without one has its default."""
    origins = latest.get("origins")
    return [
        {"key": key, "value": value, "origin": origins.get(key, "default") if isinstance(origins, dict) else None}
        for key, value in flatten(config or {}).items()
    ]


def _starts(folder: Folder, problems: list[str]) -> list[StartTimes]:
    if not folder.names("starts") or unlike_a_run(folder, folder.stats(FILES)):
        return []
    try:
        return read_starts(folder.path / "starts")
    except WorkdirError as error:
        problems.append(str(error))
        return []


def recorded_starts(folder: Folder) -> list[StartTimes]:
    """The starts of a run; none where they cannot be read."""
    return _starts(folder, [])


def _checkpoints(folder: Folder, result: Any) -> list[dict[str, Any]]:
    """The complete checkpoints by step: a checkpoint without its manifest is still being written."""
    best = None
    with contextlib.suppress(TypeError, KeyError):
        best = result["best"]["step"]
    found = []
    for name in folder.names("checkpoints"):
        written = folder.stat(f"checkpoints/{name}/manifest.json") if name.isascii() and name.isdecimal() else None
        if written is not None:
            size = _size(folder, name)
            found.append({"step": int(name), "time": written.st_mtime, "bytes": size, "best": int(name) == best})
    return sorted(found, key=lambda each: each["step"])


def _size(folder: Folder, step: str) -> int | None:
    with contextlib.suppress(WorkdirError, TypeError, KeyError, ValueError, AttributeError):
        return sum(int(size) for size, _ in folder.read_json(f"checkpoints/{step}/manifest.json")["files"].values())
    return None


def _commands(folder: Folder) -> dict[str, str]:
    """What goes on with the run, to copy."""
    run = str(folder.path)
    return {
        "resume": shlex.join(["jaxtrain", "resume", run]),
        "evaluate": shlex.join(["jaxtrain", "evaluate", run, "--report"]),
        "export": shlex.join(["jaxtrain", "export", run, "--out", f"./{folder.path.name}.safetensors"]),
        "logs": shlex.join(["jaxtrain", "logs", run, "--follow"]),
    }


def evaluation(folder: Folder, name: str) -> Any:
    """The report of an evaluation; None where there is none. Raises `WorkdirError` where it is damaged."""
    if f"{name}.json" not in folder.names("evaluation") or not _is_report(f"{name}.json"):
        return None
    return folder.read_json(f"evaluation/{name}.json", MOST_EVALUATION)


def schedule(folder: Folder) -> bytes | None:
    """The picture of the pipeline's timeline, SVG; None where there is none."""
    try:
        return folder.read("schedule.svg")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WorkdirError(f"schedule.svg cannot be read ({reason(error)}).") from None
