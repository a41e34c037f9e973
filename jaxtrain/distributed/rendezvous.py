"""The first meeting of a run's processes, before JAX starts.

JAX's own start crashes, without a sentence, where a process is missing, two have the same number, the port is taken or the
versions differ, and it trains happily where the configs differ. So the processes meet before: each tells process 0 who it
is and what it was started with, and process 0 answers all of them at once. One JSON object a line, over TCP.
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

PORTS = 8  # tried, one after the other, where other programs listen at the first
_BANNER = "jaxtrain-meeting"
SKEW_SECONDS = 5.0  # between two hosts' clocks that are warned of
_HELLO_SECONDS = 2.0  # that process 0 may take to say that it is there
_HELLO_BYTES = 1 << 20
_BACKLOG = 4096  # connections that the kernel keeps until they are taken; more try again after a second
_TRIES_A_SECOND = 20_000  # of all processes together, at one that does not listen yet

Fingerprint = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Handshake:
    """What a process tells process 0.

    fingerprint: `versions` and `config`, each a flat mapping of plain values. clock: its host's, in seconds since 1970.
    """

    index: int
    processes: int
    host: str
    fingerprint: Fingerprint
    clock: float = dataclasses.field(default_factory=time.time)


def rendezvous(
    place: ProcessInfo, fingerprint: Fingerprint, timeout: float, *, allow_version_skew: bool = False
) -> str:
    """Returns the address where JAX may start, once all processes are here and fit together.

    Args:
      fingerprint: what must be equal on all processes; only process 0's `allow_version_skew` counts.
      timeout: seconds to wait for the others.

    Raises:
      EnvironmentMismatchError: the same text on every process that is there.
    """
    host, port = place.address
    hello = Handshake(place.index, place.processes, socket.gethostname(), fingerprint)
    if place.index == 0:
        answer = _gather(place, port, hello, timeout, allow_version_skew)
    else:
        answer = _report(place, (host, port), hello, timeout)
    if "no" in answer:
        raise EnvironmentMismatchError(answer["no"])
    return f"[{host}]:{answer['port']}" if ":" in host else f"{host}:{answer['port']}"


# ---------------------------------------------------------------------------------------------------------- process 0


def _gather(place: ProcessInfo, port: int, own: Handshake, timeout: float, allow_version_skew: bool) -> dict[str, Any]:
    """Returns the answer that all got: {"port": ...} or {"no": why}."""
    server, port = _listen(place, port)
    _allow_files(place.processes)
    come: dict[int, socket.socket] = {}
    answer: dict[str, Any] = {}
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        with server, selectors.DefaultSelector() as ears:  # none waits for another: thousands may come at once
            server.setblocking(False)
            ears.register(server, selectors.EVENT_READ)
            while not answer:
                if len(come) == place.processes - 1:
                    answer = {"port": port}
                elif time.monotonic() > deadline:
                    names = ", ".join(str(other) for other in range(1, place.processes) if other not in come)
                    answer = _no(
                        f"process {names} of {place.processes} did not come to {place.coordinator} within {timeout:.0f} s."
                    )
                for key, _ in [] if answer else ears.select(0.2):
                    if key.fileobj is server:
                        _accept(server, ears, stack)
                    elif why := _hear(key, ears, come, own, allow_version_skew):
                        answer = _no(why)
                        break
        # The port is free again before anybody hears the answer: JAX listens there next.
        for connection in come.values():
            connection.settimeout(_HELLO_SECONDS)
            with contextlib.suppress(OSError):
                connection.sendall((json.dumps(answer) + "\n").encode())
    return answer


def _allow_files(processes: int) -> None:
    """A connection is an open file: here, and again in JAX's coordination service. Shells allow 1,024 by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * processes + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _no(why: str) -> dict[str, Any]:
    return {"no": why}


def _listen(place: ProcessInfo, first: int) -> tuple[socket.socket, int]:
    """A server at the first free port from `first` on. Raises `EnvironmentMismatchError` if another process 0 is there."""
    reason, everywhere = "", not place.is_local and socket.has_dualstack_ipv6()
    for port in range(first, min(first + PORTS, 65536)):
        try:
            if everywhere:
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
                ), port
            return socket.create_server(("127.0.0.1" if place.is_local else "", port), backlog=_BACKLOG), port
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            if _banner(("127.0.0.1", port)):
                raise EnvironmentMismatchError(
                    f"{place} cannot listen at {place.coordinator}: another process 0 waits there already. Does an older "
                    "start of this run still live, or have two processes the number 0?"
                ) from None
    raise EnvironmentMismatchError(
        f"{place} cannot listen at {place.coordinator} nor at the {PORTS - 1} ports behind it ({reason}); choose another port."
    )


def _accept(server: socket.socket, ears: selectors.BaseSelector, stack: contextlib.ExitStack) -> None:
    """Lets one in, tells it who is here, and listens to it."""
    with contextlib.suppress(OSError):  # it is gone again
        connection = stack.enter_context(server.accept()[0])
        connection.setblocking(False)
        connection.send(f"{_BANNER}\n".encode())
        ears.register(connection, selectors.EVENT_READ, bytearray())


