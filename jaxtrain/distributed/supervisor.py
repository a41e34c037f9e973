"""Starts the processes of a run on one host. When one dies, all are started again, from the last checkpoint.

As in torchrun, the processes live and die together, the number of restarts is limited, each waits longer than the one
before, and the first failure is named as the cause. Restarts are counted since the last progress. An error that a restart
cannot fix ends the job at once, with its exit code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from jaxtrain.distributed.cluster import JOB
from jaxtrain.distributed.exit_report import ERROR_FILE, ExitReport, read_report
from jaxtrain.distributed.watchdog import HEARTBEAT_FILE, Beat, Wakes, read_beat
from jaxtrain.errors import ConfigError, EnvironmentMismatchError, HangError, PeerError
from jaxtrain.host.files import parse_json
from jaxtrain.host.gpus import Gpus
from jaxtrain.host.ports import free_port
from jaxtrain.host.processes import LAUNCHER, STOPPING
from jaxtrain.host.text import note, printable

_LOOK_SECONDS = 0.1
_REPORT_SECONDS = 4.0  # in which the others can report why they end, after one has failed
_SAME_STEP = 3  # failures of the program itself without any progress are a crash loop
_BACKOFF_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
_DEATHS_ON_A_GPU = 2
# Saved and stopped, by SIGTERM or Ctrl-C; or SIGTERM came before Python could catch it.
_STOPPED = (75, 130, -signal.SIGTERM, 128 + signal.SIGTERM)
# A process without a heartbeat for so long (one comes each second) may be why another failed that waited for it: the watchdog
# of one that waits, or a library, may end it before `hang` is over.
_SILENT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Options:
    """How to supervise."""

    processes: int = 1
    """Started on this host; 0 starts one for each group of `gpus_per_process` GPUs, or one."""
    gpus_per_process: int = 0
    """GPUs of each process; 0 divides all evenly."""
    max_restarts: int = 10
    """In a row, without progress."""
    grace: float = 60.0
    """Seconds from SIGTERM to SIGKILL."""
    hang: float = 60.0
    """Seconds without a heartbeat after which a process counts as hung; 0 is off."""
    min_devices: int = 1
    """With fewer GPUs that work, the job ends."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one process ended."""

    process: int
    pid: int
    code: int
    """As `subprocess` returns it: -9 for SIGKILL."""
    when: float
    """Seconds of the monotonic clock."""
    report: ExitReport | None
    hung: str = ""
    """Why the supervisor ended it, if it did: what its heartbeat showed."""

    @property
    def exit_code(self) -> int:
        """As shells have it: 137 for SIGKILL."""
        return 128 - self.code if self.code < 0 else self.code

    @property
    def is_root(self) -> bool:
        """Whether it has a cause of its own, rather than the end of another process."""
        return bool(self.hung) or (self.report.error != PeerError.__name__ if self.report else self.code < 0)

    @property
    def may_be_secondary(self) -> bool:
        """Whether a hung process may have caused it: JAX aborts those that wait for it, or they time out."""
        if self.report:
            return self.report.error in (PeerError.__name__, HangError.__name__)
        return self.code == -signal.SIGABRT and not self.hung

    @property
    def summary(self) -> str:
        """How it ended, in a word or two."""
        if self.report:
            return self.report.error
        return signal.Signals(-self.code).name if self.code < 0 else f"exit code {self.code}"

    def __str__(self) -> str:
        who = f"process {self.process} (pid {self.pid})"
        if self.hung:
            return f"{who} {self.hung}"
        if self.report:
            return f"{who} on {self.report.host} ended with {self.report.error}: {self.report.message.splitlines()[0]}"
        if self.code < 0:
            return f"{who} was killed by {signal.Signals(-self.code).name}"
        return f"{who} ended with exit code {self.code} and no word"


