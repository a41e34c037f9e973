"""Checks the machine: what would break a run here, and how to fix it.

This module does not load JAX: a broken driver or flag makes JAX hang or abort, so it runs in processes of its own, with a
time limit. The facts are gathered first (`gather`). A check is a function of the facts, or tries one thing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtrain.distributed.cluster import detect_process
from jaxtrain.doctor.facts import (
    GPU_PACKAGE,
    MACHINE_FILE,
    TERMS,
    Machine,
    add_over_loopback,
    data_dir,
    gather,
    required,
)
from jaxtrain.errors import ConfigError, JaxtrainError
from jaxtrain.host import compile_cache as compile_cache_lib
from jaxtrain.host.backend import PACKAGES
from jaxtrain.host.files import atomic_write
from jaxtrain.host.paths import compile_cache
from jaxtrain.host.ports import free_port

_OLDEST_DRIVER = {"12": 525, "13": 580}  # for JAX's plugin of that CUDA release (JAX's installation guide)
_SCHEDULER = ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX", "WORLD_SIZE", "JAXTRAIN_NUM_PROCESSES")
_GIB = 1 << 30
_LOW_MEMORY, _LOW_SHARED, _LOW_DISK, _NO_DISK = 2 * _GIB, _GIB // 2, 10 * _GIB, _GIB

State = Literal["ok", "warning", "problem"]


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    state: State
    found: str
    """What is there, in words."""
    fix: str = ""
    """What to do about a warning or a problem, in one sentence."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of all checks, and the facts."""

    checks: list[Check]
    machine: Machine


def examine(workdir: Path, report: Callable[[Check], object] = lambda check: None) -> Report:
    """Makes every check. Leaves no file behind.

    Args:
      workdir: where runs will write.
      report: called with each check as soon as it is made.
    """
    checks: list[Check] = []
    machine = gather()
    for check in _checks(machine, workdir, os.environ):
        report(check)
        checks.append(check)
    return Report(checks, machine)


def write(machine: Machine, directory: Path) -> Path:
    """Writes the facts to `directory`/machine.json and returns the path. Raises `WorkdirError`."""
    path = directory / MACHINE_FILE
    with contextlib.suppress(OSError):  # `atomic_write` says why
        directory.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(machine.facts(), indent=2) + "\n")
    return path


def _checks(machine: Machine, workdir: Path, environment: Mapping[str, str]) -> Iterator[Check]:
    yield check_devices(machine, environment)
    yield check_driver(machine)
    yield check_memory(machine)
    yield check_versions(machine.versions, required())
    yield check_network(machine.host)
    proxies = check_proxies(machine.host, environment)
    yield check_collective(add_over_loopback(), proxies)
    yield check_disk("work directory", workdir, "choose another directory with --workdir")
    yield check_data_directory()
    yield check_compile_cache(environment)
    yield check_tensorflow(machine, importlib.util.find_spec("tensorflow") is not None, environment)
    yield check_xla_flags(environment)
    yield check_visible_gpus(machine, environment)
    yield proxies
    yield check_scheduler(environment)


# -------------------------------------------------------------------------------------------------------------- checks


def check_devices(machine: Machine, environment: Mapping[str, str]) -> Check:
    """JAX starts, and sees the GPUs that NVML sees."""
    devices, gpus = machine.devices, machine.gpus
    if devices.error:
        settings = " ".join(
            f"{name}={environment[name]}" for name in ("JAX_PLATFORMS", "XLA_FLAGS") if name in environment
        )
        fix = (
            f"correct or unset {settings}"
            if settings
            else "install jax and jaxlib again, or see the driver with `nvidia-smi`"
        )
        return Check("devices", "problem", f"JAX does not start: {devices.error}", fix)
    summary = ", ".join(f"{count} x {kind}" for kind, count in devices.kinds.items()) + f" ({devices.backend})"
    faulty = [f"{gpu.uuid} ({gpu.fault})" for gpu in gpus if gpu.fault]
    if faulty:
        return Check(
            "devices", "problem", f"{summary}; cannot be used: {', '.join(faulty)}", "have these GPUs reset or replaced"
        )
    if gpus and devices.backend != "gpu":
        text = f"the host has {len(gpus)} x {gpus[0].name} and JAX sees none, only {summary}"
        return Check("devices", "problem", text, _why_no_gpu(machine, environment))
    if gpus and devices.count != len(gpus):
        summary += f", of {len(gpus)} GPUs in the host"
        if not environment.get("CUDA_VISIBLE_DEVICES"):
            return Check("devices", "problem", summary, "look in `nvidia-smi` and dmesg for GPUs that JAX cannot open")
    if devices.backend == "gpu" and not gpus:
        fix = "install NVML for Python, pip install nvidia-ml-py, so that broken GPUs are noticed"
        return Check("devices", "warning", f"{summary}; NVML does not answer, so their health is unknown", fix)
    if machine.gpu_nodes and devices.backend != "gpu":
        text = f"{summary}, although /dev has {machine.gpu_nodes} NVIDIA GPUs"
        return Check("devices", "warning", text, _why_no_gpu(machine, environment))
    return Check("devices", "ok", summary)


