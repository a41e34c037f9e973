"""The data sets by name: loading, preparing and verifying them.

`load` never downloads: in a run of many processes one calls `prepare` while the others wait, and then all call `load`.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType

import numpy as np

from jaxtrain.config import DataConfig, did_you_mean
from jaxtrain.data import base, cifar, images, order
from jaxtrain.data.base import Dataset, Source, materialize, nbytes
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.plugins import load_dotted

__all__ = [
    "Dataset",
    "Source",
    "data_dir",
    "decodes_images",
    "is_cheap",
    "load",
    "materialize",
    "nbytes",
    "prepare",
    "verify",
]

NAMES = ("digits", "synthetic", *cifar.OFFICIAL)
_TEST_SHARE = 0.2  # of a data set that has neither a validation nor a test split of its own
_SYNTHETIC_EXAMPLES = 10_000
_LARGE_SIDE = 96


def data_dir(config: DataConfig) -> Path:
    """`config.dir`, else `$JAXTRAIN_DATA_DIR`, else `~/.cache/jaxtrain/data`; absolute."""
    named = config.dir or os.environ.get("JAXTRAIN_DATA_DIR") or "~/.cache/jaxtrain/data"
    return Path(named).expanduser().absolute()


def check_name(config: DataConfig) -> None:
    """Raises `ConfigError` where `config.name` can mean no data set; reads no data."""
    root, name = data_dir(config), config.name
    if _is_dotted(name):
        load_dotted(name, "data.name")
    elif ":" not in name and name not in NAMES and name.split("/")[0] not in (known := _tfds_sets().known_names(root)):
        hint = did_you_mean(name, (*NAMES, *known))
        raise ConfigError(
            f"config.data.name={name!r}: must be one of {', '.join(NAMES)}, folder:PATH, package.module:factory, or a "
            f"data set that TFDS has prepared in {root}.{hint}"
        )


def load(config: DataConfig, *, image_size: int = 0) -> Dataset:
    """The data set `config.name`, cut into train, validation and test.

    image_size: side that the model sees. Sources with a size of their own keep it (the device resizes). Images that
    differ in size need it: they are stored at this side, or at 8/7 of it with `resize_crop` (224 -> 256).

    Splits: a data set's own ones are used. Without a validation split, the share `config.validation` of training is
    held out; with a validation but no test split (ImageNet), the validation split serves as both; with neither, a fifth
    of every class is held out for the test first. `config.split_seed` alone decides which examples. `config.examples`
    then keeps the first so many of the training examples, in split order.

    Raises `ConfigError` for an unknown name or settings that do not fit the data, and `DataError` for data that is
    missing or damaged.
    """
    if not _is_dotted(config.name):
        return _split(_find_parts(config, image_size), config)
    dataset = load_dotted(config.name, "data.name")(config, image_size=image_size)
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"config.data.name={config.name!r}: returned {type(dataset).__name__}, not a Dataset.")
    return dataset


def prepare(config: DataConfig) -> Path | None:
    """Makes sure that the data set is on disk, downloading it where jaxtrain can; returns where, or None (not on disk).

    Cheap when it is there already. Of several processes on a host one works. Raises `DataError` saying what to do.
    """
    if config.name in cifar.OFFICIAL:
        return _tfds_sets().prepare_cifar(config.name, data_dir(config), config.prepare_timeout)
    if config.name == "digits":
        return _digits_file()
    if config.name.startswith("folder:"):
        return _folder_path(config)
    if config.name == "synthetic" or _is_dotted(config.name):
        return None
    return _find_prepared(config)


def verify(config: DataConfig) -> dict[str, int]:
    """Reads every example, and compares hashes where they are stored; returns split -> number of examples.

    Raises `DataError` naming the file and the record of the first that is damaged.
    """
    if config.name in cifar.OFFICIAL:
        return _tfds_sets().verify_cifar(config.name, data_dir(config))
    dataset = load(dataclasses.replace(config, examples=0), image_size=config.image_size or 32)
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {name: sum(len(labels) for _, _, labels in base.chunks(source)) for name, source in splits.items()}


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
    while isinstance(source, base.Subset):
        source = source.base
    return source


# --------------------------------------------------------------------------------------------------------------- names


def _tfds_sets() -> ModuleType:
    """Imports TFDS, a tenth of what a start imports, for the data sets that need it."""
    from jaxtrain.data import tfds_sets  # noqa: PLC0415

    return tfds_sets


def _is_dotted(name: str) -> bool:
    """Whether `name` means `package.module:factory` (and not `folder:PATH`, nor `name:1.0.0`)."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) is not None and not name.startswith("folder:")


