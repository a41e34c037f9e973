"""Which images of a folder cannot be read: found by decoding all of them, and stored in the data directory."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL

from jaxtrain.data import contents, images
from jaxtrain.data.folder_scan import ImageFile, Scan
from jaxtrain.errors import DataError, WorkdirError
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.host.files import atomic_write, read_json, writing

_SAY_EVERY = 10.0  # seconds
_CHUNK = 16  # files that a thread reads at once
log = logging.getLogger("jaxtrain")


def unreadable(
    scan: Scan,
    side: int,
    stored: Path,
    *,
    store: bool,
    names: Collection[str] | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, str]:
    """Reads the images of a folder.

    Args:
      scan: what is in the folder.
      side: in pixels, of the square that every image is resized and cropped to.
      stored: where those that cannot be read are stored, for `known_unreadable`.
      store: whether to store them, if that file can be written.
      names: of the files to read, where the others are known to be good; None: all.
      progress: wraps the files' names as they are read.

    Returns:
      Name below the folder of each image that cannot be read -> a sentence that says why.
    """
    every = [file for files in scan.files.values() for file in files]
    found = _unreadable(scan, [file for file in every if names is None or file.name in names], side, progress)
    if store:
        splits = {
            scan.folders[split]: {
                "digest": _digest(files, side),
                "unreadable": {file.name: found[file.name] for file in files if file.name in found},
            }
            for split, files in scan.files.items()
        }
        with contextlib.suppress(WorkdirError):  # the next start then reads all of them
            with writing(stored):
                stored.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(stored, json.dumps(_read(stored) | splits) + "\n")
    return found


def known_unreadable(scan: Scan, side: int, stored: Path) -> dict[str, str] | None:
    """What `unreadable` has stored; reads no image, so that every process leaves out the same ones.

    None where nothing is stored, or any of the files has changed since, as one that was mended has.
    """
    found: dict[str, str] = {}
    values = _read(stored)
    for split, files in scan.files.items():
        known = values.get(scan.folders[split], {})
        if known.get("digest") != _digest(files, side):
            return None
        found |= known["unreadable"]
    return found


def with_log_lines(names: Iterable[str]) -> Iterable[str]:
    """A progress for logs: says at first how many images are read, and every ten seconds how many are done."""
    names = list(names)
    log.info("reading %s images once, for config.data.skip_bad", f"{len(names):,}")
    due = time.monotonic() + _SAY_EVERY
    for count, name in enumerate(names):
        if time.monotonic() > due:
            log.info("read %s of %s images", f"{count:,}", f"{len(names):,}")
            due = time.monotonic() + _SAY_EVERY
        yield name


def stored_path(folder: Path, data_dir: Path) -> Path:
    """Where it is stored which images of `folder` cannot be read."""
    return contents.record_path(folder, data_dir).with_suffix(".unreadable.json")


def _unreadable(
    scan: Scan, files: Sequence[ImageFile], side: int, progress: Callable[[Iterable[str]], Iterable[str]]
) -> dict[str, str]:
    def reason(file: ImageFile) -> str:
        path = scan.root / file.name
        if file.broken:
            return f"{path} {file.broken}."
        try:
            images.read_file(path, scan.class_names[file.label], side)
        except DataError as error:
            return str(error)
        return ""

    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    pool = ThreadPoolExecutor(usable_cpus())
    try:
        reasons = itertools.chain.from_iterable(pool.map(lambda chunk: list(map(reason, chunk)), chunks))
        named = zip(progress([file.name for file in files]), reasons, strict=True)
        return {name: why for name, why in named if why}
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all the others


def _read(path: Path) -> dict[str, dict]:
    """What is stored in `path`; {} where nothing is, or nothing of use."""
    with contextlib.suppress(WorkdirError):
        values = read_json(path)
        if isinstance(values, dict) and all(
            isinstance(v, dict) and isinstance(v.get("unreadable"), dict) for v in values.values()
        ):
            return values
    return {}


def _digest(files: Sequence[ImageFile], side: int) -> str:
    """Of all that decides which of the files can be read. A smaller side than 512 pixels does not (`images`' limits)."""
    texts = [f"{max(side, 512)} {PIL.__version__}", *(f"{file.name} {file.size} {file.changed}" for file in files)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
