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
import math
import os
import resource
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtrain.distributed.cluster import ProcessInfo, job_ids
from jaxtrain.errors import EnvironmentMismatchError
from jaxtrain.host.text import note, printable

PORTS = 8  # that are tried in turn, where other programs listen at the first
_BANNER = "jaxtrain-rendezvous"
SKEW_SECONDS = 5.0  # a warning says so where two hosts' clocks differ by more
_SOCKET_SECONDS = 2.0  # to connect, to read the banner or to send the answer
_HANDSHAKE_BYTES = 1 << 20  # of a handshake at most
_SILENT = 256  # connections that say nothing; of more the oldest are dropped
_SHOWN = 200  # letters of a setting that is shown
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
    jobs: Sequence[str] = ()
    """Which jobs started it (`cluster.job_ids`)."""

    @classmethod
    def parse(cls, line: bytes | bytearray) -> Handshake | None:
        """What a process has sent; None where no process of jaxtrain sends that."""
        try:
            found = cls(**json.loads(line))
            repr(found)  # text and numbers in so many lists that Python cannot write them fail here
            numbers = type(found.index) is type(found.processes) is int and 0 <= found.index < found.processes
            clock = type(found.clock) in (int, float) and math.isfinite(found.clock)
            fingerprint = isinstance(found.fingerprint, dict) and all(
                isinstance(d, dict) for d in found.fingerprint.values()
            )
            texts = [found.host, *found.jobs]
        except (ValueError, TypeError, RecursionError):
            return None
        right = numbers and clock and fingerprint and all(isinstance(text, str) for text in texts)
        return found if right else None


def rendezvous(
    process: ProcessInfo,
    fingerprint: Fingerprint,
    timeout: float,
    *,
    allow_version_skew: bool = False,
    connections: dict[int, socket.socket] | None = None,
) -> str:
    """Waits until all processes have joined, and checks that they fit together.

    Args:
      process: this one.
      fingerprint: what must be equal on all processes.
      timeout: seconds to wait for the others.
      allow_version_skew: ignores other versions; only process 0's value counts.
      connections: gets the open connections to the others (process 0) or to process 0, by number; else they are closed.

    Returns:
      The address, HOST:PORT, where `jax.distributed` can start.

    Raises:
      EnvironmentMismatchError: a process is missing or does not fit; the same text on every process that has joined.
    """
    host, port = process.address
    jobs = sorted(job_ids())
    handshake = Handshake(process.index, process.processes, socket.gethostname(), fingerprint, jobs=jobs)
    with contextlib.ExitStack() as stack:
        if process.index == 0:
            answer, found = _gather(process, port, handshake, timeout, allow_version_skew, stack)
        else:
            answer, found = _join(process, (host, port), handshake, timeout, stack)
        if "refused" in answer:
            raise EnvironmentMismatchError(answer["refused"])
        if connections is not None:
            connections |= {number: connection.dup() for number, connection in found.items()}
    return f"[{host}]:{answer['port']}" if ":" in host else f"{host}:{answer['port']}"


# ---------------------------------------------------------------------------------------------------------- process 0


def _gather(
    process: ProcessInfo,
    port: int,
    mine: Handshake,
    timeout: float,
    allow_version_skew: bool,
    stack: contextlib.ExitStack,
) -> tuple[dict[str, Any], dict[int, socket.socket]]:
    """Accepts the other processes, and answers all of them at once.

    Args:
      process: this one.
      port: the first that it may listen at.
      mine: its own handshake.
      timeout: seconds to wait for the others.
      allow_version_skew: ignores other versions.
      stack: closes the connections.

    Returns:
      The answer, {"port": ...} or {"refused": why}, and the connections by process.
    """
    server, port = _listen(process, port)
    _allow_files(process.processes)
    answer: dict[str, Any] = {}
    deadline = time.monotonic() + timeout
    with server, _Visitors(mine, allow_version_skew, stack) as visitors:
        server.setblocking(False)
        visitors.selector.register(server, selectors.EVENT_READ)
        while not answer:
            complete = len(visitors.joined) == process.processes - 1
            for key, _ in visitors.selector.select(0 if complete else 0.2):
                if key.fileobj is server:
                    visitors.accept(server)
                elif why := visitors.receive(key.fileobj):
                    answer = _refusal(why)
                    break
            missing = [str(other) for other in range(1, process.processes) if other not in visitors.joined]
            if not answer and complete and not missing:  # none of them has gone meanwhile
                answer = {"port": port}
            elif not answer and missing and time.monotonic() > deadline:
                answer = _refusal(
                    f"process {', '.join(missing)} of {process.processes} did not come to {process.coordinator} within "
                    f"{timeout:.0f} s{visitors.turned_away and f'; one that came was turned away: {visitors.turned_away}'}."
                )
    # The server is closed before the answer is sent: JAX listens at the same port next.
    for connection in [*visitors.joined.values(), *visitors.refused]:
        _answer(connection, answer)
    return answer, visitors.joined


