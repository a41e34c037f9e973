"""The connections between process 0 and the others. They stay open after the rendezvous, for as long as the processes live.

Through them the processes tell each other that they stop or fail. The kernel closes those of a process that has ended,
however it ended, so the others know at once. A host that is gone no longer answers TCP's keep-alives. A process that is
frozen, suspended or busy does not count as gone: JAX's own heartbeats, which would say so, are as good as off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# A host that answers nothing for 30 s (given in ms) is gone; it is asked every 5 s once 10 s have passed in silence.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": 30_000}
_SEND_SECONDS = 2.0
_LINE_BYTES = 1 << 20  # of a message at most
_REASON_SECONDS = 1.0  # for a process's own reason to arrive, where JAX's connection to it is the first to break


@dataclasses.dataclass(frozen=True)
class Message:
    """What one process tells all others."""

    kind: str
    """`stop`: it was told to stop. `failed`: it ends by an error. `lost`: it ended without a word. `done`: it ends well."""
    process: int
    """Which one."""
    text: str = ""
    """For a person."""
    start: str = ""
    """Of which start of a run `stop` is (`Interrupt`)."""
    signal: int = 0
    """That it got."""


class Peers:
    """The other processes of the run, as this one is connected to them: process 0 to each, the others to process 0."""

    def __init__(self, index: int, connections: Mapping[int, socket.socket]):
        """Starts to listen.

        Args:
          index: of this process.
          connections: by the number of the process at the other end.
        """
        self._index, self._connections = index, dict(connections)
        self._messages: list[Message] = []
        self._handler: Callable[[Message], None] | None = None
        self._lock = threading.Lock()  # of the messages, the handler and sending
        self._said_why: set[int] = set()  # the processes that have said why they end
        self._lost = threading.Event()
        for connection in self._connections.values():
            connection.settimeout(_SEND_SECONDS)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._listen, name="other processes", daemon=True).start()

    def send(self, message: Message) -> None:
        """Sends it to all others. Those that are gone do not get it."""
        with self._lock:
            self._send(message)

    def _send(self, message: Message) -> None:
        line = (json.dumps(dataclasses.asdict(message)) + "\n").encode()
        for process, connection in self._connections.items():
            if process != message.process:
                with contextlib.suppress(OSError):
                    connection.sendall(line)

    def listen(self, handler: Callable[[Message], None] | None) -> None:
        """Calls `handler`, each time in a thread of its own, for every message of another process, earlier ones included."""
        with self._lock:
            self._handler = handler
            for message in self._messages:
                self._handle(message)

    def failure(self, seconds: float, kinds: Sequence[str] = ("failed", "lost")) -> str:
        """Waits so long for another process to fail or get lost. Returns what is known of it, '' if none does.

        kinds: of the messages that count.
        """
        self._lost.wait(seconds)
        return next((message.text for message in self._messages if message.kind in kinds), "")

    def lose(self, process: int, why: str) -> None:
        """Notes that `process` has ended without a word, and tells the others."""
        if process not in self._said_why:
            self._receive(Message("lost", process, f"Process {process} of this run {why}."))

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, (process, bytearray()))
            while selector.get_map():
                for key, _ in selector.select():
                    process, buffer = key.data
                    if why := self._read(key.fileobj, buffer):
                        selector.unregister(key.fileobj)
                        self.lose(process, why)

    def _read(self, connection: Any, buffer: bytearray) -> str:
        """Handles what has come. Returns why nothing will come any more, else ''."""
        try:
            received = connection.recv(1 << 16)
        except OSError as error:
            return f"cannot be reached any more ({os.strerror(error.errno or 0)})"
        buffer += received
        *lines, rest = buffer.split(b"\n")
        buffer[:] = rest
        try:
            if len(rest) > _LINE_BYTES:
                raise ValueError
            for line in lines:
                self._receive(Message(**json.loads(line)))
        except (ValueError, TypeError):
            return "sent what is no message"
        return "" if received else "ended without a word, as one that is killed does"

    def _receive(self, message: Message) -> None:
        if message.kind != "stop":
            self._said_why.add(message.process)
        with self._lock:
            if self._index == 0:  # the others are connected to this process only
                self._send(message)
            self._messages.append(message)
            self._handle(message)
        if message.kind in ("failed", "lost"):
            self._lost.set()

    def _handle(self, message: Message) -> None:
        if self._handler is not None:
            threading.Thread(target=self._handler, args=(message,), name=message.kind, daemon=True).start()


class _Known:
    """Those of this process, as JAX keeps its own connection."""

    peers: Peers | None = None


def connect(index: int, connections: Mapping[int, socket.socket]) -> Peers:
    """Makes the connections those of this process. It has them until it ends."""
    _Known.peers = Peers(index, connections)
    return _Known.peers


def connected() -> Peers | None:
    """The other processes; None in a run of one."""
    return _Known.peers


def relay(address: str, others: Peers) -> str:
    """An address of this process that leads to JAX's coordination service in process 0.

    JAX aborts a process, with a stack of C++, as soon as its connection to the service breaks. This one does not break: the
    process itself learns that process 0 is gone, and ends with a sentence and a code.

    Args:
      address: HOST:PORT of the service, which listens.
      others: are told a little after the connection to the service is broken.
    """
    host, _, port = address.rpartition(":")
    name = f"jaxtrain-{os.getpid()}-{os.urandom(8).hex()}"
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"\0{name}")  # of Linux's abstract names: there is no file
    server.listen()

    def accept() -> None:
        while True:
            client, _ = server.accept()
            service = socket.socket()
            with contextlib.suppress(OSError):  # it is noticed when the first byte is sent
                service = socket.create_connection((host.strip("[]"), int(port)))
                service.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_copy, args=(client, service), daemon=True).start()
            threading.Thread(target=back, args=(service, client), daemon=True).start()

    def back(service: socket.socket, client: socket.socket) -> None:
        _copy(service, client)
        time.sleep(_REASON_SECONDS)
        others.lose(0, "closed its connection to this one")

    threading.Thread(target=accept, name="relay to process 0", daemon=True).start()
    return f"unix-abstract:{name}"


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
