"""The official CIFAR files (Krizhevsky 2009): what was published, and reading it only after it was checked.

The files are Python 2 pickles, and a pickle can run code: bytes are unpickled only when their MD5 is the published one,
and even then with NumPy's array types and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxtrain.errors import DataError


@dataclasses.dataclass(frozen=True)
class CifarSpec:
    """One data set as published on https://www.cs.toronto.edu/~kriz/cifar.html."""

    url: str
    archive_bytes: int
    archive_sha256: str
    """As Keras pins it; the page gives MD5 only."""
    folder: str
    """What the archive extracts to."""
    files: Mapping[str, tuple[int, str]]
    """Name -> (bytes, MD5)."""
    splits: Mapping[str, tuple[str, ...]]
    """Split -> its files, in order."""
    examples: Mapping[str, int]
    """Split -> their number."""
    classes: int
    """Of the feature "label"."""
    meta: str
    """The file with the names of the classes."""
    labels: Mapping[str, tuple[bytes, bytes]]
    """Feature -> (key of its class names in `meta`, key of its column in a split's file)."""
    mean: tuple[float, ...]
    """One number a channel, over the training images in [0, 1]; so is `std`."""
    std: tuple[float, ...]
    shape: tuple[int, int, int] = (32, 32, 3)
    """Height, width and channels of every image."""

    @property
    def archive(self) -> str:
        """The archive's file name."""
        return self.url.rsplit("/", 1)[1]


CIFAR = {
    "cifar10": CifarSpec(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive_bytes=170_498_071,
        archive_sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        folder="cifar-10-batches-py",
        files={
            "data_batch_1": (31_035_704, "c99cafc152244af753f735de768cd75f"),
            "data_batch_2": (31_035_320, "d4bba439e000b95fd0a9bffe97cbabec"),
            "data_batch_3": (31_035_999, "54ebc095f3ab1f0389bbae665268c751"),
            "data_batch_4": (31_035_696, "634d18415352ddfa80567beed471001a"),
            "data_batch_5": (31_035_623, "482c414d41f54cd18b22e5b47cb7c3cb"),
            "test_batch": (31_035_526, "40351d587109b95175f43aff81a1287e"),
            "batches.meta": (158, "5ff9c542aee3614f3951f8cda6e48888"),
        },
        splits={"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
        examples={"train": 50_000, "test": 10_000},
        classes=10,
        meta="batches.meta",
        labels={"label": (b"label_names", b"labels")},
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": CifarSpec(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        archive_bytes=169_001_437,
        archive_sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        folder="cifar-100-python",
        files={
            "train": (155_249_918, "16019d7e3df5f24257cddd939b257f8d"),
            "test": (31_049_707, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
            "meta": (1_473, "7973b15100ade9c7d40fb424638fde48"),
        },
        splits={"train": ("train",), "test": ("test",)},
        examples={"train": 50_000, "test": 10_000},
        classes=100,
        meta="meta",
        labels={
            "label": (b"fine_label_names", b"fine_labels"),
            "coarse_label": (b"coarse_label_names", b"coarse_labels"),
        },
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}


def read_folder(official: CifarSpec, folder: Path) -> dict[str, bytes]:
    """Name -> content of the official files in `folder`, checked; raises `DataError` naming the first that is wrong."""
    files: dict[str, bytes] = {}
    for name in official.files:
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read ({error.strerror}); copy all of {folder.name}.") from None
        _check(official, name, files[name], str(folder / name))
    return files


def read_archive(official: CifarSpec, path: Path) -> dict[str, bytes]:
    """As `read_folder`, from the archive at `path`. Nothing is extracted to disk (TFDS's reader would import TensorFlow)."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if folder == official.folder and name in official.files and member.size == official.files[name][0]:
                    content = archive.extractfile(member)
                    files[name] = content.read() if content else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}); delete it, and it will be fetched again.") from None
    for name in official.files:
        _check(official, name, files.get(name, b""), f"{path}: {name}")
    return files


def _check(official: CifarSpec, name: str, content: bytes, where: str) -> None:
    size, md5 = official.files[name]
    if len(content) != size:
        raise DataError(f"{where} has {len(content):,} bytes, the official file {size:,}: copy or download it again.")
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != md5:
        raise DataError(f"{where} is not the official file: its MD5 is {digest}, the published one {md5}.")


def class_names(official: CifarSpec, files: Mapping[str, bytes]) -> dict[str, list[str]]:
    """Label feature -> names of its classes."""
    meta = _unpickle(files[official.meta])
    return {feature: [name.decode() for name in meta[names]] for feature, (names, _) in official.labels.items()}


def examples(
    official: CifarSpec, files: Mapping[str, bytes], split: str
) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
    """Reads a split in the official order.

    Args:
      official: the data set.
      files: name -> content, as of `read_folder` or `read_archive`.
      split: "train" or "test".

    Yields:
      (image uint8 [32, 32, 3], label feature -> class) of each example.
    """
    for name in official.splits[split]:
        content = _unpickle(files[name])
        height, width, channels = official.shape
        images = content[b"data"].reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
        columns = {feature: content[key] for feature, (_, key) in official.labels.items()}
        for row, image in enumerate(images):
            yield np.ascontiguousarray(image), {feature: int(column[row]) for feature, column in columns.items()}


class _ArraysOnly(pickle.Unpickler):
    """Loads pickles of NumPy arrays and refuses every other class."""

    _ALLOWED: ClassVar[Mapping[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise DataError(f"the pickle asks for {module}.{name}; CIFAR's files hold NumPy arrays only.")
        return self._ALLOWED[module, name]


def _unpickle(content: bytes) -> dict[bytes, Any]:
    return _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
