"""When processes of this host were started. Imports no JAX."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_IMPORTED = time.time()


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
