"""Files in YAML that a user writes, such as a job or a sweep: read as plain data, their keys and values checked one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxtrain.errors import ConfigError
from jaxtrain.host.files import patiently
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import did_you_mean

_MOST_BYTES = 1 << 20  # of a file


def read_yaml_file(path: str | Path, what: str, advice: str) -> Any:
    """What a file holds.

    Args:
      path: of the file.
      what: it is, for errors: "The job".
      advice: where such a file comes from, for the error where there is none.

    Raises:
      ConfigError: it cannot be read, or is no YAML.
    """
    require_local(path, f"{what} {path}", ConfigError)
    try:
        text = patiently(Path(path).read_bytes)
        if len(text) > _MOST_BYTES:
            raise ConfigError(f"{path}: has {len(text):,} bytes, and is no {what.rsplit(maxsplit=1)[-1]}.")
        return yaml.load(text.decode(), _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {advice}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no YAML ({_what_is_wrong(error)}).") from None


def _what_is_wrong(error: Exception) -> str:
    """Without the line itself, which PyYAML would quote: it may hold a secret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error) if isinstance(error, yaml.YAMLError) else "it is not text in UTF-8, or is nested too deeply"


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys; one of them is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is there twice")
        return super().construct_mapping(node, deep)


def whole_number(least: int) -> Callable[[Any], int]:
    """A kind for `Fields.take`: whole numbers from `least` to a million."""

    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= 10**6:
            raise ValueError(f"a whole number of at least {least}")
        return value

    return check


class Fields:
    """A mapping of a file, whose values are checked one by one."""

    def __init__(self, values: Any, where: str, example: str, *, secret: str = ""):
        """Raises `ConfigError` where it is no mapping.

        Args:
          values: what the file holds there.
          where: for errors.
          example: of a key and its value.
          secret: the key whose value errors do not show.
        """
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ConfigError(f"{where}: must hold keys and values, such as {example}.")
        self.values, self._where, self._secret = values, where, secret

    def refuse_unknown(self, known: Mapping[str, Any]) -> None:
        """Raises `ConfigError` for a key that there is not."""
        for key in self.values:
            if key not in known:
                raise ConfigError(
                    f"{self._where}: there is no key {key!r}; the keys are {', '.join(known)}.{did_you_mean(key, known)}"
                )

    def take(self, kinds: Mapping[str, Callable[[Any], Any] | None]) -> dict[str, Any]:
        """The values that are given, each made by its kind. None in `kinds`: read elsewhere.

        A kind raises `ValueError` with what the value must be.
        """
        taken = {}
        for key, kind in kinds.items():
            if kind is None or key not in self.values:
                continue
            try:
                taken[key] = kind(self.values[key])
            except ValueError as error:
                shown = "its value" if key == self._secret else repr(self.values[key])
                raise ConfigError(f"{self._where}: {key}: {shown} must be {error}.") from None
        return taken
