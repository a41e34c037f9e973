"""A run is a work directory: the names of its files, atomic writes, and which settings may change when it resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxtrain.config import Config, flatten, to_dict
from jaxtrain.errors import WorkdirError
from jaxtrain.outside import create, require_local

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


# ---------------------------------------------------------------------------------------------------- the directory


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Where each file of a run is. Process 0 alone writes the shared ones; every process writes its own log."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config of the first start."""
        return self.path / "config.json"

    @property
    def dataset(self) -> Path:
        """What the run remembers of its data set."""
        return self.path / "dataset.json"

    @property
    def metrics_csv(self) -> Path:
        """One row an epoch and phase."""
        return self.path / "metrics.csv"

    @property
    def metrics_jsonl(self) -> Path:
        """One object a logged step or evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def bad_batches(self) -> Path:
        """One object a batch whose numbers were amiss, with its examples."""
        return self.path / "bad_batches.jsonl"

    @property
    def manifest(self) -> Path:
        """What each start ran on."""
        return self.path / "manifest.json"

    @property
    def result(self) -> Path:
        """Written once, when the run is complete."""
        return self.path / "result.json"

    @property
    def starts(self) -> Path:
        """What the time of each start went into (`jaxtrain goodput`)."""
        return self.path / "starts"

    @property
    def checkpoints(self) -> Path:
        """One directory a saved step."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Event files in `train`, `val` and `test`."""
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        """What each process writes for itself."""
        return self.path / "logs"

    def trace(self, process: int) -> Path:
        """When the operations of one step ran, as one process saw it (`layout.trace_step`)."""
        return self.logs / f"pipeline_trace_{process}.json"

    def log(self, process: int) -> Path:
        """The text log of one process."""
        return self.logs / f"process_{process}.log"

    def read_config(self) -> dict[str, Any] | None:
        """The stored config as nested dicts, None where no run has started here. Raises `WorkdirError` when damaged."""
        if not self.config.exists():
            return None
        values = read_json(self.config)
        if not isinstance(values, dict):
            raise WorkdirError(f"{self.config} is damaged (it holds no JSON object); {_ELSEWHERE}.")
        return values

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Stores the resolved config (`config.to_dict`)."""
        atomic_write(self.config, json.dumps(values, indent=2, allow_nan=False) + "\n")

    def write_dataset(self, record: Mapping[str, Any]) -> None:
        """Stores what is remembered of the data set (`data.record`)."""
        atomic_write(self.dataset, json.dumps(record, indent=2, allow_nan=False) + "\n")


_ELSEWHERE = "restore it from a copy, or choose another work directory with --workdir"


def named(path: str | Path) -> Path:
    """The path of a work directory that a user has named. Raises `WorkdirError` for an address."""
    require_local(path, f"The work directory {path}", WorkdirError)
    return Path(path)


def prepare(path: str | Path) -> Workdir:
    """Creates the directory and proves that files in it can be written, synced and renamed.

    A file system that is read-only or full is found here rather than at the first save: Orbax notices only when it
    waits for an asynchronous save to finish. Every process may call it, in any order.

    Raises:
      WorkdirError: in one sentence, when the name cannot be one of a local directory or a step of the probe fails.
    """
    name = str(path)
    if not name.strip():
        raise WorkdirError("The work directory has an empty name; choose one with --workdir.")
    if _CONTROL.search(name):
        raise WorkdirError(f"The work directory {name!r} has a control character in its name; choose another name.")
    workdir = Workdir(named(path).expanduser().absolute())
    probe = workdir.path / f".probe.{os.getpid()}.{os.urandom(4).hex()}"
    renamed = probe.with_name(probe.name + ".renamed")
    try:
        workdir.log(0).parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(probe, "probe")
            os.replace(probe, renamed)
        finally:
            for leftover in (probe, renamed):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)
    except OSError as error:
        # a component of the path that is a file: EEXIST when it is the last one, ENOTDIR above that
        reason = "a file is in its way" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise WorkdirError(
            f"The work directory {workdir.path} cannot be written ({reason}); choose another with --workdir."
        ) from error
    return workdir


# ------------------------------------------------------------------------------------------------------------ files


def atomic_write(path: Path, text: str) -> None:
    """Replaces `path` by `text` at once: a reader, or a restart after a kill, sees the old text or the new, whole.

    The temporary name is fixed, so what a killed process left, or a link to elsewhere, is replaced; shared files have one
    writer, process 0.
    Raises `WorkdirError` naming the file when the disk is full, read-only or gone.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            _write_synced(part, text)
            os.replace(part, path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says against writing `path` (disk full, gone, read-only) into `WorkdirError`."""
    try:
        yield
    except OSError as error:
        linked = error.errno == errno.ELOOP  # `outside.no_link`; the system's own words would speak of too many levels
        reason = "it is a link, and is not written through; remove it" if linked else error.strerror
        raise WorkdirError(f"{path} cannot be written ({reason}).") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """The same for reading."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read ({error.strerror}).") from error


