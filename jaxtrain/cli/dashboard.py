"""Watch the runs below a directory in a browser: curves, events, logs, devices, and several runs over each other."""

import argparse
import importlib.util
import re
from pathlib import Path

from jaxtrain.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--root, --port, --host, --allow-host, --prefix."""
    parser.add_argument("--root", default=".", metavar="DIR", help="show all runs below it (default: this directory)")
    parser.add_argument("--port", type=int, default=3001, help="where; 0 takes a free one (default: 3001)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at; another than the default lets other machines in"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="the name under which a proxy shows it"
    )
    parser.add_argument("--prefix", default="", metavar="/PATH", help="the path below which a proxy shows it")


def run(arguments: argparse.Namespace) -> None:
    """Serves until Ctrl-C. Raises `JaxtrainError`."""
    if not 0 <= arguments.port <= 65535:
        raise ConfigError(f"--port {arguments.port}: must be from 0 to 65535.")
    prefix = arguments.prefix.rstrip("/")
    if prefix and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", prefix):
        raise ConfigError(f"--prefix {arguments.prefix}: must be a path such as /jax.")
    for name in arguments.allow_host:
        if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise ConfigError(
                f"--allow-host {name}: must be a name alone, such as gpu.example, without https:// or a port."
            )
    if not all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn")):
        raise ConfigError(
            "jaxtrain dashboard needs starlette and uvicorn; pip install 'jaxtrain[dashboard]' brings them."
        )
    from jaxtrain.dashboard.server import serve  # noqa: PLC0415  an extra

    serve(Path(arguments.root), arguments.host, arguments.port, arguments.allow_host, prefix)
