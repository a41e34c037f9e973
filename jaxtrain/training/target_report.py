"""`program_report.compile_report` for a user's machine, with a second try where XLA's GPU compiler refuses a program."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from pathlib import Path
from typing import Any

from jaxtrain.config import Config
from jaxtrain.errors import CompilerRefusalError
from jaxtrain.host.native import cuda_messages_dropped
from jaxtrain.host.processes import end_with
from jaxtrain.host.targets import Target
from jaxtrain.host.text import note

_INSTEAD = "--xla_gpu_enable_triton_gemm=false"


def report_on(config: Config, target: Target, *, hlo: Path | None = None, evaluation: bool = True) -> dict[str, Any]:
    """What `compile_report` returns, and `flags`: what had to be added to $XLA_FLAGS, or "".

    Triton's matrix products are what XLA refuses ("Couldn't find output tile sizes"). Without autotuning it does not look
    for another way by itself. The second try is in a process of its own: XLA reads its flags once. Arguments as of
    `compile_report`.

    Raises:
      JaxtrainError: as `compile_report`; `CompilerRefusalError` if the second try is refused as well.
    """
    try:
        return _report(config, target, hlo, evaluation) | {"flags": ""}
    except CompilerRefusalError as error:
        before = os.environ.get("XLA_FLAGS", "")
        if "xla_gpu_enable_triton_gemm" in before:
            raise
        note(f"{error} Tried again with {_INSTEAD}.")
    started = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, started, initializer=_begin, initargs=(before, os.getpid())) as pool:
        return pool.submit(_report, config, target, hlo, evaluation).result() | {"flags": _INSTEAD}


def program_figures(config: Config, target: Target) -> dict[str, Any] | None:
    """Of the training step: `peak_bytes` (with stages, all that one keeps), `kernels`, `gigabytes`; None where XLA refuses it.

    For a process of its own.
    """
    try:
        report = report_on(config, target, evaluation=False)
    except CompilerRefusalError:
        return None
    programs = report["programs"].values()
    return {
        "peak_bytes": max(report["peak_bytes"], report["stage_peak_bytes"]),
        "kernels": sum(program["kernels"] for program in programs),
        "gigabytes": round(sum(program["gigabytes"] for program in programs), 3),
    }


def _begin(flags: str, parent: int) -> None:
    end_with(parent)
    os.environ["XLA_FLAGS"] = f"{flags} {_INSTEAD}".strip()


def _report(config: Config, target: Target, hlo: Path | None, evaluation: bool) -> dict[str, Any]:
    with cuda_messages_dropped():
        import jax  # noqa: PLC0415  the flags are set by now

        from jaxtrain.training.program_report import compile_report  # noqa: PLC0415

    jax.config.update("jax_platforms", "cpu")  # GPUs that are there stay free for a run
    if target.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", target.devices)
    return compile_report(config, target, hlo=hlo, evaluation=evaluation)
