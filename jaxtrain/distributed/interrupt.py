"""Ctrl-C and SIGTERM ask a run to save and stop; a second one stops it at once.

Of several processes none may stop alone, or the others wait for it in a collective. So all count the same points of the
run, one between any two programs that they run together (`Interrupt.poll`). A thread of each process hears that one of them
was told to stop, says how far its own process has come, and all stop at the first point that none has passed. (JAX's own
preemption service knows no evaluations, no Ctrl-C and no second signal.)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxtrain.distributed import coordination
from jaxtrain.errors import InterruptedRunError, JaxtrainError, PeerError, PreemptedError

_LISTEN_SECONDS = 0.3
_QUESTIONS_A_SECOND = 2000  # of all processes together; process 0 answered 2,800 on two busy cores
_AGREE_SECONDS = 20.0
_LAST_WORDS_SECONDS = 1.0  # that a process gets to end by its own error after another one has failed
_FAREWELL_SECONDS = 3.5  # that process 0 waits at most for the others to end before it, if all are alive
_EXIT_SECONDS = 0.2  # from a process's farewell to its end

Leave = Callable[[JaxtrainError], None]
_starts = itertools.count()  # every process starts the same runs in the same order


class Interrupt:
    """Whether the run should stop. leave: ends the process at once, from any thread; without it the run stops when it can."""

    def __init__(self, leave: Leave | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.leave = leave
        self._lock = threading.Lock()
        self._points = 0  # passed so far
        self._stop_at = 0  # the point where all stop; 0 while it is not known
        self._agreed = threading.Event()
        self._words = ""  # before those of this run; '' until it is connected
        self._closed = threading.Event()
        self._listener: threading.Thread | None = None

    def poll(self) -> bool:
        """To be called by every process alike, between programs that run on all: whether all stop here."""
        with self._lock:
            self._points += 1
            if self.signal is None:
                return False
        if not self._agreed.wait(_AGREE_SECONDS):
            raise PeerError(f"The processes could not agree within {_AGREE_SECONDS:.0f} s where to stop.")
        return self._points >= self._stop_at

    def error(self, text: str) -> JaxtrainError:
        """What to raise once the run is saved: its exit code says which signal it was."""
        return (InterruptedRunError if self.signal == signal.SIGINT else PreemptedError)(text)

    def connect(self) -> None:
        """From now on hears what the other processes are told. Does nothing in a run of one process, or a second time."""
        if self._words or coordination.count() == 1:
            return
        self._words = f"jaxtrain/start {next(_starts)}"
        self._listener = threading.Thread(target=self._listen, name="listens to the others", daemon=True)
        self._listener.start()

    def ends(self, failure: BaseException | None = None) -> None:
        """Before this process ends early: tells the others of its failure, None where all have agreed to stop."""
        if not self._words:
            return
        lost = isinstance(failure, PeerError)
        if failure is not None:
            text = str(failure) or type(failure).__name__
            self._say(
                "failed", {"process": coordination.index(), "host": socket.gethostname(), "text": text, "lost": lost}
            )
        self._farewell(lost)

    def close(self) -> None:
        """Listens no more."""
        self._closed.set()
        if self._listener is not None:
            self._listener.join()  # the interpreter must not end while it asks

    # ---------------------------------------------------------------------------------------------- in other threads

    def asked(self, number: signal.Signals, times: int) -> None:
        """This process got a signal, for the `times`-th time."""
        if times > 1:
            self.signal = self.signal or number
            self._go("Stopped at once; the last checkpoint is as it was.")
            return
        if self._words:
            self._say("stop", {"signal": number})
        self._stop(number)

    def _stop(self, number: signal.Signals) -> None:
        """Agrees with the other processes where to stop, once."""
        with self._lock:
            if self.signal is not None:
                return
            self.signal, mine = number, self._points + 1  # the main thread cannot pass the next point unseen
        all_points = (
            coordination.allgather_str(f"{self._words}/stop at", str(mine), _AGREE_SECONDS) if self._words else [mine]
        )
        at = max(map(int, all_points))
        self._stop_at = at
        self._agreed.set()
        if at == 1:
            if self._words:
                self._farewell()
            self._go("Stopped before the first step of this start; the checkpoints are as they were.")

    def _go(self, text: str) -> None:
        if self.leave is not None:
            self.leave(self.error(text))

    def _farewell(self, lost: bool = False) -> None:
        """Says that this process is about to end. Process 0 waits for the others, not for long if some process is `lost`.

        The words go through process 0, and JAX aborts a process that loses it.
        """
        coordination.kv_set(f"{self._words}/farewell/{coordination.index()}", "")
        if coordination.index() == 0:
            until = time.monotonic() + (_LAST_WORDS_SECONDS if lost else _FAREWELL_SECONDS)
            while (
                len(coordination.kv_list(f"{self._words}/farewell/")) < coordination.count()
                and time.monotonic() < until
            ):
                time.sleep(0.05)
            time.sleep(_EXIT_SECONDS)

    def _say(self, word: str, said: dict[str, Any]) -> None:
        coordination.kv_set(f"{self._words}/said/{word}", json.dumps(said))

    def _listen(self) -> None:
        pause = max(_LISTEN_SECONDS, coordination.count() / _QUESTIONS_A_SECOND)
        while not self._closed.wait(pause):
            try:
                said = coordination.kv_list(f"{self._words}/said/")
            except RuntimeError as error:  # process 0 is gone
                text = f"Process 0 of this run ended or does not answer ({str(error).splitlines()[0]})."
                self._peer_failed(text, lost=True)
                return
            if "failed" in said and (what := json.loads(said["failed"]))["process"] != coordination.index():
                self._peer_failed(f"Process {what['process']} on {what['host']} failed: {what['text']}", what["lost"])
                return
            if "stop" in said:
                self._stop(signal.Signals(json.loads(said["stop"])["signal"]))

    def _peer_failed(self, text: str, lost: bool) -> None:
        # One that has agreed to stop is about to end by itself.
        seconds = _LAST_WORDS_SECONDS if self.signal is None else _AGREE_SECONDS
        if self.leave is not None and not self._closed.wait(seconds):
            self._farewell(lost)
            self.leave(PeerError(text))


@contextlib.contextmanager
def catch_signals(leave: Leave | None = None) -> Iterator[Interrupt]:
    """Catches SIGINT and SIGTERM inside the block; only the main thread can. leave: see `Interrupt`.

    A thread of its own reads them, so that they are heard while the main thread compiles or waits for another process.
    """
    interrupt = Interrupt(leave)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        interrupt.close()
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def listen() -> None:
        times = 0
        for number in iter(lambda: os.read(reader, 1), b""):
            if number[0] in numbers:
                times += 1
                interrupt.asked(signal.Signals(number[0]), times)

    handled = itertools.count(1)

    def handle(number: int, _: object) -> None:
        # The thread has it. Without `leave` the second one is for whoever called: the handlers from before, but for a
        # shell's, which has a background job ignore Ctrl-C. (Counted here: the thread may be through with the first already.)
        if leave is None and next(handled) > 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(number)

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, handle)
    thread.start()
    try:
        yield interrupt
    finally:
        interrupt.close()
        restore()
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        thread.join(1.0)
        os.close(reader)
