"""NCCL's own choice of algorithm and protocol, by its environment variables. Imports no JAX.

NCCL reads them when its first communicator starts, so they must be set before a run's first step.
"""

import os
from collections.abc import Mapping

from jaxtrain.errors import ConfigError

_VARIABLES = {"NCCL_ALGO": "nccl_algo", "NCCL_PROTO": "nccl_protocol"}


def set_nccl(algorithm: str, protocol: str) -> None:
    """Sets the variables that `layout.nccl_algo` and `layout.nccl_protocol` stand for; `auto` sets none.

    Raises:
      ConfigError: the environment says something else.
    """
    for (variable, field), value in zip(_VARIABLES.items(), (algorithm, protocol), strict=True):
        if value == "auto":
            continue
        if os.environ.setdefault(variable, value).lower() != value:
            raise ConfigError(
                f"config.layout.{field}={value!r}: the environment has {variable}={os.environ[variable]}; unset it, or leave "
                "the field out."
            )


def chosen(environment: Mapping[str, str] = os.environ) -> str:
    """What the environment tells NCCL, such as "NCCL_ALGO=ring"; "" where NCCL chooses."""
    return ", ".join(f"{variable}={environment[variable]}" for variable in _VARIABLES if variable in environment)