def _folder_path(config: DataConfig) -> Path:
    path = Path(config.name.removeprefix("folder:")).expanduser()
    if not path.is_dir():
        raise DataError(f"config.data.name={config.name!r}: there is no such folder.")
    return path


def _find_parts(config: DataConfig, image_size: int) -> base.Parts:
    name = config.name
    if name == "digits":
        return _digits()
    if name == "synthetic":
        return _synthetic(config, image_size)
    if name in cifar.OFFICIAL:
        return _tfds_sets().load_cifar(name, data_dir(config))
    side = round(image_size * 8 / 7) if config.augmentation == "resize_crop" else image_size
    if not name.startswith("folder:"):
        return _tfds_sets().load_prepared(_find_prepared(config), data_dir(config), side)
    if not side:
        raise ConfigError(f"config.data.image_size=0: set the side that the images of {name!r} are cut to.")
    return images.folder(_folder_path(config), side)


def _find_prepared(config: DataConfig) -> Path:
    check_name(config)
    return _tfds_sets().find(config.name, data_dir(config))


# -------------------------------------------------------------------------------------------------------------- splits


def _split(parts: base.Parts, config: DataConfig) -> Dataset:
    validation, test = parts.validation, parts.test
    train = np.arange(len(parts.train), dtype=np.int64)
    if validation is None and test is None:
        labels = np.zeros(len(train), np.int32) if parts.labels is None else parts.labels
        held = _stratified(labels, _TEST_SHARE, config.split_seed)
        train, test = np.setdiff1d(train, held), base.Subset(parts.train, held)
    train = train[order.split_permutation(len(train), config.split_seed)]
    if validation is None:
        count = round(len(train) * config.validation)
        train, validation = train[count:], base.Subset(parts.train, train[:count])
    if config.examples > len(train) or not len(train):
        raise ConfigError(
            f"config.data.examples={config.examples}: {config.name} has {len(train):,} training examples"
            f" (config.data.validation={config.validation:g} is held out)."
        )
    channels = parts.train.shape[2]
    mean, std = (config.mean, config.std) if config.mean else (parts.mean, parts.std)
    if len(mean) != channels:
        raise ConfigError(f"config.data.mean={mean!r}: must have {channels} numbers, one for each channel.")
    splits = (config.split_seed, config.validation, config.examples)
    return Dataset(
        name=config.name,
        train=base.Subset(parts.train, train[: config.examples or None]),
        validation=validation,
        test=validation if test is None else test,
        num_classes=len(parts.class_names),
        class_names=parts.class_names,
        mean=tuple(float(m) for m in mean),
        std=tuple(float(s) for s in std),
        fingerprint=hashlib.sha256(json.dumps([parts.identity, *splits]).encode()).hexdigest(),
    )


def _stratified(labels: np.ndarray, share: float, split_seed: int) -> np.ndarray:
    """int64, sorted: `share` of the examples of every class, at least one of each."""
    held = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(share * len(members)))
        held.append(members[order.split_permutation(len(members), split_seed, role=1 + int(label))[:count]])
    return np.sort(np.concatenate(held))


# -------------------------------------------------------------------------------------------------------------- digits


