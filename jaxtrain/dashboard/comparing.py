"""Several runs over each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.dashboard.curves import Axis, Curves, Question, compared, to_json
from jaxtrain.dashboard.overview import Row
from jaxtrain.host.folder import Folder


def compare(memory: Curves, runs: Mapping[str, tuple[Folder, Row]], question: Question) -> dict[str, Any]:
    """The answer to `api/compare`."""
    found = compared(memory, runs, question)
    plain = Axis(question.axis)
    return {
        "column": question.columns[0],
        "x": question.axis,
        "runs": [
            {
                "id": row.id,
                "name": row.name,
                "state": row.state,
                "seed": row.seed,
                "series": to_json(series, plain) if (series := found[row.id]) else None,
            }
            for _, row in runs.values()
        ],
        "differences": [],
        "groups": [],
    }
