"""What a run measures of its machine while it trains: samples of GPUs and host, the probe of the devices, `/metrics`."""

from __future__ import annotations

import functools
import json
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxtrain.config import TelemetryConfig
from jaxtrain.distributed.rounds import Rounds
from jaxtrain.errors import ConfigError
from jaxtrain.host.backend import on_cpu
from jaxtrain.host.usage import HostUsage
from jaxtrain.observability import slow_device
from jaxtrain.observability.clock import StepClock
from jaxtrain.observability.events import event
from jaxtrain.observability.gpu_health import GpuHealth, describe
from jaxtrain.observability.prometheus import PrometheusServer
from jaxtrain.observability.sampler import Sampler, Source
from jaxtrain.observability.slow_device import DeviceTime, SlowDevices
from jaxtrain.parallel.device_probe import DeviceProbe
from jaxtrain.parallel.mesh import Device

log = logging.getLogger("jaxtrain")

PROBE_SHARE = 0.005
"""Of a process's time, that the probe may take."""


class Telemetry:
    """Every process has one; process 0 has the numbers of all, those of the others as of the last round."""

    def __init__(
        self,
        config: TelemetryConfig,
        devices: Sequence[Device],
        make_probe: Callable[[Sequence[Device]], DeviceProbe] = DeviceProbe,
    ):
        """Starts to sample, and to serve `/metrics` where a port is asked for.

        Args:
          config: the run's section.
          devices: of the run, on all processes.
          make_probe: takes this process's devices.

        Raises:
          ConfigError: the port cannot be listened at.
        """
        self._devices = [device for device in devices if device.process_index == jax.process_index()]
        self._sampler = Sampler(_sources(self._devices) if config.every else {}, config.every)
        every = config.probe_every if config.probe_every >= 0 else 0 if on_cpu(devices) else slow_device.EVERY
        self._probe = make_probe(self._devices) if every and self._devices else None
        self._every = every or slow_device.EVERY  # processes tell their samples without a probe too
        self._spent, self._last_probe, self._began = 0.0, 0.0, 0.0  # seconds
        self._rounds, self._slow = Rounds("telemetry"), SlowDevices()
        self._probed: dict[str, float] = {}
        self._others: dict[str, float] = {}
        self._row: Mapping[str, Any] = {}
        self._server: PrometheusServer | None = None
        if config.port and jax.process_index() == 0:
            try:
                self._server = PrometheusServer(config.port, self._latest)
            except ConfigError:
                self.close()
                raise

    def numbers(self) -> dict[str, float]:
        """The latest of all processes, for a row: `device3/power` of a device, `host0/cpu` of the host of a process."""
        return self._others | self._mine()

    def row(self, row: Mapping[str, Any]) -> None:
        """Shows a row of metrics at `/metrics` until the next one."""
        self._row = row

    def after(self, steps: range, result: jax.Array, clock: StepClock) -> None:
        """Probes the devices where that is due after the `steps` of a call, and exchanges the numbers with other processes.

        Args:
          steps: that the call made.
          result: of the call; the probe waits for it.
          clock: of the run.
        """
        if steps[-1] // self._every == (steps[0] - 1) // self._every:
            return
        times: list[DeviceTime] = []
        if self._may_probe():
            with clock.charge("step"):
                jax.block_until_ready(result)
            with clock.charge("other"):
                times = self._time_devices()
        with clock.charge("other"):
            self._exchange(times)

    def close(self) -> None:
        """Ends the threads; may be called twice."""
        self._sampler.close()
        if self._probe is not None:
            self._probe.close()
        if self._server is not None:
            self._server.close()

    def _mine(self) -> dict[str, float]:
        prefix = f"host{jax.process_index()}/"
        named = {key if "/" in key else prefix + key: value for key, value in self._sampler.values().items()}
        return named | self._probed

    def _latest(self) -> dict[str, float]:
        """What `/metrics` shows."""
        numbers = {key: float(value) for key, value in self._row.items() if isinstance(value, (int, float))}
        return numbers | self.numbers()

    def _may_probe(self) -> bool:
        """Whether a probe as long as the last would leave all of them within their share of the time."""
        if self._probe is None or not self._probe.ready():
            return False
        now = time.monotonic()
        self._began = self._began or now
        return self._spent + self._last_probe <= PROBE_SHARE * (now - self._began)

    def _time_devices(self) -> list[DeviceTime]:
        assert self._probe is not None
        began = time.monotonic()
        try:
            seconds = self._probe()
        except Exception as error:  # no room for its arrays, or a compiler's: a run does not end for that
            log.warning("devices are not probed: the probe failed (%s)", str(error).partition("\n")[0])
            self._probe.close()
            self._probe = None
            return []
        self._last_probe = time.monotonic() - began
        self._spent += self._last_probe
        samples, host = self._sampler.values(), socket.gethostname()
        times = [
            DeviceTime(device.id, host, each, describe(samples, device.id))
            for device, each in zip(self._devices, seconds, strict=True)
        ]
        self._probed = {f"device{each.device}/probe_seconds": each.seconds for each in times}
        return times

    def _exchange(self, times: list[DeviceTime]) -> None:
        """Tells process 0 this process's numbers; it warns of slow devices."""
        mine = {"numbers": self._mine(), "times": [vars(each) for each in times]}
        if jax.process_count() > 1:
            everywhere = [json.loads(text) for text in self._rounds.exchange(json.dumps(mine))]
            self._others = {key: value for each in everywhere for key, value in each["numbers"].items()}
            times = [DeviceTime(**each) for one in everywhere for each in one["times"]]
        for text in self._slow.observe(times):
            log.warning("%s", text, extra=event("slow_device"))


def _sources(devices: Sequence[Device]) -> dict[str, Callable[[], Source]]:
    sources: dict[str, Callable[[], Source]] = {"the host": HostUsage}
    gpus = {device.id: device.local_hardware_id for device in devices if device.platform in ("gpu", "cuda")}
    return sources | ({"NVML": functools.partial(GpuHealth, gpus)} if gpus else {})
