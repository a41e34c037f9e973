"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtrain.data import base, splits
from jaxtrain.data.spec import DatasetSpec
from jaxtrain.errors import DataError


class Digits(DatasetSpec):
    """1,797 handwritten digits, 8 x 8 pixels of 17 grey levels (UCI ML; Alpaydin and Kaynak 1998)."""

    in_data_dir = False

    def prepare(self) -> Path:
        return _digits_file()

    def read(self, image_size: int, needed: str, drawn: Sequence[str] | None) -> base.Dataset:
        return splits.cut(_read_digits(), self.config, needed, drawn)


def _digits_file() -> Path:
    package = importlib.util.find_spec("sklearn")  # finds the package without importing it, which would take a second
    for directory in (package.submodule_search_locations or ()) if package else ():
        path = Path(directory, "datasets", "data", "digits.csv.gz")
        if path.exists():
            return path
    raise DataError(
        "config.data.name='digits': scikit-learn brings these images; install it with `pip install scikit-learn`."
    )


def _read_digits() -> base.RawSplits:
    path = _digits_file()
    try:
        rows = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.int64)
        pixels, labels = rows[:, :-1].reshape(-1, 8, 8, 1), rows[:, -1].astype(np.int32)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{path} is damaged ({error}); install scikit-learn again.") from None
    digits = np.rint(pixels * (255 / 16)).astype(np.uint8)
    return base.RawSplits(
        train=base.ArraySource(digits, labels),
        validation=None,
        test=None,
        class_names=tuple(str(digit) for digit in range(10)),
        mean=(0.305,),
        std=(0.376,),
        identity=hashlib.sha256(digits.tobytes() + labels.tobytes()).hexdigest(),
        labels=labels,
    )
