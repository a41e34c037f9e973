"""Server-sent events: what is new in the overview, and which files of one run have changed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from jaxtrain.dashboard.runs_index import RunsIndex

MOST_STREAMS = 32

_LOOK_SECONDS = 0.25
_ALIVE_SECONDS = 5.0


class Streams:
    """The streams that are open."""

    def __init__(self, index: RunsIndex):
        """Of the changes that `index` sees."""
        self._index, self._open, self._closing = index, 0, False

    @property
    def full(self) -> bool:
        """Whether no more may be opened."""
        return self._open >= MOST_STREAMS

    def close(self) -> None:
        """Ends all of them."""
        self._closing = True

    async def events(self, run: str) -> AsyncIterator[bytes]:
        """What is new from now on.

        run: whose files are looked at; "" for none.
        """
        self._open += 1
        try:
            version = self._index.since(-1).version
            yield _event("hello", {"time": time.time()})
            said = time.monotonic()
            while not self._closing:
                await asyncio.sleep(_LOOK_SECONDS)
                changes = self._index.since(version)
                topics = self._index.topics(run, version) if run else []
                if changes.rows or changes.gone:
                    rows = [dataclasses.asdict(row) for row in changes.rows]
                    news = {"rows": rows, "gone": changes.gone, "scanning": changes.scanning, "time": time.time()}
                    yield _event("runs", news)
                if topics:
                    yield _event("changed", {"id": run, "what": topics})
                if changes.rows or changes.gone or topics:
                    said = time.monotonic()
                elif time.monotonic() - said > _ALIVE_SECONDS:
                    said = time.monotonic()
                    yield b": alive\n\n"
                version = changes.version
        finally:
            self._open -= 1


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()
