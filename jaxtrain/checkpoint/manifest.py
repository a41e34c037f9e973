"""A checkpoint's files: manifest, verification, quarantine and retention. Imports neither Orbax nor JAX.

Orbax notices a cut or missing file when it reads it, but not a flipped bit in the arrays (120 of 120 restores gave wrong
values). So each checkpoint has a `manifest.json` with the size and SHA-256 of every file. It is written last: a folder
without it is no checkpoint.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.config import TrainConfig
from jaxtrain.data.record import DatasetRecord
from jaxtrain.errors import CheckpointError
from jaxtrain.host.files import atomic_write, sync_directory

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
    """The manifest of a checkpoint. Raises `CheckpointError` if it cannot be read, is damaged, or has a newer schema."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        values.pop("sha256")
        if text != _text(values):
            raise CheckpointError(f"{path} has changed (its SHA-256 differs).")
        if values["schema"] > SCHEMA:
            raise CheckpointError(
                f"{folder} has schema {values['schema']} (written by jaxtrain {values['versions']['jaxtrain']}); this jaxtrain "
                f"reads up to {SCHEMA}: update it."
            )
        files = {name: (int(size), str(digest)) for name, (size, digest) in values["files"].items()}
        return Manifest(**{**values, "files": files})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from None


def manifested_steps(directory: Path) -> list[int]:
    """The steps of complete checkpoints, in rising order. Looks at file names only."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit() and (path / MANIFEST).is_file())


def problems(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """A sentence for each file that is damaged, missing or not in the manifest.

    share: (i, n) reads only the i-th of n parts of the files, so that n processes can divide the reading.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    sentences = [f"{name} does not belong to it" for name in sorted(set(_files(folder)) - set(manifest.files))]
    names = sorted(manifest.files)[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(_HASHING_THREADS) as pool:
        sentences += filter(None, pool.map(lambda name: _problem(folder / name, name, *manifest.files[name]), names))
    return sentences


def _problem(path: Path, name: str, size: int, digest: str) -> str:
    try:
        present = path.stat().st_size
        if present != size:
            return f"{name} has {present:,} bytes and must have {size:,}"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"{name} has changed (SHA-256 differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return ""


def _files(folder: Path) -> list[str]:
    paths = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return [name for path in paths if (name := str(path.relative_to(folder))) not in (MANIFEST, f".{MANIFEST}.part")]


def quarantine(folder: Path, sentences: Sequence[str]) -> Path:
    """Moves a damaged checkpoint to `corrupt/`, with `problems.txt` (`sentences`). Returns its new folder."""
    corrupt = folder.parent.parent / "corrupt"
    corrupt.mkdir(exist_ok=True)
    target = corrupt / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    folder.rename(target)
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

    Call it when a newer checkpoint has just been verified. A kill during a deletion leaves a folder without manifest.

    Args:
      directory: of checkpoints.
      latest: how many of the newest stay.
      by: which figure decides what the best is: a value of `checkpoint.best`.
    """
    steps = manifested_steps(directory)
    readable = []
    for step in steps:
        with contextlib.suppress(CheckpointError):  # an unreadable one stays: `resume` decides
            readable.append(read_manifest(directory / str(step)))
    bests = _bests(readable, by) or _bests(readable, "val_accuracy")  # all are of an older version, which had no other
    kept = {*steps[-latest:], *bests, *(m.step for m in readable if m.milestone)}
    deleted = [m.step for m in readable if m.step not in kept]
    for step in deleted:
        (directory / str(step) / MANIFEST).unlink()
        shutil.rmtree(directory / str(step), ignore_errors=True)
    return deleted


def discard_unfinished(directory: Path) -> None:
    """Deletes incomplete checkpoints, which a kill leaves: Orbax would refuse to write their steps again.

    Only process 0 may call it, while no process writes there.
    """
    committed = manifested_steps(directory)
    for path in directory.iterdir() if directory.is_dir() else ():
        step = path.name.partition(".orbax-checkpoint-tmp")[0]
        if step.isdigit() and (step != path.name or int(step) not in committed):
            shutil.rmtree(path, ignore_errors=True)
