"""What a data set is: three splits, each a random-access source of `uint8` images and their labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxtrain.errors import DataError

_CHUNK = 1024  # examples read at once where a whole source is read
_LARGE_SIDE = 96  # pixels


class Source(Protocol):
    """Random access to examples. Reading workers get a pickled copy, so a source holds paths rather than open files."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, H, W, C] and labels int32 [n] of the examples `indices`, int64 [n].

        Raises `DataError` naming the file and the record of an example that cannot be read.
        """
        ...


class CheapSource:
    """A source that copies bytes from memory, the page cache or a generator: workers would not help."""


class DecodedSource:
    """A source whose examples are encoded images: reading one is mostly Pillow's work."""


SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set cut into splits; `validation` and `test` may be empty."""

    name: str
    train: Source
    validation: Source
    test: Source
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """One number a channel, for pixels in [0, 1]. A run normalizes its images by `mean` and `std`."""
    std: tuple[float, ...]
    fingerprint: str
    """SHA-256 (hex) of what identifies the content and the splits. It is equal on every process and under every path."""
    split_fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The same for each split alone; {} where only the whole is known."""
    drawn: tuple[str, ...] = ()
    """The splits that were drawn from training."""
    split_rule: str = ""
    """The rule by which splits were drawn by file names; "" where they were not. A run cannot go on under another rule."""
    notes: tuple[str, ...] = ()
    """What a user should know about it, one sentence each."""
    skipped: tuple[str, ...] = ()
    """The images that `data.skip_bad` has left out, and why: one sentence each."""

    def only(self, split: str) -> Dataset:
        """This data set with the other splits empty."""
        empty = {name: Outline(0, getattr(self, name).shape) for name in SPLITS if name != split}
        return dataclasses.replace(self, **empty)


@dataclasses.dataclass(frozen=True)
class RawSplits:
    """A data set as it is stored, before `splits.cut` draws the missing splits from training."""

    train: Source
    validation: Source | None
    """None where the data set has none, and one may be drawn from training."""
    test: Source | None
    """As `validation`."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """One number a channel, for pixels in [0, 1]; so is `std`."""
    std: tuple[float, ...]
    identity: str
    """Text that identifies the content."""
    identities: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The same for each split that the data set brings."""
    labels: np.ndarray | None = None
    """int [len(train)], for a stratified test split; None where reading them all would cost too much."""
    files: tuple[tuple[str, int], ...] = ()
    """(name below the split, bytes) of each training example's file, if examples are files. Splits are drawn by these."""

    def identity_of(self, split: str) -> str:
        """What identifies the stored split: its own content where that is known, or that of the whole data set."""
        return self.identities.get(split, self.identity)

    notes: tuple[str, ...] = ()
    """What a user should know about it, one sentence each."""


def channel_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std), one number a channel, for a data set without known statistics: ImageNet's for RGB, else 0.5 and 0.25."""
    if channels == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.5,) * channels, (0.25,) * channels


CROPPED = ("resize_crop", "random_resized_crop")
"""The augmentations whose evaluation crops the centre of a larger image."""