def read_json(path: Path) -> Any:
    """The parsed file, None where there is none. Raises `WorkdirError` when it cannot be read or is not JSON."""
    try:
        with reading(path):
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise WorkdirError(f"{path} is damaged ({error}); {_ELSEWHERE}.") from error


def _write_synced(path: Path, text: str) -> None:
    with create(path) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes a rename durable; some network file systems refuse to sync a directory, and offer nothing better."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------- changes on resume

_FREE = re.compile(
    r"layout\..*|checkpoint\..*|train\.(log_every|eval_every|steps_per_call|remat|deterministic|hang_seconds|nonfinite_skips|rollbacks)"
    r"|train\.(spike_threshold|check_replicas_every)"
    # batch_per_device only ever set the global batch at the first start; the stored global batch is what counts
    r"|data\.(dir|workers|residency|prepare_.*|batch_per_device)"
)
_LENGTH = re.compile(r"train\.(epochs|steps)")
Kind = Literal["free", "length", "numbers"]


@dataclasses.dataclass(frozen=True)
class Change:
    """One setting that differs from the stored one.

    kind: `free` (where, how fast, how often: no number of the run moves), `length` (free where no step already run
    would have had another learning rate), `numbers` (the run would no longer be the same run).
    """

    key: str
    stored: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"config.{self.key}: {self.stored!r} -> {self.new!r}"


def changes(stored: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Settings that differ between two configs (nested dicts), in the order of `Config`'s fields.

    A key that one side lacks has its default there: a config stored by an older version knows fewer fields.
    """
    defaults = flatten(to_dict(Config()))
    before, after = (defaults | flatten(values) for values in (stored, new))
    found = []
    for key in dict.fromkeys([*defaults, *before, *after]):
        pair = before.get(key), after.get(key)
        if _plain(pair[0]) != _plain(pair[1]):
            found.append(Change(key, *pair, _kind(key)))
    return found


def _kind(key: str) -> Kind:
    if _FREE.fullmatch(key):
        return "free"
    return "length" if _LENGTH.fullmatch(key) else "numbers"


def refused(found: Iterable[Change], *, same_rates: bool) -> list[Change]:
    """The changes that a resumed run may not make without `checkpoint.allow_changes`.

    same_rates: whether every step already run has the same learning rate under the new length as under the stored one.
    """
    return [c for c in found if c.kind == "numbers" or (c.kind == "length" and not same_rates)]


def refuse_text(path: Path, found: Iterable[Change], *, foreign: bool = False) -> str:
    """One sentence for `WorkdirError`: which keys differ, and what to do.

    path: the work directory, or the checkpoint of another run that this one should start from (`foreign`).
    """
    keys = ", ".join(map(str, found))
    what, other = ("checkpoint", "keep its values") if foreign else ("work directory", "choose another with --workdir")
    return (
        f"The {what} {path} belongs to a run with another config ({keys}); {other}, "
        "or go on with the new values with --config.checkpoint.allow_changes=true."
    )


def _plain(value: Any) -> Any:
    """JSON has no tuples: a stored (1, 2) comes back as [1, 2]."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
