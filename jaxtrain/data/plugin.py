"""A user's data set: `package.module:factory` is called, and what it returns is checked before a run reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxtrain.config import without_effect
from jaxtrain.data import base
from jaxtrain.data.base import Dataset, Source
from jaxtrain.data.spec import DatasetSpec
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.plugins import load_dotted, watch


class Plugin(DatasetSpec):
    """A user's factory, called as `factory(config, image_size=...)`. It returns a `Dataset`."""

    named_splits = True
    reads_skip_bad = True

    def check(self) -> None:
        load_dotted(self.config.name, "data.name")

    def read(self, image_size: int, needed: str, drawn: Sequence[str] | None) -> Dataset:
        """What the factory returns, with a note of the settings that it does not read."""
        config, name = self.config, self.config.name
        watched, fields_read = watch(config)
        dataset = load_dotted(name, "data.name")(watched, image_size=image_size)
        if not isinstance(dataset, Dataset):
            raise ConfigError(f"config.data.name={name!r}: returned {type(dataset).__name__}, not a Dataset.")
        _check_dataset(name, dataset)
        for split in base.SPLITS:
            _check_split(name, dataset, split)
        unread = [
            f for f in ("dir", "splits", "skip_bad", "examples", "validation", "split_seed") if f not in fields_read
        ]
        notes = without_effect("data", config, unread, f"{name} does not read it")
        return dataclasses.replace(dataset, num_classes=int(dataset.num_classes), notes=(*dataset.notes, *notes))


def _check_dataset(name: str, dataset: Dataset) -> None:
    """Raises `DataError` for what would end a run later, or silently give wrong results."""

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


def _check_split(name: str, dataset: Dataset, split: str) -> None:
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
