"""What a run computes with: the platform of its devices, and the packages that it needs. Imports no JAX."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

# Packages that must have the same version on all processes of a run: they decide the compiled programs, the names and
# values of the state, and the order of the data.
MUST_MATCH = ("jaxtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
PACKAGES = (*MUST_MATCH, "tensorflow-datasets", "numpy", "ml_collections", "clu")
"""The packages whose versions a run records, and which `jaxtrain doctor` checks."""

_AMPERE = 8.0  # the compute capability from which on a GPU has TF32, and products of Triton

_ACCELERATORS = ("gpu", "cuda", "rocm", "tpu")


class HasPlatform(Protocol):
    """A device, as `jax.devices()` returns them."""

    @property
    def platform(self) -> str: ...


def is_accelerator(backend: str) -> bool:
    """Whether a backend (`jax.default_backend()`, or a device's platform) is a GPU or TPU."""
    return backend in _ACCELERATORS


def on_cpu(devices: Iterable[HasPlatform]) -> bool:
    """Whether the devices of a run, which are all of one platform, are CPU devices."""
    return next(iter(devices)).platform == "cpu"


def none_or_too_old(device: Any) -> str:
    """What a device is that is no NVIDIA GPU of Ampere or newer; "" for one that is."""
    capability = getattr(device, "compute_capability", "")  # "9.0"; "gfx942" of an AMD GPU; a CPU has none
    if capability[:1].isdigit() and float(capability) >= _AMPERE:
        return ""
    return f"{device.device_kind}, compute capability {capability}" if capability else device.device_kind


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of installed packages by name, without those that are not installed."""
    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
