"""The facts of this machine: devices, memory, versions, and whether two processes can add numbers."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.config import DataConfig
from jaxtrain.distributed.cluster import ProcessInfo
from jaxtrain.host.backend import versions
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.host.gpus import Gpu, Gpus, device_files
from jaxtrain.host.ports import free_port

MACHINE_FILE = "machine.json"
# What pip installs for GPUs: JAX's plugin and NVIDIA's libraries, with or without the CUDA release in their names.
GPU_PACKAGE = re.compile(r"jax-cuda\d+-(plugin|pjrt)|nvidia-(cuda-runtime|cudnn|nccl)(-cu\d+)?")
_JAX_SECONDS = 60.0  # in which JAX must find the devices
_JOIN_SECONDS = 25.0  # in which two processes must start, join and add
_RENDEZVOUS_SHARE = 0.6  # of `_JOIN_SECONDS` for the rendezvous, so that a process can still report that it failed
FATAL = re.compile(r"^F\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] ", re.MULTILINE)  # precedes the message with which XLA aborts
TERMS = (1, 10)  # what each of the two processes adds: a wrong sum shows which one is missing


@dataclasses.dataclass(frozen=True)
class Devices:
    """What JAX finds."""

    backend: str = ""
    count: int = 0
    kinds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How many devices there are of each kind."""
    runtime: str = ""
    """The version of the backend, as the backend gives it."""
    error: str = ""
    """Why JAX does not start, or ''."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The facts of a machine. Sizes are in bytes."""

    host: str
    system: str
    python: str
    cores: int
    memory: int
    memory_free: int
    shared_memory: int
    versions: Mapping[str, str]
    """Of installed packages."""
    gpus: tuple[Gpu, ...]
    gpu_nodes: int
    """The device files of the kernel's NVIDIA driver."""
    driver: str
    devices: Devices

    def facts(self) -> dict[str, Any]:
        """In JSON's types, as machine.json has them."""
        return {
            "examined": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **dataclasses.asdict(self),
        }


# --------------------------------------------------------------------------------------------------------------- facts


def gather() -> Machine:
    """Gathers the facts; starts JAX in another process."""
    gpus = Gpus()
    total, free = _memory()
    return Machine(
        host=socket.gethostname(),
        system=platform.platform(),
        python=platform.python_version(),
        cores=usable_cpus(),
        memory=total,
        memory_free=free,
        shared_memory=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        versions=_installed(),
        gpus=tuple(gpus.all()),
        gpu_nodes=device_files(),
        driver=gpus.driver(),
        devices=find_devices(),
    )


def _memory() -> tuple[int, int]:
    """Total and free memory in bytes: the host's, or this control group's where that is less."""
    words = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    host = {word[0].rstrip(":"): int(word[1]) * 1024 for word in words}
    total, free = host["MemTotal"], host["MemAvailable"]
    with contextlib.suppress(OSError, ValueError):  # without a limit there is no such file, or it contains "max"
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
        total = min(total, limit)
    return total, free


def _installed() -> dict[str, str]:
    """Of jaxtrain's packages, and of those that pip installed for GPUs."""
    installed = {(package.name or "").lower(): package.version for package in importlib.metadata.distributions()}
    return versions() | {name: installed[name] for name in sorted(installed) if GPU_PACKAGE.fullmatch(name)}


def required() -> dict[str, str]:
    """The lowest version of each package that jaxtrain's metadata allows."""
    lines: Sequence[str] = ()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # `versions` then lacks jaxtrain
        lines = importlib.metadata.requires("jaxtrain") or ()
    matches = (re.fullmatch(r"([\w.-]+)>=([\d.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in matches if match}


def data_dir() -> Path:
    """The directory of data sets, for the default config. Raises `ConfigError` where the variable names none."""
    from jaxtrain.data.spec import data_dir  # noqa: PLC0415  takes a second to load

    return data_dir(DataConfig())


def find_devices(seconds: float = _JAX_SECONDS) -> Devices:
    """What JAX finds in another process, which allocates no GPU memory in advance."""
    (answer,) = _ask(["devices_here()"], seconds, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    return Devices(**answer)


def devices_here() -> dict[str, Any]:
    """What JAX finds in this process, as the fields of `Devices`."""
    import jax  # noqa: PLC0415  only in another process
    from jax.extend.backend import get_backend  # noqa: PLC0415

    kinds = collections.Counter(device.device_kind for device in jax.devices())
    runtime = " ".join(get_backend().platform_version.split())
    return {"backend": jax.default_backend(), "count": jax.device_count(), "kinds": kinds, "runtime": runtime}


def add_over_loopback(seconds: float = _JOIN_SECONDS) -> list[dict[str, Any]]:
    """Starts two processes, which join as those of a run do and add up their `TERMS`.

    Returns the answer of each: {"sum": ...} or {"error": why}.
    """
    port = free_port()
    calls = [f"join_here({index}, {port}, {int(seconds * _RENDEZVOUS_SHARE)})" for index in range(len(TERMS))]
    return _ask(calls, seconds, {"JAX_PLATFORMS": "cpu"})


def join_here(index: int, port: int, seconds: int) -> dict[str, Any]:
    """Runs in each of the two processes. Returns {"sum": ...}.

    Args:
      index: which of the two this is.
      port: of process 0, on 127.0.0.1.
      seconds: to wait for the other one.
    """
    import jax  # noqa: PLC0415  only in another process
    import numpy as np  # noqa: PLC0415
    from jax.experimental import multihost_utils  # noqa: PLC0415

    from jaxtrain.distributed.initialize import initialize  # noqa: PLC0415

    jax.config.update("jax_num_cpu_devices", 1)
    initialize(ProcessInfo(f"127.0.0.1:{port}", len(TERMS), index, "jaxtrain doctor"), {}, seconds)
    return {"sum": int(multihost_utils.process_allgather(np.int32(TERMS[index])).sum())}


def _ask(calls: Sequence[str], seconds: float, more: Mapping[str, str]) -> list[dict[str, Any]]:
    """Calls functions of this module, each in a new process, all at the same time.

    Args:
      calls: Python expressions, such as "devices_here()".
      seconds: for all of them.
      more: environment variables, besides those of this process.

    Returns:
      What each call returned, or {"error": why}.
    """
    # -P keeps the current directory out of the search path: it may have a file jax.py.
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.append({root!r}); import json; from jaxtrain.doctor import facts; "
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", f"{code}print(json.dumps(facts.{call}), flush=True)"],
            env={**os.environ, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for call in calls
    ]
    try:
        with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(_answer, processes, [seconds] * len(calls)))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _answer(process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"no answer within {seconds:.0f} s"}
    answers = [line for line in out.splitlines() if line.startswith("{")]  # gloo prints lines of its own
    if process.returncode == 0 and answers:
        return json.loads(answers[-1])
    if len(fatal := FATAL.split(errors, maxsplit=1)) > 1:
        return {"error": fatal[1].splitlines()[0]}  # a stack trace follows
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return {"error": lines[-1] if lines else f"exit code {process.returncode} and no word"}