def _digits_file() -> Path:
    found = importlib.util.find_spec("sklearn")  # finds the package without importing it, which would take a second
    for place in (found.submodule_search_locations or ()) if found else ():
        path = Path(place, "datasets", "data", "digits.csv.gz")
        if path.exists():
            return path
    raise DataError(
        "config.data.name='digits': scikit-learn brings these images; install it with `pip install scikit-learn`."
    )


def _digits() -> base.Parts:
    """1,797 handwritten digits, 8 x 8 pixels of 17 grey levels (UCI ML; Alpaydin and Kaynak 1998)."""
    path = _digits_file()
    try:
        rows = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.int64)
        pixels, labels = rows[:, :-1].reshape(-1, 8, 8, 1), rows[:, -1].astype(np.int32)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{path} is damaged ({error}); install scikit-learn again.") from None
    digits = np.rint(pixels * (255 / 16)).astype(np.uint8)
    return base.Parts(
        train=base.ArraySource(digits, labels),
        validation=None,
        test=None,
        class_names=tuple(str(digit) for digit in range(10)),
        mean=(0.305,),
        std=(0.376,),
        identity=hashlib.sha256(digits.tobytes() + labels.tobytes()).hexdigest(),
        labels=labels,
    )


# ----------------------------------------------------------------------------------------------------------- synthetic


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Images made when read: a quarter of the class's prototype (4 x 4 random blocks) and three quarters of noise.

    Example i of the source is number `first + i` of the endless set that `seed` means; its class is that modulo 10.
    """

    seed: int
    first: int
    length: int
    shape: tuple[int, int, int]

    CLASSES = 10

    def __len__(self) -> int:
        return self.length

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width, channels = self.shape
        numbers = (np.asarray(indices, np.int64) + self.first).astype(np.uint64)
        labels = (numbers % np.uint64(self.CLASSES)).astype(np.int32)
        blocks = self._bytes(np.arange(self.CLASSES, dtype=np.uint64), 16 * channels, stream=0)
        rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
        prototypes = blocks.reshape(-1, 4, 4, channels)[:, rows][:, :, columns]
        noise = self._bytes(numbers, height * width * channels, stream=1).reshape(-1, *self.shape)
        mixed = (prototypes[labels].astype(np.uint16) + 3 * noise.astype(np.uint16)) // 4
        return mixed.astype(np.uint8), labels

    def _bytes(self, numbers: np.ndarray, count: int, stream: int) -> np.ndarray:
        """uint8 [n, count]: random bytes that depend on (seed, stream, number) alone (SplitMix64, Steele 2014)."""
        words = -(-count // 8)
        counters = numbers[:, None] * np.uint64(words) + np.arange(words, dtype=np.uint64)
        key = np.uint64((2 * self.seed + stream + 1) * 0x9E3779B97F4A7C15 % 2**64)
        z = (counters + key) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):  # twice, or counters of neighbouring seeds would give shifted copies of one stream
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = (z ^ (z >> np.uint64(31))) + key
        return z.astype("<u8").view(np.uint8).reshape(len(numbers), -1)[:, :count]


def _synthetic(config: DataConfig, image_size: int) -> base.Parts:
    shape = (28, 28, 1) if image_size in (0, 28) else (image_size, image_size, 3)
    train = config.examples or _SYNTHETIC_EXAMPLES
    counts = (train, round(train * config.validation), max(1, train // 5))
    firsts = (0, counts[0], counts[0] + counts[1])
    sources = [SyntheticSource(config.split_seed, *place, shape) for place in zip(firsts, counts, strict=True)]
    channels = shape[2]
    return base.Parts(
        *sources,
        class_names=tuple(f"prototype {label}" for label in range(SyntheticSource.CLASSES)),
        mean=(0.5,) * channels,
        std=(0.23,) * channels,
        identity=f"synthetic 1, {config.split_seed}, {counts}, {shape}",
    )
