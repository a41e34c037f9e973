"""Serves the dashboard until Ctrl-C or SIGTERM."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from jaxtrain.dashboard.access_token import default_folder, user_token
from jaxtrain.dashboard.app import Dashboard
from jaxtrain.dashboard.guard import Guard
from jaxtrain.dashboard.runs_index import RunsIndex
from jaxtrain.errors import ConfigError
from jaxtrain.host.text import note
from jaxtrain.jobs.queue import default_queue

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EVERYWHERE = ("0.0.0.0", "::")


class _Server(uvicorn.Server):
    """Ends its streams when it is to end: uvicorn waits for what is being answered."""

    def __init__(self, config: uvicorn.Config, dashboard: Dashboard):
        super().__init__(config)
        self._dashboard = dashboard

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._dashboard.streams.close()
        await super().shutdown(sockets)


def serve(root: Path, host: str, port: int, names: Sequence[str], prefix: str) -> None:
    """Serves until it is told to end.

    Args:
      root: below which the runs are.
      host: the address to listen at.
      port: of it; 0 takes a free one.
      names: of the Host header that are let through, beside this machine's own.
      prefix: of every path, as in `/jax`; "" for none.

    Raises:
      ConfigError: the port is taken, or the token could be read by others.
      WorkdirError: `root` is no directory.
    """
    index = RunsIndex(root, default_queue())
    token = user_token(default_folder())
    listening = _listen(host, port)
    dashboard = Dashboard(index)
    own = [] if host in _LOOPBACK else [host, socket.gethostname()]
    shown = socket.gethostname() if host in _EVERYWHERE else f"[{host}]" if ":" in host else host
    guarded = Guard(dashboard.app(), token=token, names=[*own, *names], prefix=prefix)
    config = uvicorn.Config(
        guarded, log_level=logging.ERROR, access_log=False, server_header=False, ws="none", lifespan="off",
        http="h11", proxy_headers=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    index.start()
    if own:
        note(f"warning: --host {host} lets other machines in; whoever has the address below can read all runs.")
    print(f"http://{shown}:{listening.getsockname()[1]}{prefix}/?token={token}", flush=True)
    try:
        _Server(config, dashboard).run(sockets=[listening])
    except KeyboardInterrupt:  # as one ends it; uvicorn has closed what was open
        return
    finally:
        index.stop()
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port}: is taken on {host}; choose another, or 0 for a free one.") from None
        raise ConfigError(f"--host {host} --port {port}: cannot be listened at ({error.strerror}).") from None
