"""`manifest.json`: the machine, the code and the command of each start of a run, without secrets."""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.errors import WorkdirError
from jaxtrain.host.backend import versions
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.host.files import atomic_write, read_json
from jaxtrain.host.redaction import HIDDEN, is_secret, redact, without_logins

log = logging.getLogger("jaxtrain")


def append_start(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds `entry` (see `environment`) to the manifest's list `starts`. Process 0 calls it at each start.

    A damaged manifest stops no run: it is renamed to `manifest.json.damaged`, and a new one begins.
    """
    starts: list[Any] = []
    try:
        stored = read_json(path)
        if stored is not None:
            if not isinstance(stored, dict) or not isinstance(stored.get("starts"), list):
                raise WorkdirError(f"{path} is damaged (it holds no list of starts).")
            starts = stored["starts"]
    except WorkdirError as error:
        log.warning("%s It was set aside as %s.damaged, and a new one begins.", error, path.name)
        with contextlib.suppress(OSError):
            path.replace(path.with_name(path.name + ".damaged"))
    atomic_write(path, json.dumps({"starts": [*starts, entry]}, indent=2) + "\n")


def environment(step: int, argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Describes this process and all devices. It starts JAX's backend, if that has not started.

    Args:
      step: the step that the run goes on from; 0 for a new run.
      argv: the command line; this process's own unless given.
      env: the environment variables; this process's own unless given. Only `XLA_FLAGS` and `JAX_*` are kept.
    """
    argv = sys.argv if argv is None else argv
    env = os.environ if env is None else env
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": redact(argv),
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_state(Path(__file__).resolve().parents[1]),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": usable_cpus(),
        "devices": {
            "backend": jax.default_backend(),
            "count": jax.device_count(),
            "kinds": dict(kinds),
            "processes": jax.process_count(),
        },
        "environment": {
            name: HIDDEN if is_secret(name) else without_logins(value)
            for name, value in sorted(env.items())
            if name == "XLA_FLAGS" or name.startswith("JAX_")
        },
    }


def git_state(source: Path) -> dict[str, Any] | None:
    """The commit, and whether files under `source` differ from it; None when git does not track `source`.

    An installed package may lie inside the checkout of another project (`.venv`), whose commit would mean nothing.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if not git("ls-files", "."):
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "."))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return None
