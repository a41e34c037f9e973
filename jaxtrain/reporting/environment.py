"""What runs were made with: versions, code, devices, commands, and the settings that are not the defaults."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.config import Config, flatten, to_dict, tuples_to_lists
from jaxtrain.reporting.blocks import Block, Section, Sentences
from jaxtrain.reporting.run_files import not_recorded, of_each
from jaxtrain.reporting.table import Table
from jaxtrain.runs.record import RunRecord
from jaxtrain.runs.settings import shown


def environment_section(runs: Sequence[RunRecord], problems: list[str]) -> Section:
    """What all runs have in common, and in what they differ, by the latest start of each."""
    found = of_each(runs, "manifest.json", _latest, problems)
    facts = {run.name: dict(of) for run, (of, _) in found}
    names = list(dict.fromkeys(key for of in facts.values() for key in of))
    common = [key for key in names if len({of.get(key) for of in facts.values()}) == 1]
    rest = [key for key in names if key not in common]
    blocks: list[Block] = []
    if common:
        caption = "The same for all runs" if len(facts) > 1 else "What the run was made with"
        first = next(iter(facts.values()))
        blocks.append(Table.of(caption, ["what", "value"], [[key, first[key]] for key in common]))
    if rest:
        rows = [[name, *(of.get(key) for key in rest)] for name, of in facts.items()]
        blocks.append(Table.of("What is different", ["run", *rest], rows))
    if settings := _settings(runs, {run.name: origins for run, (_, origins) in found}):
        blocks.append(settings)
    commits = {(of.get("git commit"), of.get("jaxtrain"), of.get("jax")) for of in facts.values()}
    texts = not_recorded(runs, [run for run, _ in found], "Versions and devices")
    if len(commits) > 1:
        texts.append("The runs are of different versions of the code or of JAX, which may be what makes them differ.")
    return Section("Environment", (*([Sentences(tuple(texts))] if texts else []), *blocks))


def _latest(manifest: Mapping[str, Any]) -> tuple[list[tuple[str, str]], Mapping[str, str]]:
    """The facts of the latest start, and where its settings come from, as far as it says so."""
    start = manifest["starts"][-1]
    git, devices = start.get("git"), start.get("devices")
    facts: dict[str, Any] = {"command": shlex.join(map(str, start["command"]))} if start.get("command") else {}
    facts |= {key: start.get(key) for key in ("started", "hostname", "platform", "cpus", "python")}
    if isinstance(devices, dict):
        facts["devices"] = ", ".join(f"{count} x {kind}" for kind, count in devices["kinds"].items())
        facts |= {key: devices.get(key) for key in ("backend", "processes")}
    if isinstance(git, dict):
        facts["git commit"] = f"{git['commit']}{' with changes' if git['dirty'] else ''}"
    for key in ("versions", "environment"):
        facts |= start[key] if isinstance(start.get(key), dict) else {}
    facts["starts"] = len(manifest["starts"])
    origins = start.get("origins")
    return [(key, str(value)) for key, value in facts.items() if value is not None], (
        origins if isinstance(origins, dict) else {}
    )


def _settings(runs: Sequence[RunRecord], origins: Mapping[str, Mapping[str, str]]) -> Table | None:
    """The settings that are not the defaults, where they come from, and their values."""
    readable = [run for run in runs if run.settings]
    if not readable:
        return None
    defaults = {key: tuples_to_lists(value) for key, value in flatten(to_dict(Config())).items()}
    rows = []
    for key, default in defaults.items():
        values = list(dict.fromkeys(shown(run.settings[key]) for run in readable if key in run.settings))
        if values == [shown(default)]:
            continue
        places = dict.fromkeys(of[key] for of in origins.values() if key in of)
        rows.append([key, "; ".join(values), shown(default), ", ".join(map(str, places)) or None])
    columns = (
        ["setting", "value", "default", "from"] if any(row[3] for row in rows) else ["setting", "value", "default"]
    )
    return Table.of("Settings that are not the defaults", columns, [row[: len(columns)] for row in rows])
