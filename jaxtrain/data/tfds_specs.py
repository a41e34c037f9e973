"""The data sets that TFDS stores. TFDS is a tenth of what a start imports: it is imported when one of them is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from jaxtrain.data import base, cifar, splits
from jaxtrain.data.base import Dataset
from jaxtrain.data.spec import DatasetSpec, Progress, data_dir


def _tfds_sets() -> ModuleType:
    from jaxtrain.data import tfds_sets  # noqa: PLC0415

    return tfds_sets


def known_names(root: Path) -> list[str]:
    """Names of data sets that are prepared in `root` or that TFDS could prepare."""
    return _tfds_sets().known_names(root)


class Cifar(DatasetSpec):
    """CIFAR-10 or CIFAR-100, which jaxtrain downloads and prepares itself."""

    def prepare(self) -> Path:
        return _tfds_sets().prepare_cifar(self.config.name, data_dir(self.config), self.config.prepare_timeout)

    def read(self, image_size: int, needed: str, drawn: Sequence[str] | None) -> Dataset:
        parts = _tfds_sets().load_cifar(self.config.name, data_dir(self.config))
        return splits.cut(parts, self.config, needed, drawn)

    def read_outline(self, image_size: int) -> Dataset:
        official = cifar.CIFAR[self.config.name]
        train, test = (base.Outline(official.examples[split], official.shape) for split in ("train", "test"))
        names = tuple(str(label) for label in range(official.classes))
        parts = base.RawSplits(train, None, test, names, official.mean, official.std, identity="outline")
        return splits.cut(parts, self.config)

    def verify(self, progress: Progress = iter) -> dict[str, int]:
        return _tfds_sets().verify_cifar(self.config.name, data_dir(self.config))


class TfdsDataset(DatasetSpec):
    """A data set that TFDS has prepared: `name`, `name/config` or `name:1.0.0`."""

    named_splits = True

    def prepare(self) -> Path:
        return _tfds_sets().find(self.config.name, data_dir(self.config))

    def read(self, image_size: int, needed: str, drawn: Sequence[str] | None) -> Dataset:
        config, side = self.config, self.stored_side(image_size)
        parts = _tfds_sets().load_prepared(self.prepare(), data_dir(config), side, config.chosen_splits, needed)
        return splits.cut(parts, config, needed, drawn)
