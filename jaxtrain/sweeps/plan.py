"""The runs of a sweep: their settings, configs and names. All of it is known, and checked, before the first run starts."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtrain.config import Config, flatten, to_dict
from jaxtrain.errors import ConfigError
from jaxtrain.recipes import keeping, resolve, with_overrides
from jaxtrain.sweeps.spec import SEED, Halving, Range, Sweep

_MOST_RUNS = 10_000
_LONGEST_NAME = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")  # in the value of a name


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    name: str
    """Of its directory: a function of its settings."""
    setting: str
    """The same without the seed: the runs of a setting differ by chance alone."""
    settings: Mapping[str, Any]
    """The fields that vary, by dotted name, and this run's values."""
    config: Config
    origins: Mapping[str, str]
    """Where each of its values comes from, as `recipes.Resolved` has it; those that vary from a `flag`."""
    command: tuple[str, ...]
    """That trains the same run by itself, but for its work directory."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep whose runs are known."""

    sweep: Sweep
    base: Mapping[str, Any]
    """Every field's value in the base config, by dotted name."""
    runs: tuple[PlannedRun, ...]
    halving: Halving | None
    """With its number of rungs and its metric."""

    def settings(self) -> dict[str, list[PlannedRun]]:
        """The runs by their setting, in the plan's order."""
        found: dict[str, list[PlannedRun]] = {}
        for run in self.runs:
            found.setdefault(run.setting, []).append(run)
        return found


def make_plan(sweep: Sweep) -> Plan:
    """Resolves the config of every run.

    Raises:
      ConfigError: one of them is wrong, two are the same, or there are too many.
    """
    resolved = resolve(sweep.config, sweep.overrides.items())
    base = resolved.config
    combinations = [
        {**setting, **seed}
        for setting in (_draws(sweep) if sweep.draws else _grid(sweep))
        for seed in ([{SEED: str(seed)} for seed in sweep.seeds] or [{}])
    ]
    fields, labels = [*sweep.over, *([SEED] if sweep.seeds else [])], _labels(sweep.over)
    runs: list[PlannedRun] = []
    for pairs in combinations:
        config = keeping(with_overrides(base, pairs.items()), list(pairs))
        values = flatten(to_dict(config))
        settings = {key: values[key] for key in fields}
        parts = [f"{labels[key]}={_UNSAFE.sub('-', str(settings[key])).strip('-')}" for key in sweep.over]
        setting = _short(",".join(parts), {key: settings[key] for key in sweep.over})
        name = ",".join(filter(None, [setting, f"{SEED}={settings[SEED]}" if sweep.seeds else ""]))
        origins = {**resolved.origins, **dict.fromkeys(pairs, "flag")}
        flags = [f"--config.{key}={value}" for key, value in {**sweep.overrides, **pairs}.items()]
        command = ("jaxtrain", "train", "--config", sweep.config, *flags)
        runs.append(PlannedRun(name, setting, settings, config, origins, command))
    runs = _distinct(runs)
    base_values = flatten(to_dict(base))
    return Plan(sweep, base_values, tuple(runs), _resolved(sweep.halving, base, runs))


def _grid(sweep: Sweep) -> Iterator[dict[str, str]]:
    """All combinations; the last field varies fastest."""
    values = [each.values if isinstance(each, Range) else each for each in sweep.over.values()]
    if (count := math.prod(map(len, values)) * max(len(sweep.seeds), 1)) > _MOST_RUNS:
        raise ConfigError(
            f"The sweep has {count:,} runs, and at most {_MOST_RUNS:,} are taken; vary less, or draw at random."
        )
    for combination in itertools.product(*values):
        yield dict(zip(sweep.over, combination, strict=True))


def _draws(sweep: Sweep) -> list[dict[str, str]]:
    """Distinct settings, drawn one by one: a larger `draws` has those of a smaller one first."""
    if (count := sweep.draws * max(len(sweep.seeds), 1)) > _MOST_RUNS:
        raise ConfigError(f"The sweep has {count:,} runs, and at most {_MOST_RUNS:,} are taken; draw fewer.")
    found: list[dict[str, str]] = []
    for number in range(100 * sweep.draws):
        drawn = {
            key: _draw(each if isinstance(each, Range) else Range("choice", each), f"{sweep.draw_seed}/{number}/{key}")
            for key, each in sweep.over.items()
        }
        if drawn not in found:
            found.append(drawn)
        if len(found) == sweep.draws:
            return found
    raise ConfigError(
        f"The ranges have {len(found)} different settings, and {sweep.draws} are to be drawn; draw fewer, or take a grid."
    )


def _draw(source: Range, key: str) -> str:
    """A value as text, a function of `key` alone; numbers have four digits, so that names are short."""
    share = random.Random(key).random()
    if source.kind == "choice":
        return source.values[int(share * len(source.values))]
    low, high = source.values
    if source.kind == "int":
        return str(low + int(share * (high - low + 1)))
    if source.kind == "loguniform":
        return f"{math.exp(math.log(low) + share * math.log(high / low)):.4g}"
    return f"{low + share * (high - low):.4g}"


def _labels(over: Mapping[str, object]) -> dict[str, str]:
    """What a name calls each field: its last word, where no other field of the sweep has it."""
    last = {key: key.rpartition(".")[2] for key in over}
    words = list(last.values())
    return {key: word if words.count(word) == 1 and word != "name" else key for key, word in last.items()}


def _short(name: str, settings: Mapping[str, Any]) -> str:
    """`name`, cut where it is too long for a directory; a digest of the settings then keeps it apart from others."""
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{_digest(settings)}"


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]


def _distinct(runs: list[PlannedRun]) -> list[PlannedRun]:
    """The runs, with names of their own. Raises `ConfigError` where two are the same run."""
    by_config: dict[str, PlannedRun] = {}
    for run in runs:
        key = repr(to_dict(run.config))
        if key in by_config:
            raise ConfigError(
                f"The runs {by_config[key].name} and {run.name} are the same ({_listed(run.settings)}); list each value once."
            )
        by_config[key] = run
    name, count = collections.Counter(run.name for run in runs).most_common(1)[0]
    if count > 1:
        same = " and ".join(_listed(run.settings) for run in runs if run.name == name)
        raise ConfigError(f"{count} runs would be called {name}: those with {same}; leave all but one of them out.")
    return runs


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"config.{key}={value}" for key, value in settings.items())


def _resolved(halving: Halving | None, base: Config, runs: list[PlannedRun]) -> Halving | None:
    if halving is None:
        return None
    settings = len({run.setting for run in runs})
    most = int(math.log(settings, halving.eta) + 1e-9)
    if settings < halving.eta or halving.rungs > most:
        raise ConfigError(
            f"halving: of {settings} settings, one in {halving.eta} is kept at each rung, so there are at most {most} rungs; "
            "vary more, or choose a smaller eta or fewer rungs."
        )
    return Halving(halving.eta, halving.rungs or most, halving.metric or base.checkpoint.best)
