"""The workers of a sweep, seen from the sweep: tasks are handed out, a worker that dies is replaced, signals are passed on."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from jaxtrain.config import Config
from jaxtrain.host import xla_flags
from jaxtrain.host.files import open_to_append, writing
from jaxtrain.host.processes import package_command
from jaxtrain.sweeps.share import Share
from jaxtrain.sweeps.worker import FAILED, STOPPED, Check, Compiled, Outcome, Task

_RETRIES = 2  # of a run whose process dies, as the local queue has it
_LOOK_SECONDS = 0.25
_MAIN = (
    "from jaxtrain.sweeps.worker import main; main(int(sys.argv[1]), int(sys.argv[2]), list(map(int, sys.argv[3:])))"
)


class Worker:
    """A process that answers."""

    def __init__(self, share: Share, log: Path | None):
        """Starts it.

        Args:
          share: what it may use.
          log: where its output goes; None: nowhere.
        """
        self.pipe, theirs = Pipe()
        environment = dict(os.environ)
        if share.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
        command = [*package_command(_MAIN), str(os.getpid()), str(theirs.fileno()), *map(str, share.cpus)]
        with contextlib.ExitStack() as stack:
            output: Any = subprocess.DEVNULL
            if log is not None:
                with writing(log):
                    log.parent.mkdir(parents=True, exist_ok=True)
                    output = stack.enter_context(open_to_append(log))
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C on the terminal is for the sweep, which passes it on
            )
        theirs.close()
        self.task: Task | None = None
        self.flags: object = None
        """XLA's flags of its runs, which a process takes once."""

    def send(self, asked: Task | Check) -> None:
        """Asks for something; where the worker is dead, `receive` says so."""
        self.task = asked if isinstance(asked, Task) else None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(asked)

    def receive(self) -> Any:
        """What it says next, which is waited for; an `Outcome` where it has died meanwhile."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return self._death()

    def _death(self) -> Outcome:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return Outcome(FAILED, f"Its process {how}.", 128 - code if code < 0 else code, retry=True, unsound=True)

    def signal(self, number: int) -> None:
        """Passes a signal on."""
        self._process.send_signal(number)

    def end(self) -> None:
        """Ends it at once; one whose run is stopped has ended that before."""
        self._process.kill()
        self._process.wait()
        self.pipe.close()


class Crew:
    """As many workers as there are shares. Leave its block to end them."""

    def __init__(self, shares: Sequence[Share], logs: Path | None, signals: Sequence[int]):
        """Starts the first worker, whose imports take a moment.

        Args:
          shares: what each worker may use.
          logs: the directory of their output; None: it goes nowhere.
          signals: those that the sweep has caught so far.
        """
        self._shares, self._logs, self._signals = list(shares), logs, signals
        self._passed_on = 0
        self._ahead = True  # the first run alone compiles, and the others find its programs
        self._deaths: collections.Counter[str] = collections.Counter()
        self._workers: list[Worker | None] = [None] * len(self._shares)
        self._workers[0] = self._start(0)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            if worker is not None:
                worker.end()

    def _start(self, number: int) -> Worker:
        return Worker(self._shares[number], self._logs and self._logs / f"worker_{number}.log")

    def check(self, configs: Sequence[Config]) -> list[str]:
        """What is wrong with each config, in a sentence; "" for nothing."""
        worker = self._workers[0]
        if not configs or worker is None:
            return []
        worker.send(Check(tuple(configs)))
        answer = worker.receive()
        if isinstance(answer, Outcome):
            raise RuntimeError(f"The first worker does not start. {answer.message}")
        return answer

    def running(self) -> list[Task]:
        """The tasks that workers have."""
        return [worker.task for worker in self._workers if worker is not None and worker.task is not None]

    def work(self, tasks: Sequence[Task], look: Callable[[], None]) -> Iterator[tuple[Task, Outcome]]:
        """Does tasks; yields each with its outcome. After a signal none is begun, and those that run are stopped.

        Args:
          tasks: in their order.
          look: called some times a second.
        """
        waiting = collections.deque(tasks)
        while waiting or self.running():
            if self._signals:
                waiting.clear()
                self._pass_on()
            self._hand_out(waiting)
            busy = {worker.pipe: worker for worker in self._workers if worker is not None and worker.task is not None}
            for pipe in wait(list(busy), _LOOK_SECONDS):
                assert isinstance(pipe, Connection)
                worker = busy[pipe]
                answer, task = worker.receive(), worker.task
                if isinstance(answer, Compiled):
                    self._ahead = False
                    continue
                assert task is not None
                self._settle(worker, answer)
                if self._signals and answer.unsound:  # a signal has ended it before it could say so
                    answer = dataclasses.replace(answer, state=STOPPED)
                if answer.state == FAILED and answer.retry and self._goes_again(task):
                    waiting.appendleft(task)
                    continue
                yield task, answer
            look()

    def _settle(self, worker: Worker, outcome: Outcome) -> None:
        worker.task, self._ahead = None, False
        if outcome.unsound or self._signals:
            worker.end()
            self._workers[self._workers.index(worker)] = None

    def _goes_again(self, task: Task) -> bool:
        self._deaths[task.name] += 1
        return self._deaths[task.name] <= _RETRIES and not self._signals

    def _pass_on(self) -> None:
        """A second signal stops runs at once."""
        for number in self._signals[self._passed_on :]:
            for worker in self._workers:
                if worker is not None and worker.task is not None:
                    worker.signal(number)
        self._passed_on = len(self._signals)

    def _hand_out(self, waiting: collections.deque[Task]) -> None:
        for number in range(len(self._workers)):
            if not waiting or (self._ahead and self.running()):
                return
            if (worker := self._idle(number, _process_flags(waiting[0].config))) is not None:
                worker.send(waiting.popleft())

    def _idle(self, number: int, flags: object) -> Worker | None:
        """The worker of a share, new where need be; None where it has a task."""
        worker = self._workers[number]
        if worker is not None and worker.task is not None:
            return None
        if worker is not None and worker.flags not in (None, flags):
            worker.end()
            worker = None
        self._workers[number] = worker = worker or self._start(number)
        worker.flags = flags
        return worker


def _process_flags(config: Config) -> object:
    """What of a config a process takes once, when JAX's devices start."""
    layout, train = config.layout, config.train
    flags = xla_flags.for_run(train.precision, deterministic=train.deterministic)
    return dict(flags), layout.nccl_algo, layout.nccl_protocol
