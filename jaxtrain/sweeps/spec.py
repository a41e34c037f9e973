"""What a sweep is: a base config, the values that vary, seeds, halving. Read from a file in YAML, a mapping, or flags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.config import SECTIONS, flat_keys
from jaxtrain.errors import ConfigError
from jaxtrain.jobs.yaml_file import Fields, read_yaml_file, whole_number
from jaxtrain.recipes import unknown_field

METRICS = ("val_accuracy", "val_loss", "val_top5")
RANGES = ("choice", "uniform", "loguniform", "int")
SEED = "seed"
"""The field that makes the runs of one setting differ by chance alone."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Where a value is drawn from."""

    kind: str
    """One of `RANGES`; `int` are whole numbers, its bounds included."""
    values: tuple[Any, ...]
    """The values of a choice, as text; or the two bounds."""


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson and Talwalkar 2016): all run a part of their length, then the best of them eta times it."""

    eta: int = 2
    """At each rung one setting of so many goes on."""
    rungs: int = 0
    """How often is decided: at length / eta ** rungs, ..., length / eta. 0: until one setting is left."""
    metric: str = ""
    """A validation's figure that decides, as `checkpoint.best` names it; "": that of the base config."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep, as it was asked for."""

    config: str
    """A recipe and its arguments, as `jaxtrain train --config` takes it."""
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Dotted names of fields that are the same in all runs, and their values as text."""
    over: Mapping[str, tuple[str, ...] | Range] = dataclasses.field(default_factory=dict)
    """The fields that vary: all combinations of values, or where to draw from (with `draws`)."""
    draws: int = 0
    """How many settings are drawn at random; 0: all combinations."""
    draw_seed: int = 0
    seeds: tuple[int, ...] = ()
    """Each setting runs once with each; (): with the seed of the base config."""
    halving: Halving | None = None
    jobs: int = 1
    """How many runs at once."""
    workdir: str = ""


def read_sweep(source: str | Path | Mapping[str, Any]) -> Sweep:
    """The sweep of a file in YAML, or of a mapping with the same keys. Raises `ConfigError`."""
    if isinstance(source, Mapping):
        return _parse(source, "The sweep")
    return _parse(read_yaml_file(source, "The sweep", "docs/sweeps.md has an example"), str(source))


def from_words(config: str, over: Sequence[Sequence[str]], draws: int = 0) -> Sweep:
    """The sweep that flags describe.

    Args:
      config: a recipe and its arguments.
      over: for each field its name and the values; with `draws`, instead of values a range: `loguniform 0.001 1`.
      draws: how many settings are drawn at random; 0: all combinations.

    Raises:
      ConfigError: a field is named twice, is none, or has no values.
    """
    values: dict[str, Any] = {}
    for name, *words in over:
        key = name.removeprefix("config.")
        if key in values:
            raise ConfigError(f"--over {name}: is there twice; give all its values after one.")
        is_range = draws and key != SEED and words and words[0] in RANGES
        values[key] = {words[0]: words[1:]} if is_range else words
    if not values:
        raise ConfigError("A sweep needs a FILE, or --config FILE and --over FIELD VALUE VALUE ...")
    seeds = {"seeds": values.pop(SEED)} if SEED in values else {}
    axes = {"random": {"n": draws, "ranges": values}} if draws else {"grid": values} if values else {}
    return _parse({"config": config, **axes, **seeds}, "--over")


def _parse(values: Any, where: str) -> Sweep:
    fields = Fields(values, where, "`config: quickstart`")
    fields.refuse_unknown(_KEYS)
    if "config" not in fields.values:
        raise ConfigError(f"{where}: the sweep has no config; name a recipe, as in `config: quickstart`.")
    if "grid" in fields.values and "random" in fields.values:
        raise ConfigError(f"{where}: has a grid and random; choose one of them.")
    taken = fields.take(_KEYS)
    if SEED in (over := dict(taken.pop("grid", {}))):
        if "seeds" in taken:
            raise ConfigError(f"{where}: has seeds, and {SEED} in the grid; leave one out.")
        taken["seeds"] = _seeds(list(over.pop(SEED)))
    if "random" in fields.values:
        random = Fields(fields.values["random"], f"{where}: random", "`n: 8`")
        random.refuse_unknown(_RANDOM_KEYS)
        drawn = random.take(_RANDOM_KEYS)
        if not {"n", "ranges"} <= drawn.keys():
            raise ConfigError(
                f"{where}: random needs n, and ranges such as {{optim.learning_rate: {{uniform: [0, 1]}}}}."
            )
        if SEED in drawn["ranges"]:
            raise ConfigError(f"{where}: random: {SEED} is not drawn; list seeds, as in `seeds: [0, 1, 2]`.")
        over, taken["draws"], taken["draw_seed"] = drawn["ranges"], drawn["n"], drawn.get("seed", 0)
    if fields.values.get("halving") is not None:
        halving = Fields(fields.values["halving"], f"{where}: halving", "`eta: 2`")
        halving.refuse_unknown(_HALVING_KEYS)
        taken["halving"] = Halving(**halving.take(_HALVING_KEYS))
    sweep = Sweep(over=over, **taken)
    for key in sweep.overrides:
        if key in sweep.over or (key == SEED and sweep.seeds):
            raise ConfigError(f"{where}: {key} varies, and has a fixed value among the overrides; leave one out.")
    if not sweep.over and not sweep.seeds:
        raise ConfigError(f"{where}: nothing varies; give it a grid, random or seeds.")
    return sweep


# ------------------------------------------------------------------------------------------------------- kinds of values


def field(name: str) -> str:
    """The dotted name of a field, without a `config.` in front. Raises `ConfigError` where there is no such field."""
    key = name.removeprefix("config.")
    if key in SECTIONS:
        raise ConfigError(f"config.{key} is a section; vary one of its fields, such as config.{key}.FIELD.")
    if key not in flat_keys():
        raise unknown_field(key)
    return key


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("text")
    return value


def _value(value: Any) -> str:
    """One value of a field, as text that an override takes."""
    if value is None or isinstance(value, Mapping):
        raise ValueError("text, numbers or lists")
    if isinstance(value, (list, tuple)):
        return str(_tuples(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, (list, tuple)) else value


def _values(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("a list of at least one value")
    return tuple(map(_value, value))


def _flat(values: Any, wanted: str, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Fields and what stands there, nested by section or with dots."""
    if not isinstance(values, Mapping) or not values or not all(isinstance(key, str) for key in values):
        raise ValueError(wanted)
    for key, value in values.items():
        name = f"{prefix}{key}".removeprefix("config.")
        if isinstance(value, Mapping) and (name in SECTIONS or name == "config"):
            yield from _flat(value, wanted, "" if name == "config" else f"{name}.")
        else:
            yield field(name), value