def resized_side(image_size: int, crop_pct: float) -> int:
    """The side in pixels to which an image is resized before `image_size` is cropped of it (256 for 224 and 0.875)."""
    return round(image_size / crop_pct)


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(CheapSource):
    """Examples held in memory: images uint8 [N, H, W, C], labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return _image_shape(self.images)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]


class MappedSource(CheapSource):
    """Examples in two `.npy` files, memory-mapped: only rows that are read take memory, and a pickle is two paths."""

    def __init__(self, images: Path, labels: Path):
        """Files of uint8 [N, H, W, C] and int32 [N]. Raises `DataError` where they cannot be read."""
        self._paths = (images, labels)
        try:
            self._arrays = tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in self._paths)
        except (OSError, ValueError) as error:
            raise DataError(f"{images.parent}: the decoded images cannot be read ({error}).") from None

    def __reduce__(self):
        return MappedSource, self._paths

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]."""
        return np.asarray(self._arrays[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        return _image_shape(self._arrays[0])

    def __len__(self) -> int:
        return len(self._arrays[1])

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = self._arrays
        return np.asarray(images[indices]), np.asarray(labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of another source, in a given order."""

    base: Source
    indices: np.ndarray
    """int64 [n], into `base`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.base.shape

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.base.read(self.indices[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Relabelled:
    """Another source with other labels."""

    base: Source
    labels: np.ndarray
    """int32 [classes of `base`]: the new label of each old one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.base.shape

    def __len__(self) -> int:
        return len(self.base)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = self.base.read(indices)
        return images, self.labels[labels]


@dataclasses.dataclass(frozen=True)
class Outline:
    """A source of known size without examples: for an empty split, or a data set that is not on disk."""

    count: int
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise LookupError(f"an outline has no examples (asked for {len(indices)})")


def underlying(source: Source) -> Source:
    """The source that a `Subset` or a `Relabelled` reads from."""
    while isinstance(source, (Subset, Relabelled)):
        source = source.base
    return source


def is_cheap(source: Source) -> bool:
    """Whether reading `source` is no work that workers would help with."""
    return isinstance(underlying(source), CheapSource)


def decodes_images(source: Source) -> bool:
    """Whether reading is mostly Pillow's decoding of large images, which several threads do at once.

    Decoding one of 32 x 32 pixels is mostly Python, of which one thread runs at a time.
    """
    source = underlying(source)
    return isinstance(source, DecodedSource) and min(source.shape[:2]) >= _LARGE_SIDE


def labels_of(source: Source) -> np.ndarray | None:
    """int32 [N]: the labels of a source that knows them without reading its images, else None."""
    if isinstance(source, Subset):
        whole = labels_of(source.base)
        return None if whole is None else whole[source.indices]
    if isinstance(source, Relabelled):
        whole = labels_of(source.base)
        return None if whole is None else source.labels[whole]
    labels: Any = getattr(source, "labels", None)
    return labels if isinstance(labels, np.ndarray) else None


def count_classes(source: Source, classes: int) -> np.ndarray | None:
    """int64 [classes]: the examples of each class; None where all images would have to be decoded for it."""
    labels = labels_of(source)
    if labels is None and is_cheap(source):
        labels = np.concatenate([part for _, _, part in chunks(source)])
    return None if labels is None else np.bincount(labels, minlength=classes)


# -------------------------------------------------------------------------------------------------------- class names


def follow_classes(dataset: Dataset, known: Sequence[str], *, extend: bool) -> Dataset:
    """Numbers the classes of a data set as a run numbers them, by their names; notes say what has changed.

    Args:
      dataset: the data set.
      known: the names of the run's classes, in the order of its outputs.
      extend: whether to train on new classes: each takes the number of a class that is gone, or the next number. Without
        it their examples are left out, since a model that was trained on `known` has no output for them.

    Raises:
      DataError: names are not unique, or examples must be left out whose labels are only known once they are read.
    """
    present, known = dataset.class_names, tuple(known)
    if present == known:
        return dataset
    for names in (present, known):
        if len(set(names)) < len(names):
            raise DataError(
                f"The classes of {dataset.name} have changed, and their names are not unique: they cannot be told apart."
            )
    gone = [name for name in known if name not in present]
    new = [name for name in present if name not in known]
    numbered = list(known)
    if extend:
        for old, name in zip(gone, new, strict=False):
            numbered[numbered.index(old)] = name
        numbered += new[len(gone) :]
    numbers = np.array([numbered.index(name) if name in numbered else -1 for name in present], np.int32)
    notes = [f"the class {name!r} is gone" for name in gone]
    notes += [
        f"the class {name!r} is new and has output {numbered.index(name)}" if extend
        else f"the class {name!r} is not known to the run, and its examples are left out"
        for name in new
    ]  # fmt: skip

    def follow(split: str) -> Source:
        source: Source = getattr(dataset, split)
        if not len(source):
            return source
        if (numbers < 0).any():
            labels = labels_of(source)
            if labels is None:
                raise DataError(
                    f"The data set {dataset.name} has classes that the run does not know: {', '.join(new)}."
                )
            source = Subset(source, np.flatnonzero(numbers[labels] >= 0))
        return Relabelled(source, numbers)

    return dataclasses.replace(
        dataset,
        **{split: follow(split) for split in SPLITS},
        num_classes=len(numbered),
        class_names=tuple(numbered),
        notes=(*dataset.notes, *notes),
    )


def _image_shape(images: np.ndarray) -> tuple[int, int, int]:
    _, height, width, channels = images.shape
    return height, width, channels


def nbytes(source: Source) -> int:
    """Bytes of all its images and labels, decoded."""
    height, width, channels = source.shape
    return len(source) * (height * width * channels + np.dtype(np.int32).itemsize)


def chunks(source: Source) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Reads a whole source in order; yields (index of the first example, images uint8 [n, H, W, C], labels int32 [n])."""
    for start in range(0, len(source), _CHUNK):
        images, labels = source.read(np.arange(start, min(start + _CHUNK, len(source)), dtype=np.int64))
        yield start, images, labels


def materialize(source: Source, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The whole source as arrays: images uint8 [N, H, W, C] and labels int32 [N].

    `threads` threads read at once. Use more than one only for a source that several threads may read.
    """
    all_images, all_labels = np.empty((len(source), *source.shape), np.uint8), np.empty(len(source), np.int32)

    def fill(start: int) -> None:
        here = slice(start, start + _CHUNK)
        all_images[here], all_labels[here] = source.read(np.arange(start, min(here.stop, len(source)), dtype=np.int64))

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fill, range(0, len(source), _CHUNK)):
            pass  # raises what `fill` raised, the first in the source's order
    return all_images, all_labels


def read_all(dataset: Dataset) -> dict[str, int]:
    """Reads every example; returns split -> number of examples. Raises `DataError` for the first that is damaged."""
    return {split: sum(len(labels) for _, _, labels in chunks(getattr(dataset, split))) for split in SPLITS}
