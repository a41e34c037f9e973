"""Several runs over each other: in which settings they differ, and mean and spread of those that differ in the seed alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.config import Config, flatten, to_dict, tuples_to_lists
from jaxtrain.dashboard.curves import Curves, Question, curve, to_json
from jaxtrain.dashboard.overview import Row
from jaxtrain.errors import WorkdirError
from jaxtrain.host.folder import Folder
from jaxtrain.host.redaction import redact_values
from jaxtrain.runs.series import Series
from jaxtrain.runs.settings import differing

_MOST_POINTS = 20_000  # points of a curve that a mean is made of


def compare(memory: Curves, runs: Mapping[str, tuple[Folder, Row]], question: Question) -> dict[str, Any]:
    """The answer to `api/compare`: one column of several runs, by their identifiers."""
    settings = {identifier: _settings(folder, row) for identifier, (folder, row) in runs.items()}
    keys = differing(list(settings.values()))
    found = {identifier: curve(memory, folder, row, question) for identifier, (folder, row) in runs.items()}
    return {
        "column": question.columns[0],
        "x": question.axis,
        "runs": [
            {
                "id": identifier,
                "name": row.name,
                "state": row.state,
                "seed": row.seed,
                "series": to_json(series) if (series := found[identifier]) else None,
            }
            for identifier, (_, row) in runs.items()
        ],
        "differences": [
            {"key": key, "values": {identifier: each.get(key) for identifier, each in settings.items()}} for key in keys
        ],
        "groups": _groups(memory, runs, settings, keys, question),
    }


def _settings(folder: Folder, row: Row) -> dict[str, Any]:
    """Those that an older config lacks have their defaults; none where it cannot be read."""
    with contextlib.suppress(WorkdirError):
        stored = folder.read_json("config.json")
        if isinstance(stored, dict):
            values = flatten(to_dict(Config())) | flatten(redact_values(stored))
            return {key: tuples_to_lists(value) for key, value in values.items()} | {"devices": row.devices}
    return {}


def _groups(
    memory: Curves,
    runs: Mapping[str, tuple[Folder, Row]],
    settings: Mapping[str, Mapping[str, Any]],
    keys: Sequence[str],
    question: Question,
) -> list[dict[str, Any]]:
    """Mean and spread of each group of two or more runs that differ in the seed alone."""
    members: dict[str, list[str]] = {}
    for identifier, values in settings.items():
        if values:
            members.setdefault(json.dumps([values.get(key) for key in keys]), []).append(identifier)
    whole = dataclasses.replace(question, points=_MOST_POINTS)
    groups = []
    for identifiers in members.values():
        found = [curve(memory, *runs[identifier], whole) for identifier in identifiers]
        lines = [series for series in found if series]
        if len(lines) < 2:
            continue
        groups.append(
            {
                "runs": identifiers,
                "settings": {key: settings[identifiers[0]].get(key) for key in keys},
                "seeds": [runs[identifier][1].seed for identifier in identifiers],
                **spread(lines, question.points),
            }
        )
    return groups


def spread(lines: Sequence[Series], points: int) -> dict[str, list[Any]]:
    """The mean of several curves and one standard deviation (n - 1) to both sides, at about `points` places.

    Each curve counts from its first point to its last, between two points as a straight line; where two or more of them are.
    """
    places = np.unique(np.concatenate([line.x for line in lines]))
    if places.size > points:
        places = places[np.unique(np.linspace(0, places.size - 1, points).astype(np.int64))]
    heights = np.full((len(lines), places.size), np.nan)
    for height, line in zip(heights, lines, strict=True):
        order = np.argsort(line.x, kind="stable")
        height[:] = np.interp(places, line.x[order], line.y[order], left=np.nan, right=np.nan)
    count = np.isfinite(heights).sum(axis=0)
    places, heights, count = places[count > 1], heights[:, count > 1], count[count > 1]
    mean, deviation = np.nanmean(heights, axis=0), np.nanstd(heights, axis=0, ddof=1)
    return {
        "x": places.tolist(),
        "mean": mean.tolist(),
        "low": (mean - deviation).tolist(),
        "high": (mean + deviation).tolist(),
        "count": count.tolist(),
    }
