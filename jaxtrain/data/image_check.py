"""Which images of a folder cannot be read: found by decoding all of them, and stored in the data directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL

from jaxtrain.data import contents, images
from jaxtrain.data.folder_scan import ImageFile, Scan
from jaxtrain.errors import DataError, WorkdirError
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.host.files import atomic_write, read_json, writing

_SAY_EVERY = 10.0  # seconds
log = logging.getLogger("jaxtrain")


def unreadable(scan: Scan, side: int, progress: Callable[[Iterable[str]], Iterable[str]] = iter) -> dict[str, str]:
    """Reads all images of a folder.

    Args:
      scan: what is in the folder.
      side: in pixels, of the square that every image is resized and cropped to.
      progress: wraps the files' names as they are read.

    Returns:
      Name below the folder of each image that cannot be read -> a sentence that says why.
    """
    return _unreadable(scan, [file for found in scan.files.values() for file in found], side, progress)


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

    with ThreadPoolExecutor(usable_cpus()) as pool:
        reasons = zip(progress([file.name for file in files]), pool.map(reason, files), strict=True)
        return {name: why for name, why in reasons if why}


def stored_path(folder: Path, data_dir: Path) -> Path:
    """Where `unreadable_once` stores what it has found in `folder`."""
    return contents.record_path(folder, data_dir).with_suffix(".unreadable.json")


def unreadable_once(scan: Scan, side: int, path: Path, *, store: bool) -> dict[str, str]:
    """As `unreadable`, but reads again only those that were not readable, if no file has changed since.

    So an image that was mended is not left out any longer.

    Args:
      scan: what is in the folder.
      side: in pixels, of the square that every image is resized and cropped to.
      path: where the names of unreadable files are stored.
      store: whether to store them, where that can be.
    """
    stored = _read(path)
    found: dict[str, str] = {}
    for split, files in scan.files.items():
        digest, key = _digest(files, side), f"{scan.folders[split]} {side}"
        known = stored.get(key, {})
        if known.get("digest") == digest:
            names = set(known["names"])
            again = [file for file in files if file.name in names]
            found |= _unreadable(scan, again, side, iter)
            continue
        log.info(
            "reading the %s images of %s, for config.data.skip_bad", f"{len(files):,}", scan.root / scan.folders[split]
        )
        bad = _unreadable(scan, files, side, _said)
        found |= bad
        stored[key] = {"digest": digest, "names": list(bad)}
        if store:
            with contextlib.suppress(WorkdirError):  # then each process reads them
                with writing(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, json.dumps(stored) + "\n")
    return found


def _read(path: Path) -> dict[str, dict]:
    """What is stored in `path`; {} where nothing is, or nothing of use."""
    with contextlib.suppress(WorkdirError):
        values = read_json(path)
        if isinstance(values, dict) and all(isinstance(v, dict) and "names" in v for v in values.values()):
            return values
    return {}


def _digest(files: Sequence[ImageFile], side: int) -> str:
    """Of all that decides which of the files can be read."""
    texts = [f"{side} {PIL.__version__}", *(f"{file.name} {file.size} {file.changed}" for file in files)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _said(names: Iterable[str]) -> Iterable[str]:
    """Logs every ten seconds how many are done."""
    names = list(names)
    due = time.monotonic() + _SAY_EVERY
    for count, name in enumerate(names):
        if time.monotonic() > due:
            log.info("read %s of %s images", f"{count:,}", f"{len(names):,}")
            due = time.monotonic() + _SAY_EVERY
        yield name