def _why_no_gpu(machine: Machine, environment: Mapping[str, str]) -> str:
    if "cuda" not in (platforms := environment.get("JAX_PLATFORMS", "cuda")) and "gpu" not in platforms:
        return f"unset JAX_PLATFORMS ({platforms}), which keeps JAX from them"
    if environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        return "unset CUDA_VISIBLE_DEVICES, which hides them"
    if not any(name.startswith("jax-cuda") for name in machine.versions):
        return "install JAX for them: pip install -e '.[cuda12]' (or cuda13)"
    return "see what `python -c 'import jax; jax.devices()'` warns of: most often the driver is too old for the CUDA plugin"


def check_driver(machine: Machine) -> Check:
    """The driver is new enough for the CUDA release of JAX's plugin."""
    if not machine.gpus and machine.devices.backend != "gpu":
        return Check("driver", "ok", "no NVIDIA GPU, none needed")
    libraries = [f"{name} {version}" for name, version in machine.versions.items() if GPU_PACKAGE.fullmatch(name)]
    summary = ", ".join([f"NVIDIA driver {machine.driver or 'unknown'}", *libraries, machine.devices.runtime])
    if not machine.driver:
        fix = "run `nvidia-smi`, and install or load the driver if it does not answer, or nvidia-ml-py if it does"
        return Check("driver", "warning", summary, fix)
    for release, oldest in _OLDEST_DRIVER.items():
        if f"jax-cuda{release}-plugin" in machine.versions and _numbers(machine.driver) < (oldest,):
            fix = f"install driver {oldest} or newer, which CUDA {release} needs, or JAX for an older CUDA"
            return Check("driver", "problem", summary, fix)
    return Check("driver", "ok", summary)


def check_memory(machine: Machine) -> Check:
    """There is enough memory to start a run, and enough shared memory for NCCL and the workers that read data."""
    summary = f"{_gib(machine.memory)}, {_gib(machine.memory_free)} free, /dev/shm {_gib(machine.shared_memory)}"
    summary += f", {machine.cores} cores"
    if machine.gpus:
        summary += "; GPUs: " + ", ".join(_gib(gpu.memory) for gpu in machine.gpus)
    if machine.memory_free < _LOW_MEMORY:
        return Check("memory", "warning", summary, f"end other programs: a run needs about {_gib(_LOW_MEMORY)}")
    if machine.shared_memory < _LOW_SHARED and machine.gpus:
        return Check(
            "memory", "warning", summary, "start the container with --shm-size=8g: NCCL and readers use /dev/shm"
        )
    return Check("memory", "ok", summary)


def check_versions(versions: Mapping[str, str], required: Mapping[str, str]) -> Check:
    """Every package is installed and new enough. jax, jaxlib and the CUDA plugin have the same version."""
    summary = f"python {platform.python_version()}, " + ", ".join(
        f"{name} {version}" for name, version in versions.items()
    )
    missing = [name for name in PACKAGES if name not in versions]
    old = [name for name, least in required.items() if name in versions and _numbers(versions[name]) < _numbers(least)]
    if missing or old:
        text = "; ".join(
            f"{what}: {', '.join(names)}" for what, names in (("missing", missing), ("too old", old)) if names
        )
        fix = "install jaxtrain's dependencies again: pip install --upgrade -e ."
        return Check("versions", "problem", f"{text} ({summary})", fix)
    pairs = ["jaxlib", *(name for name in versions if name.startswith("jax-cuda"))]
    other = [name for name in pairs if _numbers(versions[name])[:3] != _numbers(versions["jax"])[:3]]
    if other:
        wanted = " ".join(f"{name}=={versions['jax']}" for name in other)
        text = f"jax {versions['jax']} does not go with " + ", ".join(f"{name} {versions[name]}" for name in other)
        return Check("versions", "problem", text, f"install them in one release: pip install {wanted}")
    return Check("versions", "ok", summary)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def check_network(host: str) -> Check:
    """The host's own name has an address, and a port is free."""
    try:
        port = free_port()
    except OSError as error:
        return Check(
            "network", "problem", f"no port of 127.0.0.1 is free ({error})", "let this user listen on loopback"
        )
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port)})
    except OSError as error:
        fix = f"add '127.0.1.1 {host}' to /etc/hosts, or on a cluster the address that the other hosts reach"
        return Check("network", "warning", f"the host name {host} has no address ({error})", fix)
    return Check("network", "ok", f"{host} is {', '.join(addresses)}; port {port} was free")