class Supervisor:
    """One job. `run` returns the exit code of the whole job."""

    def __init__(
        self,
        command: Sequence[str],
        options: Options,
        gpus: Gpus | None = None,
        record_end: Callable[[Path, int, str], None] = lambda path, code, message: None,
    ):
        """Prepares the job.

        Args:
          command: what each process runs, without the flags that number the processes.
          options: how to supervise.
          gpus: of this host.
          record_end: called for each start that failed, with its file, the exit code of the cause and a sentence.
        """
        self._command, self._options, self._record_end = list(command), options, record_end
        self._gpus = gpus if gpus is not None else Gpus()
        self._excluded: dict[str, str] = {}  # GPUs that are not used: UUID -> why
        self._deaths: dict[str, int] = {}  # on each GPU
        self._most_gpus = 0  # used at most, where the run does not fit all healthy ones; 0 is all
        self._first_gpus = 0  # used by the first start
        self._signals: list[int] = []
        self._furthest = -1
        self._job = os.urandom(8).hex()

    def run(self) -> int:
        """Starts, watches, restarts. Raises `EnvironmentMismatchError` when too few GPUs are left."""
        failures, same = 0, 0  # since the last progress
        idle = 0  # starts in a row that made no step
        with caught(self._signals):
            while True:
                with Gang(self._command, self._assign_gpus(), self._options, self._job) as gang:
                    ended = gang.watch(self._signals)
                    step, idle = gang.step(), 0 if gang.made_a_step() else idle + 1
                    cause = root_cause(ended)
                    oom, start_file = gang.was_out_of_memory(), gang.start_file
                if cause is None:
                    return 0
                text = f"{cause}{_about_memory(cause, oom)}"
                say(text)
                if start_file is not None and not (cause.process == 0 and cause.report):  # else it has said so itself
                    self._record_end(start_file, cause.exit_code, text)
                if self._signals or cause.code in _STOPPED:
                    return 130 if cause.code == 130 or self._signals[:1] == [signal.SIGINT] else 75
                if cause.report and not cause.report.retry:
                    if self._takes_fewer_gpus(cause.report.code, gang.gpus):
                        continue
                    return cause.report.code
                self._blame_gpu(gang.gpus[cause.process])
                progress = step > self._furthest
                self._furthest = max(step, self._furthest)
                failures = 1 if progress else failures + 1
                outside = cause.code == -signal.SIGKILL and not oom and not cause.hung
                same = 0 if outside else 1 if progress else same + 1
                if same >= _SAME_STEP:
                    say(f"the same failure {same} times without a step in between (step {step}): giving up")
                    return 70
                if failures > self._options.max_restarts:
                    say(f"{self._options.max_restarts} restarts in a row without progress: giving up")
                    return 70
                wait = _BACKOFF_SECONDS[min(idle, len(_BACKOFF_SECONDS) - 1)]
                most = self._options.max_restarts
                say(f"starting again in {wait:.0f} s (restart {failures} of at most {most} without progress)")
                if not self._pause(wait):
                    return 130 if self._signals[0] == signal.SIGINT else 75

    def _pause(self, seconds: float) -> bool:
        """Waits. Returns whether no signal came meanwhile."""
        deadline = time.monotonic() + seconds
        while not self._signals and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return not self._signals

    # ------------------------------------------------------------------------------------------------------------ GPUs

    def _assign_gpus(self) -> list[tuple[str, ...]]:
        """The UUIDs of each process's GPUs; () where the host has none, or shows none."""
        gpus = self._gpus.visible()
        for gpu in gpus:
            if gpu.fault and gpu.uuid not in self._excluded:
                self._excluded[gpu.uuid] = gpu.fault
                say(f"{gpu.uuid} is left out: {gpu.fault}")
        healthy = [gpu.uuid for gpu in gpus if gpu.uuid not in self._excluded]
        if not gpus:
            return [()] * max(self._options.processes, 1)
        usable = healthy[: self._most_gpus or None]
        if len(usable) < max(self._options.min_devices, 1):
            raise TooFewGpusError(
                f"{len(usable)} of {len(gpus)} GPUs can be used and --min-devices is {self._options.min_devices}; the others: "
                + ", ".join(
                    f"{uuid} ({self._excluded.get(uuid, 'not a number of GPUs that fits the run')})"
                    for uuid in (gpu.uuid for gpu in gpus)
                    if uuid not in usable
                )
            )
        assigned = share(usable, self._options.processes, self._options.gpus_per_process)
        self._first_gpus = self._first_gpus or sum(map(len, assigned))
        return assigned

    def _takes_fewer_gpus(self, code: int, assigned: Sequence[tuple[str, ...]]) -> bool:
        """Uses one GPU less where a config that fitted all GPUs is refused on those that are left (a batch of 128 on three)."""
        used = sum(map(len, assigned))
        if code != ConfigError.exit_code or used >= self._first_gpus or used <= 1:
            return False
        self._most_gpus = used - 1
        say(f"the run does not fit {used} GPUs; trying {used - 1} of those that are left")
        return True

    def _blame_gpu(self, uuids: tuple[str, ...]) -> None:
        """Counts the death of a process with a single GPU; after the second one the GPU is not used any more."""
        if len(uuids) != 1:
            return
        (uuid,) = uuids
        self._deaths[uuid] = self._deaths.get(uuid, 0) + 1
        if self._deaths[uuid] >= _DEATHS_ON_A_GPU:
            self._excluded[uuid] = f"{self._deaths[uuid]} processes died on it"
            say(f"{uuid} is left out: {self._excluded[uuid]}")


