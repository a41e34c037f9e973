"""Train. A run whose work directory holds checkpoints resumes from them by itself."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from jaxtrain.cli import start
from jaxtrain.distributed import peers
from jaxtrain.distributed.exit_report import ExitReport
from jaxtrain.errors import InterruptedRunError, JaxtrainError, PreemptedError
from jaxtrain.host.native import cuda_messages_dropped
from jaxtrain.host.processes import STOPPING
from jaxtrain.host.text import note
from jaxtrain.observability import progress
from jaxtrain.plugins import whose_fault
from jaxtrain.recipes import Resolved
from jaxtrain.workdir import named

if TYPE_CHECKING:
    from jaxtrain.distributed.interrupt import Interrupt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --workdir, devices, processes; also of `python -m jaxtrain.main`."""
    start.add_config_argument(parser)
    parser.add_argument(
        "--workdir", default="", metavar="DIR", help="where the run writes everything; default artifacts/<recipe>"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="instead of the run, make two steps, two evaluation batches, a save and a restore, with the run's own programs "
        "and data, in a temporary directory; say how long the run would take. (`jaxtrain demo` is about the machine: it "
        "trains a small model of its own, and checks what comes out.)",
    )
    start.add_device_arguments(parser)
    start.add_process_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Trains the config that the arguments name. With several processes, an error ends the process here."""
    with stopped_early():
        resolved = start.resolved(arguments)
        run_resolved(arguments, resolved, arguments.workdir or str(start.default_workdir(resolved.name)))


def run_resolved(arguments: argparse.Namespace, resolved: Resolved, workdir: str) -> None:
    """Starts devices and processes, and trains. With several processes, an error ends the process here.

    Args:
      arguments: those of the devices and the processes.
      resolved: the config.
      workdir: of the run.
    """
    start.check_devices(arguments)
    named(workdir)  # checks the text as written: `Path` folds the slashes of s3://bucket/run
    with ending_together() as interrupt:
        from jaxtrain.distributed import coordination  # noqa: PLC0415  a wrong config is refused before JAX is loaded
        from jaxtrain.training.jax_settings import set_environment  # noqa: PLC0415

        set_environment(resolved.config)  # before the processes connect
        start.configure_devices(arguments)
        start.start_processes(arguments, resolved, workdir, interrupt.connect)
        start.start_backend()
        if coordination.index() == 0:
            start.say_what_flags_are(arguments)
        from jaxtrain.training.session import train  # noqa: PLC0415  JAX is set up by now
        from jaxtrain.training.smoke import smoke  # noqa: PLC0415

        if arguments.smoke:
            smoke(resolved.config, resolved.name, num_devices=arguments.devices, interrupt=interrupt)
        else:
            origins = resolved.origins
            train(resolved.config, workdir, num_devices=arguments.devices, interrupt=interrupt, origins=origins)


@contextlib.contextmanager
def ending_together() -> Iterator[Interrupt]:
    """Inside the context signals are caught, and where one process stops or fails the others end too.

    An error of a single process leaves the context; with several it ends this process here.
    """
    with cuda_messages_dropped():
        from jaxtrain.distributed.interrupt import catch_signals  # noqa: PLC0415  it loads JAX

    with catch_signals(leave) as interrupt:
        try:
            yield interrupt
        except BaseException as raised:
            error = interrupt.cause(raised)
            stopped = raised is error and isinstance(error, (PreemptedError, InterruptedRunError))
            interrupt.ends(None if stopped else error)
            if not stopped and peers.connected() is None:
                ExitReport.of(error, 0).write()
                if error is raised:
                    raise
                raise error from None
            leave(error)


@contextlib.contextmanager
def stopped_early() -> Iterator[None]:
    """Until the run catches signals itself, SIGTERM and SIGHUP end the process at once, with the code of a run that was saved.

    The import of JAX alone takes seconds. A SIGHUP that is ignored (nohup) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in STOPPING if signal.getsignal(number) is signal.SIG_DFL]

    def stop(*_: object) -> None:
        _exit(PreemptedError("Stopped before the run began; the last checkpoint is as it was."), 0)

    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def leave(error: BaseException) -> None:
    """Ends the process at once, from any thread. JAX would wait 300 s for other processes, Python for a stuck thread."""
    from jaxtrain.distributed import coordination  # noqa: PLC0415

    _exit(error, coordination.index())


def _exit(error: BaseException, process: int) -> NoReturn:
    report = ExitReport.of(error, process)
    report.write()
    known = isinstance(error, JaxtrainError)
    with contextlib.suppress(OSError):  # the terminal is gone
        progress.erase_line()
        note(report.message if known else f"{whose_fault(error)}\n{report.trace}", lines=not known)
        sys.stdout.flush()
    os._exit(report.code)
