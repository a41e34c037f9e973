"""GPUs to compile for without having one: what XLA's GPU compiler wants to know of them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path

from jaxtrain.errors import ConfigError

# Of every CUDA GPU below: limits of a kernel launch, and registers and threads.
_LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "device_address_bits": 64,
}
_CUDNN = (
    9,
    15,
    0,
)  # of the wheels that jax[cuda12] and jax[cuda13] ask for; which convolutions it can fuse depends on it


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU. The numbers are those of XLA's own targets (openxla/xla, xla/backends/gpu/target_config/specs).

    Attributes:
      name: as JAX shows it.
      capability: CUDA compute capability.
      cores: streaming multiprocessors.
      fpus: per core.
      clock: GHz.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      l2: bytes of the second-level cache.
      shared: bytes of shared memory a core, and the most that one block may have.
      threads: per core.
      nvlinks: active NVLink connections.
      teraflops: 1e12 operations a second of dense matrix products, of 16 bits (summed in f32), of TF32 and of f32. Written
        from memory of NVIDIA's data sheets, and not checked against them.
      link: the name in `links.LINKS` of what connects the GPUs of a host.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    clock: float
    memory: int
    bandwidth: int
    l2: int
    shared: tuple[int, int]
    teraflops: tuple[float, float, float]
    link: str
    threads: int = 2048
    nvlinks: int = 0

    def text(self) -> str:
        """XLA's `GpuTargetConfigProto`, as text."""
        major, minor = self.capability
        accelerated = "ACCELERATED_FEATURES" if major in (9, 10) else "NONE"
        numbers = _LIMITS | {
            "core_count": self.cores,
            "fpus_per_core": self.fpus,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "memory_bandwidth": self.bandwidth,
            "l2_cache_size": self.l2,
            "shared_memory_per_core": self.shared[0],
            "shared_memory_per_block_optin": self.shared[1],
            "threads_per_core_limit": self.threads,
        }
        lines = [f"  {key}: {value}" for key, value in numbers.items()]
        lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {accelerated} }}")
        lines.append(f'  name: "{self.name}" device_vendor: "NVIDIA Corporation"')
        lines.append('  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"')
        lines.append(f'  dnn_version: "{".".join(map(str, _CUDNN))}"')
        lines.append(f"  device_interconnect_info {{ active_links: {self.nvlinks} }}")
        cudnn = "dnn_version_info {{ major: {} minor: {} patch: {} }}".format(*_CUDNN)
        inner = "\n".join(lines)
        return (
            f'gpu_device_info {{\n{inner}\n}}\nplatform_name: "CUDA"\n{cudnn}\ndevice_description_str: "{self.name}"\n'
        )


_HOPPER = {"capability": (9, 0), "fpus": 128, "l2": 52428800, "shared": (233472, 232448)}
_AMPERE = {
    "capability": (8, 0), "cores": 108, "fpus": 64, "l2": 41943040, "shared": (167936, 166912),
    "teraflops": (312, 156, 19.5),
}  # fmt: skip
_NVLINK3, _NVLINK4 = {"link": "nvlink3", "nvlinks": 12}, {"link": "nvlink4", "nvlinks": 18}
_ADA = {"capability": (8, 9), "fpus": 128, "shared": (102400, 101376), "threads": 1536, "link": "pcie4"}
GPUS: dict[str, Gpu] = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", clock=1.41, memory=42331013120, bandwidth=1555200000000, **_NVLINK3, **_AMPERE),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", clock=1.41, memory=85100068864, bandwidth=2039040000000, **_NVLINK3, **_AMPERE),
    "a100-pcie": Gpu(
        "NVIDIA A100 80GB PCIe", clock=1.1105, memory=79050250240, bandwidth=2039000000000, link="pcie4", **_AMPERE
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", cores=132, clock=1.98, memory=84942979072, bandwidth=3352320000000,
        teraflops=(989.4, 494.7, 66.9), **_NVLINK4, **_HOPPER,
    ),
    "h100-pcie": Gpu(
        "NVIDIA H100 PCIe", cores=114, clock=1.755, memory=84942979072, bandwidth=2039040000000,
        teraflops=(756, 378, 51), link="pcie5", **_HOPPER,
    ),
    "h200": Gpu(
        "NVIDIA H200", cores=132, clock=1.98, memory=151397597184, bandwidth=4800000000000,
        teraflops=(989.4, 494.7, 66.9), **_NVLINK4, **_HOPPER,
    ),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), 148, 128, 1.965, 191514411008, 7672320000000, 132644864, (233472, 232448),
        teraflops=(2250, 1125, 75), link="nvlink5", nvlinks=18,
    ),
    "rtx6000pro": Gpu(
        "NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 128, 2.6, 103079215104, 1792000000000, 134217728, (131072, 101376),
        teraflops=(503.8, 251.9, 125), link="pcie5", threads=1536,
    ),
    "a6000": Gpu(
        "NVIDIA RTX A6000", (8, 6), 84, 128, 1.8, 51041271808, 768096000000, 6291456, (102400, 101376),
        teraflops=(154.8, 77.4, 38.7), link="pcie4", threads=1536,
    ),
    # Not among XLA's own. Written from memory of NVIDIA's data sheets and of what CUDA reports, and not checked against them.
    "a10g": Gpu(
        "NVIDIA A10G", (8, 6), 80, 128, 1.71, 23609475072, 600096000000, 6291456, (102400, 101376),
        teraflops=(70, 35, 31.2), link="pcie4", threads=1536,
    ),
    "l4": Gpu(
        "NVIDIA L4", cores=58, clock=2.04, memory=23570087936, bandwidth=300096000000, l2=50331648,
        teraflops=(121, 60.5, 30.3), **_ADA,
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", cores=128, clock=2.52, memory=25393692672, bandwidth=1008096000000, l2=75497472,
        teraflops=(165.2, 82.6, 82.6), **_ADA,
    ),
}  # fmt: skip
_FILE_TERAFLOPS = (16, 8, 1)  # of a GPU that only XLA's text describes: times its f32 units, as in an A100