def missing_gpus(machine: Path, gpus: Gpus) -> list[str]:
    """UUIDs of GPUs that `jaxtrain doctor --write` found on this host and that are not there now; [] without its file."""
    try:
        facts = parse_json(machine.read_bytes())
        known = [gpu["uuid"] for gpu in facts["gpus"]] if facts["host"] == socket.gethostname() else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return sorted(set(known) - {gpu.uuid for gpu in gpus.all()})


class TooFewGpusError(EnvironmentMismatchError):
    """Not enough GPUs of this host work; the scheduler may give another host."""

    exit_code = 70


def share(uuids: Sequence[str], processes: int, group: int) -> list[tuple[str, ...]]:
    """Assigns GPUs to processes. With fewer GPUs than processes there are fewer processes.

    Args:
      uuids: of all GPUs that can be used.
      processes: how many; 0 starts as many as there are groups.
      group: GPUs of each process; 0 divides all evenly.

    Returns:
      Each process's GPUs. Those that do not divide stay unused.
    """
    if not group:
        group = max(len(uuids) // max(processes, 1), 1)
    count = min(processes, len(uuids) // group) if processes else len(uuids) // group
    return [tuple(uuids[i * group : (i + 1) * group]) for i in range(max(count, 1))]


class Gang:
    """The processes of one start. Leaving the block kills those that still run."""

    def __init__(self, command: Sequence[str], gpus: Sequence[tuple[str, ...]], options: Options, job: str):
        """Starts the processes.

        Args:
          command: what each runs, without the flags that number the processes.
          gpus: the UUIDs of each process's GPUs.
          options: of the supervisor.
          job: identifies all starts of the job.
        """
        self.gpus, self._options = list(gpus), options
        self._folder = tempfile.TemporaryDirectory(prefix="jaxtrain-launch-")
        self._ooms = _oom_kills()
        self._began: int | None = None  # the step that this start goes on from
        self.start_file: Path | None = None  # where the run keeps how this start ends, once process 0 has come so far
        self._processes: list[subprocess.Popen[str]] = []
        port = free_port()
        for number, uuids in enumerate(self.gpus):
            environment = os.environ | {
                ERROR_FILE: str(self._file("error", number)),
                HEARTBEAT_FILE: str(self._file("beat", number)),
                JOB: job,
                LAUNCHER: str(os.getpid()),
            }
            if uuids:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(uuids)
            joined = [
                "--coordinator",
                f"127.0.0.1:{port}",
                "--num-processes",
                str(len(gpus)),
                "--process-id",
                str(number),
            ]
            pipe = subprocess.PIPE if number else None  # process 0 has the screen to itself
            process = subprocess.Popen(
                [*command, *(joined if len(gpus) > 1 else ["--standalone"])],
                env=environment,
                stdout=pipe,
                stderr=subprocess.STDOUT if number else None,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C on the terminal is for the supervisor, which passes it on
            )
            if process.stdout is not None:
                threading.Thread(target=_pass_on, args=(number, process.stdout), daemon=True).start()
            self._processes.append(process)

    def _file(self, what: str, number: int) -> Path:
        return Path(self._folder.name) / f"{what}-{number}.json"

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *_: object) -> None:
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._folder.cleanup()

    def watch(self, signals: list[int]) -> list[Ended]:
        """Returns how each process ended: once all have, or once one has failed and the others had time to report.

        signals: those that the supervisor has caught so far; it passes them on.
        """
        ended: dict[int, Ended] = {}
        passed_on, kill_at, wakes = 0, float("inf"), Wakes()
        while len(ended) < len(self._processes):
            wakes.look()
            for number, process in enumerate(self._processes):
                if number not in ended and (code := process.poll()) is not None:
                    report = read_report(self._file("error", number))
                    ended[number] = Ended(number, process.pid, code, time.monotonic(), report)
                    if (
                        code
                    ):  # after a stop the others end by themselves, unless they never met the one that was stopped
                        seconds = self._options.grace if code in _STOPPED else _REPORT_SECONDS
                        kill_at = min(kill_at, time.monotonic() + seconds)
            while passed_on < len(signals):
                passed_on += 1
                self._send(signals[passed_on - 1])
                kill_at = min(kill_at, time.monotonic() + (self._options.grace if passed_on == 1 else 2.0))
            if self.start_file is None and (beat := read_beat(self._file("beat", 0))) and beat.start_file:
                self.start_file = Path(beat.start_file)
            if self._began is None and (steps := [beat.step for beat in self._beats() if beat.phase != "start"]):
                self._began = min(steps)
            for number, hung in self._hung(ended, wakes.last):
                process = self._processes[number]
                process.kill()
                ended[number] = Ended(number, process.pid, -signal.SIGKILL, time.monotonic(), None, hung)
                kill_at = time.monotonic()
            if time.monotonic() > kill_at:
                self._send(signal.SIGKILL)
            time.sleep(_LOOK_SECONDS)
        return list(ended.values())

    def _hung(self, ended: dict[int, Ended], awake: float) -> list[tuple[int, str]]:
        """The processes whose heartbeat has stopped, and a sentence on each; the one that was silent longest comes first.

        They are frozen, or a thread of theirs holds Python's global lock. awake: when the supervisor itself was last
        stopped; processes that were stopped with it need time for a heartbeat.
        """
        limit = self._options.hang or float("inf")
        secondary = min((one.when for one in ended.values() if one.may_be_secondary), default=float("-inf"))
        beats = {n: read_beat(self._file("beat", n)) for n in range(len(self._processes)) if n not in ended}
        now = time.monotonic()
        states = {n: f"{now - beat.time:.0f} s" if beat else "none yet" for n, beat in beats.items()}
        states |= {n: one.summary for n, one in ended.items()}
        by_age = sorted((beat.time, n, beat) for n, beat in beats.items() if beat is not None)
        hung = []
        for last, number, beat in by_age:
            since = max(last, awake)
            if now - since > limit or secondary - since > _SILENT_SECONDS:
                others = ", ".join(f"process {n}: {state}" for n, state in sorted(states.items()) if n != number)
                text = f"gave no sign of life for {states[number]}, in {beat.phase!r} after step {beat.step}"
                hung.append((number, f"{text} ({others})" if others else text))
        return hung

    def _send(self, number: int) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, number)

    def step(self) -> int:
        """The furthest step in a heartbeat, or -1."""
        return max((beat.step for beat in self._beats()), default=-1)

    def made_a_step(self) -> bool:
        """Whether a heartbeat shows a later step than the first one did."""
        return self._began is not None and self.step() > self._began

    def _beats(self) -> list[Beat]:
        beats = (read_beat(self._file("beat", number)) for number in range(len(self._processes)))
        return [beat for beat in beats if beat is not None]

    def was_out_of_memory(self) -> bool | None:
        """Whether the kernel killed a process of this control group since the start, for lack of memory; None: unknown."""
        now = _oom_kills()
        return None if now is None or self._ooms is None else now > self._ooms