def _of_fields(values: Any, wanted: str, kind: Callable[[Any], Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in _flat(values, wanted):
        if key in made:
            raise ConfigError(f"config.{key} is there twice; give all its values at once.")
        try:
            made[key] = kind(value)
        except ValueError as error:
            raise ConfigError(f"config.{key}: {value!r} must be {error}.") from None
    return made


def _overrides(values: Any) -> dict[str, str]:
    return _of_fields(values, "fields of the config and their values, such as {train.epochs: 3}", _value)


def _grid(values: Any) -> dict[str, tuple[str, ...]]:
    return _of_fields(values, "fields and lists of values, such as {optim.learning_rate: [0.1, 0.2]}", _values)


def _ranges(values: Any) -> dict[str, Range]:
    wanted = "fields and where to draw from, such as {optim.learning_rate: {loguniform: [0.01, 1]}}"
    return _of_fields(values, wanted, _range)


def _range(value: Any) -> Range:
    if isinstance(value, (list, tuple)):
        return Range("choice", _values(value))
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in RANGES:
        raise ValueError(f"a list of values, or one of {', '.join(RANGES)} with its bounds: {{uniform: [0, 1]}}")
    kind, given = next(iter(value.items()))
    if kind == "choice":
        return Range(kind, _values(given))
    try:
        low, high = (int(each) if kind == "int" else float(each) for each in given)
    except (TypeError, ValueError):
        raise ValueError(f"two {'whole ' * (kind == 'int')}numbers, such as {{{kind}: [1, 10]}}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (kind == "loguniform" and low <= 0):
        raise ValueError(f"two rising numbers{' above 0' * (kind == 'loguniform')}")
    return Range(kind, (low, high))


def _seeds(value: Any) -> tuple[int, ...]:
    wanted = "a list of whole numbers, or how many seeds there are from 0 on"
    if type(value) is int and 0 < value <= 10**4:
        return tuple(range(value))
    if not isinstance(value, (list, tuple)) or not value or any(isinstance(each, (bool, float)) for each in value):
        raise ValueError(wanted)
    try:
        return tuple(int(each) for each in value)
    except (TypeError, ValueError):
        raise ValueError(wanted) from None


def _metric(value: Any) -> str:
    if value not in METRICS:
        raise ValueError(f"one of {', '.join(METRICS)}")
    return value


_KEYS: dict[str, Callable[[Any], Any] | None] = {
    "config": _text, "overrides": _overrides, "grid": _grid, "random": None, "seeds": _seeds, "halving": None,
    "jobs": whole_number(1), "workdir": _text,
}  # fmt: skip
_RANDOM_KEYS: dict[str, Callable[[Any], Any] | None] = {
    "n": whole_number(1),
    "seed": whole_number(0),
    "ranges": _ranges,
}
_HALVING_KEYS: dict[str, Callable[[Any], Any] | None] = {
    "eta": whole_number(2),
    "rungs": whole_number(1),
    "metric": _metric,
}
