"""The rendezvous of a run's processes, before JAX starts.

`jax.distributed` crashes without a clear message where a process is missing, two have the same number, the port is taken or
the versions differ. Where the configs differ it notices nothing. So the processes connect to process 0 before. Each sends
a handshake: its number, and what it was started with. Process 0 compares the handshakes and answers all at once.

The protocol is one JSON object a line, over TCP; process 0 sends a banner first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any

from jaxtrain.distributed.cluster import ProcessInfo
from jaxtrain.errors import EnvironmentMismatchError
from jaxtrain.host.text import note

PORTS = 8  # that are tried in turn, where other programs listen at the first
_BANNER = "jaxtrain-rendezvous"
SKEW_SECONDS = 5.0  # a warning says so where two hosts' clocks differ by more
_SOCKET_SECONDS = 2.0  # to connect, to read the banner or to send the answer
_HANDSHAKE_BYTES = 1 << 20  # of a handshake at most
_BACKLOG = 4096  # connections that the kernel keeps until they are accepted; others try again after a second
_TRIES_A_SECOND = 20_000  # of all processes together, while process 0 does not listen yet

Fingerprint = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Handshake:
    """What a process sends to process 0."""

    index: int
    """Of the process, from 0."""
    processes: int
    """How many it was told that the run has."""
    host: str
    fingerprint: Fingerprint
    """`versions` and `config`: what must be equal on all processes, each a flat mapping of JSON's values."""
    clock: float = dataclasses.field(default_factory=time.time)
    """Its host's, in seconds since 1970."""


def rendezvous(
    process: ProcessInfo, fingerprint: Fingerprint, timeout: float, *, allow_version_skew: bool = False
) -> str:
    """Waits until all processes have joined, and checks that they fit together.

    Args:
      process: this one.
      fingerprint: what must be equal on all processes.
      timeout: seconds to wait for the others.
      allow_version_skew: ignores other versions; only process 0's value counts.

    Returns:
      The address, HOST:PORT, where `jax.distributed` can start.

    Raises:
      EnvironmentMismatchError: a process is missing or does not fit; the same text on every process that has joined.
    """
    host, port = process.address
    handshake = Handshake(process.index, process.processes, socket.gethostname(), fingerprint)
    if process.index == 0:
        answer = _gather(process, port, handshake, timeout, allow_version_skew)
    else:
        answer = _join(process, (host, port), handshake, timeout)
    if "refused" in answer:
        raise EnvironmentMismatchError(answer["refused"])
    return f"[{host}]:{answer['port']}" if ":" in host else f"{host}:{answer['port']}"


# ---------------------------------------------------------------------------------------------------------- process 0


def _gather(
    process: ProcessInfo, port: int, mine: Handshake, timeout: float, allow_version_skew: bool
) -> dict[str, Any]:
    """Accepts the other processes. Returns the answer that it sent to all: {"port": ...} or {"refused": why}."""
    server, port = _listen(process, port)
    _allow_files(process.processes)
    joined: dict[int, socket.socket] = {}
    answer: dict[str, Any] = {}
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        with server, selectors.DefaultSelector() as selector:  # none waits for another: thousands may connect at once
            server.setblocking(False)
            selector.register(server, selectors.EVENT_READ)
            while not answer:
                if len(joined) == process.processes - 1:
                    answer = {"port": port}
                elif time.monotonic() > deadline:
                    names = ", ".join(str(other) for other in range(1, process.processes) if other not in joined)
                    answer = _refusal(
                        f"process {names} of {process.processes} did not come to {process.coordinator} within {timeout:.0f} s."
                    )
                for key, _ in [] if answer else selector.select(0.2):
                    if key.fileobj is server:
                        _accept(server, selector, stack)
                    elif why := _receive(key, selector, joined, mine, allow_version_skew):
                        answer = _refusal(why)
                        break
        # The server is closed before the answer is sent: JAX listens at the same port next.
        for connection in joined.values():
            connection.settimeout(_SOCKET_SECONDS)
            with contextlib.suppress(OSError):
                connection.sendall((json.dumps(answer) + "\n").encode())
    return answer


