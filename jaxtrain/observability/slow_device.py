"""Names the device that is slower than the others, from the times of a program that each computes alone."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

EVERY = 50
"""Steps between two probes: a device is named after two, and with several processes one later."""
SLOWER = 0.15
_DEVIATIONS = 4
_PROBES = 2


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """What a device needed for the probe."""

    device: int
    """Its number in the run, as of `jax.devices()`."""
    host: str
    seconds: float
    reason: str = ""
    """What NVML says of it: its clocks, and what slows them down."""


class SlowDevices:
    """Observes the rounds of a probe.

    A device is slow whose time is above the median of the others' by 15 % of it, and by four times their median absolute
    deviation. (The others': of two devices a slow one would be half of what it is compared with.) It is named after two
    rounds in a row, and again only when it was as fast as the others in between.
    """

    def __init__(self) -> None:
        self._slow_rounds: dict[int, int] = {}

    def observe(self, times: Sequence[DeviceTime]) -> list[str]:
        """A sentence for each device that is found slow by this round. times: of all devices, or of some."""
        found = []
        for time in times:
            others = [other.seconds for other in times if other is not time]
            if not others:
                continue
            middle = statistics.median(others)
            spread = statistics.median(abs(seconds - middle) for seconds in others)
            if time.seconds - middle <= max(SLOWER * middle, _DEVIATIONS * spread):
                self._slow_rounds[time.device] = 0
                continue
            rounds = self._slow_rounds.get(time.device, 0) + 1
            self._slow_rounds[time.device] = rounds
            if rounds == _PROBES:
                found.append(_sentence(time, middle))
        return found


def _sentence(time: DeviceTime, middle: float) -> str:
    return (
        f"slow device: device {time.device} on {time.host} needs {1e3 * time.seconds:.3g} ms for a program that it computes "
        f"alone, {time.seconds / middle - 1:.0%} more than the {1e3 * middle:.3g} ms of the others, in {_PROBES} probes in a "
        f"row; {time.reason or 'NVML gives no reason'}. All devices wait for it in every step."
    )
