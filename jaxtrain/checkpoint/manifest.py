"""A checkpoint's files: manifest, verification, quarantine and retention. Imports neither Orbax nor JAX.

Orbax notices a cut or missing file when it reads it, but not a flipped bit in the arrays (120 of 120 restores gave wrong
values). So each checkpoint has a `manifest.json` with the size and SHA-256 of every file. It is written last: a folder
without it is no checkpoint.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxtrain.config import TrainConfig
from jaxtrain.data.record import DatasetRecord
from jaxtrain.errors import CheckpointError, DamagedError, UnreadableError
from jaxtrain.host.backend import versions
from jaxtrain.host.files import NOT_THERE, atomic_write, move, parse_json, patiently, sync_directory, writing

MANIFEST = "manifest.json"
SCHEMA = 2
_HASHING_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without reading its arrays."""

    step: int
    schema: int
    """The version of this class's fields."""
    position: Mapping[str, Any]
    """How far the run was, with its config (`Position.to_json`)."""
    files: Mapping[str, tuple[int, str]]
    """Size in bytes and SHA-256 of each file, by its path within the checkpoint."""
    versions: Mapping[str, str]
    """Of packages."""
    config_sha256: str
    epoch: int
    """Epochs completed, -1 inside one."""
    milestone: bool
    """It is never deleted."""
    owner: str
    """The start of the run that wrote it (`Lease.token`)."""
    time: str
    val_accuracy: float | None = None
    """In [0, 1]; None before validation. So are the other two, which schema 1 did not have; they are the figures that
    `checkpoint.best` names."""
    val_loss: float | None = None
    val_top5: float | None = None

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(size for size, _ in self.files.values())


_FIGURE = (float, int, type(None))
_POSITION = ("step", "examples", "epoch_loss", "epoch_correct", "epoch_examples")  # what every schema has
_KINDS: dict[str, Any] = {
    "step": int, "epoch": int, "milestone": bool, "val_accuracy": _FIGURE, "val_loss": _FIGURE,
    "val_top5": _FIGURE,
    **{f"position.{name}": (int, float) for name in _POSITION},
}  # fmt: skip


def write_manifest(folder: Path, before_commit: Callable[[], None] = lambda: None, **fields: Any) -> Manifest:
    """Hashes and syncs every file of a checkpoint, and then writes its manifest.

    Args:
      folder: the checkpoint.
      before_commit: called just before the manifest is written; raises if this run may not write here any more.
      fields: the other fields of `Manifest`.
    """
    names = sorted(_files(folder))

    def read(name: str) -> tuple[int, str]:
        path = folder / name
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        return path.stat().st_size, digest

    with concurrent.futures.ThreadPoolExecutor(_HASHING_THREADS) as pool:
        files = dict(zip(names, pool.map(read, names), strict=True))
    for directory in {(folder / name).parent for name in names}:
        sync_directory(directory)
    manifest = Manifest(schema=SCHEMA, files=files, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **fields)
    before_commit()
    _store(folder, manifest)
    return manifest


def annotate(folder: Path, **fields: Any) -> None:
    """Changes fields of a manifest, such as an accuracy that was measured later. Not the files."""
    _store(folder, dataclasses.replace(read_manifest(folder), **fields))


def _store(folder: Path, manifest: Manifest) -> None:
    atomic_write(folder / MANIFEST, _text(dataclasses.asdict(manifest)))


