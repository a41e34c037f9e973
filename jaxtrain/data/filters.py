"""The filters by which images are resized, those of Pillow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - x, 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys 1981 with a = -1/2."""
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS: Mapping[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = MappingProxyType(
    {"bilinear": (_triangle, 1), "bicubic": (_cubic, 2)}
)
"""The value at a distance of 0 or more, and the distance from which on it is 0. For names of `config.INTERPOLATIONS`."""
