"""Who dispatches the stages' work: a thread for each stage on a CPU, one thread for all on an accelerator."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxtrain.host.backend import on_cpu
from jaxtrain.parallel.layout import Layout


class StageExecutors:
    """Who dispatches: a thread for each of this process's stages and one for transfers; or the caller, with `threads=False`."""

    def __init__(self, stages: Iterable[int], *, threads: bool):
        self.stages = list(stages)
        executors = [*self.stages, "transfers"] if threads else []
        self._threads = {
            lane: concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f"stage {lane}") for lane in executors
        }

    @property
    def threads(self) -> bool:
        """Whether each stage has a thread."""
        return bool(self._threads)

    def each(self, jobs: Mapping[int, Callable[[], Any]]) -> list[Any]:
        """Runs a job for each stage, all at once; returns what they return, in their order."""
        return [future.result() for future in [self.submit(stage, job) for stage, job in jobs.items()]]

    def submit(self, lane: int | str, job: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future[Any]:
        """Queues `job` behind what a stage's lane, or that of the `transfers`, does already."""
        if self._threads:
            return self._threads[lane].submit(lambda: jax.block_until_ready(job(*arguments)))
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(job(*arguments))
        return future


def local_stages(layout: Layout) -> list[int]:
    """The stages that have devices of this process."""
    return [stage for stage in range(layout.stages) if layout.on_stage(stage).mesh.local_devices]


def make_executors(layout: Layout) -> StageExecutors:
    """Threads on a CPU, none on an accelerator."""
    return StageExecutors(local_stages(layout), threads=on_cpu(layout.mesh.devices.flat))