def _text(values: Mapping[str, Any]) -> str:
    """The text of a manifest's file: its values and their SHA-256. The same values give the same text."""
    sorted_json = json.dumps(values, sort_keys=True)
    return (
        json.dumps({**values, "sha256": hashlib.sha256(sorted_json.encode()).hexdigest()}, indent=1, sort_keys=True)
        + "\n"
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
      DamagedError: it is damaged, or not there.
      UnreadableError: it cannot be read now.
      CheckpointError: it is of another version of jaxtrain, or of another step than the folder's name.
    """
    path, values = folder / MANIFEST, _whole_values(folder)
    try:
        if values["schema"] > SCHEMA:
            ours = "".join(versions(["jaxtrain"]).values())
            raise CheckpointError(
                f"{folder} has schema {values['schema']} (written by jaxtrain {values['versions']['jaxtrain']}); this one, "
                f"jaxtrain {ours}, reads up to {SCHEMA}: update it."
            )
        files = {name: (int(size), str(digest)) for name, (size, digest) in values["files"].items()}
        manifest = Manifest(**{**values, "files": files})
        _validation(manifest.position)
        position = manifest.position["step"]
        found = {**vars(manifest), **{f"position.{name}": manifest.position[name] for name in _POSITION}}
        if wrong := [name for name, kinds in _KINDS.items() if not isinstance(found[name], kinds)]:
            raise TypeError(f"its {wrong[0]} is {found[wrong[0]]!r}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is whole, but not as this version of jaxtrain writes it ({error}).") from None
    if {str(manifest.step), str(position)} != {folder.name}:
        raise CheckpointError(
            f"{folder} does not hold step {folder.name}: its manifest is of step {manifest.step}, with the position of step "
            f"{position}; give the folder the name that it had, or move it away."
        )
    return manifest


def _whole_values(folder: Path) -> dict[str, Any]:
    """What a manifest's file holds, without its own SHA-256, which it fits."""
    path = folder / MANIFEST
    try:
        text = patiently(path.read_bytes).decode("utf-8")
        values = parse_json(text)
        values.pop("sha256")
        if text != _text(values):
            raise DamagedError(f"{path} has changed (its SHA-256 differs).")
    except NOT_THERE:
        raise DamagedError(f"{path} is not there.") from None
    except OSError as error:
        _refuse_to_judge(path, error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} cannot be read ({error}).") from None
    return values


def _refuse_to_judge(path: Path, error: OSError) -> NoReturn:
    raise UnreadableError(
        f"{path} cannot be read now ({error.strerror}), which does not mean that it is damaged: remove the cause and try again."
    ) from error


def step_of(name: str) -> int | None:
    """The step whose folder has this name; None where it is the name of none, as 040 and ² are not."""
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,17}", name) else None


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has its manifest. A reader beside a running run asks again: retention deletes it first."""
    try:
        return stat.S_ISREG(patiently((folder / MANIFEST).stat).st_mode)
    except NOT_THERE:
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        _refuse_to_judge(folder, error)


class DeletedError(CheckpointError):
    """The run of a checkpoint has deleted it while it was read."""


@contextlib.contextmanager
def unless_deleted(folder: Path) -> Iterator[None]:
    """Inside, a complete checkpoint is read, maybe beside the run that writes there.

    Raises:
      DeletedError: it is not there any more; what was found in the block says nothing then.
    """
    error: CheckpointError | None = None
    try:
        yield
    except CheckpointError as found:
        error = found
    if not is_complete(folder):
        raise DeletedError(
            f"Step {folder.name} of {folder.parent} was deleted by its run while it was read."
        ) from error
    if error is not None:
        raise error


def _entries(directory: Path) -> list[Path]:
    """What a directory holds; [] where it is none. Raises `UnreadableError`: what is not seen would be trained again."""
    try:
        return patiently(lambda: sorted(directory.iterdir()))
    except NOT_THERE:
        return []
    except OSError as error:
        _refuse_to_judge(directory, error)


def manifested_steps(directory: Path) -> list[int]:
    """The steps of complete checkpoints, in rising order. Looks at file names only."""
    named = ((step_of(path.name), path) for path in _entries(directory))
    return sorted(step for step, path in named if step is not None and is_complete(path))


def problems(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """A sentence for each file that is damaged, missing or not in the manifest.

    Args:
      folder: the checkpoint.
      share: (i, n) reads only the i-th of n parts of the files, so that n processes can divide the reading.

    Raises:
      UnreadableError: a file cannot be read now.
      CheckpointError: as `read_manifest`, except for a manifest that is damaged.
    """
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        return [str(error)]
    try:
        foreign = set(_files(folder)) - set(manifest.files)
    except NOT_THERE:  # which the files of the manifest show
        foreign = set()
    except OSError as error:
        _refuse_to_judge(folder, error)
    sentences = [f"{name} does not belong to it" for name in sorted(foreign)]
    names = sorted(manifest.files)[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(_HASHING_THREADS) as pool:
        found = [pool.submit(_problem, folder / name, name, *manifest.files[name]) for name in names]
        try:
            sentences += filter(None, (each.result() for each in found))
        finally:
            pool.shutdown(cancel_futures=True)
    return sentences


def _problem(path: Path, name: str, size: int, digest: str) -> str:
    try:
        present = patiently(path.stat).st_size
        if present != size:
            return f"{name} has {present:,} bytes and must have {size:,}"
        if patiently(lambda: _digest(path)) != digest:
            return f"{name} has changed (SHA-256 differs)"
    except NOT_THERE:
        return f"{name} is missing"
    except IsADirectoryError:
        return f"{name} is a directory"
    except OSError as error:
        _refuse_to_judge(path, error)
    return ""


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    """The checkpoint's files by their paths within it, without the manifest. Raises `OSError`."""

    def fail(error: OSError) -> NoReturn:
        raise error  # else `os.walk` leaves out what it cannot read

    def walk() -> list[Path]:
        return [Path(root) / name for root, _, names in os.walk(folder, onerror=fail) for name in names]

    return [
        name
        for path in patiently(walk)
        if (name := str(path.relative_to(folder))) not in (MANIFEST, f".{MANIFEST}.part")
    ]


