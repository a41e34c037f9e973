"""The data sets by name: loading, preparing and verifying them.

`load` never downloads. In a run of many processes one calls `prepare` while the others wait. Then all call `load`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from jaxtrain.config import DataConfig
from jaxtrain.data import base, cifar, tfds_specs
from jaxtrain.data.base import Dataset, Source
from jaxtrain.data.digits import Digits
from jaxtrain.data.folder import FolderSource, ImageFolder
from jaxtrain.data.plugin import Plugin
from jaxtrain.data.spec import DatasetSpec, Progress, data_dir
from jaxtrain.data.synthetic import Synthetic
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.host.text import did_you_mean
from jaxtrain.plugins import is_factory

_SPECS: dict[str, type[DatasetSpec]] = {
    "digits": Digits,
    "synthetic": Synthetic,
    **dict.fromkeys(cifar.CIFAR, tfds_specs.Cifar),
}
NAMES = tuple(_SPECS)


def find_spec(config: DataConfig) -> DatasetSpec:
    """The data set that `config.name` means. Raises `ConfigError` for a name that is unknown; reads no data."""
    name = config.name
    if name in _SPECS:
        return _SPECS[name](config)
    if name.startswith("folder:"):
        return ImageFolder(config)
    if is_factory(name):
        return Plugin(config)
    root = data_dir(config)
    if ":" not in name and name.split("/")[0] not in (known := tfds_specs.known_names(root)):
        hint = did_you_mean(name, (*NAMES, *known))
        raise ConfigError(
            f"config.data.name={name!r}: must be one of {', '.join(NAMES)}, folder:PATH, package.module:factory, or a "
            f"data set that TFDS has prepared in {root}.{hint}"
        )
    return tfds_specs.TfdsDataset(config)


def absolute(config: DataConfig) -> DataConfig:
    """`config` with paths that mean the same in every current directory."""

    def path(text: str) -> str:
        return os.path.abspath(os.path.expanduser(text))

    name = f"folder:{path(folder)}" if (folder := _folder(config.name)) else config.name
    return dataclasses.replace(config, name=name, dir=path(config.dir) if config.dir else "")


def found_at(config: DataConfig, data: str) -> DataConfig:
    """`config` with the data set that a user has named in place of its own.

    Args:
      config: the data section.
      data: a name, as `config.name`; or a directory: one in which TFDS has prepared data becomes the data directory, and
        any other is a folder of images.

    Raises:
      DataError: it is a path, and there is no such directory.
    """
    path = Path(data).expanduser()
    if data in NAMES or (not path.is_dir() and data[:1] not in ("/", ".", "~")):
        return absolute(dataclasses.replace(config, name=data))
    if not path.is_dir():
        raise DataError(f"{data}: there is no such directory.")
    is_data_dir = any(any(path.glob(f"{levels}/features.json")) for levels in ("*/*", "*/*/*"))
    if is_data_dir and not _folder(config.name):
        return absolute(dataclasses.replace(config, dir=str(path)))
    return absolute(dataclasses.replace(config, name=f"folder:{path}"))


def _folder(name: str) -> str:
    """The path in `folder:PATH`, "" in other names."""
    return name.removeprefix("folder:") if name.startswith("folder:") else ""


def undivided(dataset: Dataset) -> Source | None:
    """All images of a folder that has no splits, whatever was drawn from them; None for other data sets."""
    sources = [base.underlying(getattr(dataset, split)) for split in base.SPLITS]
    return next((s for s in sources if isinstance(s, FolderSource) and s.is_whole_folder), None)


def check_name(config: DataConfig) -> None:
    """Raises `ConfigError` where `config.name` can mean no data set, or the data directory is an address; reads no data."""
    data_dir(config)
    find_spec(config).check()


def load(config: DataConfig, *, image_size: int = 0, needed: str = "", drawn: Sequence[str] | None = None) -> Dataset:
    """The data set `config.name`, cut into train, validation and test, with the normalization that the config sets.

    A data set's splits are used, or those that `config.splits` names. What is missing is drawn from training: for the
    validation the share `config.validation`. A test split is drawn only if the validation is missing too: a fifth, first.

    In a folder, a file is held out if a hash of its name is below the share. So an added file moves no other. Elsewhere
    positions are drawn (for the test: of every class, where labels are known). So a data set keeps its splits while it has
    the same examples. `config.split_seed` alone decides which. `config.examples` then keeps the first so many of the
    training examples, in split order.

    Args:
      config: the data section.
      image_size: side in pixels that the model sees. Images that all have one size keep it (the device resizes them).
        Images that differ in size need it: they are stored at this side, or at the larger side that is cropped (224 -> 256).
      needed: the one split whose files must exist, "" for all. Another split whose files are missing is then empty.
      drawn: the only splits that may be drawn from training: those that a run had drawn; None: whatever is missing.

    Raises:
      ConfigError: an unknown name, or settings that do not fit the data.
      DataError: data that is missing or damaged.
    """
    return find_spec(config).load(image_size=image_size, needed=needed, drawn=drawn)


def outline(config: DataConfig, *, image_size: int = 0) -> Dataset:
    """What `load` returns, but without its examples where their number is known without them.

    Accepts and refuses what `load` does.
    """
    return find_spec(config).outline(image_size=image_size)


def prepare(config: DataConfig) -> Path | None:
    """Makes sure that the data set is on disk, downloading it where jaxtrain can; returns where, or None (not on disk).

    Cheap when it is there already. Of several processes on a host one works. Raises `DataError` saying what to do.
    """
    return find_spec(config).prepare()


def verify(config: DataConfig, progress: Progress = iter) -> dict[str, int]:
    """Reads every example, and compares hashes where they are stored; returns split -> number of examples.

    The contents of a folder are compared with those that `record_contents` has stored, and stored where it has not.

    Raises `DataError` naming the file and the record of the first that is damaged, or the files that have changed.
    """
    return find_spec(config).verify(progress)


def record_contents(config: DataConfig, dataset: Dataset, *, afresh: bool = False, progress: Progress = iter) -> str:
    """Stores a SHA-256 of every file of a folder, for `verify`.

    Args:
      config: the data section. Nothing is stored for a data set that is not a folder.
      dataset: what `load` returned for it.
      afresh: read every file again and take it as it is. Otherwise only unknown files are added, and a folder of more
        than 1 GiB or 50,000 files is left alone.
      progress: wraps the files as they are read.

    Returns:
      How many files were recorded where, "" unless `afresh`.
    """
    return find_spec(config).record_contents(dataset, afresh=afresh, progress=progress)


def recorded_on(config: DataConfig) -> str:
    """When the contents of a folder were recorded, "" where they were not."""
    return find_spec(config).recorded_on()
