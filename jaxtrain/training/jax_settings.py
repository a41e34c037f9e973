"""JAX's process-wide settings for a run."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxtrain.config import Config
from jaxtrain.host.paths import can_be_written, compile_cache, is_address
from jaxtrain.precision import product_precision, resolve_precision


@contextlib.contextmanager
def settings(config: Config) -> Iterator[None]:
    """JAX's process-wide settings for this run, and the seeds of Python and NumPy; JAX's are given back afterwards.

    The transfer guard forbids implicit transfers to and between devices: each would stop the loop for a round trip. It is
    set for the whole process, since the context manager of the same name would miss other threads.
    """
    random.seed(config.seed)
    np.random.seed(config.seed)
    precision = resolve_precision(config.train.precision, jax.default_backend())
    wanted: dict[str, object] = {
        "jax_enable_x64": precision == "f64" or _jax_setting("jax_enable_x64"),
        "jax_default_matmul_precision": product_precision(precision),
        "jax_threefry_partitionable": True,  # or a layout would change the random numbers
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # pipelines have many small programs
    }
    if not _jax_setting("jax_compilation_cache_dir"):
        wanted["jax_compilation_cache_dir"] = compile_cache()
    with _jax_config(wanted):
        yield


def compile_cache_note() -> str:
    """Whether the next start finds what is compiled now, inside `settings`."""
    directory = _jax_setting("jax_compilation_cache_dir")
    if not _jax_setting("jax_enable_compilation_cache"):
        return "not kept for the next start: the compile cache is switched off"
    if is_address(directory) or can_be_written(directory):
        return "the next start finds it in the compile cache"
    return f"not kept for the next start: {directory} cannot be written"


@contextlib.contextmanager
def no_compile_cache() -> Iterator[None]:
    """Inside, compiled programs are neither kept nor looked for: those for devices that are not there cannot be loaded."""
    with _jax_config({"jax_enable_compilation_cache": False}):
        yield


@contextlib.contextmanager
def no_implicit_transfers() -> Iterator[None]:
    """Inside, an implicit transfer from host to device or between devices raises, on every thread."""
    with _jax_config({f"jax_transfer_guard_{way}": "disallow" for way in ("host_to_device", "device_to_device")}):
        yield


@contextlib.contextmanager
def _jax_config(wanted: Mapping[str, object]) -> Iterator[None]:
    before = {name: _jax_setting(name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _jax_setting(name: str) -> Any:
    return getattr(jax.config, name)
