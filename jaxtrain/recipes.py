"""Recipes: config files, their arguments, and overrides. Imports no JAX.

A recipe is a Python file with a function `get_config(arg)` that returns `recipe(Config(...), arg, {...})`. `arg` is the text
after the colon of `--config FILE:arg`: names joined by commas. Each is a name of the recipe's own or one of `LAYOUTS`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxtrain.config import CHOSEN_FIELDS, SECTIONS, Config, flat_keys, flatten, from_dict, nested_dicts, to_dict
from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import require_local
from jaxtrain.host.search_path import Importable
from jaxtrain.host.text import did_you_mean

# Every recipe takes these arguments. They change only where arrays live, never a number of the run.
LAYOUTS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "dp": {"zero": 0},
        "zero1": {"zero": 1},
        "zero2": {"zero": 2},
        "zero3": {"zero": 3},
        "tensor2": {"tensor": 2},
        "hybrid": {"replica": 2, "zero": 3},
        "pipeline2": {"stages": 2, "microbatches": 0},
        "pipeline4": {"stages": 4, "microbatches": 0},
    }
)
Variant = Callable[[Config], Config]


def recipe(
    config: Config, arg: str | None = "", variants: Mapping[str, Variant] | None = None
) -> ml_collections.ConfigDict:
    """Applies the arguments of a recipe, from left to right.

    Args:
      config: the recipe without arguments.
      arg: names joined by commas; "" or None for none.
      variants: what each name of the recipe's own does.

    Returns:
      The locked `ConfigDict` of the result.

    Raises:
      ConfigError: an argument is neither in `variants` nor in `LAYOUTS`.
    """
    variants = variants or {}
    for name in filter(None, (arg or "").split(",")):
        if name in variants:
            config = variants[name](config)
        elif name in LAYOUTS:
            config = change(config, **{f"layout.{key}": value for key, value in LAYOUTS[name].items()})
        else:
            known = [*variants, *LAYOUTS]
            raise ConfigError(
                f"recipe argument {name!r}: must be one of {', '.join(known)}.{did_you_mean(name, known)}"
            )
    return ml_collections.ConfigDict(to_dict(config)).lock()


def change(config: Config, **fields: Any) -> Config:
    """A copy of `config` with other values of the named fields: `change(config, **{"optim.name": "adamw"})`."""
    values = to_dict(config)
    for name, value in fields.items():
        section, _, key = name.rpartition(".")
        (values[section] if section else values)[key] = value
    return from_dict(values)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config, and where each of its values came from."""

    config: Config
    origins: Mapping[str, str]
    """By dotted name: `default`, `recipe`, `argument` (of the recipe), `file` (of settings) or `flag`."""
    name: str
    """The recipe's file name without ".py"."""


