"""The host's NVIDIA GPUs and their health, by NVML. The one module that knows NVML; without it there are no GPUs."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Xid errors after which a GPU needs a reset or a repair (NVIDIA, Xid Errors, r570): double-bit ECC, row
# remapping failures, NVLink, fallen off the bus, uncontained ECC, GSP time-out and error, unrecovered ECC.
FATAL_XIDS = frozenset({48, 63, 64, 74, 79, 95, 119, 120, 140})

THROTTLES = {"power cap": 0x04, "hardware slowdown": 0x08, "temperature": 0x20 | 0x40, "power brake": 0x80}
"""What slows a GPU's clocks down, and the bits that say so (NVML API reference, nvmlClocksEventReasons)."""

_SM_CLOCK, _MEMORY_CLOCK, _CELSIUS = 1, 2, 0  # NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU."""

    uuid: str
    name: str
    memory: int
    """In bytes."""
    fault: str = ""
    """Why it cannot be used, or ''."""


@dataclasses.dataclass(frozen=True)
class GpuReading:
    """What NVML says of a GPU at one moment. None for what it does not say."""

    utilization: float | None
    """The share of the last second or less in which a kernel ran, in [0, 1]."""
    memory_used: int | None
    """Bytes."""
    temperature: float | None
    """In degrees Celsius."""
    power: float | None
    """Watts."""
    clock: float | None
    """Of the multiprocessors, MHz."""
    memory_clock: float | None
    """MHz."""
    throttles: tuple[str, ...] | None
    """What slows the clocks down: names of `THROTTLES`."""
    xids: tuple[int, ...]
    """All Xid errors since the `Gpus` were made, in their order."""


class Gpus:
    """All GPUs of the host, watched for fatal errors from now on. Empty where there is no NVML."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: dict[str, Any] = {}
        self._xids: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
        self._events: Any = None
        with contextlib.suppress(ImportError):
            nvml = importlib.import_module("pynvml")
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlInit()
                self._nvml = nvml
                self._watch()

    def _watch(self) -> None:
        nvml = self._nvml
        for index in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):  # a lost GPU has no handle
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                self._handles[_text(nvml.nvmlDeviceGetUUID(handle))] = handle
        with contextlib.suppress(nvml.NVMLError):
            self._events = nvml.nvmlEventSetCreate()
            for handle in self._handles.values():
                with contextlib.suppress(nvml.NVMLError):
                    nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, self._events)

    def all(self) -> list[Gpu]:
        """Every GPU, with the faults that are known by now."""
        self._collect_xids()
        return [self._examine(uuid, handle) for uuid, handle in self._handles.items()]

    def visible(self) -> list[Gpu]:
        """Those of `all` that $CUDA_VISIBLE_DEVICES names, by number in NVML's order or by UUID; all where it is not set.

        As for CUDA, a name that fits none ends the list. So there are none where it names parts of a GPU (MIG).
        """
        named, gpus = os.environ.get("CUDA_VISIBLE_DEVICES"), self.all()
        if named is None:
            return gpus
        found: list[Gpu] = []
        for name in (word.strip() for word in named.split(",")):
            fits = [gpu for number, gpu in enumerate(gpus) if name == str(number) or _begins(gpu.uuid, name)]
            if len(fits) != 1:
                break
            found += fits
        return list(dict.fromkeys(found))

    def _collect_xids(self) -> None:
        if self._events is None:
            return
        with contextlib.suppress(self._nvml.NVMLError):
            while True:  # ends with NVMLError_Timeout
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
                self._xids[_text(self._nvml.nvmlDeviceGetUUID(event.device))].append(event.eventData)

    def _examine(self, uuid: str, handle: Any) -> Gpu:
        nvml = self._nvml
        if fatal := [xid for xid in self._xids[uuid] if xid in FATAL_XIDS]:
            return Gpu(uuid, "", 0, f"Xid {fatal[-1]}")
        try:
            gpu = Gpu(uuid, _text(nvml.nvmlDeviceGetName(handle)), nvml.nvmlDeviceGetMemoryInfo(handle).total)
        except nvml.NVMLError as error:
            return Gpu(uuid, "", 0, f"it does not answer: {error}")
        with contextlib.suppress(nvml.NVMLError):  # not every GPU has ECC
            count = nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
            if count:
                return dataclasses.replace(gpu, fault=f"{count} uncorrectable memory errors")
        return gpu

    def memory_used(self, uuid: str) -> int | None:
        """Bytes that processes use on a GPU, without what the driver keeps for itself where it says so. None: unknown.

        Of all processes of the machine: NVML's list of them is empty in a container, this number is not.
        """
        nvml, handle = self._nvml, self._handles[uuid]
        for version in ((nvml.nvmlMemory_v2,) if hasattr(nvml, "nvmlMemory_v2") else (), ()):
            with contextlib.suppress(nvml.NVMLError):  # an older driver knows no second version
                return nvml.nvmlDeviceGetMemoryInfo(handle, *version).used
        return None

    def read(self, uuid: str) -> GpuReading:
        """The readings of one GPU, now."""
        nvml, handle = self._nvml, self._handles[uuid]

        def ask(question: Callable[[], float]) -> float | None:
            with contextlib.suppress(nvml.NVMLError):  # not every GPU and driver answers every question
                return question()
            return None

        self._collect_xids()
        percent = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        milliwatts = ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        reasons = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        return GpuReading(
            utilization=None if percent is None else percent / 100,
            memory_used=self.memory_used(uuid),
            temperature=ask(lambda: nvml.nvmlDeviceGetTemperature(handle, _CELSIUS)),
            power=None if milliwatts is None else milliwatts / 1000,
            clock=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, _SM_CLOCK)),
            memory_clock=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, _MEMORY_CLOCK)),
            throttles=None
            if reasons is None
            else tuple(name for name, bits in THROTTLES.items() if int(reasons) & bits),
            xids=tuple(self._xids[uuid]),
        )

    def driver(self) -> str:
        """The driver's version, or ''."""
        if self._nvml is None:
            return ""
        with contextlib.suppress(self._nvml.NVMLError):
            return _text(self._nvml.nvmlSystemGetDriverVersion())
        return ""


def _begins(uuid: str, name: str) -> bool:
    """Whether `name` is a UUID, or the beginning of one, as CUDA takes it."""
    return name.startswith("GPU-") and uuid.startswith(name)


def device_files() -> int:
    """How many GPUs the kernel's NVIDIA driver shows: the files /dev/nvidia0, /dev/nvidia1, ..."""
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


@functools.cache
def driver_missing() -> bool:
    """Whether JAX's CUDA plugin is installed, perhaps for its compiler, on a machine without NVIDIA's driver."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)) or device_files():
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


def visible_gpus() -> int:
    """How many NVIDIA GPUs a process may use, as far as can be told without starting CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return device_files()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
