"""A worker of a sweep: a process that trains one run after another, so that JAX is imported and programs are compiled once.

The sweep talks to it over a pipe. Where the sweep dies, the worker gets SIGTERM: its run saves, and it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jaxtrain.config import Config
from jaxtrain.distributed.exit_report import ExitReport
from jaxtrain.errors import DeviceMemoryError, JaxtrainError
from jaxtrain.host import xla_flags
from jaxtrain.host.gpus import driver_missing
from jaxtrain.host.processes import end_with
from jaxtrain.plugins import whose_fault

DONE, PAUSED, STOPPED, FAILED = "done", "paused", "stopped", "failed"


@dataclasses.dataclass(frozen=True)
class Check:
    """Asks whether what configs name exists. The answer: a sentence for each config, "" where it does."""

    configs: tuple[Config, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """Asks for a run, from wherever its directory is."""

    name: str
    config: Config
    origins: Mapping[str, str]
    """Where each value of the config comes from."""
    command: tuple[str, ...]
    """That would train the same run by itself; the run's manifest has it."""
    folder: Path
    num_devices: int = 0
    pause_at: float = 1.0
    """The share of its length after which the next validation pauses it; 1: it runs to its end."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Says that the run has made its first step, so that its programs are in the compile cache."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The answer to a task: how far it came."""

    state: str
    message: str = ""
    """Why it was stopped or has failed, in a sentence."""
    code: int = 0
    """Its exit code, had it been a process of its own."""
    retry: bool = False
    """Whether it may succeed another time."""
    compiled: int = 0
    """Programs that were compiled, and not found in the cache."""
    unsound: bool = False
    """Whether this process may be in a state that harms the next run."""


def main(parent: int, descriptor: int, cpus: list[int]) -> None:
    """Answers until the pipe is closed.

    Args:
      parent: the process number of the sweep.
      descriptor: of the pipe.
      cpus: that the worker may use; []: all.
    """
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # between runs a signal ends it at once
    if cpus:
        os.sched_setaffinity(0, cpus)
    with Connection(descriptor) as pipe, contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            asked = pipe.recv()
            pipe.send([_problem(config) for config in asked.configs] if isinstance(asked, Check) else _run(asked, pipe))
            gc.collect()  # the state of the run, before the next one needs its memory


def _problem(config: Config) -> str:
    _prepare()
    from jaxtrain.training.setup import check_names  # noqa: PLC0415  not before the environment is set

    try:
        check_names(config)
    except JaxtrainError as error:
        return str(error)
    return ""


def _prepare() -> None:
    """What the command line does before a run of its own."""
    xla_flags.hide_alarms()
    if driver_missing() and "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"


def _run(task: Task, pipe: Connection) -> Outcome:
    _prepare()
    import jax  # noqa: PLC0415  not before the environment is set

    from jaxtrain.distributed.interrupt import catch_signals  # noqa: PLC0415
    from jaxtrain.sweeps.watch import Watch  # noqa: PLC0415
    from jaxtrain.training.session import train  # noqa: PLC0415

    compiled: list[str] = []

    def count(event: str, **_: Any) -> None:
        if "cache_misses" in event:
            compiled.append(event)

    sys.argv = [*task.command, "--workdir", str(task.folder)]
    watch = Watch(task.pause_at, lambda: pipe.send(Compiled()))
    jax.monitoring.register_event_listener(count)
    try:
        with catch_signals(_leave) as interrupt:
            train(
                task.config,
                task.folder,
                num_devices=task.num_devices,
                quiet=True,
                interrupt=interrupt,
                callbacks=[watch],
                origins=task.origins,
            )
        outcome = Outcome(DONE)
    except Exception as error:
        outcome = _failure(error, paused=watch.paused, stopped=interrupt.signal is not None)
    finally:
        jax.monitoring.unregister_event_listener(count)
    return dataclasses.replace(outcome, compiled=len(compiled))


def _failure(error: Exception, *, paused: bool, stopped: bool) -> Outcome:
    report = ExitReport.of(error, 0)
    if isinstance(error, JaxtrainError):
        state = PAUSED if paused and report.code == 75 else STOPPED if stopped else FAILED
        return Outcome(state, str(error), report.code, error.retry, unsound=isinstance(error, DeviceMemoryError))
    traceback.print_exception(error)
    return Outcome(FAILED, f"{whose_fault(error)} {report.sentence}", report.code, unsound=True)


def _leave(error: BaseException) -> None:
    """Ends the process at once: after a second signal, or where the run hangs."""
    report = ExitReport.of(error, 0)
    print(report.message, file=sys.stderr, flush=True)
    os._exit(report.code)
