"""Ctrl-C and SIGTERM ask a run to stop at the next step; a second one stops it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from jaxtrain.errors import InterruptedRunError, JaxtrainError, PreemptedError


class Interrupt:
    """`asked` becomes true on the first signal, which also gives the signals back to whoever had them before."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def asked(self) -> bool:
        """Whether the run should save and stop."""
        return self.signal is not None

    def error(self, text: str) -> JaxtrainError:
        """What to raise once the run is saved: its exit code says which signal it was."""
        return (PreemptedError if self.signal == signal.SIGTERM else InterruptedRunError)(text)


@contextlib.contextmanager
def catch_signals(enabled: bool) -> Iterator[Interrupt]:
    """Catches SIGINT and SIGTERM inside the block; only the main thread can, elsewhere (and without `enabled`) nothing is caught.

    With several processes the caller leaves them alone: processes that stop at different steps would wait for each other.
    """
    interrupt = Interrupt()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _: FrameType | None) -> None:
        interrupt.signal = signal.Signals(number)
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield interrupt
    finally:
        restore()
