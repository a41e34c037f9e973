"""What a run computes with: the packages that it needs. Imports no JAX."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

# Packages that must have the same version on all processes of a run: they decide the compiled programs, the names and
# values of the state, and the order of the data.
MUST_MATCH = ("jaxtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
PACKAGES = (*MUST_MATCH, "tensorflow-datasets", "numpy", "ml_collections", "clu")
"""The packages whose versions a run records, and which `jaxtrain doctor` checks."""


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of installed packages by name, without those that are not installed."""
    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
