"""Arguments and first steps that commands share: the recipe, the devices, the other processes."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

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
        metavar="FILE[:ARGUMENT,...]",
        help="a recipe and its arguments (dp, zero1, zero2, zero3, tensor2, hybrid, pipeline2, pipeline4, or its own); "
        "--config.KEY=VALUE changes any field, see `jaxtrain config FILE`",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """--devices and --simulate-devices."""
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="use the first N devices of the host")
    parser.add_argument("--simulate-devices", type=int, default=0, metavar="N", help="make N CPU devices")


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """--coordinator, --num-processes, --process-id, --start-timeout."""
    parser.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="process 0's address, in a run of several processes"
    )
    parser.add_argument("--num-processes", type=int, default=0, metavar="P")
    parser.add_argument("--process-id", type=int, default=-1, metavar="I")
    parser.add_argument(
        "--start-timeout", type=int, default=300, metavar="S", help="seconds to wait for the other processes"
    )


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
        raise ConfigError(
            f"--process-id {arguments.process_id}: must be below --num-processes {arguments.num_processes}."
        )
    import jax  # noqa: PLC0415

    address, who = arguments.coordinator, f"process {arguments.process_id} of {arguments.num_processes}"
    note = threading.Timer(
        WAITING_NOTE_SECONDS,
        lambda: print(
            f"jaxtrain: {who} waits for the others at {address}; is every process started, with the same --num-processes "
            "and its own --process-id, and does no firewall stand between?",
            file=sys.stderr,
            flush=True,
        ),
    )
    note.daemon = True
    note.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # XLA:CPU runs programs in as many threads as there are cores; one that waits for another process must not keep the
    # others from running.
    os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, 8)))
    try:
        _meet(address, arguments.process_id, arguments.num_processes, arguments.start_timeout)
        jax.distributed.initialize(
            address, arguments.num_processes, arguments.process_id, initialization_timeout=arguments.start_timeout
        )
    except (RuntimeError, ValueError) as error:
        raise EnvironmentMismatchError(
            f"{who} could not join the run at {address}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        note.cancel()


# ---------------------------------------------------------------------------------------------------- the first meeting
#
# JAX's own start crashes, without a sentence, where a process is missing, two have the same number or the port is taken.
# So the processes meet at its address before: each tells process 0 who it is, and process 0 answers all of them at once.

_GO = "jaxtrain: go"
_NO = "jaxtrain: no, "


def _meet(address: str, process: int, count: int, timeout: float) -> None:
    """Returns when all processes are here and JAX may start. Raises `EnvironmentMismatchError`, the same on each of them."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator {address!r}: must be HOST:PORT.")
    place = (host.strip("[]"), int(port))
    answer = (
        _gather(address, place[1], count, timeout) if process == 0 else _report(address, place, process, count, timeout)
    )
    if answer != _GO:
        raise EnvironmentMismatchError(answer.removeprefix(_NO))


def _gather(address: str, port: int, count: int, timeout: float) -> str:
    """Process 0's part. Returns the answer that all got."""
    try:
        everywhere: Any = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        server = socket.create_server(("", port), **everywhere)
    except OSError as error:
        raise EnvironmentMismatchError(
            f"process 0 of {count} cannot listen at {address} ({os.strerror(error.errno or 0)}); is another process 0 there "
            "already? Otherwise choose another port for --coordinator."
        ) from error
    come: dict[int, socket.socket] = {}
    answer, deadline = "", time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        with server:
            server.settimeout(0.2)
            while not answer:
                come = {other: connection for other, connection in come.items() if not _is_closed(connection)}
                missing = [str(other) for other in range(1, count) if other not in come]
                if not missing:
                    answer = _GO
                elif time.monotonic() > deadline:
                    names = ", ".join(missing)
                    answer = f"{_NO}process {names} of {count} did not come to {address} within {timeout:.0f} s."
                else:
                    answer = _welcome(server, come, count, stack)
        # The port is free again before anybody hears the answer: JAX listens there next.
        for connection in come.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{answer}\n".encode())
    return answer


def _welcome(server: socket.socket, come: dict[int, socket.socket], count: int, stack: contextlib.ExitStack) -> str:
    """Takes one connection, if there is any, into `come`. Returns what is wrong with who it is, else ''."""
    try:
        connection = stack.enter_context(server.accept()[0])
        connection.settimeout(2)
        name, process, processes = connection.recv(64).decode().split()
        process, processes = int(process), int(processes)
    except (OSError, ValueError):
        return ""  # nobody came, or it was none of us
    if name != "jaxtrain":
        return ""
    other, come[process] = come.get(process), connection
    if other is not None:
        come[-1] = other  # it hears the answer too
        return f"{_NO}two processes say that they are process {process} of {count}; each needs its own --process-id."
    if processes != count:
        return f"{_NO}process {process} was started with --num-processes {processes} and process 0 with {count}."
    return ""


def _is_closed(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0])  # who has said its name says nothing more


def _report(address: str, place: tuple[str, int], process: int, count: int, timeout: float) -> str:
    """The part of every other process. Returns process 0's answer, once JAX listens there."""
    deadline = time.monotonic() + timeout
    answer = ""
    while True:
        try:
            with socket.create_connection(place, timeout=2) as connection:
                if answer == _GO:
                    return answer
                connection.sendall(f"jaxtrain {process} {count}".encode())
                connection.settimeout(timeout + 10)  # process 0 may have begun to wait just now
                answer = connection.makefile(encoding="utf-8", errors="replace").readline().rstrip("\n")
                if answer.startswith(_NO):
                    return answer
                if answer == _GO:
                    deadline = time.monotonic() + timeout
            error = "it does not answer"
        except OSError as refused:
            error = str(refused)
        if time.monotonic() > deadline:
            return (
                f"process {process} of {count} cannot reach the coordinator {address} after {timeout:.0f} s ({error}); is "
                "process 0 up there, and does no firewall stand between?"
            )
        time.sleep(0.1)


def default_workdir(name: str) -> Path:
    """artifacts/<recipe>."""
    return Path("artifacts") / name
