"""Examines the machine: what would break a run here, and what mends it.

Loads no JAX itself: JAX is asked in processes of its own, under a time limit, since a broken driver or flag makes it hang
or abort. The facts are gathered first (`look`); a check is a function of them, or tries one thing.
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtrain.config import DataConfig
from jaxtrain.cpus import usable_cpus
from jaxtrain.distributed.place import Place, find_place
from jaxtrain.errors import ConfigError, JaxtrainError
from jaxtrain.gpus import Gpu, Gpus
from jaxtrain.workdir import atomic_write

MACHINE_FILE = "machine.json"
PACKAGES = ("jaxtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
# What pip installs for GPUs: JAX's plugin, and NVIDIA's libraries by a name with or without the CUDA release.
_GPU_PACKAGE = re.compile(r"jax-cuda\d+-(plugin|pjrt)|nvidia-(cuda-runtime|cudnn|nccl)(-cu\d+)?")
_OLDEST_DRIVER = {"12": 525, "13": 580}  # for JAX's plugin of that CUDA release (JAX's installation guide)
_SCHEDULER = ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX", "WORLD_SIZE", "JAXTRAIN_NUM_PROCESSES")
_JAX_SECONDS = 60.0  # that JAX may take to find the devices
_JOIN_SECONDS = 25.0  # that two processes may take to start, meet and add
_MEETING_SHARE = 0.6  # of them to find each other in, so that one that waits in vain can still say so
_FATAL = re.compile(r"^F\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] ", re.MULTILINE)  # before the sentence that XLA aborts with
_TERMS = (1, 10)  # what each of the two adds: the sum says who is missing
_GIB = 1 << 30
_LOW_MEMORY, _LOW_SHARED, _LOW_DISK, _NO_DISK = 2 * _GIB, _GIB // 2, 10 * _GIB, _GIB

State = Literal["ok", "warning", "problem"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding. found: what is there. fix: what to do about a warning or a problem, in one sentence."""

    name: str
    state: State
    found: str
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Devices:
    """What JAX finds. runtime: the backend's own words on its version. error: why JAX does not start, or ''."""

    backend: str = ""
    count: int = 0
    kinds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    runtime: str = ""
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The facts. Sizes are in bytes. versions: of installed packages. gpu_nodes: the kernel driver's device files."""

    host: str
    system: str
    python: str
    cores: int
    memory: int
    memory_free: int
    shared_memory: int
    versions: Mapping[str, str]
    gpus: tuple[Gpu, ...]
    gpu_nodes: int
    driver: str
    devices: Devices

    def facts(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "examined": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **dataclasses.asdict(self),
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """All that `examine` found."""

    checks: list[Check]
    machine: Machine


def examine(workdir: Path, report: Callable[[Check], object] = lambda check: None) -> Report:
    """Makes every check; `report` is called with each as soon as it is made. Leaves no file behind."""
    checks: list[Check] = []
    machine = look()
    for check in _checks(machine, workdir, os.environ):
        report(check)
        checks.append(check)
    return Report(checks, machine)


def write(machine: Machine, directory: Path) -> Path:
    """Keeps the facts in `directory`/machine.json and returns the path. Raises `WorkdirError`."""
    path = directory / MACHINE_FILE
    with contextlib.suppress(OSError):  # the write says why
        directory.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(machine.facts(), indent=2) + "\n")
    return path


def _checks(machine: Machine, workdir: Path, environment: Mapping[str, str]) -> Iterator[Check]:
    yield check_devices(machine, environment)
    yield check_driver(machine)
    yield check_memory(machine)
    yield check_versions(machine.versions, _required())
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


# --------------------------------------------------------------------------------------------------------------- facts


def look() -> Machine:
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
        versions=_versions(),
        gpus=tuple(gpus.all()),
        gpu_nodes=sum(path.name[len("nvidia") :].isdigit() for path in Path("/dev").glob("nvidia*")),
        driver=gpus.driver(),
        devices=find_devices(),
    )