def _allow_files(processes: int) -> None:
    """Raises the limit of open files. Each process has a connection here, and another to JAX's coordination service."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * processes + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _refusal(why: str) -> dict[str, Any]:
    return {"refused": why}


def _listen(process: ProcessInfo, first: int) -> tuple[socket.socket, int]:
    """A server at the first free port from `first` on. Raises `EnvironmentMismatchError` if another process 0 listens there."""
    reason, everywhere = "", not process.is_local and socket.has_dualstack_ipv6()
    for port in range(first, min(first + PORTS, 65536)):
        try:
            if everywhere:
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
                ), port
            return socket.create_server(("127.0.0.1" if process.is_local else "", port), backlog=_BACKLOG), port
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            if _process_zero_listens(("127.0.0.1", port)):
                raise EnvironmentMismatchError(
                    f"{process} cannot listen at {process.coordinator}: another process 0 waits there already. Does an older "
                    "start of this run still live, or have two processes the number 0?"
                ) from None
    raise EnvironmentMismatchError(
        f"{process} cannot listen at {process.coordinator} nor at the {PORTS - 1} ports behind it ({reason}); choose "
        "another port."
    )


def _accept(server: socket.socket, selector: selectors.BaseSelector, stack: contextlib.ExitStack) -> None:
    """Accepts a connection, sends the banner, and waits for its handshake."""
    with contextlib.suppress(OSError):  # it is closed again
        connection = stack.enter_context(server.accept()[0])
        connection.setblocking(False)
        connection.send(f"{_BANNER}\n".encode())
        selector.register(connection, selectors.EVENT_READ, bytearray())


def _receive(
    key: selectors.SelectorKey,
    selector: selectors.BaseSelector,
    joined: dict[int, socket.socket],
    mine: Handshake,
    allow_version_skew: bool,
) -> str:
    """Reads from a connection; once its handshake is complete, puts it into `joined`.

    Returns why the handshake is refused, else ''.
    """
    connection: Any = key.fileobj
    buffer, received = key.data, b""
    with contextlib.suppress(OSError):
        received = connection.recv(1 << 16)
    buffer += received
    try:
        if not received or len(buffer) > _HANDSHAKE_BYTES:
            raise ValueError
        if not received.endswith(b"\n"):
            return ""  # the rest of the handshake comes later
        other = Handshake(**json.loads(buffer))
    except (ValueError, TypeError):  # it is closed, or not a process of a run, or sends more than its handshake
        selector.unregister(connection)
        for index in [index for index, known in joined.items() if known is connection]:
            del joined[index]
        connection.close()
        return ""
    if abs(skew := other.clock - time.time()) > SKEW_SECONDS:
        ahead = "ahead of" if skew > 0 else "behind"
        text = (
            f"the clock of process {other.index} on {other.host} is {abs(skew):.0f} s {ahead} that of process 0; "
            "nothing in the run depends on it, but the times in logs will not match."
        )
        note(text)
    before, joined[other.index] = joined.get(other.index), connection
    if before is not None or other.index == 0:
        if before is not None:
            joined[-1] = before  # it gets the answer too
        return f"two processes say that they are process {other.index} of {mine.processes}; each needs its own --process-id."
    if other.processes != mine.processes:
        return f"process {other.index} was started with --num-processes {other.processes} and process 0 with {mine.processes}."
    return difference(mine, other, allow_version_skew=allow_version_skew)


def difference(mine: Handshake, other: Handshake, *, allow_version_skew: bool = False) -> str:
    """Compares two handshakes.

    Args:
      mine: of process 0.
      other: of another process.
      allow_version_skew: ignores other versions.

    Returns:
      A sentence on how the other process was started differently, or ''.
    """
    for what in mine.fingerprint:
        if what == "versions" and allow_version_skew:
            continue
        here, there = mine.fingerprint[what], other.fingerprint.get(what, {})
        keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]
        if keys:
            differing = "; ".join(
                f"{key} is {there.get(key)!r} there and {here.get(key)!r} on process 0" for key in keys[:5]
            )
            more = f"; and {len(keys) - 5} more" if len(keys) > 5 else ""
            advice = (
                "install the same versions, or use --allow-version-skew" if what == "versions" else "start all alike"
            )
            return f"process {other.index} on {other.host} has another {what} ({differing}{more}); {advice}."
    return ""


# ----------------------------------------------------------------------------------------------------------- the others


def _join(process: ProcessInfo, address: tuple[str, int], handshake: Handshake, timeout: float) -> dict[str, Any]:
    """Sends the handshake to process 0, until it listens. Returns its answer, once JAX listens there."""
    deadline = time.monotonic() + timeout
    while True:
        for port in range(address[1], min(address[1] + PORTS, 65536)):
            answer, error = _send_handshake((address[0], port), handshake, timeout)
            if answer:
                return answer if "refused" in answer else _wait_for_jax(process, (address[0], answer["port"]), timeout)
            if error is not None and not isinstance(error, ConnectionRefusedError):
                break  # there is no such host, or it cannot be reached
        if time.monotonic() > deadline:
            return _refusal(
                f"{process} on {handshake.host} cannot reach the coordinator {process.coordinator} after {timeout:.0f} s "
                f"({error or 'another program answers there'}); is process 0 up there, and does no firewall or proxy stand "
                "between?"
            )
        time.sleep(max(0.1, PORTS * process.processes / _TRIES_A_SECOND))


def _send_handshake(
    address: tuple[str, int], handshake: Handshake, timeout: float
) -> tuple[dict[str, Any], OSError | None]:
    """The answer of process 0, {} where it does not listen there; and the error where no program does."""
    try:
        connection = socket.create_connection(address, timeout=_SOCKET_SECONDS)
    except OSError as refused:
        return {}, refused
    with connection:
        try:
            reader = connection.makefile(encoding="utf-8", errors="replace")
            if reader.readline(64).strip() != _BANNER:
                return {}, None
            now = dataclasses.replace(handshake, clock=time.time())
            connection.sendall((json.dumps(dataclasses.asdict(now)) + "\n").encode())
            connection.settimeout(timeout + 10)  # process 0 may have begun to wait only now
            answer = json.loads(reader.readline(1 << 16))
        except (OSError, ValueError):
            return {}, None
    return answer, None


def _wait_for_jax(process: ProcessInfo, address: tuple[str, int], timeout: float) -> dict[str, Any]:
    """Returns once JAX's coordination service, in process 0, listens at the port."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=_SOCKET_SECONDS):
            return {"port": address[1]}
        time.sleep(max(0.05, process.processes / _TRIES_A_SECOND))
    return _refusal(f"{process}: JAX did not start on process 0 within {timeout:.0f} s.")


def _process_zero_listens(address: tuple[str, int]) -> bool:
    """Whether a process 0 of jaxtrain listens there."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=0.5) as connection:
        return connection.makefile(encoding="utf-8", errors="replace").readline(64).strip() == _BANNER
    return False
