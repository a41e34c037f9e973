"""The data sets by name: loading, preparing and verifying them.

`load` never downloads: in a run of many processes one calls `prepare` while the others wait, and then all call `load`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from jaxtrain.config import DataConfig, did_you_mean, without_effect
from jaxtrain.data import base, cifar, contents, images, splits
from jaxtrain.data.base import Dataset, Source, materialize, nbytes
from jaxtrain.data.digits import digits_file, load_digits
from jaxtrain.data.synthetic import SyntheticSource, load_synthetic
from jaxtrain.errors import ConfigError, DataError, WorkdirError
from jaxtrain.host.paths import require_local
from jaxtrain.plugins import is_factory, load_dotted, watch

__all__ = [
    "Dataset",
    "Source",
    "data_dir",
    "decodes_images",
    "is_cheap",
    "load",
    "materialize",
    "nbytes",
    "outline",
    "prepare",
    "record_contents",
    "recorded_on",
    "verify",
]

NAMES = ("digits", "synthetic", *cifar.CIFAR)
_LARGE_SIDE = 96


def data_dir(config: DataConfig) -> Path:
    """`config.dir`, else `$JAXTRAIN_DATA_DIR`, else `~/.cache/jaxtrain/data`; absolute. Raises `ConfigError` for an address."""
    if not config.dir and (variable := os.environ.get("JAXTRAIN_DATA_DIR")):
        require_local(variable, f"$JAXTRAIN_DATA_DIR={variable!r}", ConfigError)
    named = config.dir or os.environ.get("JAXTRAIN_DATA_DIR") or "~/.cache/jaxtrain/data"
    return Path(named).expanduser().absolute()


def check_name(config: DataConfig) -> None:
    """Raises `ConfigError` where `config.name` can mean no data set; reads no data."""
    root, name = data_dir(config), config.name
    if is_factory(name):
        load_dotted(name, "data.name")
    elif ":" not in name and name not in NAMES and name.split("/")[0] not in (known := _tfds_sets().known_names(root)):
        hint = did_you_mean(name, (*NAMES, *known))
        raise ConfigError(
            f"config.data.name={name!r}: must be one of {', '.join(NAMES)}, folder:PATH, package.module:factory, or a "
            f"data set that TFDS has prepared in {root}.{hint}"
        )


def load(config: DataConfig, *, image_size: int = 0, needed: str = "", drawn: Sequence[str] | None = None) -> Dataset:
    """The data set `config.name`, cut into train, validation and test.

    image_size: side that the model sees. Sources with a size of their own keep it (the device resizes). Images that
    differ in size need it: they are stored at this side, or at 8/7 of it with `resize_crop` (224 -> 256).
    needed: the one split whose files must be there ("" for all); others whose files are not are then empty.
    drawn: the splits that a run had drawn from training, so that no other is, for want of its files; None: what is lacking.

    Splits: a data set's own ones are used, or those that `config.splits` names. Without a validation split, the share
    `config.validation` of training is held out; without a test split there is none, unless both are missing: then a fifth
    of training is held out for the test first. Of a folder, a file is held out when a hash of its name is below the share,
    so that no added file moves another; elsewhere positions are drawn (for the test, of every class where labels are
    known), so that every data set keeps its splits while it has the same examples. `config.split_seed` alone decides
    which. `config.examples` then keeps the first so many of the training examples, in split order.

    Raises `ConfigError` for an unknown name or settings that do not fit the data, and `DataError` for data that is
    missing or damaged.
    """
    if is_factory(config.name):
        dataset = _own(config, image_size)
    else:
        dataset = splits.cut(_find_parts(config, image_size, needed), config, needed, drawn)
        if config.name in ("digits", "synthetic"):
            notes = without_effect("data", config, ["dir"], f"{config.name} is not in the data directory")
            dataset = dataclasses.replace(dataset, notes=(*dataset.notes, *notes))
    return dataset


def _own(config: DataConfig, image_size: int) -> Dataset:
    """What a user's factory returns, with a note of the settings that it has not looked at."""
    watched, read = watch(config)
    dataset = load_dotted(config.name, "data.name")(watched, image_size=image_size)
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"config.data.name={config.name!r}: returned {type(dataset).__name__}, not a Dataset.")
    _check_own(config.name, dataset)
    for split in base.SPLITS:
        _check_own_split(config.name, dataset, split)
    dataset = dataclasses.replace(dataset, num_classes=int(dataset.num_classes))
    unread = [name for name in ("dir", "splits", "examples", "validation", "split_seed") if name not in read]
    notes = without_effect("data", config, unread, f"{config.name} does not read it")
    return dataclasses.replace(dataset, notes=(*dataset.notes, *notes))


