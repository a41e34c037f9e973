"""Compiles layouts for a target, several at once, each in a process of its own; what was compiled once is looked up."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.config import Config, to_dict
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.host.files import atomic_write
from jaxtrain.host.paths import compile_cache, is_address
from jaxtrain.host.processes import end_with
from jaxtrain.host.targets import Target
from jaxtrain.training.target_report import program_figures

_WITHOUT = ("seed", "checkpoint", "train.epochs", "train.steps")


def compile_layouts(
    configs: Sequence[Config], target: Target, said: Callable[[str], None]
) -> list[dict[str, Any] | None]:
    """What the programs of each run need.

    Args:
      configs: of the runs.
      target: the devices.
      said: takes a line on what is being done.

    Returns:
      For each config `peak_bytes`, `kernels`, `gigabytes`; or None where XLA refuses it.
    """
    results: list[dict[str, Any] | None] = [None] * len(configs)
    missing = {}
    for i, config in enumerate(configs):
        path = _cached(config, target)
        if path.is_file():
            results[i] = json.loads(path.read_text())
        else:
            missing[i] = path
    if not missing:
        return results
    workers = min(len(missing), usable_cpus())
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, initializer=end_with, initargs=(os.getpid(),)) as pool:
        jobs = {pool.submit(program_figures, configs[i], target): i for i in missing}
        for done, job in enumerate(concurrent.futures.as_completed(jobs), start=1):
            said(f"compiled {done} of {len(jobs)} layouts for {target.name}")
            i = jobs[job]
            results[i] = job.result()
            missing[i].parent.mkdir(parents=True, exist_ok=True)
            atomic_write(missing[i], json.dumps(results[i]))
    return results


def _cached(config: Config, target: Target) -> Path:
    """The file of a layout's figures. Its name depends on all that they depend on."""
    values: dict[str, Any] = to_dict(config)
    for name in _WITHOUT:
        section, _, key = name.rpartition(".")
        (values[section] if section else values).pop(key)
    flags = os.environ.get("XLA_FLAGS", "")
    text = json.dumps([values, target.name, target.text, jax.__version__, flags, _source()], default=str)
    folder = compile_cache()
    kept = Path.home() / ".cache" / "jaxtrain" if is_address(folder) else Path(folder)
    return kept / "plans" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


@functools.cache
def _source() -> str:
    """A hash of jaxtrain's own code."""
    digest, folder = hashlib.sha256(), Path(__file__).parents[2]
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