def check_collective(answers: Sequence[Mapping[str, Any]], proxies: Check) -> Check:
    """Both processes of `add_over_loopback` have the right sum. `proxies` may say why they do not join."""
    name, wanted = "collective", sum(TERMS)
    see = proxies.fix or "allow loopback in the firewall, and try without XLA_FLAGS and other variables of JAX"
    for index, answer in enumerate(answers):
        if "error" in answer:
            text = f"process {index} of {len(answers)} over loopback: {answer['error']}"
            return Check(name, "problem", text, see)
        if answer["sum"] != wanted:
            text = f"process {index} of {len(answers)} over loopback added {answer['sum']} for {wanted}"
            return Check(name, "problem", text, "do not train with this build of jax: install jax and jaxlib again")
    return Check(name, "ok", f"{len(answers)} processes joined over loopback (gloo) and added {wanted} for {wanted}")


def check_disk(name: str, directory: Path, elsewhere: str) -> Check:
    """A file can be written, synced and renamed in a directory, and its disk has room.

    Args:
      name: of the check.
      directory: what is checked; if it does not exist, the directory above it that does.
      elsewhere: how to choose another one, for the fix.
    """
    directory = directory.expanduser().absolute()
    if why := _unwritable(there := _existing(directory)):
        return Check(name, "problem", f"{directory}: {why}", f"make it writable, or {elsewhere}")
    free = shutil.disk_usage(there).free
    summary = f"{directory}: written, synced and renamed a file; {_gib(free)} free"
    if free < _LOW_DISK:
        return Check(name, "problem" if free < _NO_DISK else "warning", summary, f"make room there, or {elsewhere}")
    return Check(name, "ok", summary)


def check_data_directory() -> Check:
    """As `check_disk`, for the data directory, which `$JAXTRAIN_DATA_DIR` may name."""
    name, elsewhere = "data directory", "set JAXTRAIN_DATA_DIR to another directory"
    try:
        return check_disk(name, data_dir(), elsewhere)
    except ConfigError as error:  # the variable names no directory
        return Check(name, "problem", str(error).rstrip("."), elsewhere)


def check_compile_cache(environment: Mapping[str, str]) -> Check:
    """Compiled programs can be stored, by this user alone, and are as they were stored; else they are compiled again."""
    cache = compile_cache(environment)
    if "://" in cache:
        return Check("compile cache", "ok", f"{cache}, on another machine")
    if why := compile_cache_lib.why_refused(Path(cache)):
        fix = "set JAX_COMPILATION_CACHE_DIR to a directory of this user's own: the entries are machine code"
        return Check("compile cache", "warning", f"{cache} is not used: {why}", fix)
    if why := _unwritable(_existing(Path(cache).absolute())):
        fix = "set JAX_COMPILATION_CACHE_DIR to a directory that can be written, or every start compiles again"
        return Check("compile cache", "warning", f"{cache}: {why}", fix)
    try:
        damaged = compile_cache_lib.damaged(Path(cache))
    except OSError as error:
        fix = "run jaxtrain doctor --clear-cache, or see to the disk"
        return Check("compile cache", "warning", f"{cache}: an entry cannot be read ({error.strerror})", fix)
    if damaged:
        text = f"{cache}: {len(damaged)} entries are damaged, so that their programs are compiled again"
        return Check(
            "compile cache", "warning", text, "run jaxtrain doctor --clear-cache, and see to the disk or the memory"
        )
    return Check(
        "compile cache", "ok", f"{cache} can be written; {len(compile_cache_lib.entries(Path(cache)))} programs"
    )


