"""What native code writes past Python."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from jaxtrain.host.gpus import driver_missing


@contextlib.contextmanager
def native_stderr_dropped() -> Iterator[None]:
    """Drops what this process writes to standard error inside the context, libraries in C++ included."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def cuda_messages_dropped() -> contextlib.AbstractContextManager[None]:
    """Around what loads JAX or starts its devices: where CUDA's plugin is and NVIDIA's driver is not, drops what it says."""
    return native_stderr_dropped() if driver_missing() else contextlib.nullcontext()
