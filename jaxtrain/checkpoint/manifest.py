"""A checkpoint's files: the manifest that makes it count, verification, quarantine, retention. Knows no Orbax and no JAX.

Orbax finds a cut or missing file when it reads it, and a flipped bit in the arrays never (120 of 120 restored wrong values).
So each checkpoint has a `manifest.json` with the size and SHA-256 of every file, written last: a folder without one is no
checkpoint.
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

from jaxtrain.errors import CheckpointError
from jaxtrain.host.files import atomic_write, sync_directory

MANIFEST = "manifest.json"
SCHEMA = 1
_HASHING_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without reading its arrays.

    files: size in bytes and SHA-256 of each, by path within the checkpoint. position: how far the run was, with its config.
    config_sha256: of that config. versions: of packages. epoch: epochs completed, -1 inside one. val_accuracy: None before
    validation. milestone: kept for ever. owner: which start of the run wrote it.
    """

    step: int
    schema: int
    position: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]
    versions: Mapping[str, str]
    config_sha256: str
    epoch: int
    val_accuracy: float | None
    milestone: bool
    owner: str
    time: str

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for size, _ in self.files.values())


def write_manifest(folder: Path, before_commit: Callable[[], None] = lambda: None, **fields: Any) -> Manifest:
    """Hashes every file of a checkpoint, makes all durable, and writes its manifest last. fields: those of `Manifest`.

    before_commit: raises where this run may not write here any more.
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
    """Changes what a manifest says beside the files: an accuracy that was found later."""
    _store(folder, dataclasses.replace(read_manifest(folder), **fields))


def _store(folder: Path, manifest: Manifest) -> None:
    atomic_write(folder / MANIFEST, _text(dataclasses.asdict(manifest)))


def _text(values: Mapping[str, Any]) -> str:
    """A manifest's file: its values and their own SHA-256. There is one text for the same values."""
    plain = json.dumps(values, sort_keys=True)
    return json.dumps({**values, "sha256": hashlib.sha256(plain.encode()).hexdigest()}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Raises `CheckpointError` when it cannot be read, is damaged, or a newer jaxtrain wrote it."""
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
    """The steps that count, rising. Reads names only."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit() and (path / MANIFEST).is_file())


def problems(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What differs from the manifest: a sentence for each damaged, missing or foreign file.

    share: (i, n) looks at the i-th of n parts of the files' contents only, so that n processes share the reading.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    found = [f"{name} does not belong to it" for name in sorted(set(_files(folder)) - set(manifest.files))]
    names = sorted(manifest.files)[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(_HASHING_THREADS) as pool:
        found += filter(None, pool.map(lambda name: _problem(folder / name, name, *manifest.files[name]), names))
    return found


def _problem(path: Path, name: str, size: int, digest: str) -> str:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes and must have {size:,}"
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


def quarantine(folder: Path, found: Sequence[str]) -> Path:
    """Moves a damaged checkpoint to `corrupt/` beside the checkpoints, with what was found; returns where it is now."""
    corrupt = folder.parent.parent / "corrupt"
    corrupt.mkdir(exist_ok=True)
    target = corrupt / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    folder.rename(target)
    atomic_write(target / "problems.txt", "\n".join(found) + "\n")
    return target


def best_of(manifests: Sequence[Manifest]) -> int | None:
    """The step with the highest validation accuracy, the earliest of equals; `None` if none was evaluated.

    Accuracies on other validation examples than the newest ones are no rivals of theirs.
    """
    bests = _bests(manifests)
    return bests[-1] if bests else None


def _bests(manifests: Sequence[Manifest]) -> list[int]:
    """The best step on each set of validation examples that a run has had, the present one last."""
    groups: dict[str, list[Manifest]] = {}
    for manifest in sorted(manifests, key=lambda m: m.step):
        if manifest.val_accuracy is not None:
            where = _validation(manifest.position) or next(reversed(groups), "")
            earlier = groups.pop(where, groups.pop("", []))  # what is not known counts as the same
            groups[where] = [*earlier, manifest]
    return [-max((m.val_accuracy or 0.0, -m.step) for m in group)[1] for group in groups.values()]


def _validation(position: Mapping[str, Any]) -> str:
    """What identifies the validation examples, "" where an older version stored it without."""
    data = position.get("dataset", {})
    own = data.get("splits", {}).get("validation", {}).get("fingerprint", "")
    return own or data.get("fingerprint", "")


def delete_old(directory: Path, latest: int) -> list[int]:
    """Deletes all but the `latest` newest, the best, and every milestone; returns the steps that are gone.

    To be called when a newer checkpoint has just been verified. A kill in between leaves a folder without manifest.
    """
    steps = manifested_steps(directory)
    readable = []
    for step in steps:
        with contextlib.suppress(CheckpointError):  # what cannot be read is left for `resume` to judge
            readable.append(read_manifest(directory / str(step)))
    kept = {*steps[-latest:], *_bests(readable), *(m.step for m in readable if m.milestone)}
    gone = [m.step for m in readable if m.step not in kept]
    for step in gone:
        (directory / str(step) / MANIFEST).unlink()
        shutil.rmtree(directory / str(step), ignore_errors=True)
    return gone


def discard_unfinished(directory: Path) -> None:
    """Deletes what a killed run left of a write or a deletion: Orbax would refuse to write that step again.

    Only process 0 may call it, while nobody writes there.
    """
    committed = manifested_steps(directory)
    for path in directory.iterdir() if directory.is_dir() else ():
        step = path.name.partition(".orbax-checkpoint-tmp")[0]
        if step.isdigit() and (step != path.name or int(step) not in committed):
            shutil.rmtree(path, ignore_errors=True)
