"""Who dispatches the stages' programs: a thread for each stage on a CPU, one thread for all stages on an accelerator."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxtrain.host.backend import on_cpu
from jaxtrain.parallel.layout import Layout

# The name of the executor that sends activations and gradients between processes; the others are called by their stage.
TRANSFERS = "transfers"


class StageExecutors:
    """Runs functions that dispatch programs.

    With `threads`, each of this process's stages has a thread, and transfers have one more. Otherwise the caller's
    thread runs everything at once.
    """

    def __init__(self, stages: Iterable[int], *, threads: bool):
        self.stages = list(stages)
        names = [*self.stages, TRANSFERS] if threads else []
        self._threads = {
            name: concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f"stage {name}") for name in names
        }

    @property
    def threads(self) -> bool:
        """Whether each stage has a thread."""
        return bool(self._threads)

    def run_all(self, jobs: Mapping[int, Callable[[], Any]]) -> list[Any]:
        """Runs a job for each stage, all at the same time. Returns their results, in the order of `jobs`."""
        return [future.result() for future in [self.submit(stage, job) for stage, job in jobs.items()]]

    def submit(self, name: int | str, job: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future[Any]:
        """Runs `job` after everything else that the executor `name` was given.

        Args:
          name: a stage, or `TRANSFERS`.
          job: returns arrays. With threads, its future is done when these are ready.
          *arguments: of `job`.
        """
        if self._threads:
            return self._threads[name].submit(lambda: jax.block_until_ready(job(*arguments)))
        return completed(job(*arguments))


def completed(value: Any) -> concurrent.futures.Future[Any]:
    """A future that already has its result."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result(value)
    return future


def local_stages(layout: Layout) -> list[int]:
    """The stages that have devices of this process."""
    return [stage for stage in range(layout.stages) if layout.on_stage(stage).mesh.local_devices]


def make_executors(layout: Layout) -> StageExecutors:
    """Executors for this process's stages: with threads on a CPU, without on an accelerator."""
    return StageExecutors(local_stages(layout), threads=on_cpu(layout.mesh.devices.flat))