def products_per_second(teraflops: tuple[float, float, float], precision: str) -> float:
    """Operations a second of dense matrix products at most. teraflops: as of `Gpu`. precision: `train.precision`, resolved."""
    half, tf32, single = (1e12 * rate for rate in teraflops)
    return {"bf16": half, "fp16": half, "tf32": tf32, "f32": single, "f64": single / 2}[precision]


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as it was asked for, `2x8xh100`.
      text: XLA's `GpuTargetConfigProto`; "" of CPUs.
      hosts: how many.
      per_host: GPUs of each.
      memory: bytes of a GPU.
      bandwidth: of a GPU's memory, bytes a second.
      teraflops: as of `Gpu`.
      link: as of `Gpu`.
    """

    name: str
    text: str
    hosts: int
    per_host: int
    memory: int
    bandwidth: int
    teraflops: tuple[float, float, float]
    link: str

    @property
    def devices(self) -> int:
        """How many GPUs."""
        return self.hosts * self.per_host

    @property
    def platform(self) -> str:
        """`cuda` or `cpu`."""
        return "cuda" if self.text else "cpu"


_FORM = re.compile(r"(?:(?:(?P<hosts>\d+)x)?(?P<per_host>\d+)x)?(?P<gpu>\D.*)")


def parse_target(name: str) -> Target:
    """The target `GPU`, `8xGPU` or `2x8xGPU` (hosts x GPUs of each); GPU is one of `GPUS` or a file with XLA's text.

    Raises:
      ConfigError: there is no such GPU or file, or a number is 0.
    """
    match = _FORM.fullmatch(name)
    hosts, per_host = (int(match[part] or 1) for part in ("hosts", "per_host")) if match else (0, 0)
    if match is None or not hosts * per_host:
        raise ConfigError(f"--target {name}: must be GPU, COUNTxGPU or HOSTSxCOUNTxGPU, for example 2x8xh100.")
    gpu = match["gpu"]
    if gpu in GPUS:
        text = GPUS[gpu].text()
    elif Path(gpu).is_file():
        text = Path(gpu).read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"--target {name}: there is no GPU {gpu!r}; known are {', '.join(GPUS)}, or the file of an XLA target "
            "(a GpuTargetConfigProto as text)."
        )
    found = {key: re.search(rf"\b{key}: (\d+)", text) for key in ("device_memory_size", "memory_bandwidth")}
    if missing := [key for key, value in found.items() if value is None]:
        raise ConfigError(f"--target {name}: {gpu} has no {missing[0]}; it must be a GpuTargetConfigProto as text.")
    memory, bandwidth = (int(value[1]) for value in found.values() if value)
    known = GPUS.get(gpu)
    teraflops = known.teraflops if known else _teraflops_of(text)
    return Target(name, text, hosts, per_host, memory, bandwidth, teraflops, known.link if known else "pcie4")


def cpu_target(hosts: int, per_host: int) -> Target:
    """CPU devices, which share the memory and the cores of their host. The rates are nominal: they only compare layouts."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_host
    rate = 0.1 / per_host
    return Target(
        f"{hosts * per_host}xcpu", "", hosts, per_host, memory, 20_000_000_000 // per_host, (rate, rate, rate), ""
    )


def gpu_target(kind: str, hosts: int, per_host: int, *, cores: int, capability: str, memory: int) -> Target:
    """GPUs that are there: the known ones by their name, others by what they say of themselves and guesses.

    Args:
      kind: the name, as JAX shows it.
      hosts: how many.
      per_host: GPUs of each.
      cores: streaming multiprocessors.
      capability: such as "9.0".
      memory: bytes of a GPU.
    """
    known = next((name for name, gpu in GPUS.items() if gpu.name == kind), None)
    if known is not None:
        return parse_target(f"{hosts}x{per_host}x{known}")
    major, minor = (int(part) for part in capability.split("."))
    a6000 = GPUS["a6000"]
    gpu = dataclasses.replace(a6000, name=kind, capability=(major, minor), cores=cores, memory=memory)
    name = f"{hosts}x{per_host}x{kind}"
    return Target(name, gpu.text(), hosts, per_host, memory, gpu.bandwidth, gpu.teraflops, gpu.link)


def _teraflops_of(text: str) -> tuple[float, float, float]:
    """A guess from XLA's text: two operations a cycle of each f32 unit, and of 16 bits and TF32 as many more as in an A100."""
    found = [re.search(rf"\b{key}: ([\d.]+)", text) for key in ("core_count", "fpus_per_core", "clock_rate_ghz")]
    single = 2e-3 * math.prod(float(value[1]) if value else 1.0 for value in found)
    half, tf32, f32 = (factor * single for factor in _FILE_TERAFLOPS)
    return half, tf32, f32