def _answer(connection: socket.socket, answer: Mapping[str, Any]) -> None:
    connection.settimeout(_SOCKET_SECONDS)
    with contextlib.suppress(OSError):
        connection.sendall((json.dumps(answer) + "\n").encode())


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


class _Visitors:
    """Whoever connects to process 0: its own processes, those of another run by mistake, and strangers.

    None waits for another: thousands may connect at once. A stranger is dropped, and so is a process of another run, which
    is told so first.
    """

    def __init__(self, mine: Handshake, allow_version_skew: bool, stack: contextlib.ExitStack):
        """Begins with nobody.

        Args:
          mine: the handshake of process 0.
          allow_version_skew: ignores other versions.
          stack: closes the connections.
        """
        self._mine, self._allow_version_skew, self._stack = mine, allow_version_skew, stack
        self.selector = selectors.DefaultSelector()
        self._silent: dict[
            Any, bytearray
        ] = {}  # what those have sent that have yet to say who they are; the oldest first
        self.joined: dict[int, socket.socket] = {}
        self.refused: list[socket.socket] = []  # they get the answer too
        self.turned_away = ""  # why another run's process was, the last one

    def __enter__(self) -> _Visitors:
        return self

    def __exit__(self, *_: object) -> None:
        self.selector.close()

    def accept(self, server: socket.socket) -> None:
        """Accepts a connection, sends the banner, and waits for its handshake."""
        try:
            connection = self._stack.enter_context(server.accept()[0])
            connection.setblocking(False)
            connection.send(f"{_BANNER}\n".encode())
        except OSError:  # it is closed again, or this process has no file left for it
            full = bool(self._silent)
        else:
            self._silent[connection] = bytearray()
            self.selector.register(connection, selectors.EVENT_READ)
            full = len(self._silent) > _SILENT + self._mine.processes
        if full:  # a process sends its handshake at once; if it is dropped here, it comes again
            self._drop(next(iter(self._silent)))

    def receive(self, connection: Any) -> str:
        """Reads from a connection; once its handshake is complete, it has joined.

        Returns why no run can come of it, else ''.
        """
        received, buffer = b"", self._silent.get(connection)
        with contextlib.suppress(OSError):
            received = connection.recv(1 << 16)
        if buffer is None or not received or len(buffer) + len(received) > _HANDSHAKE_BYTES:
            self._drop(connection)  # it is closed, or sends more than its handshake
            return ""
        buffer += received
        if not received.endswith(b"\n"):
            return ""  # the rest of the handshake comes later
        other = Handshake.parse(buffer)
        if other is None:
            self._drop(connection)
            return ""
        del self._silent[connection]
        if why := self._of_another_run(other):
            note(f"{why}; it was turned away.")
            self.turned_away = why
            _answer(connection, _refusal(f"{why}; each run needs a port of its own."))
            self._drop(connection)
            return ""
        return self._join(connection, other)

    def _join(self, connection: socket.socket, other: Handshake) -> str:
        if abs(skew := other.clock - time.time()) > SKEW_SECONDS:
            ahead = "ahead of" if skew > 0 else "behind"
            text = (
                f"the clock of process {other.index} on {other.host} is {abs(skew):.0f} s {ahead} that of process 0; "
                "nothing in the run depends on it, but the times in logs will not match."
            )
            note(text)
        if other.index in self.joined or other.index == 0:
            self.refused.append(connection)
            return (
                f"two processes say that they are process {other.index} of {self._mine.processes}; each needs its own "
                "--process-id."
            )
        self.joined[other.index] = connection
        if other.processes != self._mine.processes:
            return (
                f"process {other.index} was started with --num-processes {other.processes} and process 0 with "
                f"{self._mine.processes}."
            )
        return difference(self._mine, other, allow_version_skew=self._allow_version_skew)

    def _of_another_run(self, other: Handshake) -> str:
        """Why it cannot be a process of this run that was only started wrongly, else ''."""
        who = f"process {other.index} on {other.host} belongs to another run"
        if self._mine.jobs and other.jobs and not set(self._mine.jobs) & set(other.jobs):
            return f"{who} ({', '.join(other.jobs)} there and {', '.join(self._mine.jobs)} on process 0)"
        here, there = (of.fingerprint.get("config", {}).get("--workdir") for of in (self._mine, other))
        return f"{who} (--workdir is {_short(there)} there and {_short(here)} on process 0)" if here != there else ""

    def _drop(self, connection: Any) -> None:
        self.selector.unregister(connection)
        self._silent.pop(connection, None)
        for index in [index for index, known in self.joined.items() if known is connection]:
            del self.joined[index]
        connection.close()


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
                f"{_short(key, str)} is {_short(there.get(key))} there and {_short(here.get(key))} on process 0"
                for key in keys[:5]
            )
            more = f"; and {len(keys) - 5} more" if len(keys) > 5 else ""
            advice = (
                "install the same versions, or use --allow-version-skew" if what == "versions" else "start all alike"
            )
            return f"process {other.index} on {other.host} has another {what} ({differing}{more}); {advice}."
    return ""


