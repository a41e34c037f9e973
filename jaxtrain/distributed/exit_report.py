"""Why a process ended: a report for the supervisor, and errors that say that another process is gone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
import traceback
from pathlib import Path

from jaxtrain.errors import JaxtrainError, PeerError

ERROR_FILE = "JAXTRAIN_ERROR_FILE"  # set by `jaxtrain launch`, for each process its own

# Parts of the messages of XLA, gloo, NCCL and the coordination service when another process is gone.
_PEER_GONE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Gloo", "NCCL", "heartbeat",
    "coordination service", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Socket closed", "Connection refused",
)  # fmt: skip

_XLA_STATUS = re.compile(r"(UNKNOWN|UNAVAILABLE|ABORTED|INTERNAL|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")


@dataclasses.dataclass(frozen=True)
class ExitReport:
    """Why a process ended."""

    process: int
    host: str
    pid: int
    time: float
    """Seconds since 1970."""
    code: int
    """The exit code."""
    error: str
    """The name of the error's class."""
    message: str
    retry: bool
    """Whether the same command may succeed another time."""
    trace: str = ""
    """The traceback of an error that jaxtrain did not raise on purpose."""

    @property
    def sentence(self) -> str:
        """Why it ended, on one line."""
        text = " ".join(self.message.split())
        return f"{self.error}: {text}" if self.trace else text

    @classmethod
    def of(cls, error: BaseException, process: int) -> ExitReport:
        """The report of a process that ends with `error`."""
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
        """Writes it to the supervisor's file, if there is a supervisor. The first report of a process stays."""
        path = os.environ.get(ERROR_FILE)
        if not path:
            return
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(self)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_report(path: Path) -> ExitReport | None:
    """What a process wrote; None where it wrote nothing, or was killed while it wrote."""
    try:
        return ExitReport(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def as_peer_error(error: BaseException) -> BaseException:
    """A `PeerError` where `error` means that another process is gone, else `error` itself. For runs of several processes."""
    text = str(error)
    if isinstance(error, JaxtrainError) or not any(part in text for part in _PEER_GONE):
        return error
    # Orbax raises what XLA says as a ValueError.
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError") and not _XLA_STATUS.match(text):
        return error
    first = (text.splitlines() or [""])[0]
    return PeerError(f"Another process of this run ended or does not answer ({first[:200]}).")
