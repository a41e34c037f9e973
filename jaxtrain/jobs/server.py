"""The server of the local queue: starts waiting jobs where their GPUs, CPUs and memory are free, and those again that died."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence

from jaxtrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentMismatchError,
    NumericError,
    WorkdirError,
)
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.host.gpus import Gpu, Gpus
from jaxtrain.host.processes import STOPPING, boot_id
from jaxtrain.host.text import note, printable
from jaxtrain.jobs import runner
from jaxtrain.jobs.job import Job
from jaxtrain.jobs.queue import DONE, ENDED, FAILED, RUNNING, STOPPED, WAITING, Entry, JobState, Queue, lease
from jaxtrain.observability.goodput import read_starts
from jaxtrain.workdir import Workdir

BUSY_BYTES = 256 << 20
"""A GPU with more memory in use, by whomever, is not free."""

_LOOK_SECONDS = 0.5
_NEVER = "this host has"
_FINAL = {
    error.exit_code
    for error in (ConfigError, DataError, CheckpointError, WorkdirError, NumericError, EnvironmentMismatchError)
}


class Server:
    """Works through one queue."""

    def __init__(self, queue: Queue, gpus: Gpus):
        self._queue, self._gpus = queue, gpus
        self._runners: dict[str, subprocess.Popen[bytes]] = {}  # that this server has started, by the job's id
        self._codes: dict[str, int] = {}  # of runners that have ended
        self._damaged: set[str] = set()  # jobs that were named
        self._ended: dict[
            str, tuple[int, JobState]
        ] = {}  # of jobs that have ended: when their state was written, and it

    def serve(self, *, until_empty: bool = False) -> None:
        """Serves until a signal comes. The jobs that run then go on, and the next server finds them.

        until_empty: returns when no job waits or runs.
        """
        stopping = threading.Event()
        for each in (*STOPPING, signal.SIGINT):
            signal.signal(each, lambda *_: stopping.set())
        with self._queue.served():
            while not stopping.is_set():
                open_jobs = self._work()
                if until_empty and not open_jobs:
                    return
                stopping.wait(_LOOK_SECONDS)
        if self._runners:
            _say(f"the server ends; {len(self._runners)} jobs go on, and the next server finds them")

    def _work(self) -> int:
        """Settles what has ended and starts what can start. Returns how many jobs are not at their end."""
        states = self._states()
        for entry, state in list(states.items()):
            if state.status == RUNNING and not self._lives(entry):
                states[entry] = self._settle(entry, state)
            elif state.status == WAITING and entry.is_to_stop():
                states[entry] = _write(entry, state, status=STOPPED, ended=time.time(), reason="it was stopped")
        running = {entry: entry.job() for entry, state in states.items() if state.status == RUNNING}
        free = [gpu for gpu in self._gpus.visible() if self._is_free(gpu, states)]
        for entry, state in states.items():
            if state.status != WAITING:
                continue
            job = entry.job()
            lack = self._lacks(job, len(free), list(running.values()))
            if lack is None:
                chosen, free = free[: job.resources.gpu], free[job.resources.gpu :]
                states[entry] = self._start(entry, state, [gpu.uuid for gpu in chosen])
                running[entry] = job
                continue
            _write(entry, state, reason=lack)
            if not lack.startswith(_NEVER):
                break  # the next ones wait for it, or small jobs would keep a large one waiting for ever
        return sum(state.status not in ENDED for state in states.values())

    def _states(self) -> dict[Entry, JobState]:
        """Of all jobs, in their order; a damaged one is named once and left alone."""
        found = {}
        for entry in self._queue.entries():
            try:
                found[entry] = self._state(entry)
            except WorkdirError as error:
                if entry.id not in self._damaged:
                    self._damaged.add(entry.id)
                    _say(f"{entry.id} is left out: {error}")
        return found

    def _state(self, entry: Entry) -> JobState:
        """Of a job whose description can be read too, unless it has ended. One that has ended is not read again."""
        written = entry.state_written()
        known = self._ended.get(entry.id)
        if known and known[0] == written:
            return known[1]
        state = entry.state()
        if state.status in ENDED:
            self._ended[entry.id] = written, state
        else:
            entry.job()
        return state

    def _lives(self, entry: Entry) -> bool:
        process = self._runners.get(entry.id)
        if process is None:  # an earlier server has started it
            return entry.is_running()
        code = process.poll()
        if code is None:
            return True
        del self._runners[entry.id]
        self._codes[entry.id] = code
        return False

    def _is_free(self, gpu: Gpu, states: dict[Entry, JobState]) -> bool:
        """Whether nobody uses a GPU: no job of a queue of this user, and nobody else who has memory there."""
        if gpu.fault or any(gpu.uuid in state.gpus for state in states.values() if state.status == RUNNING):
            return False
        with lease(gpu.uuid, patience=0.0) as free:
            used = self._gpus.memory_used(gpu.uuid)
            return free and used is not None and used <= BUSY_BYTES

    def _lacks(self, job: Job, free_gpus: int, running: Sequence[Job]) -> str | None:
        """Why a job cannot start now, in a sentence; None where it can."""
        wanted = job.resources
        if never := exceeds_host(job, self._gpus):
            return never
        if wanted.gpu > free_gpus:
            return f"needs {wanted.gpu} GPUs, and {free_gpus} are free"
        cpus = usable_cpus() - sum(each.resources.cpu for each in running)
        if wanted.cpu > cpus:
            return f"needs {wanted.cpu} CPUs, and {max(cpus, 0)} are free"
        memory = host_memory() - sum(each.resources.memory for each in running)
        if wanted.memory > memory:
            return f"needs {wanted.gibibytes} GiB of memory, and {max(memory, 0) >> 30} are not taken by other jobs"
        return None

    def _start(self, entry: Entry, state: JobState, gpus: Sequence[str]) -> JobState:
        number = state.tries + 1
        state = _write(
            entry, state, status=RUNNING, tries=number, gpus=tuple(gpus), started=time.time(), boot=boot_id(), reason=""
        )
        self._runners[entry.id] = runner.start(entry, number, gpus)
        _say(f"{entry.id} starts{f' on {len(gpus)} GPUs' if gpus else ''}{f' (try {number})' if number > 1 else ''}")
        return state

    def _settle(self, entry: Entry, state: JobState) -> JobState:
        """What becomes of a job whose try is over."""
        end, job = entry.end(), entry.job()
        code = end.code if end and end.number == state.tries else None
        if code == 0:
            return _write(entry, state, status=DONE, code=0, ended=time.time(), reason="")
        if entry.is_to_stop():
            return _write(entry, state, status=STOPPED, code=code, ended=time.time(), reason="it was stopped")
        if (end and code is not None and end.interrupted) or (code is None and state.boot != boot_id()):
            return _write(entry, state, status=WAITING, code=code, reason="its host was shut down; it starts again")
        if code is None and self._codes.pop(entry.id, None) == runner.TAKEN:
            return _write(entry, state, status=WAITING, tries=state.tries - 1, reason="a GPU of it was taken")
        failures = state.failures + 1
        why = _why(entry, job, code)
        if (job.config and code in _FINAL) or failures > job.retries:
            return _write(entry, state, status=FAILED, code=code, failures=failures, ended=time.time(), reason=why)
        again = f"it died ({why}) and starts again ({failures} of {job.retries})"
        return _write(entry, state, status=WAITING, code=code, failures=failures, reason=again)


def exceeds_host(job: Job, gpus: Gpus) -> str:
    """Why a job can never run on this host, as it is now; "" where it can."""
    wanted, healthy = job.resources, [gpu for gpu in gpus.visible() if not gpu.fault]
    for what, needed, there in (
        ("GPUs that work", wanted.gpu, len(healthy)),
        ("CPUs", wanted.cpu, usable_cpus()),
        ("GiB of memory", wanted.gibibytes, -(-host_memory() >> 30)),
    ):
        if needed > there:
            return f"{_NEVER} {there} {what}, and the job needs {needed}"
    return ""


def host_memory() -> int:
    """In bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _write(entry: Entry, state: JobState, **changes: object) -> JobState:
    """Stores a changed state, and says what has become of the job."""
    new = dataclasses.replace(state, **changes)  # type: ignore[arg-type]
    if new != state:
        entry.write_state(new)
        if new.status != RUNNING:
            _say(f"{entry.id} is {new.status}{f': {new.reason}' if new.reason else ''}")
    return new


def _why(entry: Entry, job: Job, code: int | None) -> str:
    """Why the latest try ended, in a sentence: what its run has recorded, or the last line that it printed."""
    if job.run is not None:
        with contextlib.suppress(WorkdirError):
            end = read_starts(Workdir(job.run).starts)[-1].end
            if end is not None and end.time >= entry.state().started:
                return printable(end.message)
    text = "exit code unknown: it was killed" if code is None else f"exit code {code}"
    with contextlib.suppress(OSError):
        lines = entry.log.read_bytes()[-4096:].decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip() and not line.startswith("== try")), "")
        text += f": {printable(last.strip())}" if last else ""
    return text


def _say(text: str) -> None:
    note(f"{time.strftime('%H:%M:%S')} {text}", "jaxtrain queue")