def load_config(spec: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> ml_collections.ConfigDict:
    """The checked config of a recipe.

    Args:
      spec: the file and its arguments, such as "configs/resnet50_cifar100.py:production,zero3", or the name of a recipe that
        comes with jaxtrain in place of the file.
      overrides: {"train.steps": 20} or ["train.steps=20"]; a leading "--config." is accepted.

    Returns:
      A locked `ConfigDict`: its fields can be set, and `train` checks them again.

    Raises:
      ConfigError: the recipe, an argument or an override is wrong; in one sentence.
    """
    if isinstance(overrides, Mapping):
        pairs = [(key, str(value)) for key, value in overrides.items()]
    else:
        pairs = [split_override(text) for text in overrides]
    return ml_collections.ConfigDict(to_dict(resolve(str(spec), pairs).config)).lock()


def split_override(text: str) -> tuple[str, str]:
    """("train.steps", "20") from "--config.train.steps=20" or "train.steps=20". Raises `ConfigError` without a "="."""
    key, equals, value = text.removeprefix("--").removeprefix("config.").partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is not an override; write --config.{key}=VALUE.")
    return key, value


def resolve(spec: str, overrides: Iterable[tuple[str, str]] = (), settings: Iterable[tuple[str, str]] = ()) -> Resolved:
    """Runs a recipe, then applies settings and overrides; of two that name the same field the later wins.

    Args:
      spec: the recipe and its arguments: FILE:ARGUMENTS, or NAME:ARGUMENTS for one that comes with jaxtrain; "" is every
        field's default.
      overrides: pairs (dotted name, text).
      settings: the same, from a file; they come before the overrides.

    Raises:
      ConfigError: the recipe, an argument or an override is wrong; in one sentence.
    """
    overrides, settings = list(overrides), list(settings)
    path, _, arg = spec.partition(":")
    if arg:
        require_local(spec, f"--config {spec}", ConfigError)
    file = _find_recipe(path)
    with Importable(str(file.parent)):
        get_config = _load_recipe(file) if path else recipe_of_defaults
        plain_recipe, with_arg = (_call(get_config, file, each) for each in ("", arg))
    values = _override(with_arg, [*settings, *overrides])
    config = from_dict(nested_dicts(values))
    default, base, variant, final = (
        flatten(nested_dicts(c)) for c in (to_dict(Config()), plain_recipe, with_arg, to_dict(config))
    )
    flagged, filed = ({key for key, _ in pairs} for pairs in (overrides, settings))
    origins = {
        key: "flag" if key in flagged
        else "file" if key in filed
        else "argument" if variant[key] != base[key]
        else "recipe" if base[key] != default[key]
        else "default"
        for key in final
    }  # fmt: skip
    given = [key for key, origin in origins.items() if origin in ("flag", "file", "argument")]
    return Resolved(keeping(config, given), origins, file.stem)


def keeping(config: Config, fields: Sequence[str]) -> Config:
    """`config` with `layout.keep` naming what `layout.strategy=auto` may not choose.

    fields: dotted names of what a flag, a file or an argument of the recipe has set, also to its default.
    """
    if config.layout.strategy != "auto":
        return config
    names = {"train.remat" if name == "remat" else f"layout.{name}": name for name in CHOSEN_FIELDS}
    given = [name for key, name in names.items() if key in fields]
    return change(config, **{"layout.keep": tuple(dict.fromkeys([*config.layout.keep, *given]))})


def with_overrides(config: Config, overrides: Iterable[tuple[str, str]]) -> Config:
    """`config` with other values of some fields: pairs (dotted name, text). Raises `ConfigError`."""
    return from_dict(nested_dicts(_override(ml_collections.ConfigDict(to_dict(config)).lock(), list(overrides))))


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with jaxtrain, by name: in an installed package, or in the checkout that it is run from."""
    package = Path(__file__).resolve().parent
    folders = (package / "configs", package.parent / "configs")
    folder = next((folder for folder in folders if (folder / "quickstart.py").is_file()), None)
    return {path.stem: path for path in sorted(folder.glob("*.py"))} if folder else {}


def recipe_of_defaults(arg: str) -> ml_collections.ConfigDict:
    """The recipe where none is named: every field has its default."""
    return recipe(Config(), arg)


def _find_recipe(path: str) -> Path:
    """The file that is meant: `path` itself, or the recipe of that name that comes with jaxtrain."""
    if not path or Path(path).is_file():
        return Path(path)
    names = packaged_recipes()
    if path in names:
        return names[path]
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    there = sorted(p.name for p in folder.glob("*.py"))
    text = f"--config {path}: there is no such file."
    if len(Path(path).parts) > 1 or path.endswith(".py") or Path(path).is_dir():
        text += f" {folder} has {', '.join(there)}." if there else ""
        near = did_you_mean(Path(path).name, there) or did_you_mean(Path(path).stem, names)
    else:
        near = did_you_mean(path, names)
    raise ConfigError(f"{text} Recipes that come with jaxtrain, by name: {', '.join(names)}.{near}")


def _load_recipe(path: Path) -> Callable[[str], Any]:
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"--config {path}: a recipe is a Python file; a YAML file is given with --yaml {path}.")
    spec = importlib.util.spec_from_file_location(f"jaxtrain_recipe_{path.stem}", path.absolute())
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config {path}: a recipe is a Python file, with a name that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(_explain(error, path)) from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"--config {path}: the file must define get_config(arg).")
    return get_config


def _call(get_config: Callable[..., Any], path: Path, arg: str) -> ml_collections.ConfigDict:
    takes_argument = _takes_argument(get_config)
    if arg and not takes_argument:
        raise ConfigError(
            f"--config {path}:{arg}: its get_config takes no argument; write get_config(arg='') there, and return "
            "recipe(config, arg), or leave the argument out."
        )
    try:
        values = get_config(arg) if takes_argument else get_config()
    except ConfigError as error:
        raise ConfigError(f"--config {path}{':' if arg else ''}{arg}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(_explain(error, path)) from error
    if not isinstance(values, ml_collections.ConfigDict):
        raise ConfigError(
            f"--config {path}: get_config returned {type(values).__name__}; return jaxtrain.recipes.recipe(...)."
        )
    return values


def _takes_argument(get_config: Callable[..., Any]) -> bool:
    try:
        inspect.signature(get_config).bind("")
    except TypeError:
        return False
    except ValueError:  # of a built-in, which has no signature
        return True
    return True


def _explain(error: BaseException, path: Path) -> str:
    """ "file:line: error" on one line; the line is the last one of the recipe in the traceback."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path.absolute())]
    if isinstance(error, SyntaxError) and error.filename == str(path.absolute()):
        lines.append(error.lineno)
    where = f"{path}:{lines[-1]}" if lines and lines[-1] else str(path)
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"


def _override(values: ml_collections.ConfigDict, overrides: list[tuple[str, str]]) -> ml_collections.ConfigDict:
    known = flat_keys()
    for key, _ in overrides:
        if key in SECTIONS:
            raise ConfigError(f"config.{key} is a section; set one of its fields.{_suggest(key, known)}")
        if key not in known:
            raise unknown_field(key)
    values = values.copy_and_resolve_references().lock()
    for key, text in overrides:
        # One at a time, so that an error belongs to this one. absl reads `sys_argv` to find the overridden keys.
        argv = ["jaxtrain", f"--config.{key}={text}"]
        found = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", values, flag_values=found, sys_argv=argv)
        try:
            found(argv)
        except (flags.Error, TypeError, ValueError, SyntaxError) as error:
            kind = type(flatten(nested_dicts(values))[key]).__name__
            kinds = {
                "int": "a whole number",
                "float": "a number",
                "bool": "true or false",
                "tuple": "a tuple such as (0.5, 0.5)",
            }
            raise ConfigError(f"config.{key}={text!r}: must be {kinds.get(kind, kind)}.") from error
        values = found["config"].value or values
    return values


def unknown_field(key: str) -> ConfigError:
    """The error for a dotted name that no field has; it names the nearest field."""
    return ConfigError(f"config.{key} does not exist.{_suggest(key, flat_keys())}")


def _suggest(key: str, known: list[str]) -> str:
    """A hint: the nearest field or section, else the fields of the section that `key` names, else the sections."""
    section, _, rest = key.partition(".")
    fields = {name.removeprefix(section + "."): name for name in known if name.startswith(section + ".")}
    if fields:
        return did_you_mean(rest, fields, f"config.{section}.") or f" config.{section} has {', '.join(fields)}."
    same = [name for name in known if name.endswith("." + key.rpartition(".")[2])]
    tops = dict.fromkeys(name.partition(".")[0] for name in known)
    elsewhere = f" Did you mean 'config.{same[0]}'?" if same else f" There are {', '.join(tops)}."
    return did_you_mean(key, [*known, *tops], "config.") or elsewhere
