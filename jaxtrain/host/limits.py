"""What the system refuses this process: files, memory, threads."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator

from jaxtrain.errors import EnvironmentMismatchError, JaxtrainError


@contextlib.contextmanager
def limits_named() -> Iterator[None]:
    """Raises `explained` errors in the block's place."""
    try:
        yield
    except Exception as error:
        known = explained(error)
        if known is error:
            raise
        raise known from error


def explained(error: Exception) -> Exception:
    """`EnvironmentMismatchError` where `error`, or what it came from, is a limit of the system; else `error` itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(error, JaxtrainError):
        number = cause.errno if isinstance(cause, OSError) else None
        if number in (errno.EMFILE, errno.ENFILE):
            return EnvironmentMismatchError(
                f"This process may open no more files (ulimit -n is {_limit(resource.RLIMIT_NOFILE)}): raise that, or "
                "lower config.data.workers."
            )
        no_thread = isinstance(cause, RuntimeError) and "can't start new thread" in str(cause)
        if isinstance(cause, MemoryError) or number in (errno.ENOMEM, errno.EAGAIN) or no_thread:
            limits = f"ulimit -v is {_limit(resource.RLIMIT_AS)}, ulimit -u is {_limit(resource.RLIMIT_NPROC)}"
            return EnvironmentMismatchError(
                f"The system gives this process no more memory or threads ({cause}; {limits}): raise these limits, or those of "
                "its container."
            )
        cause = cause.__cause__ or cause.__context__
    return error


def _limit(kind: int) -> str:
    soft, _ = resource.getrlimit(kind)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
