"""All of XLA's flags that a run sets. They have an effect only before JAX's backend starts. Imports no JAX.

Flags that the user has set in `XLA_FLAGS` win. docs/xla_flags.md says what each is for, and what it gained when measured. A
flag that jaxlib does not know ends the process when it first uses a device, so each is tested with every supported jaxlib.
"""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Mapping

from jaxtrain.errors import ConfigError
from jaxtrain.host.gpus import device_files, visible_gpus

COLLECTIVE_SECONDS = 600  # after which a collective fails that another process does not join

# For more than one GPU: without it XLA:GPU computes nothing while a collective runs.
SEVERAL_GPUS: Mapping[str, object] = {"xla_gpu_enable_latency_hiding_scheduler": True}
SEVERAL_PROCESSES: Mapping[str, object] = {
    "xla_cpu_collective_timeout_seconds": COLLECTIVE_SECONDS,
    "xla_gpu_nccl_termination_timeout_seconds": COLLECTIVE_SECONDS,
    **SEVERAL_GPUS,
}
# XLA:CPU gives convolutions to YNNPACK, which computes many of them in one thread. With this flag it gives them to Eigen,
# which uses every core, but has no f64.
CPU_CONVOLUTIONS: Mapping[str, object] = {"xla_cpu_experimental_ynn_fusion_type": "-individual_convolution"}
# Autotuning chooses kernels by their measured time, so it is off too. What it costs: docs/troubleshooting.md.
DETERMINISTIC: Mapping[str, object] = {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}
_READ_FLAGS = "from jaxlib import xla_client; xla_client.CompileOptions().executable_build_options.debug_options"
_added: set[str] = set()  # to `XLA_FLAGS` by `set_flags`


def set_flags(flags: Mapping[str, object]) -> None:
    """Adds flags that the user has not set to `XLA_FLAGS`."""
    present = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.lstrip("-").partition("=")[0] for flag in present}
    more = [f"--{name}={str(value).lower()}" for name, value in flags.items() if name not in names]
    os.environ["XLA_FLAGS"] = " ".join(present + more)
    _added.update(more)


def refuse_unknown() -> None:
    """Raises `ConfigError` where jaxlib does not know a flag that the user has set in `XLA_FLAGS`, or not its value.

    jaxlib would end the process for it, without an exception. So another process, which loads little else, reads them first.
    """
    given = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in _added)
    if not given:
        return
    if why := _why_refused(given):
        raise ConfigError(f"XLA_FLAGS={given!r}: jaxlib refuses it ({why}); correct or unset it.")


@functools.cache
def _why_refused(flags: str) -> str:
    environment = os.environ | {"XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "0"}
    command = [sys.executable, "-P", "-c", _READ_FLAGS]
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    ).stderr
    refused = re.search(r"Unknown flag.*|Couldn't interpret value .*", said)
    return refused[0].strip().rstrip(".") if refused else ""


def for_run(precision: str, *, deterministic: bool = False) -> Mapping[str, object]:
    """The flags for a run with `train.precision` and `train.deterministic` on this host's devices."""
    return {
        **(SEVERAL_GPUS if visible_gpus() > 1 else {}),
        **(CPU_CONVOLUTIONS if precision != "f64" else {}),
        **(DETERMINISTIC if deterministic else {}),
    }


def hide_alarms(*, always: bool = False) -> None:
    """Keeps XLA's alarms about slow compilation off the terminal, unless the user has set $TF_CPP_MIN_LOG_LEVEL.

    XLA logs them as errors, so real errors of its log go too; what fails is raised as well. On a host with GPUs they stay,
    since they may say more than the exception, unless `always`. Call it before JAX is imported.
    """
    if always or not device_files():
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
