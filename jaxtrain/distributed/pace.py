"""Which process holds the others up: each tells how long its own part of a step takes, and nobody waits to hear it."""

from __future__ import annotations

import dataclasses
import json
import socket

from jaxtrain.distributed import processes

EVERY = 100  # steps between two tellings, at most


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds a step that process `process` on `host` spent on its own: its input, and the host's work."""

    process: int
    host: str
    seconds: float


class Paces:
    """Made and used by all processes alike."""

    def __init__(self) -> None:
        self._word = processes.next_word("paces") if processes.count() > 1 else ""
        self._tellings = 0

    def tell(self, seconds: float) -> list[Pace]:
        """Tells this process's pace. Process 0 gets what all have told the time before, once all have; others get []."""
        if not self._word:
            return []
        own = Pace(processes.index(), socket.gethostname(), seconds)
        processes.publish(f"{self._word}/{self._tellings}/{own.process}", json.dumps(dataclasses.asdict(own)))
        self._tellings += 1
        if own.process or self._tellings == 1:
            return []
        before = f"{self._word}/{self._tellings - 2}/"
        try:
            told = [Pace(**json.loads(text)) for text in processes.said(before).values()]
        except RuntimeError:  # the run is ending
            return []
        processes.forget(before)
        return sorted(told, key=lambda pace: pace.process) if len(told) == processes.count() else []