def _memory() -> tuple[int, int]:
    """The host's memory and what is free of it, or this control group's where that is less."""
    words = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    host = {word[0].rstrip(":"): int(word[1]) * 1024 for word in words}
    total, free = host["MemTotal"], host["MemAvailable"]
    with contextlib.suppress(OSError, ValueError):  # no limit: there is no such file, or it says "max"
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
        total = min(total, limit)
    return total, free


def _versions() -> dict[str, str]:
    installed = {(each.name or "").lower(): each.version for each in importlib.metadata.distributions()}
    names = [*PACKAGES, *sorted(name for name in installed if _GPU_PACKAGE.fullmatch(name))]
    return {name: installed[name] for name in names if name in installed}


def _required() -> dict[str, str]:
    """The least version of each package that jaxtrain needs, by its own metadata."""
    lines: Sequence[str] = ()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # which is then missing among the versions
        lines = importlib.metadata.requires("jaxtrain") or ()
    found = (re.fullmatch(r"([\w.-]+)>=([\d.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def _data_dir() -> Path:
    from jaxtrain.data.sources import data_dir  # noqa: PLC0415  takes a second to load

    return data_dir(DataConfig())


def find_devices(seconds: float = _JAX_SECONDS) -> Devices:
    """What JAX finds in a process of its own, which takes no GPU memory ahead."""
    (answer,) = _ask(["devices_here()"], seconds, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    return Devices(**answer)


def devices_here() -> dict[str, Any]:
    """What JAX finds in this process, as the fields of `Devices`."""
    import jax  # noqa: PLC0415  only in a process of its own
    from jax.extend.backend import get_backend  # noqa: PLC0415

    kinds = collections.Counter(device.device_kind for device in jax.devices())
    runtime = " ".join(get_backend().platform_version.split())
    return {"backend": jax.default_backend(), "count": jax.device_count(), "kinds": kinds, "runtime": runtime}


def add_over_loopback(seconds: float = _JOIN_SECONDS) -> list[dict[str, Any]]:
    """What two processes say that join as those of a run do, and add a number each: {"sum": ...} or {"error": ...}."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    calls = [f"join_here({index}, {port}, {int(seconds * _MEETING_SHARE)})" for index in range(len(_TERMS))]
    return _ask(calls, seconds, {"JAX_PLATFORMS": "cpu"})


def join_here(index: int, port: int, seconds: int) -> dict[str, Any]:
    """Makes this process one of the two."""
    import jax  # noqa: PLC0415  only in a process of its own
    import numpy as np  # noqa: PLC0415
    from jax.experimental import multihost_utils  # noqa: PLC0415

    from jaxtrain.distributed.join import join  # noqa: PLC0415

    jax.config.update("jax_num_cpu_devices", 1)
    join(Place(f"127.0.0.1:{port}", len(_TERMS), index, "jaxtrain doctor"), {}, seconds)
    return {"sum": int(multihost_utils.process_allgather(np.int32(_TERMS[index])).sum())}


def _ask(calls: Sequence[str], seconds: float, more: Mapping[str, str]) -> list[dict[str, Any]]:
    """Calls functions of this module, each in a process of its own, all at once; their answers, or {"error": why}.

    more: environment variables.
    """
    # -P: or the current directory would come first, and a stranger's jax.py in it
    code = (
        f"import sys; sys.path.append({str(Path(__file__).parents[1])!r}); import json; from jaxtrain import doctor; "
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", f"{code}print(json.dumps(doctor.{call}), flush=True)"],
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
    if len(fatal := _FATAL.split(errors, maxsplit=1)) > 1:
        return {"error": fatal[1].splitlines()[0]}  # a trace of the stack follows
    said = [line.strip() for line in errors.splitlines() if line.strip()]
    return {"error": said[-1] if said else f"exit code {process.returncode} and no word"}


# -------------------------------------------------------------------------------------------------------------- checks


def check_devices(machine: Machine, environment: Mapping[str, str]) -> Check:
    """JAX starts, and sees the GPUs that NVML sees."""
    devices, gpus = machine.devices, machine.gpus
    if devices.error:
        found = " ".join(
            f"{name}={environment[name]}" for name in ("JAX_PLATFORMS", "XLA_FLAGS") if name in environment
        )
        fix = f"mend or unset {found}" if found else "install jax and jaxlib again, or see the driver with `nvidia-smi`"
        return Check("devices", "problem", f"JAX does not start: {devices.error}", fix)
    found = ", ".join(f"{count} x {kind}" for kind, count in devices.kinds.items()) + f" ({devices.backend})"
    sick = [f"{gpu.uuid} ({gpu.fault})" for gpu in gpus if gpu.fault]
    if sick:
        return Check(
            "devices", "problem", f"{found}; cannot be used: {', '.join(sick)}", "have these GPUs reset or replaced"
        )
    if gpus and devices.backend != "gpu":
        text = f"the host has {len(gpus)} x {gpus[0].name} and JAX sees none, only {found}"
        return Check("devices", "problem", text, _why_no_gpu(machine, environment))
    if gpus and devices.count != len(gpus):
        found += f", of {len(gpus)} GPUs in the host"
        if not environment.get("CUDA_VISIBLE_DEVICES"):
            return Check("devices", "problem", found, "look in `nvidia-smi` and dmesg for GPUs that JAX cannot open")
    if devices.backend == "gpu" and not gpus:
        fix = "install NVML's Python door, pip install nvidia-ml-py, so that sick GPUs are noticed"
        return Check("devices", "warning", f"{found}; NVML does not answer, so their health is unknown", fix)
    if machine.gpu_nodes and devices.backend != "gpu":
        text = f"{found}, although /dev has {machine.gpu_nodes} NVIDIA GPUs"
        return Check("devices", "warning", text, _why_no_gpu(machine, environment))
    return Check("devices", "ok", found)


def _why_no_gpu(machine: Machine, environment: Mapping[str, str]) -> str:
    if "cuda" not in (platforms := environment.get("JAX_PLATFORMS", "cuda")) and "gpu" not in platforms:
        return f"unset JAX_PLATFORMS ({platforms}), which keeps JAX from them"
    if environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        return "unset CUDA_VISIBLE_DEVICES, which hides them"
    if not any(name.startswith("jax-cuda") for name in machine.versions):
        return "install JAX for them: pip install -e '.[cuda12]' (or cuda13)"
    return "see what `python -c 'import jax; jax.devices()'` warns of: most often the driver is too old for the CUDA plugin"


def check_driver(machine: Machine) -> Check:
    """The driver is new enough for the CUDA release that JAX's plugin is made for."""
    if not machine.gpus and machine.devices.backend != "gpu":
        return Check("driver", "ok", "no NVIDIA GPU, none needed")
    libraries = [f"{name} {version}" for name, version in machine.versions.items() if _GPU_PACKAGE.fullmatch(name)]
    found = ", ".join([f"NVIDIA driver {machine.driver or 'unknown'}", *libraries, machine.devices.runtime])
    if not machine.driver:
        fix = "run `nvidia-smi`, and install or load the driver if it does not answer, or nvidia-ml-py if it does"
        return Check("driver", "warning", found, fix)
    for release, oldest in _OLDEST_DRIVER.items():
        if f"jax-cuda{release}-plugin" in machine.versions and _numbers(machine.driver) < (oldest,):
            fix = f"install driver {oldest} or newer, which CUDA {release} needs, or JAX for an older CUDA"
            return Check("driver", "problem", found, fix)
    return Check("driver", "ok", found)


def check_memory(machine: Machine) -> Check:
    """There is memory to start in, and shared memory where NCCL and the reading workers need it."""
    found = f"{_gib(machine.memory)}, {_gib(machine.memory_free)} free, /dev/shm {_gib(machine.shared_memory)}"
    found += f", {machine.cores} cores"
    if machine.gpus:
        found += "; GPUs: " + ", ".join(_gib(gpu.memory) for gpu in machine.gpus)
    if machine.memory_free < _LOW_MEMORY:
        return Check("memory", "warning", found, f"end other programs: a run needs about {_gib(_LOW_MEMORY)}")
    if machine.shared_memory < _LOW_SHARED and machine.gpus:
        return Check(
            "memory", "warning", found, "start the container with --shm-size=8g: NCCL and readers use /dev/shm"
        )
    return Check("memory", "ok", found)


def check_versions(versions: Mapping[str, str], required: Mapping[str, str]) -> Check:
    """Every package is there and new enough; jax, jaxlib and the CUDA plugin are of one release."""
    found = f"python {platform.python_version()}, " + ", ".join(
        f"{name} {version}" for name, version in versions.items()
    )
    missing = [name for name in PACKAGES if name not in versions]
    old = [name for name, least in required.items() if name in versions and _numbers(versions[name]) < _numbers(least)]
    if missing or old:
        text = "; ".join(
            f"{what}: {', '.join(names)}" for what, names in (("missing", missing), ("too old", old)) if names
        )
        fix = "install jaxtrain's dependencies again: pip install --upgrade -e ."
        return Check("versions", "problem", f"{text} ({found})", fix)
    pairs = ["jaxlib", *(name for name in versions if name.startswith("jax-cuda"))]
    other = [name for name in pairs if _numbers(versions[name])[:3] != _numbers(versions["jax"])[:3]]
    if other:
        wanted = " ".join(f"{name}=={versions['jax']}" for name in other)
        text = f"jax {versions['jax']} does not go with " + ", ".join(f"{name} {versions[name]}" for name in other)
        return Check("versions", "problem", text, f"install them in one release: pip install {wanted}")
    return Check("versions", "ok", found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def check_network(host: str) -> Check:
    """The host's own name has an address, and a port can be had."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
    except OSError as error:
        return Check(
            "network", "problem", f"no port of 127.0.0.1 can be had ({error})", "let this user listen on loopback"
        )
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port)})
    except OSError as error:
        fix = f"add '127.0.1.1 {host}' to /etc/hosts, or on a cluster the address that the other hosts reach"
        return Check("network", "warning", f"the host name {host} has no address ({error})", fix)
    return Check("network", "ok", f"{host} is {', '.join(addresses)}; port {port} was free")


def check_collective(answers: Sequence[Mapping[str, Any]], proxies: Check) -> Check:
    """Both processes of `add_over_loopback` have the sum that they must have; `proxies` may say why they do not join."""
    name, wanted = "collective", sum(_TERMS)
    see = proxies.fix or "let no firewall stand on loopback, and try without XLA_FLAGS and other variables of JAX"
    for index, answer in enumerate(answers):
        if "error" in answer:
            text = f"process {index} of {len(answers)} over loopback: {answer['error']}"
            return Check(name, "problem", text, see)
        if answer["sum"] != wanted:
            text = f"process {index} of {len(answers)} over loopback added {answer['sum']} for {wanted}"
            return Check(name, "problem", text, "do not train with this build of jax: install jax and jaxlib again")
    return Check(name, "ok", f"{len(answers)} processes joined over loopback (gloo) and added {wanted} for {wanted}")


def check_disk(name: str, directory: Path, elsewhere: str) -> Check:
    """A file can be written, synced and renamed in `directory` (where it is not there yet: above it), and room is left.

    elsewhere: the fix, how to choose another one.
    """
    directory = directory.expanduser().absolute()
    if why := _unwritable(there := _existing(directory)):
        return Check(name, "problem", f"{directory}: {why}", f"make it writable, or {elsewhere}")
    free = shutil.disk_usage(there).free
    found = f"{directory}: written, synced and renamed a file; {_gib(free)} free"
    if free < _LOW_DISK:
        return Check(name, "problem" if free < _NO_DISK else "warning", found, f"make room there, or {elsewhere}")
    return Check(name, "ok", found)


def check_data_directory() -> Check:
    """The same for the data directory, which `$JAXTRAIN_DATA_DIR` may name."""
    name, elsewhere = "data directory", "set JAXTRAIN_DATA_DIR to another directory"
    try:
        return check_disk(name, _data_dir(), elsewhere)
    except ConfigError as error:  # it names no directory
        return Check(name, "problem", str(error).rstrip("."), elsewhere)


def check_compile_cache(environment: Mapping[str, str]) -> Check:
    """What JAX compiled can be kept; without that every start compiles again."""
    # the directory of `jaxtrain.run.settings`
    place = environment.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "jaxtrain" / "xla")
    if "://" in place:
        return Check("compile cache", "ok", f"{place}, on another machine")
    if why := _unwritable(_existing(Path(place).absolute())):
        fix = "set JAX_COMPILATION_CACHE_DIR to a directory that can be written, or every start compiles again"
        return Check("compile cache", "warning", f"{place}: {why}", fix)
    return Check("compile cache", "ok", f"{place} can be written")


def _existing(path: Path) -> Path:
    """`path`, or what is there of it."""
    return next(each for each in (path, *path.parents) if each.exists())


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
    """No TensorFlow takes the GPUs' memory."""
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
    """No flag makes CPU devices behind the back of --simulate-devices."""
    flags = environment.get("XLA_FLAGS", "")
    if "--xla_force_host_platform_device_count" in flags:
        fix = "take that flag out and use --simulate-devices N where CPU devices are wanted"
        return Check("XLA_FLAGS", "warning", f"{flags} simulates CPU devices in every run", fix)
    return Check("XLA_FLAGS", "ok", flags or "not set")


def check_visible_gpus(machine: Machine, environment: Mapping[str, str]) -> Check:
    """CUDA_VISIBLE_DEVICES names GPUs that there are."""
    name = "CUDA_VISIBLE_DEVICES"
    value = environment.get(name)
    if value is None:
        return Check(name, "ok", "not set")
    if machine.gpus:
        words = [word.strip() for word in value.split(",")]
        absent = [word for word in words if word.isdigit() and int(word) >= len(machine.gpus)]
        if absent:
            text = f"{value!r} names GPU {', '.join(absent)}, and there are {len(machine.gpus)}, counted from 0"
            return Check(name, "problem", text, "name GPUs that there are: CUDA hides that one and all behind it")
        if words[0] in ("", "-1", "NoDevFiles"):
            return Check(name, "warning", f"{value!r} hides every GPU", f"unset {name} to train on the GPUs")
    return Check(name, "ok", repr(value))


def check_proxies(host: str, environment: Mapping[str, str]) -> Check:
    """gRPC, by which processes join, goes through no proxy: it obeys these variables even for the next host."""
    lower = {name.lower(): value for name, value in environment.items() if value}
    proxies = [name for name in ("grpc_proxy", "https_proxy", "http_proxy") if name in lower]
    if not proxies:
        return Check("proxies", "ok", "not set")
    named = [lower[name] for name in ("no_grpc_proxy", "no_proxy") if name in lower][:1]  # gRPC's own comes first
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
    return any(each == "*" or (each and (host == each or host.endswith("." + each.lstrip("*.")))) for each in excepted)


def check_scheduler(environment: Mapping[str, str]) -> Check:
    """What a scheduler says of this process is enough to start a run."""
    names = [name for name in _SCHEDULER if name in environment]
    try:
        place = find_place(environment=environment)
    except JaxtrainError as error:
        fix = "start runs by the scheduler's own launcher (srun, mpirun, torchrun), or with --standalone in one process"
        return Check("scheduler", "warning", str(error), fix)
    if place is None:
        return Check("scheduler", "ok", f"{', '.join(names) or 'no variables'}: a run here is one process")
    return Check("scheduler", "ok", f"{place} by {place.source}, coordinator {place.coordinator} ({', '.join(names)})")


def _gib(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"
