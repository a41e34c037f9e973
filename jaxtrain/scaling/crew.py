"""The processes of a run that is measured, as `scale` sees them. Imports no JAX."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jaxtrain import errors
from jaxtrain.errors import EnvironmentMismatchError, JaxtrainError
from jaxtrain.host.processes import package_command
from jaxtrain.scaling.protocol import Failure, Job, Profile, Ready

_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several runs wait on the same GPU
_LINES = 3  # of a process's standard error, where it died without a word


class Crew:
    """Some processes that make steps at the same time, when they are told to."""

    def __init__(self, pipes: Sequence[Connection], logs: Sequence[Path]):
        self._pipes, self._logs = pipes, logs
        self.ready: list[Ready] = []

    def wait(self) -> None:
        """Returns when each is about to make its first step. Raises the error of one that cannot."""
        self.ready = self._answers()

    def tell(self, command: int | str | Profile) -> list[Any]:
        """What the processes answer, in their order, once all have. Raises the error of one that fails meanwhile."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it is gone: reading says why
                pipe.send(command)
        return self._answers()

    def _answers(self) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            waiting = {pipe: i for i, pipe in enumerate(self._pipes) if i not in answers}
            for pipe in multiprocessing.connection.wait(list(waiting)):
                number = waiting[pipe]  # pyright: ignore[reportArgumentType]  only connections were given
                try:
                    answers[number] = self._pipes[number].recv()
                except (EOFError, OSError):
                    raise EnvironmentMismatchError(self._death(number)) from None
                if isinstance(answers[number], Failure):
                    raise _error(answers[number])
        return [answers[number] for number in range(len(self._pipes))]

    def _death(self, number: int) -> str:
        lines = self._logs[number].read_text(errors="replace").strip().splitlines()[-_LINES:]
        said = f"; it said last: {' '.join(lines)}" if lines else ""
        return f"Process {number} of the {len(self._pipes)} that were measured ended before its time{said}."


@contextlib.contextmanager
def started(jobs: Sequence[Job]) -> Iterator[Crew]:
    """Processes that work at `jobs`; `Crew.wait` waits for them. At the end of the context they are killed."""
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxtrain-scale-", ignore_cleanup_errors=True))
        )
        pipes, logs = [], []
        for number, job in enumerate(jobs):
            logs.append(folder / f"stderr_{number}.txt")
            pipes.append(stack.enter_context(_process(job, logs[-1])))
        yield Crew(pipes, logs)


@contextlib.contextmanager
def _process(job: Job, log: Path) -> Iterator[Connection]:
    ours, theirs = multiprocessing.Pipe()
    command = package_command("from jaxtrain.scaling.worker import main; main()")
    with ours, log.open("wb") as errors_file:
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors_file,
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,  # Ctrl-C is for this process alone, which kills it
            )
        try:
            with contextlib.suppress(OSError):  # it is gone: `Crew` says why
                ours.send(job)
            yield ours
        finally:
            process.kill()  # not terminate: a run would save first
            process.wait()


def _error(failure: Failure) -> JaxtrainError:
    """The error that a process had, as one of the types with its exit code."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, JaxtrainError)]
    kind = next((kind for kind in kinds if kind.exit_code == failure.code and kind is not JaxtrainError), JaxtrainError)
    return (JaxtrainError if failure.code == JaxtrainError.exit_code else kind)(failure.text)
