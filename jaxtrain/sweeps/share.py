"""How the cores and GPUs of this machine are shared out to runs that run side by side."""

from __future__ import annotations

import dataclasses
import os

from jaxtrain.distributed.supervisor import share
from jaxtrain.errors import ConfigError
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.host.gpus import device_files


@dataclasses.dataclass(frozen=True)
class Share:
    """What one worker may use."""

    cpus: tuple[int, ...] = ()
    """(): all."""
    gpus: tuple[str, ...] = ()
    """As `CUDA_VISIBLE_DEVICES` names them; (): all that are visible."""


def shares(jobs: int, num_devices: int) -> list[Share]:
    """A share for each of `jobs` workers; a single one has everything.

    Args:
      jobs: how many.
      num_devices: GPUs of each; 0 divides all evenly.

    Raises:
      ConfigError: there are fewer cores or GPUs than workers.
    """
    if jobs == 1:
        return [Share()]
    cpus, gpus = _cpus(), _gpus()
    if jobs > len(cpus):
        raise ConfigError(f"jobs={jobs}: this process may use {len(cpus)} CPUs; choose at most as many.")
    groups = share(gpus, jobs, num_devices)
    if gpus and len(groups) < jobs:
        raise ConfigError(
            f"jobs={jobs}: there are {len(gpus)} GPUs, for {len(gpus) // max(num_devices, 1)} runs of {max(num_devices, 1)}; "
            "runs that share a GPU would take each other's memory."
        )
    edges = [len(cpus) * number // jobs for number in range(jobs + 1)]
    return [
        Share(tuple(cpus[edges[number] : edges[number + 1]]), groups[number] if gpus else ()) for number in range(jobs)
    ]


def _cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(usable_cpus()))


def _gpus() -> list[str]:
    """Names of the GPUs that are visible, as `CUDA_VISIBLE_DEVICES` has them; none where JAX is told to use the CPU."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(device_files())]
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
