"""Flags for bit-for-bit repeatable GPU programs. Imports no JAX: they count only before its backend starts."""

import os


def ask_for_determinism() -> None:
    """Adds XLA's flags to the environment. CPU programs are deterministic without them.

    Autotuning is off too, since it picks kernels by time. What it costs: docs/troubleshooting.md.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    wanted = ["--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0"]
    os.environ["XLA_FLAGS"] = " ".join(flags + [flag for flag in wanted if flag not in flags])
