"""Joins the other processes of the run: the first meeting, JAX's start, and a collective whose answer is known."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtrain.config import tuples_to_lists
from jaxtrain.distributed.cluster import FLAGS, ProcessInfo
from jaxtrain.distributed.rendezvous import Fingerprint, rendezvous
from jaxtrain.distributed.self_test import check_all_devices
from jaxtrain.errors import EnvironmentMismatchError
from jaxtrain.host.backend import MUST_MATCH, versions
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.host.text import note
from jaxtrain.host.xla_flags import SEVERAL_PROCESSES, set_flags

WAITING_NOTE_SECONDS = 10.0
HEARTBEAT_SECONDS = 15  # JAX's own 100 s are how long a dead process would keep the others waiting at a barrier

# Settings that each host may have for itself.
OF_ONE_HOST = ("data.dir", "data.workers", "data.prepare_per_host", "data.prepare_timeout")


def fingerprint_of(config: Mapping[str, Any], workdir: str, modules: Iterable[str] = ()) -> Fingerprint:
    """What must be the same on all processes. config: flat, by dotted names. modules: of the user's own, that it names."""
    must_match = versions(MUST_MATCH)
    must_match["python"] = ".".join(platform.python_version_tuple()[:2])
    must_match["code of jaxtrain"] = _hash(*sorted(Path(__file__).parents[1].rglob("*.py")))
    for module in sorted(set(modules)):
        with contextlib.suppress(ImportError, ValueError, OSError):  # no module: `load_dotted` says so
            if (found := importlib.util.find_spec(module)) and found.origin:
                must_match[f"code of {module}"] = _hash(Path(found.origin))
    settings = {f"config.{key}": tuples_to_lists(value) for key, value in config.items() if key not in OF_ONE_HOST}
    return {"versions": must_match, "config": settings | {"--workdir": workdir}}


def _hash(*files: Path) -> str:
    """SHA-256 of their contents, shortened."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def initialize(place: ProcessInfo, fingerprint: Fingerprint, timeout: int, *, allow_version_skew: bool = False) -> None:
    """Returns once JAX knows the devices of all processes and they add numbers right.

    timeout: seconds to wait for the others. Raises `EnvironmentMismatchError`.
    """
    note = threading.Timer(WAITING_NOTE_SECONDS, _say_what_is_waited_for, [place])
    note.daemon = True
    note.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM; see `interrupt`
    set_threads()
    set_flags(SEVERAL_PROCESSES)
    try:
        address = rendezvous(place, fingerprint, timeout, allow_version_skew=allow_version_skew)
        jax.distributed.initialize(
            address,
            place.processes,
            place.index,
            initialization_timeout=timeout,
            # Inside a scheduler's job JAX would take a single GPU, by the task's number, also of a process that was told
            # its place (by `jaxtrain launch`, say) and may have several.
            cluster_detection_method="deactivate" if place.source == FLAGS else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            coordinator_bind_address=address if place.is_local else None,
        )
        check_all_devices()
    except (RuntimeError, ValueError) as error:
        raise EnvironmentMismatchError(
            f"{place} could not join the run at {place.coordinator}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        note.cancel()


def set_threads() -> None:
    """XLA:CPU runs programs in as many threads as it has cores; one that waits for another process must leave some over."""
    os.environ.setdefault("PJRT_NPROC", str(max(usable_cpus(), 8)))


def _say_what_is_waited_for(place: ProcessInfo) -> None:
    text = (
        f"{place} (by {place.source}) waits for the others at {place.coordinator}; is every process started, with "
        "the same --num-processes and its own --process-id, and does no firewall stand between?"
    )
    note(text)
