"""The CPUs that this process may use. Imports no JAX."""

import os
import platform
from pathlib import Path


def usable_cpus() -> int:
    """How many CPUs this process may use: a scheduler may give it only a part of the host's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name, or where the system does not say, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
