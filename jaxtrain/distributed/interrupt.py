"""Ctrl-C, SIGTERM and SIGHUP ask a run to save and stop; a second signal stops it at once.

Of several processes none may stop alone: the others would wait for it in a collective. So all processes count the same
points of the run, one between any two programs that they run together (`Interrupt.poll`). When one process gets a signal, a
thread of each process learns of it and shares how many points its process has passed. All stop at the first point that none
has passed. (JAX's own preemption service knows no evaluations, no Ctrl-C and no second signal.)
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from jaxtrain.distributed import coordination, peers
from jaxtrain.distributed.exit_report import as_peer_error
from jaxtrain.distributed.peers import Message, Peers
from jaxtrain.errors import InterruptedRunError, JaxtrainError, PeerError, PreemptedError
from jaxtrain.host.processes import STOPPING

_AGREE_SECONDS = 20.0  # in which all processes must share their points
_OWN_ERROR_SECONDS = 1.0  # in which a process can end by its own error, after another one has failed
_HEAR_SECONDS = 0.5  # in which a process hears that its error is the echo of another one's
_ECHO_SECONDS = 3.0  # the same where the error itself says so; fewer than the launcher waits for the reports of all

Leave = Callable[[JaxtrainError], None]
_starts = itertools.count()  # every process starts the same runs in the same order


class Interrupt:
    """Whether the run should stop."""

    def __init__(self, leave: Leave | None = None) -> None:
        """leave: ends the process at once, from any thread. Without it the run stops when it can."""
        self.signal: signal.Signals | None = None
        self.kept = "the last checkpoint is as it was"  # what is said of a run that is stopped at once
        self.leave = leave and functools.partial(self._say_and_leave, leave)
        self.last_words: Callable[[BaseException], None] = lambda error: None  # called before `leave`
        self._lock = threading.Lock()
        self._points = 0  # passed so far
        self._stop_at = 0  # the point where all stop; 0 until it is known
        self._agreed = threading.Event()
        self._peers: Peers | None = None  # until it is connected
        self._start = ""  # which one of this process this is
        self._closed = threading.Event()
        self._cause: BaseException | None = None  # of the end, once it is known

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
        if self._peers is None and (others := peers.connected()) is not None:
            self._peers, self._start = others, f"start {next(_starts)}"
            others.listen(self._heard)

    def cause(self, raised: BaseException) -> BaseException:
        """Why the run really ends, where it raised `raised`: `raised` itself, or an error in its place.

        That is a `PeerError` where another process has failed or ended before. What a user's code raises to end the process
        is an error too: the run is not done. The answer to the first call stays.
        """
        if self._cause is None:
            self._cause = self._find_cause(raised)
        return self._cause

    def _find_cause(self, raised: BaseException) -> BaseException:
        seconds = _ECHO_SECONDS if isinstance(as_peer_error(raised), PeerError) else _HEAR_SECONDS
        if isinstance(raised, JaxtrainError):
            # What it was raised from may be the echo of a process that was lost: a save or a read that failed, say.
            if self._peers is not None and raised.__cause__ and (why := self._peers.failure(seconds, ["lost"])):
                return PeerError(why)
            return raised
        if self._peers is not None and (why := self._peers.failure(seconds)):
            return PeerError(why)
        if isinstance(raised, KeyboardInterrupt):
            return InterruptedRunError(f"Stopped at once; {self.kept}.")
        if isinstance(raised, SystemExit):
            text = f"sys.exit({raised.code!r}) was called in the middle of the run"
            return RuntimeError(text).with_traceback(raised.__traceback__)
        return as_peer_error(raised) if self._peers is not None else raised

    def ends(self, failure: BaseException | None = None) -> None:
        """Call it before this process ends early. It sends the failure to the others; None where all have agreed to stop."""
        if self._peers is None:
            return
        mine = coordination.index()
        if failure is None:
            self._peers.send(Message("done", mine, start=self._start, signal=self.signal or 0))
            return
        text = str(failure) or type(failure).__name__
        if not isinstance(failure, PeerError):
            text = f"Process {mine} on {socket.gethostname()} failed: {text}"
        self._peers.send(Message("failed", mine, text))

    def close(self) -> None:
        """Stops listening to the others."""
        self._closed.set()
        if self._peers is not None:
            self._peers.listen(None)

    # ---------------------------------------------------------------------------------------------- in other threads

    def asked(self, number: signal.Signals, times: int) -> None:
        """Handles a signal to this process, its `times`-th."""
        if times > 1:
            self.signal = self.signal or number
            self._leave(f"Stopped at once; {self.kept}.")
            return
        if self._peers is not None:
            self._peers.send(Message("stop", coordination.index(), start=self._start, signal=number))
        self._stop(number)

    def _stop(self, number: signal.Signals) -> None:
        """Agrees with the other processes where to stop, once."""
        with self._lock:
            if self.signal is not None:
                return
            self.signal, next_point = number, self._points + 1  # `poll` takes the lock: no point is passed meanwhile
        points = [str(next_point)]
        try:
            points = coordination.allgather_str(f"jaxtrain/{self._start}/stop at", points[0], _AGREE_SECONDS)
        except (RuntimeError, AttributeError):  # JAX has yet to connect: no process makes a step without this one
            if next_point > 1:
                raise
        self._stop_at = max(map(int, points))
        self._agreed.set()
        if self._stop_at == 1:
            self._stop_before_the_first_step()

    def _stop_before_the_first_step(self) -> None:
        self.ends()
        self._leave(f"Stopped before the first step of this start; {self.kept}.")

    def _leave(self, text: str) -> None:
        if self.leave is not None:
            self.leave(self.error(text))

    def _say_and_leave(self, leave: Leave, error: JaxtrainError) -> None:
        self.last_words(error)
        leave(error)

    def _heard(self, message: Message) -> None:
        """Handles what another process says."""
        if message.kind in ("failed", "lost"):
            # A process that has agreed to stop is about to end by itself, unless another one is gone.
            stops = self.signal is not None and message.kind == "failed"
            if not self._closed.wait(_AGREE_SECONDS if stops else _OWN_ERROR_SECONDS) and self.leave is not None:
                self.leave(PeerError(message.text))
        elif message.start == self._start and message.kind == "stop":
            self._stop(signal.Signals(message.signal))
        elif message.start == self._start and not self._agreed.is_set():  # it is done, without having asked the others
            self.signal = signal.Signals(message.signal)
            self._stop_before_the_first_step()


@contextlib.contextmanager
def catch_signals(leave: Leave | None = None) -> Iterator[Interrupt]:
    """Catches Ctrl-C and the `STOPPING` signals inside the block; only the main thread can. leave: see `Interrupt`.

    A SIGTERM or SIGHUP that is ignored (nohup) stays so.

    A thread reads the signals from a pipe, so that they are handled while the main thread compiles or waits for another
    process.
    """
    interrupt = Interrupt(leave)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        interrupt.close()
        return
    numbers = (signal.SIGINT, *(number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN))
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
            for stopping in STOPPING:
                signal.signal(stopping, signal.SIG_DFL)
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
