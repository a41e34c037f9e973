"""Processes of this host: when they were started, which signals stop a run, who ends with whom. Imports no JAX."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

STOPPING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a run to save and stop, besides Ctrl-C: of a scheduler, and of a terminal that is closed."""

LAUNCHER = "JAXTRAIN_LAUNCHER"
"""Set by `jaxtrain launch` for the processes that it starts: its process number."""

_PR_SET_PDEATHSIG = 1

_IMPORTED = time.time()


_PARENT = str(Path(__file__).resolve().parents[2])


def package_command(code: str) -> list[str]:
    """A command line that runs `code` with this same package, wherever it is installed, and `sys` at hand.

    Not by `-m`, which would search the current directory first.
    """
    return [sys.executable, "-P", "-c", f"import sys; sys.path.append({_PARENT!r}); {code}"]


def boot_id() -> str:
    """The kernel's identifier of the host's present boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def start_ticks(pid: int) -> str:
    """When the process was started, in clock ticks since boot; '' where there is no such process, or no /proc.

    With its number it identifies a process: the kernel gives the numbers of ended processes to new ones.
    """
    try:
        # The name, in parentheses, may hold spaces; the start is field 22, and what follows the name begins with field 3.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def start_time() -> float:
    """When this process was started, in seconds since 1970. Where the system does not say: when this module was imported."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - int(start_ticks(os.getpid())) / os.sysconf("SC_CLK_TCK"))
    return _IMPORTED


def end_with_launcher() -> None:
    """Call this first in a process of `jaxtrain launch`: as `end_with`."""
    end_with(int(os.environ[LAUNCHER]))


def end_with(parent: int) -> None:
    """When the process `parent`, which has started this one, dies, this one gets SIGTERM, at any moment.

    If it is dead already, the process ends here.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(128 + signal.SIGTERM)
