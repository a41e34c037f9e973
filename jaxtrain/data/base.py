"""What a data set is: three random-access sources of `uint8` images and their labels."""

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
    """A data set cut into splits; `validation` and `test` may be empty.

    mean, std: per channel, of pixels in [0, 1]; what the images are normalized with.
    fingerprint: SHA-256 (hex) of what identifies the content and the splits; equal on every process and path.
    split_fingerprints: the same of each split alone; {} where only the whole is known.
    drawn: the splits that were drawn from training. split_rule: by which rule, where by file names ("" where not); another
        rule is another run.
    notes: what a user should know of it, a sentence each.
    """

    name: str
    train: Source
    validation: Source
    test: Source
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    split_fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    drawn: tuple[str, ...] = ()
    split_rule: str = ""
    notes: tuple[str, ...] = ()

    def only(self, split: str) -> Dataset:
        """The same with the other splits empty."""
        empty = {name: Outline(0, getattr(self, name).shape) for name in SPLITS if name != split}
        return dataclasses.replace(self, **empty)


@dataclasses.dataclass(frozen=True)
class RawSplits:
    """What a loader finds, before `sources.load` cuts the missing splits and applies the config.

    validation, test: the data set's own, or None where it has none and one may be drawn from training.
    labels: int [len(train)], for a stratified test split; None where reading them all would cost too much.
    identity: text that identifies the content. identities: the same for each of its own splits.
    files: (name below the split, bytes) of each training example's file, where they are files: splits are drawn by them.
    """

    train: Source
    validation: Source | None
    test: Source | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    identity: str
    identities: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: np.ndarray | None = None
    files: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()


def channel_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) where a data set does not bring its own: ImageNet's for RGB, else 0.5 and 0.25."""
    if channels == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.5,) * channels, (0.25,) * channels


def resize_crop_side(image_size: int) -> int:
    """The side in pixels to which `resize_crop` resizes an image before it crops `image_size` (256 for 224)."""
    return round(image_size * 8 / 7)


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
        """Raises `DataError` naming the file that is not such an array."""
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
    """The examples `indices` (int64 [n]) of another source, in that order."""

    base: Source
    indices: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.base.shape

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.base.read(self.indices[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Relabelled:
    """Another source whose label k is `labels[k]` (int32 [classes])."""

    base: Source
    labels: np.ndarray

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
    """A source of known size whose examples are not there."""

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


# -------------------------------------------------------------------------------------------------------- class names


def follow_classes(dataset: Dataset, known: Sequence[str], *, extend: bool) -> Dataset:
    """`dataset` with its classes numbered as in `known`, by their names; notes say what has changed.

    extend: a class that is not known takes the number of one that is gone, or a new one, to be trained on. Without it,
    examples of such classes are left out: a model that was trained on `known` has no output for them.

    Raises `DataError` where names are not unique, or examples would have to be left out that are only known once they
    are read.
    """
    found, known = dataset.class_names, tuple(known)
    if found == known:
        return dataset
    for names in (found, known):
        if len(set(names)) < len(names):
            raise DataError(
                f"The classes of {dataset.name} have changed, and their names are not unique: they cannot be told apart."
            )
    gone = [name for name in known if name not in found]
    new = [name for name in found if name not in known]
    numbered = list(known)
    if extend:
        for old, name in zip(gone, new, strict=False):
            numbered[numbered.index(old)] = name
        numbered += new[len(gone) :]
    numbers = np.array([numbered.index(name) if name in numbered else -1 for name in found], np.int32)
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
    """Reads a whole source in order; yields (index of the first example, images, labels)."""
    for start in range(0, len(source), _CHUNK):
        images, labels = source.read(np.arange(start, min(start + _CHUNK, len(source)), dtype=np.int64))
        yield start, images, labels


def materialize(source: Source, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The whole source as arrays: images uint8 [N, H, W, C] and labels int32 [N].

    threads: that read at once; more than one only for a source that many may read at once.
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