def quarantine(folder: Path, sentences: Sequence[str]) -> Path:
    """Moves a damaged checkpoint to `corrupt/`, with `problems.txt` (`sentences`). Returns its new folder.

    Of a link only the link is moved, into a folder of its own: what it leads to is not this run's. Raises `WorkdirError`.
    """
    corrupt = folder.parent.parent / "corrupt"
    target = corrupt / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    with writing(corrupt):
        corrupt.mkdir(exist_ok=True)
        if folder.is_symlink():
            target.mkdir()
            move(folder, target / folder.name)
        else:
            move(folder, target)
    atomic_write(target / "problems.txt", "\n".join(sentences) + "\n")
    return target


def is_better(by: str, figure: float | None, best: float | None) -> bool:
    """Whether a figure of a validation is better than the best one before it.

    Args:
      by: which figure it is: a value of `checkpoint.best`.
      figure: None is not better than anything.
      best: None where there is none yet.
    """
    return figure is not None and (best is None or _height(by, figure) > _height(by, best))


def _height(by: str, figure: float) -> float:
    return -figure if by == "val_loss" else figure


def best_of(manifests: Sequence[Manifest], by: str) -> int | None:
    """The best step, the earliest of equal ones; None if none was evaluated.

    Only figures on the newest validation examples are compared. by: a value of `checkpoint.best`.
    """
    bests = _bests(manifests, by)
    return bests[-1] if bests else None


def _bests(manifests: Sequence[Manifest], by: str) -> list[int]:
    """The best step on each set of validation examples that a run has had; the present set comes last."""
    groups: dict[str, list[Manifest]] = {}
    for manifest in sorted(manifests, key=lambda m: m.step):
        if getattr(manifest, by) is not None:
            where = _validation(manifest.position) or next(reversed(groups), "")
            earlier = groups.pop(where, groups.pop("", []))  # unknown examples count as the same
            groups[where] = [*earlier, manifest]
    return [-max((_height(by, getattr(m, by)), -m.step) for m in group)[1] for group in groups.values()]


def _validation(position: Mapping[str, Any]) -> str:
    """Identifies the validation examples that were evaluated; '' if an older version did not store it."""
    record = DatasetRecord.from_json(position["dataset"]) if "dataset" in position else DatasetRecord()
    found = record.split_fingerprint("validation") or record.fingerprint
    stored = position.get("config", {}).get("train") or {}
    part = record.part("validation", stored.get("eval_examples", TrainConfig.eval_examples))
    return f"{found}, {part} of them" if found and part else found


def delete_old(directory: Path, latest: int, by: str) -> list[int]:
    """Deletes all but the `latest` newest checkpoints, the best, and every milestone. Returns the deleted steps.

    Call it when a newer checkpoint has just been verified. A kill during a deletion leaves a folder without manifest. A folder
    that is a link stays, and so does what it leads to.

    Args:
      directory: of checkpoints.
      latest: how many of the newest stay.
      by: which figure decides what the best is: a value of `checkpoint.best`.
    """
    steps = manifested_steps(directory)
    readable = []
    for step in steps:
        with contextlib.suppress(CheckpointError):  # one that is damaged or cannot be read stays: `resume` decides
            readable.append(read_manifest(directory / str(step)))
    bests = _bests(readable, by) or _bests(readable, "val_accuracy")  # all are of an older version, which had no other
    kept = {*steps[-latest:], *bests, *(m.step for m in readable if m.milestone)}
    deleted = [m.step for m in readable if m.step not in kept and not (directory / str(m.step)).is_symlink()]
    for step in deleted:
        (directory / str(step) / MANIFEST).unlink()
        shutil.rmtree(directory / str(step), ignore_errors=True)
    return deleted


def later_folders(directory: Path, step: int) -> list[Path]:
    """All that has the name of a step after `step`: complete checkpoints, links, and what no checkpoint can replace."""
    return [path for path in _entries(directory) if (found := step_of(path.name)) is not None and found > step]


def discard_unfinished(directory: Path) -> None:
    """Deletes incomplete checkpoints, which a kill leaves: Orbax would refuse to write their steps again.

    Only process 0 may call it, while no process writes there.
    """
    committed = manifested_steps(directory)
    for path in _entries(directory):
        step = step_of(path.name.partition(".orbax-checkpoint-tmp")[0])
        if step is not None and (str(step) != path.name or step not in committed):
            shutil.rmtree(path, ignore_errors=True)  # of a link it deletes nothing
