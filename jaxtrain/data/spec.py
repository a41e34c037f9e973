"""`DatasetSpec`: what a kind of data set can do. Its subclasses are in the modules of the kinds; `registry` lists them."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from jaxtrain.config import DataConfig, without_effect
from jaxtrain.data import base
from jaxtrain.data.base import Dataset
from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import home, require_local

Progress = Callable[[Iterable[str]], Iterable[str]]
"""Wraps an iterable of files to show how many of them are done."""


def data_dir(config: DataConfig) -> Path:
    """`config.dir`, else `$JAXTRAIN_DATA_DIR`, else `~/.cache/jaxtrain/data`; absolute. Raises `ConfigError` for an address."""
    if not config.dir and (variable := os.environ.get("JAXTRAIN_DATA_DIR")):
        require_local(variable, f"$JAXTRAIN_DATA_DIR={variable!r}", ConfigError)
    named = config.dir or os.environ.get("JAXTRAIN_DATA_DIR") or home("JAXTRAIN_DATA_DIR") / ".cache/jaxtrain/data"
    return Path(named).expanduser().absolute()


@dataclasses.dataclass(frozen=True)
class DatasetSpec(abc.ABC):
    """The data set that `config` names. A kind must implement `read`; the other methods have a default."""

    config: DataConfig

    named_splits: ClassVar[bool] = False
    """Whether its splits have names that `config.splits` can choose."""

    in_data_dir: ClassVar[bool] = True
    """Whether it reads `config.dir`."""

    reads_skip_bad: ClassVar[bool] = False
    """Whether it reads `config.skip_bad`."""

    @abc.abstractmethod
    def read(self, image_size: int, needed: str, drawn: Sequence[str] | None) -> Dataset:
        """The data set as it is stored; the arguments are those of `load`. Usually `splits.cut` of its `RawSplits`."""

    def read_outline(self, image_size: int) -> Dataset:
        """As `read`, but without examples where their number is known without them."""
        return self.read(image_size, "", None)

    def check(self) -> None:  # noqa: B027  most kinds have nothing to check
        """Raises `ConfigError` where the name can mean no data set of this kind; reads no data."""

    def prepare(self) -> Path | None:
        """Makes sure that the data set is on disk; see `registry.prepare`."""
        return None

    def load(self, *, image_size: int = 0, needed: str = "", drawn: Sequence[str] | None = None) -> Dataset:
        """See `registry.load`."""
        self._refuse_chosen_splits()
        return self._configured(self.read(image_size, needed, drawn))

    def outline(self, *, image_size: int = 0) -> Dataset:
        """See `registry.outline`."""
        self._refuse_chosen_splits()
        return self._configured(self.read_outline(image_size))

    def verify(self, progress: Progress = iter) -> dict[str, int]:
        """See `registry.verify`."""
        del progress
        return base.read_all(self.load_all())

    def record_contents(self, dataset: Dataset, *, afresh: bool = False, progress: Progress = iter) -> str:
        """See `registry.record_contents`."""
        del dataset, afresh, progress
        return ""

    def recorded_on(self) -> str:
        """See `registry.recorded_on`."""
        return ""

    def load_all(self) -> Dataset:
        """The data set with all its training examples, whatever `config.examples` says."""
        config = dataclasses.replace(self.config, examples=0)
        return dataclasses.replace(self, config=config).load(image_size=config.image_size or 32)

    def stored_side(self, image_size: int) -> int:
        """The side in pixels at which images that differ in size are stored, for a model that sees `image_size`."""
        cropped = self.config.augmentation in base.CROPPED
        return base.resized_side(image_size, self.config.crop_pct) if cropped else image_size

    def _refuse_chosen_splits(self) -> None:
        config = self.config
        if config.splits and not self.named_splits:
            raise ConfigError(
                f"config.data.splits={config.splits!r}: {config.name} has its own splits; leave it out, or hold out another "
                "share with config.data.validation."
            )

    def _configured(self, dataset: Dataset) -> Dataset:
        """`dataset` with `config.mean` and `config.std` where they are set; `ConfigError` if they do not fit the channels."""
        config, channels = self.config, dataset.train.shape[2]
        if not self.in_data_dir:
            notes = without_effect("data", config, ["dir"], f"{config.name} is not in the data directory")
            dataset = dataclasses.replace(dataset, notes=(*dataset.notes, *notes))
        if not self.reads_skip_bad:
            notes = without_effect("data", config, ["skip_bad"], f"{config.name} is not a folder of images")
            dataset = dataclasses.replace(dataset, notes=(*dataset.notes, *notes))
        if not config.mean:
            return dataset
        if len(config.mean) != channels:
            raise ConfigError(f"config.data.mean={config.mean!r}: must have {channels} numbers, one for each channel.")
        return dataclasses.replace(dataset, mean=tuple(map(float, config.mean)), std=tuple(map(float, config.std)))