def _check_own(name: str, dataset: Dataset) -> None:
    """Raises `DataError` for what would end a run later, or give wrong figures in silence."""

    def require(good: object, what: str) -> None:
        if not good:
            raise DataError(f"config.data.name={name!r}: of the data set that it returned {what}.")

    for split in base.SPLITS:
        require(
            hasattr(getattr(dataset, split), "read"), f"{split} is no source; it is an empty one where there is none"
        )
    classes, channels = dataset.num_classes, dataset.train.shape[2]
    require(len(dataset.train), "train is empty")
    whole = isinstance(classes, (int, np.integer)) and classes > 1
    require(whole, f"num_classes is {classes!r}, and must be a whole number above 1")
    names = len(dataset.class_names)
    require(names <= classes, f"class_names has {names} names for {classes} classes")
    text = isinstance(dataset.fingerprint, str) and dataset.fingerprint
    require(text, f"fingerprint is {dataset.fingerprint!r}, and must be a text that is another one for other data")
    for field in ("mean", "std"):
        values = getattr(dataset, field)
        good = len(values) == channels and (field == "mean" or all(value > 0 for value in values))
        require(good, f"{field} is {values!r}, and must have {channels} numbers, one a channel, those of std above 0")


def _check_own_split(name: str, dataset: Dataset, split: str) -> None:
    """Raises `DataError` for what would end a run only when it comes to that split, or count as wrong answers."""
    source: Source = getattr(dataset, split)
    if not len(source):
        return
    if source.shape != dataset.train.shape:
        raise DataError(
            f"config.data.name={name!r}: {split} has images of {list(source.shape)}, and training of "
            f"{list(dataset.train.shape)}."
        )
    labels = base.labels_of(source)  # without reading an example: those of streams may not be there yet
    if labels is not None and len(wrong := np.flatnonzero((labels < 0) | (labels >= dataset.num_classes))):
        raise DataError(
            f"config.data.name={name!r}: example {wrong[0]} of {split} has label {labels[wrong[0]]}, and there are "
            f"{dataset.num_classes} classes; leave out a split that has no labels."
        )


def outline(config: DataConfig, *, image_size: int = 0) -> Dataset:
    """What `load` returns, or the same without its examples where they need not be there to know how many there are.

    Accepts and refuses what `load` does.
    """
    if config.name not in cifar.CIFAR:
        return load(config, image_size=image_size)
    _refuse_chosen_splits(config)
    official = cifar.CIFAR[config.name]
    train, test = (base.Outline(official.examples[split], official.shape) for split in ("train", "test"))
    names = tuple(str(label) for label in range(official.classes))
    parts = base.RawSplits(train, None, test, names, official.mean, official.std, identity="outline")
    return splits.cut(parts, config)


def prepare(config: DataConfig) -> Path | None:
    """Makes sure that the data set is on disk, downloading it where jaxtrain can; returns where, or None (not on disk).

    Cheap when it is there already. Of several processes on a host one works. Raises `DataError` saying what to do.
    """
    if config.name in cifar.CIFAR:
        return _tfds_sets().prepare_cifar(config.name, data_dir(config), config.prepare_timeout)
    if config.name == "digits":
        return digits_file()
    if config.name.startswith("folder:"):
        return _folder_path(config)
    if config.name == "synthetic" or is_factory(config.name):
        return None
    return _find_prepared(config)


def verify(config: DataConfig, progress: Progress = iter) -> dict[str, int]:
    """Reads every example, and compares hashes where they are stored; returns split -> number of examples.

    Of a folder, the contents are compared with those that `record_contents` has stored, and stored where it has not.

    Raises `DataError` naming the file and the record of the first that is damaged, or the files that have changed.
    """
    if config.name in cifar.CIFAR:
        return _tfds_sets().verify_cifar(config.name, data_dir(config))
    dataset = load(dataclasses.replace(config, examples=0), image_size=config.image_size or 32)
    counts = {split: sum(len(labels) for _, _, labels in base.chunks(getattr(dataset, split))) for split in base.SPLITS}
    if config.name.startswith("folder:"):
        folder, names, path = _folder_files(config, dataset)
        recorded = contents.read_record(path)
        changed = contents.compare(folder, names, recorded, progress) if recorded else []
        if recorded and changed:
            options = {"--dir": config.dir, "--splits": config.splits}
            command = ["jaxtrain", "data", "prepare", config.name]
            command += [word for option, value in options.items() if value for word in (option, value)]
            raise DataError(
                f"{len(changed):,} of {len(recorded.files):,} files of {folder} are not as they were on {recorded.when} "
                f"({', '.join(changed[:3])}{', ...' * (len(changed) > 3)}); bring them back, or take them as they are with "
                f"`{shlex.join(command)}`."
            )
        with contextlib.suppress(WorkdirError):  # what was read is sound, also where that cannot be remembered
            contents.record(folder, names, path, known=recorded, progress=progress)
    return counts