def _hear(
    key: selectors.SelectorKey,
    ears: selectors.BaseSelector,
    come: dict[int, socket.socket],
    own: Handshake,
    allow_version_skew: bool,
) -> str:
    """Takes what a connection says; once it has said who it is, into `come`. Returns what is wrong with that, else ''."""
    connection: Any = key.fileobj
    heard, said = key.data, b""
    with contextlib.suppress(OSError):
        said = connection.recv(1 << 16)
    heard += said
    try:
        if not said or len(heard) > _HELLO_BYTES:
            raise ValueError
        if not said.endswith(b"\n"):
            return ""  # not all of it yet
        other = Handshake(**json.loads(heard))
    except (ValueError, TypeError):  # it has gone, or is none of us; who has said its name says nothing more
        ears.unregister(connection)
        for index in [index for index, known in come.items() if known is connection]:
            del come[index]
        connection.close()
        return ""
    if abs(skew := other.clock - time.time()) > SKEW_SECONDS:
        ahead = "ahead of" if skew > 0 else "behind"
        text = (
            f"the clock of process {other.index} on {other.host} is {abs(skew):.0f} s {ahead} that of process 0; "
            "nothing in the run depends on it, but the times in logs will not match."
        )
        note(text)
    before, come[other.index] = come.get(other.index), connection
    if before is not None or other.index == 0:
        if before is not None:
            come[-1] = before  # it hears the answer too
        return f"two processes say that they are process {other.index} of {own.processes}; each needs its own --process-id."
    if other.processes != own.processes:
        return f"process {other.index} was started with --num-processes {other.processes} and process 0 with {own.processes}."
    return difference(own, other, allow_version_skew=allow_version_skew)


def difference(own: Handshake, other: Handshake, *, allow_version_skew: bool = False) -> str:
    """What process `other` was started with that process 0 (`own`) was not, in a sentence, or ''."""
    for what in own.fingerprint:
        if what == "versions" and allow_version_skew:
            continue
        mine, theirs = own.fingerprint[what], other.fingerprint.get(what, {})
        keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if keys:
            found = "; ".join(
                f"{key} is {theirs.get(key)!r} there and {mine.get(key)!r} on process 0" for key in keys[:5]
            )
            more = f"; and {len(keys) - 5} more" if len(keys) > 5 else ""
            advice = (
                "install the same versions, or use --allow-version-skew" if what == "versions" else "start all alike"
            )
            return f"process {other.index} on {other.host} has another {what} ({found}{more}); {advice}."
    return ""


# ----------------------------------------------------------------------------------------------------------- the others


def _report(place: ProcessInfo, address: tuple[str, int], hello: Handshake, timeout: float) -> dict[str, Any]:
    """Tells process 0 who this is. Returns its answer, once JAX listens there."""
    deadline = time.monotonic() + timeout
    while True:
        for port in range(address[1], min(address[1] + PORTS, 65536)):
            answer, error = _ask((address[0], port), hello, timeout)
            if answer:
                return answer if "no" in answer else _wait_for_jax(place, (address[0], answer["port"]), timeout)
            if error is not None and not isinstance(error, ConnectionRefusedError):
                break  # no such host, or no way there
        if time.monotonic() > deadline:
            return _no(
                f"{place} on {hello.host} cannot reach the coordinator {place.coordinator} after {timeout:.0f} s "
                f"({error or 'another program answers there'}); is process 0 up there, and does no firewall or proxy stand "
                "between?"
            )
        time.sleep(max(0.1, PORTS * place.processes / _TRIES_A_SECOND))


def _ask(address: tuple[str, int], hello: Handshake, timeout: float) -> tuple[dict[str, Any], OSError | None]:
    """The answer of process 0, if it listens there; and the error where nobody listens."""
    try:
        connection = socket.create_connection(address, timeout=_HELLO_SECONDS)
    except OSError as refused:
        return {}, refused
    with connection:
        try:
            reader = connection.makefile(encoding="utf-8", errors="replace")
            if reader.readline(64).strip() != _BANNER:
                return {}, None
            now = dataclasses.replace(hello, clock=time.time())
            connection.sendall((json.dumps(dataclasses.asdict(now)) + "\n").encode())
            connection.settimeout(timeout + 10)  # process 0 may have begun to wait just now
            answer = json.loads(reader.readline(1 << 16))
        except (OSError, ValueError):
            return {}, None
    return answer, None


def _wait_for_jax(place: ProcessInfo, address: tuple[str, int], timeout: float) -> dict[str, Any]:
    """Returns when something listens at the port again: JAX's coordination service, in process 0."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=_HELLO_SECONDS):
            return {"port": address[1]}
        time.sleep(max(0.05, place.processes / _TRIES_A_SECOND))
    return _no(f"{place}: JAX did not start on process 0 within {timeout:.0f} s.")


def _banner(address: tuple[str, int]) -> bool:
    """Whether a process 0 listens there."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=0.5) as connection:
        return connection.makefile(encoding="utf-8", errors="replace").readline(64).strip() == _BANNER
    return False
