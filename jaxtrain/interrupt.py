"""Ctrl-C and SIGTERM ask a run to stop at the next step; a second one stops it at once.

Of several processes none may stop alone, or the others wait for it. There JAX takes the SIGTERM that any of them gets, and
all stop at the step that its coordination service names; Ctrl-C, which a terminal sends to all, stops them at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from jaxtrain.errors import InterruptedRunError, JaxtrainError, PreemptedError


class Interrupt:
    """`asked` becomes true on the first signal; from then on a signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def asked(self) -> bool:
        """Whether the run should save and stop."""
        return self.signal is not None

    def poll(self, step: int) -> None:
        """To be called after every step: asks whether another process was told to stop."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM

    def error(self, text: str) -> JaxtrainError:
        """What to raise once the run is saved: its exit code says which signal it was."""
        return (PreemptedError if self.signal == signal.SIGTERM else InterruptedRunError)(text)


@contextlib.contextmanager
def catch_signals() -> Iterator[Interrupt]:
    """Catches SIGINT and SIGTERM inside the block, in a run of one process; only the main thread can."""
    interrupt = Interrupt()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: FrameType | None) -> None:
        interrupt.signal = signal.Signals(number)
        # not the handlers from before: a shell has a background job ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
