"""What is to be run, as `job.yaml` describes it. A wrong key or value is one `ConfigError`; nothing is run by reading it."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.config import flatten
from jaxtrain.errors import ConfigError
from jaxtrain.jobs.yaml_file import Fields, read_yaml_file, whole_number

SCHEDULERS = ("local", "slurm", "pbs", "kubernetes", "skypilot")

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?")  # what Kubernetes takes as a name, and every other scheduler
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|K|M|G|T)?")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_TIME = re.compile(r"(\d+):([0-5]\d):([0-5]\d)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a job needs on each of its hosts."""

    gpu: int = 0
    cpu: int = 1
    memory: int = 0
    """In bytes; 0 does not say."""
    accelerator: str = ""
    """The GPUs' name, as SkyPilot has it (A100, L4); for SkyPilot alone."""

    @property
    def gibibytes(self) -> int:
        """`memory`, rounded up to whole GiB, as schedulers take it."""
        return -(-self.memory // _UNITS["Gi"])


@dataclasses.dataclass(frozen=True)
class Job:
    """One job."""

    name: str
    directory: str
    """Where it runs: that of its file. Relative paths are relative to it."""
    description: str = ""
    config: str = ""
    """A recipe, as `jaxtrain train --config` takes it; or else there is a `command`."""
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Dotted names of the config's fields, and their values as text."""
    workdir: str = ""
    """Of the run; "" is runs/NAME."""
    command: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    """Packages beside jaxtrain, as pip takes them."""
    image: str = ""
    """Of a container, for Kubernetes and SkyPilot."""
    resources: Resources = Resources()
    nodes: int = 1
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scheduler: str = "local"
    queue: str = ""
    """Slurm's partition, the queue of PBS, or Kueue's local queue; "" is the scheduler's own."""
    time_limit: str = ""
    """HH:MM:SS, for Slurm and PBS; "" is the scheduler's own."""
    retries: int = 2
    """How often the local queue starts it again after it has died."""

    @property
    def run(self) -> Path | None:
        """The work directory of its run; None for a command."""
        return Path(self.directory, self.workdir or f"runs/{self.name}") if self.config else None

    def train_arguments(self) -> list[str]:
        """The arguments of `jaxtrain train`."""
        overrides = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        return ["--config", self.config, "--workdir", str(self.run), *overrides]


def read_job(path: str | Path) -> Job:
    """The job that a file describes. Raises `ConfigError`."""
    return parse_job(read_yaml_file(path, "The job", "jaxtrain init NAME writes a job"), Path(path))


def parse_job(values: Any, path: Path) -> Job:
    """The job of parsed YAML.

    Args:
      values: what the file holds.
      path: the file, which errors name and whose directory is the job's.

    Raises:
      ConfigError: a key is unknown or missing, or a value is not of its kind.
    """
    fields = Fields(values, str(path), "`name: my-job`", secret="environment")
    fields.refuse_unknown(_JOB_KEYS)
    if "name" not in fields.values:
        raise ConfigError(f"{path}: the job has no name; give it one, as in `name: my-job`.")
    resources = Fields({"resources": {}, **fields.values}["resources"], f"{path}: resources", "`gpu: 1`")
    resources.refuse_unknown(_RESOURCE_KEYS)
    job = Job(
        directory=str(path.absolute().parent),
        resources=Resources(**resources.take(_RESOURCE_KEYS)),
        **fields.take(_JOB_KEYS),
    )
    if bool(job.config) == bool(job.command):
        raise ConfigError(f"{path}: needs a config (a recipe) or a command, and not both.")
    for key in ("overrides", "workdir"):
        if job.command and getattr(job, key):
            raise ConfigError(f"{path}: {key} belongs to a config, and this job has a command.")
    if job.scheduler == "local" and job.nodes > 1:
        raise ConfigError(f"{path}: nodes={job.nodes}: the local queue has one; take another scheduler.")
    return job


# Each kind makes a value, or raises `ValueError` with what the value must be.


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError("at most 52 small letters, digits and hyphens, and begin and end with a letter or digit")
    return value


def _memory(value: Any) -> int:
    match = _MEMORY.fullmatch(str(value))
    if isinstance(value, bool) or not match:
        raise ValueError("bytes, or a number with a unit: 8Gi, 512Mi, 16G")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, dict):
        raise ValueError("text, a number or a list for each key")
    return str(value)


def _overrides(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("fields of the config, such as {train.epochs: 3}")
    return {key.removeprefix("config."): _scalar(each) for key, each in flatten(value).items()}


def _environment(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(key, str) and _VARIABLE.fullmatch(key) for key in value):
        raise ValueError("names of variables and their values")
    if any(not isinstance(each, (str, int, float)) or "\0" in str(each) for each in value.values()):
        raise ValueError("names of variables and values that are text or numbers")
    return {key: str(each) for key, each in value.items()}


def _command(value: Any) -> tuple[str, ...]:
    words = shlex.split(value) if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, (str, int, float)) for word in words):
        raise ValueError("a command, as one line or as a list of words")
    return tuple(map(str, words))


def _requirements(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) and not each.startswith("-") for each in value):
        raise ValueError("a list of packages, such as [wandb, pandas>=2]")
    return tuple(value)


def _scheduler(value: Any) -> str:
    if value not in SCHEDULERS:
        raise ValueError(f"one of {', '.join(SCHEDULERS)}")
    return value


def _time(value: Any) -> str:
    # YAML 1.1 reads 2:00:00 as a number in base 60.
    text = f"{value // 3600:02d}:{value // 60 % 60:02d}:{value % 60:02d}" if type(value) is int else value
    if not isinstance(text, str) or not _TIME.fullmatch(text):
        raise ValueError("hours, minutes and seconds, such as '02:00:00'")
    return text


_RESOURCE_KEYS: dict[str, Callable[[Any], Any] | None] = {
    "gpu": whole_number(0), "cpu": whole_number(1), "memory": _memory, "accelerator": _text,
}  # fmt: skip
_JOB_KEYS: dict[str, Callable[[Any], Any] | None] = {
    "name": _name, "description": _text, "config": _text, "overrides": _overrides, "workdir": _text, "command": _command,
    "requirements": _requirements, "image": _text, "resources": None, "nodes": whole_number(1), "environment": _environment,
    "scheduler": _scheduler, "queue": _text, "time_limit": _time, "retries": whole_number(0),
}  # fmt: skip
