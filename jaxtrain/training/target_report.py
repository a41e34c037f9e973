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
    with concurrent.futures.ProcessPoolExecutor(1, started, initializer=_begin, initargs=(before,)) as pool:
        return pool.submit(_report, config, target, hlo, evaluation).result() | {"flags": _INSTEAD}


def _begin(flags: str) -> None:
    os.environ["XLA_FLAGS"] = f"{flags} {_INSTEAD}".strip()


def _report(config: Config, target: Target, hlo: Path | None, evaluation: bool) -> dict[str, Any]:
    with cuda_messages_dropped():
        import jax  # noqa: PLC0415  the flags are set by now

        from jaxtrain.training.program_report import compile_report  # noqa: PLC0415

    jax.config.update("jax_platforms", "cpu")  # GPUs that are there stay free for a run
    return compile_report(config, target, hlo=hlo, evaluation=evaluation)
