"""JAX's process-wide settings for a run."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import compilation_cache  # JAX has no public way to a cache of one's own (0.10-0.12)
from jax._src.lru_cache import LRUCache

from jaxtrain.config import Config
from jaxtrain.host import xla_flags
from jaxtrain.host.compile_cache import CHECKED, program_in, why_refused, with_digest
from jaxtrain.host.nccl import set_nccl
from jaxtrain.host.paths import can_be_written, compile_cache, is_address
from jaxtrain.precision import product_precision, resolve_precision

log = logging.getLogger("jaxtrain")


class CheckedCache(LRUCache):
    """JAX's cache of compiled programs. An entry that is damaged is deleted, and its program compiled again."""

    def get(self, key: str) -> bytes | None:
        """The program that is stored under `key`; None where there is none, or a damaged one."""
        entry = super().get(key + CHECKED)
        if entry is None:
            return None
        program = program_in(key, bytes(entry))
        if program is None:
            log.warning("an entry of the compile cache is damaged, and its program is compiled again: %s", key)
            (self.path / f"{key}{CHECKED}-cache").unlink(missing_ok=True)
        return program

    def put(self, key: str, value: bytes) -> None:
        """Stores a program. Where another process does so too, whoever reads a mixture of both takes it for damaged."""
        super().put(key + CHECKED, with_digest(key, value))


def _open_cache(path: str) -> tuple[CheckedCache, str] | None:
    """In place of JAX's `get_file_cache`: no cache where others may have written."""
    if not is_address(path):
        if why := why_refused(Path(path)):
            log.warning("the compile cache %s is not used: %s; name another with JAX_COMPILATION_CACHE_DIR", path, why)
            return None
        with contextlib.suppress(OSError):  # JAX goes on without it
            os.makedirs(path, mode=0o700, exist_ok=True)
    return CheckedCache(path, max_size=_jax_setting("jax_compilation_cache_max_size")), path


def check_compile_cache() -> None:
    """From now on, JAX runs no program from its cache that is not the one that was stored."""
    if compilation_cache.get_file_cache is not _open_cache:
        compilation_cache.get_file_cache = _open_cache
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _checked_compile_cache() -> Iterator[None]:
    before = compilation_cache.get_file_cache
    check_compile_cache()
    try:
        yield
    finally:
        if before is not _open_cache:
            compilation_cache.get_file_cache = before
            compilation_cache.reset_cache()


def set_environment(config: Config) -> None:
    """Sets what XLA and NCCL read from the environment when they start. Raises `ConfigError` where it says something else."""
    xla_flags.set_flags(xla_flags.for_run(config.train.precision, deterministic=config.train.deterministic))
    set_nccl(config.layout.nccl_algo, config.layout.nccl_protocol)


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
        "jax_persistent_cache_enable_xla_caches": "none",  # XLA checks nothing in its own ones
    }
    if not _jax_setting("jax_compilation_cache_dir"):
        wanted["jax_compilation_cache_dir"] = compile_cache()
    with _jax_config(wanted), _checked_compile_cache():
        yield


def compile_cache_note() -> str:
    """Whether the next start finds what is compiled now, inside `settings`."""
    directory = _jax_setting("jax_compilation_cache_dir")
    if not _jax_setting("jax_enable_compilation_cache"):
        return "not kept for the next start: the compile cache is switched off"
    if not is_address(directory) and (why := why_refused(Path(directory))):
        return f"not kept for the next start: {directory} is not used, since {why}"
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
    # As a new thread sees them: around this, a caller's own `jax.enable_x64(True)` is for its thread alone, and what is set
    # here is for all of them.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        before = dict(zip(wanted, thread.map(_jax_setting, wanted), strict=True))
    for name, value in wanted.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _jax_setting(name: str) -> Any:
    return getattr(jax.config, name)