Progress = Callable[[Iterable[str]], Iterable[str]]  # wraps an iterable of files to show how far it is

# Of a folder up to this size a run records the contents at its first start, in a second or two.
_SMALL_FILES, _SMALL_BYTES = 50_000, 1 << 30


def record_contents(config: DataConfig, dataset: Dataset, *, afresh: bool = False, progress: Progress = iter) -> str:
    """Stores a SHA-256 of every file of a folder, for `verify`; returns what was recorded when, "" where nothing is.

    afresh: read every file again and take it as it is; else only files that are not known are added, and a folder of more
    than 1 GiB or 50,000 files is left to who asks for it.
    """
    if not config.name.startswith("folder:"):
        return ""
    folder, names, path = _folder_files(config, dataset)
    if not afresh:
        if len(names) > _SMALL_FILES or sum(os.stat(folder / name).st_size for name in names) > _SMALL_BYTES:
            return ""
        with contextlib.suppress(OSError, WorkdirError, DataError):  # the data directory need not be writable for this
            contents.record(folder, names, path, known=contents.read_record(path))
        return ""
    found = contents.record(folder, names, path, progress=progress)
    return f"{len(found.files):,} files recorded in {path}"


def recorded_on(config: DataConfig) -> str:
    """When the contents of a folder were recorded, "" where they were not."""
    if not config.name.startswith("folder:"):
        return ""
    found = contents.read_record(contents.record_path(_folder_path(config), data_dir(config)))
    return found.when if found else ""


def _folder_files(config: DataConfig, dataset: Dataset) -> tuple[Path, set[str], Path]:
    """The folder, its images' files below it, and where their contents are recorded."""
    folder = _folder_path(config).resolve()
    wholes = (_whole(getattr(dataset, split)) for split in base.SPLITS)
    names = {
        os.path.normpath(file) for whole in wholes if isinstance(whole, images.FolderSource) for file in whole.files
    }
    return folder, names, contents.record_path(folder, data_dir(config))


def is_cheap(source: Source) -> bool:
    """True where reading copies bytes from memory, the page cache or a generator: nothing that workers would help."""
    return isinstance(_whole(source), (base.ArraySource, base.MappedSource, SyntheticSource))


def decodes_images(source: Source) -> bool:
    """True where reading is mostly Pillow's decoding of large images, which several threads do at once.

    Decoding one of 32 x 32 pixels is mostly Python, of which one thread runs at a time.
    """
    whole = _whole(source)
    return isinstance(whole, base.DecodedSource) and min(whole.shape[:2]) >= _LARGE_SIDE


def _whole(source: Source) -> Source:
    while isinstance(source, (base.Subset, base.Relabelled)):
        source = source.base
    return source


# --------------------------------------------------------------------------------------------------------------- names


def _tfds_sets() -> ModuleType:
    """Imports TFDS, a tenth of what a start imports, for the data sets that need it."""
    from jaxtrain.data import tfds_sets  # noqa: PLC0415

    return tfds_sets


def _folder_path(config: DataConfig) -> Path:
    path = Path(config.name.removeprefix("folder:")).expanduser()
    if not path.is_dir():
        raise DataError(f"config.data.name={config.name!r}: there is no such folder.")
    return path


def _find_parts(config: DataConfig, image_size: int, needed: str) -> base.RawSplits:
    name = config.name
    side = round(image_size * 8 / 7) if config.augmentation == "resize_crop" else image_size
    if name.startswith("folder:"):
        if not side:
            raise ConfigError(f"config.data.image_size=0: set the side that the images of {name!r} are cut to.")
        return images.folder(_folder_path(config), side, config.chosen_splits, needed)
    if _is_tfds(name):
        directory = _find_prepared(config)
        return _tfds_sets().load_prepared(directory, data_dir(config), side, config.chosen_splits, needed)
    _refuse_chosen_splits(config)
    if name == "digits":
        return load_digits()
    if name == "synthetic":
        return load_synthetic(config, image_size)
    return _tfds_sets().load_cifar(name, data_dir(config))


def _refuse_chosen_splits(config: DataConfig) -> None:
    if config.splits:
        raise ConfigError(
            f"config.data.splits={config.splits!r}: {config.name} has its own splits; leave it out, or hold out another share "
            "with config.data.validation."
        )


def _is_tfds(name: str) -> bool:
    return name not in NAMES and not name.startswith("folder:") and not is_factory(name)


def _find_prepared(config: DataConfig) -> Path:
    check_name(config)
    return _tfds_sets().find(config.name, data_dir(config))
