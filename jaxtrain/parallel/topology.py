"""Devices that are not there: those of a target, to compile for."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from jaxtrain.errors import ConfigError, EnvironmentMismatchError
from jaxtrain.host.native import native_stderr_dropped
from jaxtrain.host.targets import Target
from jaxtrain.parallel.mesh import Device

_PLUGINS = ("jax-cuda12-pjrt", "jax-cuda13-pjrt")


def target_devices(target: Target) -> list[Device]:
    """The target's devices, for `jax.jit(...).lower(...).compile()`: XLA's GPU compiler needs no GPU.

    Those of a CPU target are this process's, which must have so many (`jax_num_cpu_devices`).

    Raises:
      EnvironmentMismatchError: the compiler is not installed, or is that of another version of jaxlib.
      ConfigError: XLA does not take the target.
    """
    if target.platform == "cpu":
        return jax.devices("cpu")[: target.devices]
    if problem := compiler_problem():
        raise EnvironmentMismatchError(problem)
    topology = f"1x{target.hosts}x{target.per_host}"
    try:
        with native_stderr_dropped():  # the plugin says a dozen times that there is no driver
            described = topologies.get_topology_desc(platform="cuda", target_config=target.text, topology=topology)
            return list(described.devices)
    except Exception as error:  # XLA's own, of many kinds
        raise ConfigError(f"--target {target.name}: XLA does not take it: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def lowering_for(device: Device) -> Iterator[None]:
    """Inside the context, what is lowered may ask which GPU it is for, as Pallas does since jax 0.11."""
    if device.platform == "cpu" or "abstract_device" not in inspect.signature(jax.sharding.AbstractMesh).parameters:
        yield
        return
    abstract = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract)):
        yield


def compiler_problem() -> str:
    """Why XLA's GPU compiler, which is in JAX's CUDA plugin and must be of jaxlib's version, cannot be used; or ""."""
    wanted = importlib.metadata.version("jaxlib")
    found = {}
    for name in _PLUGINS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if wanted in found.values():
        return ""
    problem = "is not installed"
    if found:
        problem = (
            f"does not fit jaxlib {wanted}: {', '.join(f'{name} is {version}' for name, version in found.items())}"
        )
    cuda = 12 if sys.version_info < (3, 12) else 13
    return (
        f"XLA's GPU compiler, a part of JAX's CUDA plugin, {problem}. "
        f"It needs no GPU: pip install 'jax[cuda{cuda}-local]=={jax.__version__}' (480 MB)."
    )
