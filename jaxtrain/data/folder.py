"""Image folders: one folder for each class, below one folder for each split if the data set has splits."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shlex
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxtrain.config import did_you_mean
from jaxtrain.data import base, contents, images, splits
from jaxtrain.data.base import Dataset
from jaxtrain.data.spec import DatasetSpec, Progress, data_dir
from jaxtrain.errors import ConfigError, DataError, WorkdirError

# A run records the contents of a folder up to this size at its first start, in a second or two.
_SMALL_FILES, _SMALL_BYTES = 50_000, 1 << 30


class ImageFolder(DatasetSpec):
    """The images in a folder, `folder:PATH`. Their labels are the names of the folders that they lie in."""

    named_splits = True

    @property
    def path(self) -> Path:
        """The folder. Raises `DataError` where there is none."""
        path = Path(self.config.name.removeprefix("folder:")).expanduser()
        if not path.is_dir():
            raise DataError(f"config.data.name={self.config.name!r}: there is no such folder.")
        return path

    def prepare(self) -> Path:
        return self.path

    def read(self, image_size: int, needed: str, drawn: Sequence[str] | None) -> Dataset:
        config, side = self.config, self.stored_side(image_size)
        if not side:
            raise ConfigError(f"config.data.image_size=0: set the side that the images of {config.name!r} are cut to.")
        parts = scan_folder(self.path, side, config.chosen_splits, needed)
        return splits.cut(parts, config, needed, drawn)

    def verify(self, progress: Progress = iter) -> dict[str, int]:
        dataset = self.load_all()
        counts = base.read_all(dataset)
        names, record_path = _file_names(dataset), self._record_path
        recorded = contents.read_record(record_path)
        changed = contents.compare(self.path.resolve(), names, recorded, progress) if recorded else []
        if recorded and changed:
            raise DataError(
                f"{len(changed):,} of {len(recorded.files):,} files of {self.path.resolve()} are not as they were on "
                f"{recorded.when} ({', '.join(changed[:3])}{', ...' * (len(changed) > 3)}); bring them back, or take them as "
                f"they are with `{self._prepare_command}`."
            )
        with contextlib.suppress(WorkdirError):  # the files can be read, even if their contents cannot be recorded
            contents.record(self.path.resolve(), names, record_path, known=recorded, progress=progress)
        return counts

    def record_contents(self, dataset: Dataset, *, afresh: bool = False, progress: Progress = iter) -> str:
        folder, names, record_path = self.path.resolve(), _file_names(dataset), self._record_path
        if afresh:
            recorded = contents.record(folder, names, record_path, progress=progress)
            return f"{len(recorded.files):,} files recorded in {record_path}"
        if len(names) <= _SMALL_FILES and sum(os.stat(folder / name).st_size for name in names) <= _SMALL_BYTES:
            # The data directory need not be writable for this.
            with contextlib.suppress(OSError, WorkdirError, DataError):
                contents.record(folder, names, record_path, known=contents.read_record(record_path))
        return ""

    def recorded_on(self) -> str:
        recorded = contents.read_record(self._record_path)
        return recorded.when if recorded else ""

    @property
    def _record_path(self) -> Path:
        return contents.record_path(self.path, data_dir(self.config))

    @property
    def _prepare_command(self) -> str:
        options = {"--dir": self.config.dir, "--splits": self.config.splits}
        words = [word for option, value in options.items() if value for word in (option, value)]
        return shlex.join(["jaxtrain", "data", "prepare", self.config.name, *words])


def _file_names(dataset: Dataset) -> set[str]:
    """The paths of a folder's image files, below the folder."""
    sources = (base.underlying(getattr(dataset, split)) for split in base.SPLITS)
    return {os.path.normpath(file) for source in sources if isinstance(source, FolderSource) for file in source.files}


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(base.DecodedSource):
    """Images in files, decoded when read."""

    root: Path
    files: tuple[str, ...]
    """Paths below `root`."""
    labels: np.ndarray
    """int32 [N]."""
    side: int
    """In pixels, of the square that every image is resized and cropped to."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.side, self.side, 3

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.empty((len(indices), *self.shape), np.uint8)
        for row, index in enumerate(indices):
            path = self.root / self.files[index]
            where = f"{path} (class {path.parent.name!r})"
            pixels[row] = images.decode(_read_bytes(path), where, channels=3, side=self.side)
        return pixels, self.labels[indices]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} (class {path.parent.name!r}) cannot be read ({error.strerror}).") from None


def scan_folder(path: Path, side: int, chosen: Mapping[str, str], needed: str = "") -> base.RawSplits:
    """Finds the images of PATH/{train,val|valid|validation,test}/CLASS/*, or of PATH/CLASS/* where there are no splits.

    Classes are the folders' names, sorted. Files that are not images are ignored. A split whose images lie in no folders of
    classes counts as absent.

    Args:
      path: the folder.
      side: in pixels, of the square that every image is resized and cropped to.
      chosen: as `DataConfig.chosen_splits`: folders that are splits whatever their names; other folders may lie beside them.
      needed: the one split whose folder must exist, "" for all.

    Raises:
      DataError: a class or a split without images, a class that training lacks, folders beside the splits, a name that is
        not UTF-8, or a link that leaves `path` (it could name any file).
      ConfigError: a chosen split does not exist.
    """
    root = path.resolve()
    folders = _split_folders(root, chosen) or {"train": "."}
    required = needed if needed in folders else "train"
    if required not in folders:
        raise DataError(f"{root}: has {', '.join(sorted(folders.values()))} but no train.")
    unlabelled = [
        split for split, name in folders.items()
        if split != "train" and split not in chosen and _has_no_classes(root / name, root)
    ]  # fmt: skip
    folders = {split: name for split, name in folders.items() if split not in unlabelled}
    required = required if required in folders else "train"
    classes = _class_names(root, {folders[split] for split in {required, "train"} & folders.keys()})
    if len(classes) < 2 and not needed:
        raise DataError(f"{root / folders['train']}: needs a folder of images for each of at least 2 classes.")
    sources: dict[str, FolderSource] = {}
    files: dict[str, list[tuple[str, int]]] = {}
    for split, name in folders.items():
        try:
            sources[split], files[split] = _split_source(root, name, classes, side)
        except DataError:  # where one split is needed, the others need not exist
            if not needed or split == required:
                raise
    identities = {split: "".join(f"{file} {size}\n" for file, size in files[split]) for split in files}
    absent = base.Outline(0, (side, side, 3))
    not_wanted = [split for split, name in chosen.items() if name == "none"]
    by_split: dict[str, base.Source] = {**dict.fromkeys(["train", *not_wanted, *folders], absent), **sources}
    mean, std = base.channel_statistics(3)
    return base.RawSplits(
        train=by_split["train"],
        validation=by_split.get("validation"),
        test=by_split.get("test"),
        class_names=classes,
        mean=mean,
        std=std,
        identity=hashlib.sha256("".join([f"{side} {classes}", *identities.values()]).encode()).hexdigest(),
        identities=identities,
        labels=sources["train"].labels if "train" in sources else None,
        notes=tuple(f"the split {split!r} has images without classes, and is left out" for split in unlabelled),
        files=tuple((file[len(folders["train"]) + 1 :], size) for file, size in files.get("train", ())),
    )


def _class_names(root: Path, split_folders: set[str]) -> tuple[str, ...]:
    """The names of the folders in the splits' folders, sorted."""
    entries = (entry for folder in split_folders for entry in _listing(root / folder, root))
    return tuple(sorted({entry.name for entry in entries if entry.is_dir()}))


# Folder's name -> the split that it holds.
_SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


def _split_folders(root: Path, chosen: Mapping[str, str]) -> dict[str, str]:
    """The folder of each split, {} where there are none. Raises `DataError` where images would be left out unnoticed."""
    names = [entry.name for entry in _listing(root, root) if entry.is_dir()]
    folders: dict[str, str] = {split: name for split, name in chosen.items() if name != "none"}
    for split, name in folders.items():
        if name not in names:
            there = f"it has {', '.join(names[:8])}{', ...' * (len(names) > 8)}" if names else "it has none"
            raise ConfigError(f"config.data.splits: {root} has no folder {name!r} for {split}; {there}.")
    twice = [split for split, name in folders.items() if split != "train" and name == folders.get("train")]
    if twice:
        raise ConfigError(
            f"config.data.splits: {folders['train']!r} is for {twice[0]} and for train, which would be tested on."
        )
    for name in names:
        if name in chosen.values() or _SPLITS.get(name) in chosen:
            continue
        if (split := _SPLITS.get(name)) in folders:
            raise DataError(f"{root}: {folders[split]} and {name} are both for {split}; keep one of them.")
        if split:
            folders[split] = name
    others = [name for name in names if name not in _SPLITS and name not in folders.values()]
    if folders and others and not chosen:
        raise DataError(
            f"{root}: has the split{'s' * (len(folders) > 1)} {', '.join(folders.values())} and beside them "
            f"{', '.join(others[:3])}{', ...' * (len(others) > 3)}; splits are called {', '.join(_SPLITS)}, and a class must "
            "not be called like one. config.data.splits names others."
        )
    return folders


def _has_no_classes(split: Path, root: Path) -> bool:
    """Whether a split's folder has images, as the test of a competition, and no folders of classes."""
    entries = _listing(split, root)
    return not any(e.is_dir() for e in entries) and any(e.name.lower().endswith(images.EXTENSIONS) for e in entries)


def _split_source(
    root: Path, split: str, classes: tuple[str, ...], side: int
) -> tuple[FolderSource, list[tuple[str, int]]]:
    """The images of a split's folder, and (path below `root`, bytes) of each of their files."""
    files: list[tuple[str, int]] = []
    labels: list[int] = []
    for folder_entry in _listing(root / split, root):
        name = folder_entry.name
        if not folder_entry.is_dir():
            continue
        if name not in classes:
            raise DataError(f"{root / split / name}: training has no class {name!r}.{did_you_mean(name, classes)}")
        listing = _listing(root / split / name, root)
        entries = [e for e in listing if e.name.lower().endswith(images.EXTENSIONS) and not e.is_dir()]
        if not entries:
            raise DataError(f"{root / split / name}: the class has no images ({', '.join(images.EXTENSIONS)}).")
        files += [(os.path.join(split, name, entry.name), _size(entry)) for entry in entries]
        labels += [classes.index(name)] * len(entries)
    if not files:
        raise DataError(f"{root / split}: the split has no images.")
    return FolderSource(root, tuple(file for file, _ in files), np.array(labels, np.int32), side), files


def _size(entry: os.DirEntry[str]) -> int:
    try:
        status = entry.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{entry.path} is no file with an image, but a device, a pipe or a socket.")
        return status.st_size
    except OSError as error:  # a dangling link
        raise DataError(f"{entry.path} cannot be read ({error.strerror}).") from None


def _listing(folder_path: Path, root: Path) -> list[os.DirEntry[str]]:
    """Entries sorted by name, without hidden ones.

    Raises `DataError` for a link that leads out of `root`, and for a name that is no UTF-8.
    """
    try:
        with os.scandir(folder_path) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder_path} cannot be read ({error.strerror}).") from None
    for entry in visible:
        if not _is_utf8(entry.name):
            raise DataError(f"{folder_path}: the name {entry.name!r} is not UTF-8; give it another one.")
        if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
            raise DataError(f"{entry.path}: the link leads out of {root}; copy what it points to, or mount it there.")
    return visible


def _is_utf8(name: str) -> bool:
    """Whether a name of the file system is text: Python keeps other bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
