"""Ports of this host."""

import socket


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now. Raises `OSError` where this user may not listen there at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
