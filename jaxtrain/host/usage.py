"""How busy the host is, and how much memory this process has. The one module that knows psutil."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import psutil


class HostUsage:
    """Reads CPU, memory, disk and network; rates and shares are those since the reading before."""

    def __init__(self, timer: Callable[[], float] = time.monotonic, ps: Any = psutil):
        """Takes the first reading, which later ones are compared with.

        Args:
          timer: the clock, in seconds.
          ps: psutil, or what answers like it.
        """
        self._timer, self._ps, self._process = timer, ps, ps.Process()
        self._before = self._counters()

    def __call__(self) -> dict[str, float]:
        """The usage now, by name; without what the system does not say.

        Returns:
          `cpu` (share of all cores, in [0, 1]), `memory` (share in use), `process_cpu` (cores that this process kept busy),
          `process_memory` (resident bytes), and in bytes a second `disk_read`, `disk_write`, `network_received`,
          `network_sent`.
        """
        before, self._before = self._before, self._counters()
        grown = {name: value - before[name] for name, value in self._before.items() if name in before}
        usage = {
            "memory": self._ps.virtual_memory().percent / 100,
            "process_memory": float(self._process.memory_info().rss),
        }
        if total := grown["cpu_total"]:
            usage["cpu"] = grown["cpu_busy"] / total
        if seconds := grown["time"]:
            rates = grown.keys() - {"time", "cpu_total", "cpu_busy"}
            usage |= {name: grown[name] / seconds for name in sorted(rates)}
        return usage

    def _counters(self) -> dict[str, float]:
        """What only grows: seconds and bytes."""
        times = self._ps.cpu_times()._asdict()
        # Linux counts the time of guests as `user` and `nice` too.
        total = sum(seconds for name, seconds in times.items() if not name.startswith("guest"))
        idle = sum(seconds for name, seconds in times.items() if name in ("idle", "iowait"))
        own = self._process.cpu_times()
        found = {
            "time": self._timer(),
            "cpu_total": total,
            "cpu_busy": total - idle,
            "process_cpu": own.user + own.system,
        }
        with contextlib.suppress(OSError, RuntimeError):  # a container may hide them
            if disk := self._ps.disk_io_counters():
                found |= {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
        with contextlib.suppress(OSError, RuntimeError):
            if network := self._ps.net_io_counters():
                found |= {"network_received": network.bytes_recv, "network_sent": network.bytes_sent}
        return found
