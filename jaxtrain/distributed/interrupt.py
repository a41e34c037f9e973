"""Ctrl-C and SIGTERM ask a run to save and stop; a second signal stops it at once.

Of several processes none may stop alone: the others would wait for it in a collective. So all processes count the same
points of the run, one between any two programs that they run together (`Interrupt.poll`). When one process gets a signal, a
thread of each process learns of it and shares how many points its process has passed. All stop at the first point that none
has passed. (JAX's own preemption service knows no evaluations, no Ctrl-C and no second signal.)
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

_LISTEN_SECONDS = 0.3  # between two looks at the messages
_REQUESTS_A_SECOND = 2000  # of all processes together; process 0 answered 2,800 on two busy cores
_AGREE_SECONDS = 20.0  # in which all processes must share their points
_OWN_ERROR_SECONDS = 1.0  # in which a process can end by its own error, after another one has failed
_EXIT_WAIT_SECONDS = 3.5  # that process 0 waits at most for the others to end before it, if all are alive
_EXIT_SECONDS = 0.2  # from the announcement of a process's exit to its end

Leave = Callable[[JaxtrainError], None]
_starts = itertools.count()  # every process starts the same runs in the same order


class Interrupt:
    """Whether the run should stop."""

    def __init__(self, leave: Leave | None = None) -> None:
        """leave: ends the process at once, from any thread. Without it the run stops when it can."""
        self.signal: signal.Signals | None = None
        self.kept = "the last checkpoint is as it was"  # what is said of a run that is stopped at once
        self.leave = leave
        self._lock = threading.Lock()
        self._points = 0  # passed so far
        self._stop_at = 0  # the point where all stop; 0 until it is known
        self._agreed = threading.Event()
        self._folder = ""  # of this start's keys; '' until it is connected
        self._closed = threading.Event()
        self._listener: threading.Thread | None = None

    def poll(self) -> bool:
        """Whether all stop here. Every process must call it between any two programs that run on all."""
        with self._lock:
            self._points += 1
            if self.signal is None:
                return False
        if not self._agreed.wait(_AGREE_SECONDS):
            raise PeerError(f"The processes could not agree within {_AGREE_SECONDS:.0f} s where to stop.")
        return self._points >= self._stop_at

    def error(self, text: str) -> JaxtrainError:
        """The error to raise once the run is saved; its exit code depends on the signal."""
        return (InterruptedRunError if self.signal == signal.SIGINT else PreemptedError)(text)

    def connect(self) -> None:
        """Starts to listen to the other processes. Does nothing in a run of one process, or a second time."""
        if self._folder or coordination.count() == 1:
            return
        self._folder = f"jaxtrain/start {next(_starts)}"
        self._listener = threading.Thread(target=self._listen, name="interrupts of other processes", daemon=True)
        self._listener.start()

    def ends(self, failure: BaseException | None = None) -> None:
        """Call it before this process ends early. It sends the failure to the others; None where all have agreed to stop."""
        if not self._folder:
            return
        lost = isinstance(failure, PeerError)
        if failure is not None:
            text = str(failure) or type(failure).__name__
            self._send(
                "failed", {"process": coordination.index(), "host": socket.gethostname(), "text": text, "lost": lost}
            )
        self._announce_exit(lost)

    def close(self) -> None:
        """Stops the thread that listens."""
        self._closed.set()
        if self._listener is not None:
            self._listener.join()  # the interpreter must not end during its request

    # ---------------------------------------------------------------------------------------------- in other threads

    def asked(self, number: signal.Signals, times: int) -> None:
        """Handles a signal to this process, its `times`-th."""
        if times > 1:
            self.signal = self.signal or number
            self._leave(f"Stopped at once; {self.kept}.")
            return
        if self._folder:
            self._send("stop", {"signal": number})
        self._stop(number)

    def _stop(self, number: signal.Signals) -> None:
        """Agrees with the other processes where to stop, once."""
        with self._lock:
            if self.signal is not None:
                return
            self.signal, next_point = number, self._points + 1  # `poll` takes the lock: no point is passed meanwhile
        points = [str(next_point)]
        if self._folder:
            points = coordination.allgather_str(f"{self._folder}/stop at", points[0], _AGREE_SECONDS)
        self._stop_at = max(map(int, points))
        self._agreed.set()
        if self._stop_at == 1:
            if self._folder:
                self._announce_exit()
            self._leave(f"Stopped before the first step of this start; {self.kept}.")

    def _leave(self, text: str) -> None:
        if self.leave is not None:
            self.leave(self.error(text))

    def _announce_exit(self, lost: bool = False) -> None:
        """Tells the others that this process is about to end.

        Process 0 then waits for the others, since it keeps the messages, and JAX aborts a process that loses process 0. It
        waits less where some process is `lost`.
        """
        coordination.kv_set(f"{self._folder}/exits/{coordination.index()}", "")
        if coordination.index() == 0:
            until = time.monotonic() + (_OWN_ERROR_SECONDS if lost else _EXIT_WAIT_SECONDS)
            while (
                len(coordination.kv_list(f"{self._folder}/exits/")) < coordination.count() and time.monotonic() < until
            ):
                time.sleep(0.05)
            time.sleep(_EXIT_SECONDS)

    def _send(self, kind: str, message: dict[str, Any]) -> None:
        coordination.kv_set(f"{self._folder}/messages/{kind}", json.dumps(message))

    def _listen(self) -> None:
        pause = max(_LISTEN_SECONDS, coordination.count() / _REQUESTS_A_SECOND)
        while not self._closed.wait(pause):
            try:
                messages = coordination.kv_list(f"{self._folder}/messages/")
            except RuntimeError as error:  # process 0 is gone
                text = f"Process 0 of this run ended or does not answer ({str(error).splitlines()[0]})."
                self._peer_failed(text, lost=True)
                return
            failure = json.loads(messages.get("failed", "null"))
            if failure and failure["process"] != coordination.index():
                self._peer_failed(
                    f"Process {failure['process']} on {failure['host']} failed: {failure['text']}", failure["lost"]
                )
                return
            if "stop" in messages:
                self._stop(signal.Signals(json.loads(messages["stop"])["signal"]))

    def _peer_failed(self, text: str, lost: bool) -> None:
        # A process that has agreed to stop is about to end by itself.
        seconds = _OWN_ERROR_SECONDS if self.signal is None else _AGREE_SECONDS
        if self.leave is not None and not self._closed.wait(seconds):
            self._announce_exit(lost)
            self.leave(PeerError(text))


@contextlib.contextmanager
def catch_signals(leave: Leave | None = None) -> Iterator[Interrupt]:
    """Catches SIGINT and SIGTERM inside the block; only the main thread can. leave: see `Interrupt`.

    A thread reads the signals from a pipe, so that they are handled while the main thread compiles or waits for another
    process.
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
        # The thread handles it. Without `leave` the second signal has Python's usual effect. (Not the handlers from before:
        # a shell lets a background job ignore Ctrl-C. Counted here: the thread may have handled the first one already.)
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
