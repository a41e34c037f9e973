"""Finds the images of a folder: which splits and classes it has, which files are in them, and what is left out."""

from __future__ import annotations

import collections
import dataclasses
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jaxtrain.data import images
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.host.text import did_you_mean

# Folder's name -> the split that it holds.
SPLIT_FOLDERS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
# Names that are split folders' in other programs, in any case of letters.
_LIKE_A_SPLIT = SPLIT_FOLDERS | {"training": "train", "dev": "validation", "testing": "test"}
# What archivers, file managers and file systems leave beside classes, in lower case. Hidden names are ignored too.
_JUNK = {"__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A file with an image."""

    name: str
    """Its path below the folder."""
    size: int
    """In bytes; -1 where it could not be asked."""
    label: int
    changed: int
    """When its content, rights or name last changed, in ns; 0 where it could not be asked."""
    broken: str = ""
    """Why it cannot be read, as the end of a sentence; "" where that is not known before it is read."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """What is in a folder."""

    root: Path
    class_names: tuple[str, ...]
    folders: Mapping[str, str]
    """Split -> the name of its folder; {"train": "."} where classes lie in the folder itself."""
    files: Mapping[str, list[ImageFile]]
    """Split -> its images. Only splits that were found, if one was needed."""
    notes: tuple[str, ...]
    """What was left out, one sentence each."""


@dataclasses.dataclass
class _LeftOut:
    """What a scan passes by."""

    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Of files in the folders of classes: their extension -> how many."""
    junk: set[str] = dataclasses.field(default_factory=set)
    """Names of folders."""
    beside: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Folder -> images that lie in it beside the folders of classes."""
    nested: list[str] = dataclasses.field(default_factory=list)
    """Sub-folders of classes, whose images are read."""

    def notes(self) -> list[str]:
        """One sentence about what is left out, by kind, and one about sub-folders; [] where there is nothing to say."""
        parts = [f"{count:,} {kind}" for kind, count in self.kinds.most_common()]
        parts += [f"{count:,} beside the folders of classes in {folder}" for folder, count in self.beside.items()]
        parts += [f"the folder {name}" for name in sorted(self.junk)]
        found = [f"left out, as no images of a class: {', '.join(parts)}"] if parts else []
        if self.nested:
            more = f" and {len(self.nested) - 1:,} more" * (len(self.nested) > 1)
            found.append(f"the images of sub-folders belong to their class: {self.nested[0]}{more}")
        return found


def scan_folder(path: Path, chosen: Mapping[str, str], needed: str = "") -> Scan:
    """Finds the images of PATH/{train,val|valid|validation,test}/CLASS/**, or of PATH/CLASS/** where there are no splits.

    Classes are the folders' names, sorted. A file is an image by its extension. A split whose images lie in no folders of
    classes counts as absent.

    Args:
      path: the folder.
      chosen: as `DataConfig.chosen_splits`: folders that are splits whatever their names; other folders may lie beside them.
      needed: the one split whose folder must exist, "" for all.

    Raises:
      DataError: a class or a split without images, a class that training lacks, folders beside the splits, a name that is
        not text, or a link that leaves `path` (it could name any file).
      ConfigError: a chosen split does not exist.
    """
    root = path.resolve()
    left_out = _LeftOut()
    folders = _split_folders(root, chosen, left_out) or {"train": "."}
    required = needed if needed in folders else "train"
    if required not in folders:
        raise DataError(f"{root}: has {', '.join(sorted(folders.values()))} but no train.")
    unlabelled = [
        split for split, name in folders.items()
        if split != "train" and split not in chosen and _has_no_classes(root / name, root)
    ]  # fmt: skip
    notes = [
        f"the split {folders[split]!r} has images without classes, and is left out: a folder for each class would label them"
        for split in unlabelled
    ]
    folders = {split: name for split, name in folders.items() if split not in unlabelled}
    required = required if required in folders else "train"
    if required not in folders:
        raise DataError(f"{root}: {notes[0]}; and there is no train.")
    classes = _class_names(root, {folders[split] for split in {required, "train"} & folders.keys()})
    if len(classes) < 2 and not needed:
        raise DataError(_too_few_classes(root, folders["train"], classes))
    files: dict[str, list[ImageFile]] = {}
    for split, name in folders.items():
        try:
            files[split] = _split_files(root, name, classes, left_out)
        except DataError:  # where one split is needed, the others need not exist
            if not needed or split == required:
                raise
    return Scan(root, classes, folders, files, (*notes, *left_out.notes()))


# ------------------------------------------------------------------------------------------------------------- splits


def _split_folders(root: Path, chosen: Mapping[str, str], left_out: _LeftOut) -> dict[str, str]:
    """The folder of each split, {} where there are none. Raises `DataError` where images would be left out unnoticed."""
    names = [entry.name for entry in _entries(root, root, left_out) if entry.is_dir()]
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
        if name in chosen.values() or SPLIT_FOLDERS.get(name) in chosen:
            continue
        if (split := SPLIT_FOLDERS.get(name)) in folders:
            raise DataError(f"{root}: {folders[split]} and {name} are both for {split}; keep one of them.")
        if split:
            folders[split] = name
    others = [name for name in names if name not in SPLIT_FOLDERS and name not in folders.values()]
    alike = [name for name in others if name.lower() in _LIKE_A_SPLIT]
    if folders and others and not chosen:
        raise DataError(
            f"{root}: has the split{'s' * (len(folders) > 1)} {', '.join(folders.values())} and beside them "
            f"{_some(others)}; splits are called {', '.join(SPLIT_FOLDERS)}, and a class must not be called like one. "
            f"{_choose({**folders, **_meant(alike)}) if alike else 'config.data.splits names others.'}"
        )
    if not folders and alike and (alike == others or any(_has_folders(root / name, root) for name in alike)):
        raise DataError(
            f"{root}: as there is no train, {_some(alike)} would be taken for classes, and their names are like those of "
            f"splits, which are called {', '.join(SPLIT_FOLDERS)}. {_choose(_meant(alike))}"
        )
    return folders


def _meant(alike: Iterable[str]) -> dict[str, str]:
    """Split -> the folder whose name is like that split's."""
    return {_LIKE_A_SPLIT[name.lower()]: name for name in alike}


def _choose(folders: Mapping[str, str]) -> str:
    """What to do where the splits are these folders."""
    pairs = ",".join(f"{split}={name}" for split, name in folders.items())
    return (
        f"Rename the folders, or name the splits: --config.data.splits={pairs} (data prepare, data verify: --splits)."
    )


def _has_folders(folder: Path, root: Path) -> bool:
    return any(entry.is_dir() for entry in _entries(folder, root))


def _has_no_classes(split: Path, root: Path) -> bool:
    """Whether a split's folder has images, as the test of a competition, and no folders of classes."""
    entries = _entries(split, root)
    return not any(e.is_dir() for e in entries) and any(_is_image(e) for e in entries)


def _too_few_classes(root: Path, train: str, classes: tuple[str, ...]) -> str:
    """The sentence that refuses a folder with fewer than two classes: what it has instead."""
    folder = root / train
    loose = sum(map(_is_image, _entries(folder, root)))
    wanted = f"{folder}: needs a folder of images for each of at least 2 classes"
    if not classes and loose:
        return (
            f"{wanted}, and has images without folders ({loose:,}); move those of each class into a folder of its own."
        )
    if not classes:
        return f"{wanted}, and has no folders."
    inside = [entry.name for entry in _entries(folder / classes[0], root) if entry.is_dir()]
    if inside:
        instead = f"was folder:{folder / classes[0]} meant, which has {_some(inside)}?"
        return f"{wanted}, and has one, {classes[0]!r}; {instead}"
    return f"{wanted}, and has one, {classes[0]!r}."


# ------------------------------------------------------------------------------------------------------------- images


def _class_names(root: Path, split_folders: set[str]) -> tuple[str, ...]:
    """The names of the folders in the splits' folders, sorted."""
    entries = (entry for folder in split_folders for entry in _entries(root / folder, root))
    return tuple(sorted({entry.name for entry in entries if entry.is_dir()}))


def _split_files(root: Path, split: str, classes: tuple[str, ...], left_out: _LeftOut) -> list[ImageFile]:
    """The images of a split's folder."""
    files: list[ImageFile] = []
    for entry in _entries(root / split, root, left_out):
        name = entry.name
        if not entry.is_dir():
            if _is_image(entry):
                left_out.beside[str(root / split)] += 1
            continue
        if name not in classes:
            raise DataError(
                f"{root / split / name}: training has no class {name!r}.{did_you_mean(name, classes)} A split that is not "
                f"labelled is left out with --config.data.splits={SPLIT_FOLDERS.get(split, 'test')}=none."
            )
        before = len(files)
        label, kinds = classes.index(name), collections.Counter[str]()
        for inside, image in _walk(root / split / name, root, left_out, kinds, ()):
            files.append(_image_file(image, os.path.join(split, name, inside), label))
        left_out.kinds += kinds
        if len(files) == before:
            has = (
                f"but {', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common(5))}"
                if kinds
                else "nor other files"
            )
            raise DataError(
                f"{root / split / name}: the class has no images, {has}; remove the folder, or convert what is in it to "
                f"images of a kind that is read ({', '.join(images.EXTENSIONS)})."
            )
    if not files:
        raise DataError(f"{root / split}: the split has no images.")
    return files


def _walk(
    folder: Path, root: Path, left_out: _LeftOut, kinds: collections.Counter[str], above: tuple[Path, ...]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(path below `folder`, entry) of its images, then of those of its sub-folders.

    Args:
      folder: of a class, or below one.
      root: links must not lead out of it.
      left_out: gets the folders that are walked or ignored.
      kinds: gets the files that are no images.
      above: the folders on the way here, without links.

    Raises:
      DataError: a link leads to a folder on the way here, so that the walk would not end.
    """
    here = folder.resolve()
    if here in above:
        raise DataError(f"{folder}: the link leads to a folder above it; remove it.")
    entries = _entries(folder, root, left_out)
    found = [entry for entry in entries if _is_image(entry)]
    if found and above:
        left_out.nested.append(str(folder.relative_to(root)))
    yield from ((entry.name, entry) for entry in found)
    for entry in entries:
        if entry.is_dir():
            for name, image in _walk(folder / entry.name, root, left_out, kinds, (*above, here)):
                yield os.path.join(entry.name, name), image
        elif not _is_image(entry):
            kinds[Path(entry.name).suffix.lower() or "without an extension"] += 1


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By its name, and unless it is a folder."""
    return entry.name.lower().endswith(images.EXTENSIONS) and not entry.is_dir()


def _image_file(entry: os.DirEntry[str], name: str, label: int) -> ImageFile:
    try:
        status = entry.stat()
    except OSError as error:  # a dangling link
        return ImageFile(name, -1, label, 0, f"cannot be read ({error.strerror})")
    if not stat.S_ISREG(status.st_mode):
        return ImageFile(name, -1, label, 0, "is no file with an image, but a device, a pipe or a socket")
    return ImageFile(name, status.st_size, label, status.st_ctime_ns)


# ------------------------------------------------------------------------------------------------------------ listing


def _entries(folder: Path, root: Path, left_out: _LeftOut | None = None) -> list[os.DirEntry[str]]:
    """Entries of a folder sorted by name, without hidden ones and junk, whose folders are noted in `left_out`.

    Raises `DataError` for a link that leads out of `root`, and for a name that is no text.
    """
    try:
        with os.scandir(folder) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}).") from None
    wanted = []
    for entry in visible:
        if entry.name.lower() in _JUNK:
            if left_out and entry.is_dir():
                left_out.junk.add(entry.name)
            continue
        check_name(entry.name, folder)
        if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
            raise DataError(f"{entry.path}: the link leads out of {root}; copy what it points to, or mount it there.")
        wanted.append(entry)
    return wanted


def check_name(name: str, folder: Path) -> None:
    """Raises `DataError` for a name in `folder` that is no UTF-8, or that the locale does not let this process read as such."""
    if name.isascii():
        return
    try:
        text = os.fsencode(name).decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{folder}: the name {name!r} is not UTF-8; give it another one.") from None
    if text != name:
        raise DataError(
            f"{folder}: the name {text!r} is UTF-8, and this process reads names as {sys.getfilesystemencoding()}, by its "
            "locale; start it with LC_ALL=C.UTF-8 or with PYTHONUTF8=1."
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}"
