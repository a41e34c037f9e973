"""The readings of a process's GPUs as numbers by name; says each Xid error once, and what slows a GPU down."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from jaxtrain.host.gpus import THROTTLES, GpuReading, Gpus
from jaxtrain.observability.events import event

log = logging.getLogger("jaxtrain")

_NUMBERS = ("utilization", "memory_used", "temperature", "power", "clock", "memory_clock")


class GpuHealth:
    """Reads the GPUs that the devices of this process are."""

    def __init__(self, numbers: Mapping[int, int]):
        """Opens NVML.

        Args:
          numbers: by a device's number in the run: that of its GPU among those that the process may use.

        Raises:
          RuntimeError: NVML is not there, or does not know a GPU.
        """
        self._gpus = Gpus()
        visible = self._gpus.visible()
        if not visible or max(numbers.values()) >= len(visible):
            raise RuntimeError(f"NVML shows {len(visible)} GPUs that this process may use; is nvidia-ml-py installed?")
        self._uuids = {device: visible[number].uuid for device, number in numbers.items()}
        self._xids = dict.fromkeys(numbers, 0)  # how many of them were said

    def __call__(self) -> dict[str, float]:
        """The readings now; `device3/power` is that of the device 3 of the run. What NVML does not say is missing.

        `utilization` (share), `memory_used` (bytes), `temperature` (degrees Celsius), `power` (watts), `clock` and
        `memory_clock` (MHz), `throttled_...` (1 where that slows the clocks down, else 0), `xids` (errors so far).
        """
        values: dict[str, float] = {}
        for device, uuid in self._uuids.items():
            reading = self._gpus.read(uuid)
            self._say_xids(device, reading)
            numbers = {name: getattr(reading, name) for name in _NUMBERS} | {"xids": len(reading.xids)}
            if reading.throttles is not None:
                numbers |= {_throttled(name): float(name in reading.throttles) for name in THROTTLES}
            values |= {f"device{device}/{name}": float(value) for name, value in numbers.items() if value is not None}
        return values

    def _say_xids(self, device: int, reading: GpuReading) -> None:
        for xid in reading.xids[self._xids[device] :]:
            text = "device %d (%s) reports Xid %d; see NVIDIA's list of Xid errors."
            log.warning(text, device, self._uuids[device], xid, extra=event("gpu"))
        self._xids[device] = len(reading.xids)


def describe(values: Mapping[str, float], device: int) -> str:
    """What slows a device down, and its clock: `NVML says temperature, clock 1200 MHz`; "" where nothing is known.

    values: as of `GpuHealth`.
    """
    reasons = [name for name in THROTTLES if values.get(f"device{device}/{_throttled(name)}")]
    clock = values.get(f"device{device}/clock")
    if clock is None:
        return ""
    return f"NVML says {', '.join(reasons) or 'nothing slows its clocks down'}, clock {clock:.0f} MHz"


def _throttled(name: str) -> str:
    return f"throttled_{name.replace(' ', '_')}"
