"""Joins the processes of a run: the rendezvous, the start of `jax.distributed`, and a test of the all-reduce."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtrain.config import tuples_to_lists
from jaxtrain.distributed import peers
from jaxtrain.distributed.cluster import FLAGS, ProcessInfo
from jaxtrain.distributed.rendezvous import Fingerprint, rendezvous
from jaxtrain.distributed.self_test import check_all_devices
from jaxtrain.errors import EnvironmentMismatchError, PeerError
from jaxtrain.host.backend import MUST_MATCH, versions
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.host.native import cuda_messages_dropped
from jaxtrain.host.text import note
from jaxtrain.host.xla_flags import SEVERAL_PROCESSES, set_flags

WAITING_NOTE_SECONDS = 10.0  # after which a process says on standard error that it waits
# JAX's own heartbeats are as good as off: a busy host or a suspended job misses them, and JAX then aborts all processes. How
# they learn of each other's end, `peers` says.
_HEARTBEAT_SECONDS = 10_000_000
_SHUTDOWN_SECONDS = 60  # that a process waits for the others once its run has ended
_OWN_ERROR_SECONDS = 1.0  # in which a process learns that its error is the end of another one

# Settings that may differ from host to host.
OF_ONE_HOST = ("data.dir", "data.workers", "data.prepare_per_host", "data.prepare_timeout")


def fingerprint_of(config: Mapping[str, Any], workdir: str, modules: Iterable[str] = ()) -> Fingerprint:
    """What must be the same on all processes of a run.

    Args:
      config: the settings, flat, by dotted names.
      workdir: the work directory, as it was given.
      modules: the user's own modules that the config names; their code is hashed.

    Returns:
      `versions` (packages, Python, hashes of code) and `config` (settings and --workdir).
    """
    must_match = versions(MUST_MATCH)
    must_match["python"] = ".".join(platform.python_version_tuple()[:2])
    must_match["code of jaxtrain"] = _hash(*sorted(Path(__file__).parents[1].rglob("*.py")))
    for module in sorted(set(modules)):
        with contextlib.suppress(ImportError, ValueError, OSError):  # no module: `load_dotted` says so
            if (spec := importlib.util.find_spec(module)) and spec.origin:
                must_match[f"code of {module}"] = _hash(Path(spec.origin))
    settings = {f"config.{key}": tuples_to_lists(value) for key, value in config.items() if key not in OF_ONE_HOST}
    if settings.get("config.data.name", "").startswith(
        "folder:"
    ):  # its path is of one host; what it holds is compared later
        settings["config.data.name"] = "folder:"
    return {"versions": must_match, "config": settings | {"--workdir": workdir}}


def _hash(*files: Path) -> str:
    """The first digits of the SHA-256 of all contents."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def initialize(
    process: ProcessInfo,
    fingerprint: Fingerprint,
    timeout: int,
    *,
    allow_version_skew: bool = False,
    met: Callable[[], None] = lambda: None,
) -> None:
    """Returns once JAX knows the devices of all processes, and an all-reduce over them is right.

    Args:
      process: which one this is.
      fingerprint: what must be the same on all processes (`fingerprint_of`).
      timeout: seconds to wait for the others.
      allow_version_skew: lets processes with other versions join.
      met: called when all have met, and `peers.connected` are there, before JAX starts.

    Raises:
      EnvironmentMismatchError: a process is missing or was started with something else, JAX does not start, or the
        all-reduce is wrong.
      PeerError: another process ended meanwhile.
    """
    timer = threading.Timer(WAITING_NOTE_SECONDS, _print_waiting_note, [process])
    timer.daemon = True
    timer.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM; see `interrupt`
    set_threads()
    set_flags(SEVERAL_PROCESSES)
    _bypass_proxies()
    connections: dict[int, socket.socket] = {}
    try:
        address = rendezvous(
            process, fingerprint, timeout, allow_version_skew=allow_version_skew, connections=connections
        )
        others = peers.connect(process.index, connections)
        met()
        jax.distributed.initialize(
            address if process.index == 0 else peers.relay(address, others),
            process.processes,
            process.index,
            initialization_timeout=timeout,
            # Inside a scheduler's job JAX would take a single GPU, by the task's number, also where `jaxtrain
            # launch` started this process and gave it several.
            cluster_detection_method="deactivate" if process.source == FLAGS else None,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            coordinator_bind_address=address if process.is_local else None,
        )
        with cuda_messages_dropped():
            jax.devices()
        check_all_devices()
    except (RuntimeError, ValueError) as error:
        if (others := peers.connected()) and (why := others.failure(_OWN_ERROR_SECONDS)):
            raise PeerError(why) from error
        raise EnvironmentMismatchError(
            f"{process} could not join the run at {process.coordinator}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        timer.cancel()


def _bypass_proxies() -> None:
    """Keeps JAX's connections off the proxies of HTTP, through which gRPC would try to reach even this host."""
    if any(name in os.environ for name in ("https_proxy", "http_proxy")):
        os.environ["grpc_proxy"] = ""  # noqa: SIM112  gRPC asks for this name
        jax.config.update("jax_check_proxy_envs", False)  # it would warn of them


def set_threads() -> None:
    """Gives XLA:CPU at least 8 threads. Its default is one a core, and a program that waits for another process blocks one."""
    os.environ.setdefault("PJRT_NPROC", str(max(usable_cpus(), 8)))


def _print_waiting_note(process: ProcessInfo) -> None:
    text = (
        f"{process} (by {process.source}) waits for the others at {process.coordinator}; is every process started, with "
        "the same --num-processes and its own --process-id, and does no firewall stand between?"
    )
    note(text)
