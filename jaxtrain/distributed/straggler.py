"""Which process holds the others up: each tells how long its own part of a step takes, and nobody waits to hear it."""

from __future__ import annotations

import dataclasses
import json
import socket
import statistics
from collections.abc import Sequence

from jaxtrain.distributed import coordination

EVERY = 100  # steps between two tellings, at most
IMBALANCE = 1.3
IMBALANCE_SECONDS = 2e-3  # less than this a step nobody would feel


@dataclasses.dataclass(frozen=True)
class ProcessTime:
    """Seconds a step that process `process` on `host` spent on its own: its input, and the host's work."""

    process: int
    host: str
    seconds: float


class ProcessTimes:
    """Made and used by all processes alike."""

    def __init__(self) -> None:
        self._word = coordination.unique_key("paces") if coordination.count() > 1 else ""
        self._tellings = 0

    def tell(self, seconds: float) -> list[ProcessTime]:
        """Tells this process's pace. Process 0 gets what all have told the time before, once all have; others get []."""
        if not self._word:
            return []
        own = ProcessTime(coordination.index(), socket.gethostname(), seconds)
        coordination.kv_set(f"{self._word}/{self._tellings}/{own.process}", json.dumps(dataclasses.asdict(own)))
        self._tellings += 1
        if own.process or self._tellings == 1:
            return []
        before = f"{self._word}/{self._tellings - 2}/"
        try:
            told = [ProcessTime(**json.loads(text)) for text in coordination.kv_list(before).values()]
        except RuntimeError:  # the run is ending
            return []
        coordination.kv_delete(before)
        return sorted(told, key=lambda pace: pace.process) if len(told) == coordination.count() else []


def imbalanced(paces: Sequence[ProcessTime]) -> str:
    """One process takes more than 1.3 times as long for its own part of a step as the others, and 2 ms longer.

    The whole step's time will not do: collectives make every process wait for the slowest, so all have the same.
    """
    if len(paces) < 2:
        return ""
    slow = max(paces, key=lambda pace: pace.seconds)
    # the median of the others: of two processes, the slow one would be half of its own yardstick
    others = statistics.median(pace.seconds for pace in paces if pace is not slow)
    if slow.seconds <= max(IMBALANCE * others, others + IMBALANCE_SECONDS):
        return ""
    ratio = f"{slow.seconds / others:.1f} times" if others else "and not"
    return (
        f"imbalanced: process {slow.process} on {slow.host} needs {slow.seconds:.3g} s for its part of a step, {ratio} the "
        f"{others:.3g} s of the others; look for other programs, a slower disk or fewer CPUs on that host."
    )
