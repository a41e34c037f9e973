"""The CPUs that this process may use. Imports no JAX."""

import os


def usable_cpus() -> int:
    """How many CPUs this process may use: a scheduler may give it only a part of the host's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
