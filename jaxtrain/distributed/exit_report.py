"""How a process tells why it ends: a file for the supervisor, a word for the other processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
import traceback
from pathlib import Path

from jaxtrain.errors import JaxtrainError, PeerError

ERROR_FILE = "JAXTRAIN_ERROR_FILE"  # set by `jaxtrain launch`, for each process its own

# What XLA, gloo, NCCL and the coordination service say where another process is gone.
_PEER_GONE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Gloo", "NCCL", "heartbeat",
    "coordination service", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Socket closed", "Connection refused",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ExitReport:
    """Why a process ended. error: the class's name. retry: whether the same start may go well another time."""

    process: int
    host: str
    pid: int
    time: float
    code: int
    error: str
    message: str
    retry: bool
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException, process: int) -> ExitReport:
        """What is to be said of `error`."""
        known = isinstance(error, JaxtrainError)
        return cls(
            process=process,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=time.time(),
            code=error.exit_code if known else 70,
            error=type(error).__name__,
            message=str(error) or type(error).__name__,
            retry=error.retry if known else True,
            trace="" if known else "".join(traceback.format_exception(error)),
        )

    def write(self) -> None:
        """Into the supervisor's file, if there is one; the first report of a process stays."""
        path = os.environ.get(ERROR_FILE)
        if not path:
            return
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(self)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_report(path: Path) -> ExitReport | None:
    """What a process wrote; None where it wrote nothing, or was killed while it did."""
    try:
        return ExitReport(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def as_peer_error(error: BaseException) -> BaseException:
    """`PeerError` where `error` says that another process is gone, else `error`. For runs of several processes."""
    text = str(error)
    if isinstance(error, JaxtrainError) or not any(sign in text for sign in _PEER_GONE):
        return error
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return error
    first = (text.splitlines() or [""])[0]
    return PeerError(f"Another process of this run ended or does not answer ({first[:200]}).")