def _existing(path: Path) -> Path:
    """`path`, or the directory above it that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def _unwritable(directory: Path) -> str:
    """Why no file can be written, synced and renamed there, or ''."""
    probe = directory / f".jaxtrain-doctor.{os.getpid()}"
    try:
        atomic_write(probe, "probe")
        probe.unlink()
    except (JaxtrainError, OSError) as error:
        return str(error).rstrip(".")
    return ""


def check_tensorflow(machine: Machine, installed: bool, environment: Mapping[str, str]) -> Check:
    """TensorFlow does not take the GPUs' memory.

    Args:
      machine: the facts.
      installed: whether TensorFlow is.
      environment: the environment variables.
    """
    if not installed:
        return Check("tensorflow", "ok", "not installed, none needed")
    if not machine.gpus and machine.devices.backend != "gpu":
        return Check("tensorflow", "ok", "installed, and no GPU whose memory it could take")
    if environment.get("TF_FORCE_GPU_ALLOW_GROWTH", "").lower() == "true":
        return Check("tensorflow", "ok", "installed, and takes GPU memory only as it needs it")
    fix = (
        "uninstall it (jaxtrain never imports it), or set TF_FORCE_GPU_ALLOW_GROWTH=true where your own code imports it"
    )
    return Check("tensorflow", "warning", "installed: imported in a run, it may take all memory of the GPUs", fix)


def check_xla_flags(environment: Mapping[str, str]) -> Check:
    """No flag simulates CPU devices, since --simulate-devices does."""
    flags = environment.get("XLA_FLAGS", "")
    if "--xla_force_host_platform_device_count" in flags:
        fix = "take that flag out and use --simulate-devices N where CPU devices are wanted"
        return Check("XLA_FLAGS", "warning", f"{flags} simulates CPU devices in every run", fix)
    return Check("XLA_FLAGS", "ok", flags or "not set")


def check_visible_gpus(machine: Machine, environment: Mapping[str, str]) -> Check:
    """CUDA_VISIBLE_DEVICES names only GPUs that exist."""
    name = "CUDA_VISIBLE_DEVICES"
    value = environment.get(name)
    if value is None:
        return Check(name, "ok", "not set")
    if machine.gpus:
        words = [word.strip() for word in value.split(",")]
        absent = [word for word in words if word.isdigit() and int(word) >= len(machine.gpus)]
        if absent:
            text = f"{value!r} names GPU {', '.join(absent)}, and there are {len(machine.gpus)}, counted from 0"
            return Check(name, "problem", text, "name GPUs that exist: CUDA hides that one and all behind it")
        if words[0] in ("", "-1", "NoDevFiles"):
            return Check(name, "warning", f"{value!r} hides every GPU", f"unset {name} to train on the GPUs")
    return Check(name, "ok", repr(value))


def check_proxies(host: str, environment: Mapping[str, str]) -> Check:
    """gRPC, by which processes join, uses no proxy: it obeys these variables even for a neighbouring host."""
    lower = {name.lower(): value for name, value in environment.items() if value}
    proxies = [name for name in ("grpc_proxy", "https_proxy", "http_proxy") if name in lower]
    if not proxies:
        return Check("proxies", "ok", "not set")
    named = [lower[name] for name in ("no_grpc_proxy", "no_proxy") if name in lower][
        :1
    ]  # gRPC's own variable comes first
    excepted = [word for text in named for word in re.split(r"[,\s]+", text)]
    through = [name for name in ("localhost", "127.0.0.1", host) if not _is_excepted(name, excepted)]
    if through:
        text = (
            f"{', '.join(proxies)} set, and no_proxy leaves out {', '.join(through)}: processes may not find each other"
        )
        fix = f"export no_proxy=localhost,127.0.0.1,{host} with the names of the other hosts of a run"
        return Check("proxies", "warning", text, fix)
    return Check("proxies", "ok", f"{', '.join(proxies)} set, and no_proxy excepts this host")


def _is_excepted(host: str, excepted: Sequence[str]) -> bool:
    return any(name == "*" or (name and (host == name or host.endswith("." + name.lstrip("*.")))) for name in excepted)


def check_scheduler(environment: Mapping[str, str]) -> Check:
    """The variables of a scheduler are enough to start a run."""
    names = [name for name in _SCHEDULER if name in environment]
    try:
        process = detect_process(environment=environment)
    except JaxtrainError as error:
        fix = "start runs by the scheduler's own launcher (srun, mpirun, torchrun), or with --standalone in one process"
        return Check("scheduler", "warning", str(error), fix)
    if process is None:
        return Check("scheduler", "ok", f"{', '.join(names) or 'no variables'}: a run here is one process")
    return Check(
        "scheduler", "ok", f"{process} by {process.source}, coordinator {process.coordinator} ({', '.join(names)})"
    )


def _gib(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"
