"""Images that are made as they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxtrain.config import DataConfig
from jaxtrain.data import base, splits
from jaxtrain.data.spec import DatasetSpec

_TRAIN_EXAMPLES = 10_000  # unless `config.examples` says how many


class Synthetic(DatasetSpec):
    """Images that are made as they are read, for tests and for measuring speed."""

    in_data_dir = False

    def read(self, image_size: int, needed: str, drawn: Sequence[str] | None) -> base.Dataset:
        return splits.cut(_make_splits(self.config, image_size), self.config, needed, drawn)


@dataclasses.dataclass(frozen=True)
class SyntheticSource(base.CheapSource):
    """Images made when read: a quarter of the class's prototype (4 x 4 random blocks) and three quarters of noise.

    Example i of the source is number `first + i` of an endless set. Its class is this number modulo 10.
    """

    seed: int
    """Of the endless set."""
    first: int
    length: int
    shape: tuple[int, int, int]
    """Height, width and channels of every image."""

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


def _make_splits(config: DataConfig, image_size: int) -> base.RawSplits:
    shape = (28, 28, 1) if image_size in (0, 28) else (image_size, image_size, 3)
    train = config.examples or _TRAIN_EXAMPLES
    counts = (train, round(train * config.validation), max(1, train // 5))
    firsts = (0, counts[0], counts[0] + counts[1])
    sources = [
        SyntheticSource(config.split_seed, first, count, shape) for first, count in zip(firsts, counts, strict=True)
    ]
    channels = shape[2]
    return base.RawSplits(
        *sources,
        class_names=tuple(f"prototype {label}" for label in range(SyntheticSource.CLASSES)),
        mean=(0.5,) * channels,
        std=(0.23,) * channels,
        identity=f"synthetic 1, {config.split_seed}, {counts}, {shape}",
    )
