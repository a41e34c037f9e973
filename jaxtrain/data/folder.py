"""Image folders: one folder for each class, below one folder for each split if the data set has splits."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxtrain.data import base, contents, image_check, images, splits
from jaxtrain.data.base import Dataset
from jaxtrain.data.folder_scan import ImageFile, Scan, check_name, scan_folder
from jaxtrain.data.spec import DatasetSpec, Progress, data_dir
from jaxtrain.errors import ConfigError, DataError, WorkdirError

# A run records the contents of a folder up to this size at its first start, in a second or two.
_SMALL_FILES, _SMALL_BYTES = 50_000, 1 << 30
_BAD_ADVICE = "`jaxtrain data verify` lists all such images, and --config.data.skip_bad=true leaves them out."
log = logging.getLogger("jaxtrain")


class UnreadableImages(DataError):
    """Images of a folder cannot be read. `images` has a sentence for each, the error's own text is about all of them."""

    def __init__(self, text: str, images: Sequence[str]):
        super().__init__(text)
        self.images = tuple(images)


class ImageFolder(DatasetSpec):
    """The images in a folder, `folder:PATH`. Their labels are the names of the folders that they lie in."""

    named_splits = True
    reads_skip_bad = True

    @property
    def path(self) -> Path:
        """The folder. Raises `DataError` where there is none."""
        path = Path(self.config.name.removeprefix("folder:")).expanduser()
        for part in path.resolve().parts:
            check_name(part, path)
        if path.is_file():
            raise DataError(f"config.data.name={self.config.name!r}: {path} is a file; unpack it, and name the folder.")
        if not path.is_dir():
            raise DataError(
                f"config.data.name={self.config.name!r}: there is no such folder; if it was moved, say where it is now "
                "(jaxtrain evaluate: with --data)."
            )
        return path

    def prepare(self) -> Path:
        path, side = self.path, self.stored_side(self.config.image_size)
        if self.config.skip_bad and side:  # once for all processes, which then find what this has stored
            with contextlib.suppress(ConfigError, DataError):  # loading says what is wrong
                self._unreadable(scan_folder(path, self.config.chosen_splits), side, store=True)
        return path

    def read(self, image_size: int, needed: str, drawn: Sequence[str] | None) -> Dataset:
        config, side = self.config, self.stored_side(image_size)
        if not side:
            raise ConfigError(f"config.data.image_size=0: set the side that the images of {config.name!r} are cut to.")
        scan = scan_folder(self.path, config.chosen_splits, needed)
        unreadable = self._unreadable(scan, side) if config.skip_bad else {}
        dataset = splits.cut(_raw_splits(scan, side, config.chosen_splits, unreadable), config, needed, drawn)
        return dataclasses.replace(dataset, skipped=tuple(unreadable.values()))

    def verify(self, progress: Progress = iter) -> dict[str, int]:
        scan = scan_folder(self.path, self.config.chosen_splits)
        stored = image_check.stored_path(scan.root, data_dir(self.config))
        unreadable = image_check.unreadable(scan, self.config.image_size or 32, stored, store=True, progress=progress)
        if unreadable:
            count = sum(map(len, scan.files.values()))
            raise UnreadableImages(
                f"{len(unreadable):,} of {count:,} images of {scan.root} cannot be used, such as: "
                f"{next(iter(unreadable.values()))} Mend or remove them, or train without them with "
                "--config.data.skip_bad=true.",
                tuple(unreadable.values()),
            )
        dataset = self.load_all()
        for note in dataset.notes:
            log.warning("data %s: %s", dataset.name, note)
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
        return {split: len(getattr(dataset, split)) for split in base.SPLITS}

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

    def _unreadable(self, scan: Scan, side: int, *, store: bool = False) -> dict[str, str]:
        """What `image_check.unreadable` finds, or has found before: for a large folder that takes minutes.

        store: whether to store what is found, in the data directory. Those that could not be read are then tried again:
          the disk may have been at fault.
        """
        stored = image_check.stored_path(scan.root, data_dir(self.config))
        known = image_check.known_unreadable(scan, side, stored)
        if known is None:
            return image_check.unreadable(scan, side, stored, store=store, progress=image_check.with_log_lines)
        return image_check.unreadable(scan, side, stored, store=True, names=known) if store and known else known

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
    class_names: tuple[str, ...]
    side: int
    """In pixels, of the square that every image is resized and cropped to."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.side, self.side, 3

    def __len__(self) -> int:
        return len(self.files)

    @property
    def is_whole_folder(self) -> bool:
        """Whether the folder has no splits, and these are all its images."""
        return self.files[0].startswith(f".{os.sep}")

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.empty((len(indices), *self.shape), np.uint8)
        for row, index in enumerate(indices):
            class_name = self.class_names[self.labels[index]]
            try:
                pixels[row] = images.read_file(self.root / self.files[index], class_name, self.side)
            except DataError as error:
                raise DataError(f"{error} {_BAD_ADVICE}") from None
        return pixels, self.labels[indices]


def file_of(source: base.Source, index: int) -> str:
    """The path below its folder of an example of `source`; "" where examples are no files."""
    while isinstance(source, (base.Subset, base.Relabelled)):
        index = int(source.indices[index]) if isinstance(source, base.Subset) else index
        source = source.base
    return source.files[index] if isinstance(source, FolderSource) else ""


def _raw_splits(scan: Scan, side: int, chosen: Mapping[str, str], unreadable: Mapping[str, str]) -> base.RawSplits:
    """The folder's splits, before those that it lacks are drawn.

    Args:
      scan: what is in the folder.
      side: in pixels, of the square that every image is resized and cropped to.
      chosen: as `DataConfig.chosen_splits`.
      unreadable: names of files to leave out.

    Raises:
      DataError: a file that is not left out is no regular one, or nothing is left.
    """
    files: dict[str, list[ImageFile]] = {}
    for split, found in scan.files.items():
        files[split] = [file for file in found if file.name not in unreadable]
        for file in files[split]:
            if file.broken:
                raise DataError(f"{scan.root / file.name} {file.broken}. {_BAD_ADVICE}")
        if not files[split]:
            raise DataError(f"{scan.root / scan.folders[split]}: none of its {len(found):,} images can be read.")
    sources = {split: _source(scan, found, side) for split, found in files.items()}
    identities = {split: "".join(f"{file.name} {file.size}\n" for file in found) for split, found in files.items()}
    absent = base.Outline(0, (side, side, 3))
    not_wanted = [split for split, name in chosen.items() if name == "none"]
    by_split: dict[str, base.Source] = {**dict.fromkeys(["train", *not_wanted, *scan.folders], absent), **sources}
    mean, std = base.channel_statistics(3)
    labels: np.ndarray | None = None
    contents: tuple[tuple[str, int], ...] = ()
    if "train" in sources:  # a folder that is only evaluated may have none
        folder = len(scan.folders["train"]) + 1
        labels, contents = sources["train"].labels, tuple((file.name[folder:], file.size) for file in files["train"])
    return base.RawSplits(
        train=by_split["train"],
        validation=by_split.get("validation"),
        test=by_split.get("test"),
        class_names=scan.class_names,
        mean=mean,
        std=std,
        identity=hashlib.sha256("".join([f"{side} {scan.class_names}", *identities.values()]).encode()).hexdigest(),
        identities=identities,
        labels=labels,
        notes=(*scan.notes, *_skipped_note(scan, unreadable)),
        files=contents,
    )


def _source(scan: Scan, files: Sequence[ImageFile], side: int) -> FolderSource:
    labels = np.array([file.label for file in files], np.int32)
    return FolderSource(scan.root, tuple(file.name for file in files), labels, scan.class_names, side)


def _skipped_note(scan: Scan, unreadable: Mapping[str, str]) -> list[str]:
    """One sentence about the images that are left out with `data.skip_bad`, [] where none is."""
    if not unreadable:
        return []
    names = list(map(os.path.normpath, unreadable))
    count = sum(map(len, scan.files.values()))
    return [
        f"{len(names):,} of {count:,} images cannot be read and are left out (config.data.skip_bad): "
        f"{', '.join(names[:3])}{', ...; skipped_images.txt has all of them' * (len(names) > 3)}"
    ]