def _short(value: Any, show: Callable[[Any], str] = repr) -> str:
    """A setting as it is shown: another process may have sent anything."""
    text = show(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


# ----------------------------------------------------------------------------------------------------------- the others


def _join(
    process: ProcessInfo, address: tuple[str, int], handshake: Handshake, timeout: float, stack: contextlib.ExitStack
) -> tuple[dict[str, Any], dict[int, socket.socket]]:
    """Sends the handshake to process 0, until it listens.

    Args:
      process: this one.
      address: the first at which process 0 may listen.
      handshake: of this process.
      timeout: seconds to try for.
      stack: closes the connection.

    Returns:
      Its answer, once JAX listens there, and the connection, as process 0's.
    """
    deadline = time.monotonic() + timeout
    while True:
        for port in range(address[1], min(address[1] + PORTS, 65536)):
            answer, result = _send_handshake((address[0], port), handshake, timeout, stack)
            if "refused" in answer:
                return answer, {}
            if isinstance(result, socket.socket):
                return _wait_for_jax(process, (address[0], answer["port"]), timeout), {0: result}
            if result is not None and not isinstance(result, ConnectionRefusedError):
                break  # there is no such host, or it cannot be reached
        if time.monotonic() > deadline:
            refusal = _refusal(
                f"{process} on {handshake.host} cannot reach the coordinator {process.coordinator} after {timeout:.0f} s "
                f"({result or 'another program answers there'}); is process 0 up there, and does no firewall or proxy stand "
                "between?"
            )
            return refusal, {}
        time.sleep(max(0.1, PORTS * process.processes / _TRIES_A_SECOND))


def _send_handshake(
    address: tuple[str, int], handshake: Handshake, timeout: float, stack: contextlib.ExitStack
) -> tuple[dict[str, Any], socket.socket | OSError | None]:
    """Sends the handshake once.

    Args:
      address: where process 0 may listen.
      handshake: of this process.
      timeout: seconds that process 0 may wait for others.
      stack: closes the connection.

    Returns:
      The answer of process 0 and the connection. {} where it does not listen there, and the error where no program does.
    """
    try:
        connection = stack.enter_context(socket.create_connection(address, timeout=_SOCKET_SECONDS))
    except OSError as refused:
        return {}, refused
    with contextlib.suppress(
        OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError
    ):  # it is not process 0
        if _read_line(connection, 64) == f"{_BANNER}\n".encode():
            now = dataclasses.replace(handshake, clock=time.time())
            connection.sendall((json.dumps(dataclasses.asdict(now)) + "\n").encode())
            connection.settimeout(timeout + 10)  # process 0 may have begun to wait only now
            answer = json.loads(_read_line(connection, 1 << 16))
            if isinstance(answer.get("refused"), str):
                return _refusal(printable(answer["refused"])), None
            if type(answer["port"]) is int and 0 < answer["port"] < 65536:
                return {"port": answer["port"]}, connection
    connection.close()
    return {}, None


def _read_line(connection: socket.socket, limit: int) -> bytes:
    """A line, or so many bytes at most. Nothing behind it is read: the connection may stay open for other messages."""
    line = bytearray()
    while len(line) < limit and not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return bytes(line)


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
        return _read_line(connection, 64) == f"{_BANNER}\n".encode()
    return False
