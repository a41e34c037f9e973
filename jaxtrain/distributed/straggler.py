"""Finds the process that slows the others down: each shares its own time for a step, and none waits for the answers."""

from __future__ import annotations

import dataclasses
import json
import socket
import statistics
from collections.abc import Sequence

from jaxtrain.distributed import coordination
from jaxtrain.distributed.rounds import Rounds

EVERY = 100  # steps between two exchanges, at most
IMBALANCE = 1.3
IMBALANCE_SECONDS = 2e-3  # a smaller difference in a step's time does not matter


@dataclasses.dataclass(frozen=True)
class ProcessTime:
    """Seconds a step that `process` on `host` spends on its own work: its input, and what the host does."""

    process: int
    host: str
    seconds: float


class ProcessTimes:
    """Exchanges the times. All processes make one and use it alike."""

    def __init__(self) -> None:
        self._rounds = Rounds("step times")

    def exchange(self, seconds: float) -> list[ProcessTime]:
        """Stores this process's time, in seconds a step.

        Returns the times of all processes in the round before, by process, on process 0; see `Rounds.exchange`.
        """
        mine = ProcessTime(coordination.index(), socket.gethostname(), seconds)
        texts = self._rounds.exchange(json.dumps(dataclasses.asdict(mine)))
        return sorted((ProcessTime(**json.loads(text)) for text in texts), key=lambda time: time.process)


def imbalanced(times: Sequence[ProcessTime]) -> str:
    """A warning where one process's own part of a step takes over 1.3 times as long as the others', and 2 ms longer.

    The time of the whole step does not show it: in collectives every process waits for the slowest, so all have the same.
    """
    if len(times) < 2:
        return ""
    slow = max(times, key=lambda time: time.seconds)
    # The median of the others: of two processes, the slow one would be half of what it is compared with.
    others = statistics.median(time.seconds for time in times if time is not slow)
    if slow.seconds <= max(IMBALANCE * others, others + IMBALANCE_SECONDS):
        return ""
    ratio = f"{slow.seconds / others:.1f} times" if others else "and not"
    return (
        f"imbalanced: process {slow.process} on {slow.host} needs {slow.seconds:.3g} s for its part of a step, {ratio} the "
        f"{others:.3g} s of the others; look for other programs, a slower disk or fewer CPUs on that host."
    )
