"""Profiles a window of a run's steps: JAX's trace of them, and a summary of what their time went into.

A profile changes no number, and nothing that goes wrong with it ends a run. Each process profiles its own devices.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxtrain.distributed.watchdog import Watchdog
from jaxtrain.host.files import atomic_write
from jaxtrain.observability.clock import StepClock
from jaxtrain.observability.events import event
from jaxtrain.observability.op_times import READ, read_trace
from jaxtrain.observability.progress import Progress
from jaxtrain.step.batch import Batch
from jaxtrain.step.metrics import StepMetrics
from jaxtrain.step.train_state import TrainState
from jaxtrain.step.train_step import TrainStep
from jaxtrain.training.compiled import CompiledRun
from jaxtrain.training.profile_summary import Window, origins_of, summary
from jaxtrain.workdir import Workdir

log = logging.getLogger("jaxtrain")

PROFILE_SIGNAL = signal.SIGUSR2
SUMMARY = "summary.txt"


def read(metrics: StepMetrics, steps: range) -> list[dict[str, float]]:
    """The metrics of each of `steps`, which one call has made. A profile shows when they were known."""
    with jax.profiler.TraceAnnotation(READ, steps=len(steps)):
        return metrics.rows()


class ProfileRequest:
    """What has asked for a profile: a signal, or a callback."""

    def __init__(self) -> None:
        self._signalled = threading.Event()
        self._steps = 0

    def ask_by_signal(self) -> None:
        """Asks for one of the next steps; more of them until it begins ask for the same one."""
        self._signalled.set()

    def ask(self, steps: int) -> None:
        """Asks for one of the next `steps`, on every process alike."""
        self._steps = max(self._steps, steps)

    def take_signal(self) -> bool:
        """Whether a signal has come since the last call."""
        signalled = self._signalled.is_set()
        self._signalled.clear()
        return signalled

    def take(self) -> int:
        """How many steps were asked for (`ask`) since the last call; 0: none were."""
        steps, self._steps = self._steps, 0
        return steps


@contextlib.contextmanager
def catch_profile_signal() -> Iterator[ProfileRequest]:
    """Inside, `PROFILE_SIGNAL` asks for a profile. Only the main thread can catch it."""
    request = ProfileRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(PROFILE_SIGNAL, lambda *_: request.ask_by_signal())
    try:
        yield request
    finally:
        signal.signal(PROFILE_SIGNAL, before)


class Profiler:
    """The windows of a start: that of `profile.steps`, and those that a signal or a callback asks for; one at a time.

    A window has whole calls of the step. It ends early where something else is due, so that it holds steps alone. That of a
    callback goes on until it has the steps that were asked for, or the run ends.
    """

    def __init__(
        self,
        compiled: CompiledRun,
        directory: Workdir,
        progress: Progress,
        watchdog: Watchdog,
        clock: StepClock,
        request: ProfileRequest,
    ):
        """Profiles nothing yet.

        Args:
          compiled: the run.
          directory: of the run.
          progress: the line of what is done now.
          watchdog: is told of each window's ends.
          clock: of the run.
          request: of a signal or a callback.
        """
        self._compiled, self._directory = compiled, directory
        self._progress, self._watchdog = progress, watchdog
        self._clock, self._request = clock, request
        steps = compiled.run.config.profile.steps
        self._planned = range(steps[0], steps[1] + 1) if steps else range(0)
        self._window = range(0)  # the steps to be profiled; () where none are
        self._over_pauses = False
        self._done = range(0)  # those that were
        self._step: TrainStep = compiled.step
        self._tracing = False
        self._open = contextlib.ExitStack()

    def begin_if_due(self, steps: range, read_all: Callable[[], None]) -> None:
        """Begins a window before the call that makes `steps`, where one is due. read_all: waits for the steps before."""
        if self._begins(steps):
            self._watchdog.feed("profile", steps[0] - 1)
            read_all()
            self._begin()

    def _begins(self, steps: range) -> bool:
        if self._window:
            return False
        asked = self._request.take()
        self._over_pauses = asked > 0
        if asked:
            self._window = range(steps[0], steps[0] + asked)
        elif self._planned and steps[-1] >= self._planned.start:
            window, self._planned = self._planned, range(0)
            self._window = window if steps[0] in window or window.start in steps else range(0)
        elif self._request.take_signal() and self._is_alone():
            self._window = range(steps[0], steps[0] + self._compiled.run.config.profile.length)
        self._done = range(steps[0], steps[0])
        return bool(self._window)

    def _is_alone(self) -> bool:
        """Whether this is the only process. Of several, all must compile the step that is profiled."""
        if jax.process_count() > 1:
            log.warning(
                "a signal profiles a run of one process alone; with several, start it with config.profile.steps"
            )
        return jax.process_count() == 1

    def _begin(self) -> None:
        """Starts the trace, after compiling a step for it where that is needed."""
        words = f"profiling steps {self._done.start} to {self._window[-1]}"
        self._open.enter_context(self._progress.activity(words))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down the host, and the trace would be of Python above all
        try:
            with self._clock.charge("compile"):
                self._step = self._compiled.step_for_profile
            with self._clock.charge("profile"):
                shutil.rmtree(self._folder, ignore_errors=True)  # of a start that was here before
                self._folder.mkdir(parents=True)  # JAX fails at the end alone, and then keeps its profiler
                jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._tracing = True
        except Exception as error:
            self._give_up(error)

    def step(self, steps: range, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Makes the updates `steps`, as `TrainStep` does."""
        resident = self._compiled.inputs.resident
        if not self._window:
            return self._compiled.step(state, batch, resident)
        self._done = range(self._done.start, steps[-1] + 1)
        with jax.profiler.StepTraceAnnotation("train", step_num=steps[0]):
            return self._step(state, batch, resident)

    def ends(self, steps: range) -> bool:
        """Whether the window ends with `steps`. Then all metrics must be read before `end_if_due`."""
        return bool(self._window) and steps[-1] >= self._window[-1]

    def end_if_due(self, steps: range, *, pauses: bool) -> None:
        """Ends the window where it is due after `steps`. pauses: whether something else comes next."""
        if self.ends(steps) or (pauses and not self._over_pauses):
            self.end()

    def end(self) -> None:
        """Ends the window, if there is one: writes its trace and its summary, and says where they are."""
        if not self._window:
            return
        self._watchdog.feed("profile")
        try:
            with self._clock.charge("profile"):
                jax.profiler.stop_trace()
                self._tracing = False
                path = self._write_summary()
        except Exception as error:
            self._give_up(error)
            return
        self._window = range(0)
        self._over()
        first, last = self._done[0], self._done[-1]
        log.info("profile of steps %d to %d: %s", first, last, path, extra=event("profile", last))

    def _over(self) -> None:
        """What was asked for meanwhile was of this window."""
        self._request.take_signal()
        self._request.take()
        self._open.close()

    def close(self) -> None:
        """Drops the window that is open, if there is one; may be called twice."""
        if self._window:
            self._drop()
        self._open.close()

    def _write_summary(self) -> Path:
        (trace,) = self._folder.rglob("*.xplane.pb")
        texts = [program.as_text() or "" for program in self._step.programs.values()]
        kind = self._compiled.run.layout.mesh.devices.flat[0].device_kind
        window = Window(self._done, jax.process_index(), kind)
        path = self._folder / SUMMARY
        atomic_write(path, summary(window, read_trace(trace), origins_of(texts)))
        return path

    @property
    def _folder(self) -> Path:
        return self._directory.profile(self._done.start, self._window[-1], jax.process_index())

    def _give_up(self, error: Exception) -> None:
        """Goes on without the profile."""
        log.warning(
            "no profile of steps %d to %d (%s); training goes on",
            self._done.start,
            self._window[-1],
            str(error).partition("\n")[0],
        )
        self._drop()
        self._over()

    def _drop(self) -> None:
        """Ends the window, and deletes what it has written, since the disk may be full."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._tracing:
            with contextlib.suppress(Exception):  # where it has failed before, it now gives the profiler back
                jax.profiler.stop_trace()
            shutil.rmtree(self._folder, ignore_errors=True)
        self._tracing, self._window = False, range(0)