def root_cause(ended: Sequence[Ended]) -> Ended | None:
    """The first failure that is not the consequence of another one; None where all went well.

    Where a process had hung, the failure of those that waited for it is a consequence.
    """
    failed = sorted((one for one in ended if one.code), key=lambda one: one.when)
    hung = any(one.hung for one in failed)
    roots = (one for one in failed if one.is_root and not (hung and one.may_be_secondary))
    return next(roots, failed[0] if failed else None)


@contextlib.contextmanager
def caught(signals: list[int]) -> Iterator[None]:
    """Collects Ctrl-C and the `STOPPING` signals, which would end the process; not a SIGHUP that is ignored (nohup)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOPPING)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, lambda number, _: signals.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(number: int, lines: IO[str]) -> None:
    for line in lines:
        if not line.startswith("[Gloo]"):
            print(f"[{number}] {printable(line, lines=True)}", end="", file=sys.stderr, flush=True)


def _oom_kills() -> int | None:
    """How often the kernel has killed in this process's control group for lack of memory; None where it is not known."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2: one tree for all
            path = Path(f"/sys/fs/cgroup/{group}/memory.events")
        elif "memory" in controllers.split(","):
            path = Path(f"/sys/fs/cgroup/memory/{group}/memory.oom_control")
        else:
            continue
        if match := re.search(r"^oom_kill (\d+)$", _text(path), re.MULTILINE):
            return int(match[1])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _about_memory(cause: Ended, oom: bool | None) -> str:
    if oom:
        return " (probably out of memory: the kernel killed it; give the job more, or lower config.data.workers)"
    if oom is None and cause.code == -signal.SIGKILL and not cause.hung:
        return " (who sent it is not known; the kernel does where memory runs out: see dmesg)"
    return ""


def say(text: str) -> None:
    """Prints a line of the supervisor's own on standard error."""
    note(text, "jaxtrain launch")
