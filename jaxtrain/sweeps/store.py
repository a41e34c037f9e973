"""`sweep.json`: what a sweep is and what it has decided, so that the same command goes on with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.errors import ConfigError, WorkdirError
from jaxtrain.host.files import ELSEWHERE, atomic_write, read_json
from jaxtrain.sweeps.plan import Plan
from jaxtrain.sweeps.spec import Range
from jaxtrain.workdir import SWEEP_FILE

_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided at one rung of halving."""

    rung: int
    """From 1."""
    share: float
    """Of a run's length."""
    figures: Mapping[str, float | None]
    """By setting: the mean over its seeds; None where one of them failed, or its figure is not finite."""
    kept: tuple[str, ...]
    """The settings that go on, the best first."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A sweep's file."""

    plan: Mapping[str, Any]
    decisions: tuple[Decision, ...] = ()


def path_in(workdir: Path) -> Path:
    """Where the file is."""
    return workdir / SWEEP_FILE


def read(workdir: Path) -> Stored | None:
    """The file; None where there is none. Raises `WorkdirError` where it is damaged."""
    path = path_in(workdir)
    values = read_json(path)
    if values is None:
        return None
    try:
        if values["version"] != _VERSION:
            raise WorkdirError(
                f"{path} is of version {values['version']}, and this jaxtrain knows {_VERSION}; {ELSEWHERE}."
            )
        decisions = tuple(Decision(**{**each, "kept": tuple(each["kept"])}) for each in values["decisions"])
        return Stored({key: values[key] for key in ("base", "over", "random", "seeds", "halving", "runs")}, decisions)
    except (TypeError, KeyError) as error:
        raise WorkdirError(f"{path} is damaged ({error!r}); {ELSEWHERE}.") from None


def write(workdir: Path, plan: Plan, decisions: Sequence[Decision]) -> None:
    """Replaces the file. Raises `WorkdirError` where it cannot be written."""
    values = {"version": _VERSION, "config": plan.sweep.config, **describe(plan)}
    values |= {"decisions": [dataclasses.asdict(each) for each in decisions]}
    atomic_write(path_in(workdir), json.dumps(values, indent=1) + "\n")


def describe(plan: Plan) -> dict[str, Any]:
    """A plan as JSON has it."""
    sweep = plan.sweep
    over = {
        key: {each.kind: list(each.values)} if isinstance(each, Range) else list(each)
        for key, each in sweep.over.items()
    }
    values = {
        "base": dict(plan.base),
        "over": over,
        "random": {"n": sweep.draws, "seed": sweep.draw_seed} if sweep.draws else None,
        "seeds": list(sweep.seeds),
        "halving": dataclasses.asdict(plan.halving) if plan.halving else None,
        "runs": [{"name": run.name, "settings": dict(run.settings)} for run in plan.runs],
    }
    return json.loads(json.dumps(values))  # which has lists in place of tuples


def refuse_changes(stored: Stored, plan: Plan, workdir: Path) -> None:
    """Raises `ConfigError` where a plan differs from the stored one in more than values, seeds or draws that were added."""
    now, added = describe(plan), {run.name for run in plan.runs} - {run["name"] for run in stored.plan["runs"]}
    halving = plan.sweep.halving
    if added and halving and not halving.rungs and stored.plan["halving"]:
        now["halving"]["rungs"] = stored.plan["halving"][
            "rungs"
        ]  # more settings have more rungs: nobody has changed that
    differences = list(_differences(stored.plan, now))
    if stored.decisions and added and not differences:
        differences = [f"{len(added)} runs are new, and halving has already decided which of the others go on"]
    if differences:
        raise ConfigError(
            f"The sweep in {workdir} is another one: {'; '.join(differences)}. Values and seeds may be added; for the rest set "
            "it back, or choose another --workdir."
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    varied = {*old["over"], *new["over"]}
    for key, value in new["base"].items():
        if key in old["base"] and old["base"][key] != value and key not in varied:
            yield f"config.{key} is {value}, and was {old['base'][key]}"
    for key in sorted(varied):
        before, now = old["over"].get(key), new["over"].get(key)
        if before is None or now is None:
            yield f"config.{key} {'varies now' if before is None else 'varies no more'}"
        elif before != now and (new["random"] or isinstance(now, dict)):
            yield f"config.{key} is drawn from {now}, and was from {before}"
        elif not new["random"] and (gone := _values(old, key) - _values(new, key)):
            yield f"config.{key} has no {', '.join(sorted(gone))} any more"
    if gone := [str(seed) for seed in old["seeds"] if seed not in new["seeds"]]:
        yield f"the seeds have no {', '.join(gone)} any more"
    elif new["seeds"] and not old["seeds"]:
        yield "it has seeds now, and had none"
    for key, fixed in (("random", "seed"), ("halving", "")):
        before, now = old[key], new[key]
        if (before is None) != (now is None):
            yield f"{key} was {'not ' * (before is None)}asked for"
        elif before and fixed and (before[fixed] != now[fixed] or before["n"] > now["n"]):
            yield f"random is {now}, and was {before}"
        elif not fixed and before != now:
            yield f"halving is {now}, and was {before}"


def _values(plan: Mapping[str, Any], key: str) -> set[str]:
    """What a field has in the runs, whichever way it was written: 0.10 is 0.1."""
    return {str(run["settings"][key]) for run in plan["runs"]}
