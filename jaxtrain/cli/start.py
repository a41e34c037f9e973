"""Arguments and first steps that commands share: the recipe, the devices, the other processes."""

from __future__ import annotations

import argparse
import socket
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

from jaxtrain.errors import ConfigError, EnvironmentMismatchError
from jaxtrain.recipes import Resolved, resolve

WAITING_NOTE_SECONDS = 10.0


def console() -> Console:
    """Standard output. A table that goes into a file or another program is not cut to the width of a screen."""
    width = None if sys.stdout.isatty() else 1_000_000
    return Console(width=width, highlight=False, markup=False, emoji=False)


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """--config FILE[:ARGUMENTS]; overrides are taken out before argparse sees them."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT,...]",
        help="a recipe and its arguments (dp, zero1, zero2, zero3, tensor2, hybrid, or its own); "
        "--config.KEY=VALUE changes any field, see `jaxtrain config FILE`",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """--devices and --simulate-devices."""
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="use the first N devices of the host")
    parser.add_argument("--simulate-devices", type=int, default=0, metavar="N", help="make N CPU devices")


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """--coordinator, --num-processes, --process-id, --start-timeout."""
    parser.add_argument("--coordinator", default="", metavar="HOST:PORT", help="process 0's address, in a run of several processes")
    parser.add_argument("--num-processes", type=int, default=0, metavar="P")
    parser.add_argument("--process-id", type=int, default=-1, metavar="I")
    parser.add_argument("--start-timeout", type=int, default=300, metavar="S", help="seconds to wait for the other processes")


def resolved(arguments: argparse.Namespace) -> Resolved:
    """The config that the arguments name. Raises `ConfigError`."""
    return resolve(arguments.config, arguments.overrides)


def start_devices(arguments: argparse.Namespace) -> None:
    """Sets JAX up before its backend starts. Raises `ConfigError` for a count that makes no sense."""
    for name in ("devices", "simulate_devices"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1.")
    import jax  # noqa: PLC0415  bad arguments are answered before JAX is loaded

    if arguments.simulate_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.simulate_devices)


def start_processes(arguments: argparse.Namespace) -> None:
    """Joins the other processes of the run, if it has any. Raises `EnvironmentMismatchError` when they do not come."""
    given = (bool(arguments.coordinator), arguments.num_processes > 0, arguments.process_id >= 0)
    if not any(given):
        return
    if not all(given):
        raise ConfigError("--coordinator, --num-processes and --process-id go together.")
    if not 0 <= arguments.process_id < arguments.num_processes:
        raise ConfigError(f"--process-id {arguments.process_id}: must be below --num-processes {arguments.num_processes}.")
    import jax  # noqa: PLC0415

    who = f"process {arguments.process_id} of {arguments.num_processes}"
    if arguments.process_id:
        _reach(arguments.coordinator, arguments.start_timeout, who)
    note = threading.Timer(
        WAITING_NOTE_SECONDS,
        lambda: print(
            f"jaxtrain: {who} waits for the others at {arguments.coordinator}; is every process started, with the same "
            "--num-processes and its own --process-id?",
            file=sys.stderr,
            flush=True,
        ),
    )
    note.daemon = True
    note.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            arguments.coordinator,
            arguments.num_processes,
            arguments.process_id,
            initialization_timeout=arguments.start_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise EnvironmentMismatchError(f"{who} could not join the run at {arguments.coordinator}: {str(error).splitlines()[0]}") from error
    finally:
        note.cancel()


def _reach(address: str, timeout: float, who: str) -> None:
    """Returns once something listens at `address`: JAX itself would abort without naming it."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator {address!r}: must be HOST:PORT.")
    deadline = time.monotonic() + timeout
    said = False
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise EnvironmentMismatchError(
                    f"{who} cannot reach the coordinator {address} after {timeout:.0f} s ({error}); is process 0 up there, "
                    "and does no firewall stand between?"
                ) from error
            if not said and time.monotonic() > deadline - timeout + WAITING_NOTE_SECONDS:
                said = True
                print(f"jaxtrain: {who} waits for process 0 at {address} ({error})", file=sys.stderr, flush=True)
        time.sleep(0.2)


def default_workdir(name: str) -> Path:
    """artifacts/<recipe>."""
    return Path("artifacts") / name
