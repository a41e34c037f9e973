"""The sweep: plan, check, run what is not done, decide at the rungs, compare. `sweep(source, workdir)` is the whole program."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain import workdir as workdir_lib
from jaxtrain.checkpoint import lease
from jaxtrain.distributed.supervisor import caught
from jaxtrain.errors import ConfigError, InterruptedRunError, JaxtrainError, PreemptedError, WorkdirError
from jaxtrain.host.files import read_json
from jaxtrain.jobs import run_status
from jaxtrain.jobs.run_status import is_run, read_status
from jaxtrain.sweeps import halving, store
from jaxtrain.sweeps.crew import Crew
from jaxtrain.sweeps.plan import Plan, PlannedRun, make_plan
from jaxtrain.sweeps.share import shares
from jaxtrain.sweeps.spec import Sweep, read_sweep
from jaxtrain.sweeps.store import Decision
from jaxtrain.sweeps.view import View
from jaxtrain.sweeps.worker import DONE, FAILED, Task
from jaxtrain.workdir import Workdir

HALVED = "halved"
"""The state of a run that halving has stopped."""

_PATIENCE_SECONDS = 120.0  # in which a run that is still being saved must end
_LOOK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep that is over."""

    name: str
    settings: Mapping[str, Any]
    """The fields that vary, by dotted name, and this run's values."""
    workdir: Workdir
    state: str
    """`done`; `halved`: halving has stopped it; `failed`."""
    reason: str
    """Why it failed, in a sentence."""
    result: Mapping[str, Any] | None
    """What `result.json` holds; None unless it is done."""


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What `sweep` returns."""

    path: Path
    """The directory of the sweep."""
    runs: tuple[SweepRun, ...]
    """In the plan's order."""
    decisions: tuple[Decision, ...]
    """Of halving, rung by rung."""

    def in_state(self, state: str) -> list[SweepRun]:
        """The runs that are `done`, `halved` or `failed`."""
        return [run for run in self.runs if run.state == state]


def sweep(
    source: str | Path | Mapping[str, Any] | Sweep,
    workdir: str | Path = "",
    *,
    jobs: int = 0,
    num_devices: int = 0,
    retry_failed: bool = False,
    quiet: bool = False,
) -> SweepResult:
    """Trains every run of a sweep that is not done, each in a directory below `workdir`, going on from what is there.

    A run that fails does not end the sweep; its state says so.

    Args:
      source: a file in YAML, or a mapping with the same keys (docs/sweeps.md).
      workdir: the directory of the sweep; "" is the one that `source` names.
      jobs: how many runs at once; 0: as `source` says, else one.
      num_devices: how many devices each run uses; 0: all that its share of the machine has.
      retry_failed: whether runs that have failed are tried again.
      quiet: print nothing.

    Raises:
      ConfigError: the sweep or one of its configs is wrong, or differs from the one in `workdir`; nothing was run.
      WorkdirError: a directory cannot be written, or another sweep works there.
      InterruptedRunError, PreemptedError: it was told to stop; the runs are saved, and the same call goes on.
    """
    asked = source if isinstance(source, Sweep) else read_sweep(source)
    place = str(workdir) or asked.workdir
    if not place:
        raise ConfigError(
            "The sweep has no work directory; give it one with --workdir, or as `workdir: DIR` in its file."
        )
    plan = make_plan(asked)
    parts = shares(jobs or asked.jobs, num_devices)
    if is_run(workdir_lib.named(place)):
        raise WorkdirError(f"{place} is the work directory of a run; choose another --workdir for the sweep.")
    _read_stored(Path(place).expanduser().absolute(), plan)
    directory, view, signals = workdir_lib.prepare(place), View(quiet=quiet), []
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(caught(signals))
        stack.enter_context(lease.held(directory.path))
        decisions = _read_stored(directory.path, plan)
        with view.waiting("starting, and checking the configs"):
            crew = stack.enter_context(Crew(parts, directory.logs, signals))
            check([run for run in plan.runs if not Workdir(directory.path / run.name).result.is_file()], crew)
        store.write(directory.path, plan, decisions)
        going = _Going(plan, directory.path, crew, view, signals, num_devices, retry_failed)
        return going.to_the_end(decisions)


def check(runs: Sequence[PlannedRun], crew: Crew) -> None:
    """Raises `ConfigError` where a config names something that there is not."""
    for run, problem in zip(runs, crew.check([run.config for run in runs]), strict=True):
        if problem:
            raise ConfigError(f"The run {run.name}: {problem}")


def _read_stored(folder: Path, plan: Plan) -> list[Decision]:
    """What an earlier start of the same sweep has decided. Raises `ConfigError` where it was another sweep."""
    stored = store.read(folder)
    if stored is None:
        return []
    store.refuse_changes(stored, plan, folder)
    return list(stored.decisions)


class _Going:
    """One start of a sweep."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        crew: Crew,
        view: View,
        signals: Sequence[int],
        num_devices: int,
        retry_failed: bool,
    ):
        self._plan, self._folder, self._crew, self._view, self._signals = plan, folder, crew, view, signals
        self._num_devices, self._retry_failed = num_devices, retry_failed
        self._failed: dict[str, str] = {}  # in this start, and why

    def to_the_end(self, decisions: list[Decision]) -> SweepResult:
        """Trains rung by rung, then to the end."""
        settings, plan = self._plan.settings(), self._plan
        count = plan.halving.rungs if plan.halving else 0
        for rung in range(len(decisions) + 1, count + 1):
            assert plan.halving is not None
            share = halving.share_of(plan.halving, rung)
            alive = decisions[-1].kept if decisions else tuple(settings)
            self._train(f"rung {rung} of {count}", [run for each in alive for run in settings[each]], share)
            figures = {
                each: [halving.figure_at(self._folder / run.name, share, plan.halving.metric) for run in settings[each]]
                for each in alive
            }
            decisions.append(halving.decide(plan.halving, rung, figures))
            store.write(self._folder, plan, decisions)
            self._view.say(f"rung {rung} of {count}: {', '.join(decisions[-1].kept)} of {len(alive)} settings go on")
        alive = decisions[-1].kept if decisions else tuple(settings)
        self._train("sweep", [run for run in plan.runs if run.setting in alive], 1.0)
        return SweepResult(self._folder, tuple(map(self._over, plan.runs)), tuple(decisions))

    def _train(self, what: str, runs: Sequence[PlannedRun], pause_at: float) -> None:
        """Trains what has not come to `pause_at`. Raises where the sweep is told to stop, or cannot write."""
        tasks = [
            Task(run.name, run.config, run.origins, run.command, self._folder / run.name, self._num_devices, pause_at)
            for run in runs
            if self._is_open(run, pause_at)
        ]
        self._wait_for_savers(tasks)
        with self._view.round(what, len(runs) - len(tasks), len(runs)):
            begun = 0

            def look() -> None:
                running = self._crew.running()
                self._view.look(running, max(len(tasks) - begun - len(running), 0))

            for task, outcome in self._crew.work(tasks, look):
                begun += 1
                self._view.ended(task, outcome)
                if outcome.code == WorkdirError.exit_code:
                    raise WorkdirError(
                        f"The run {task.name}: {outcome.message} The sweep stops; the same command goes on."
                    )
                if outcome.state == FAILED:
                    self._failed[task.name] = outcome.message
        if self._signals:
            raise self._stopped()

    def _is_open(self, run: PlannedRun, pause_at: float) -> bool:
        """Whether there is something to train: it is not done, has not come to the rung, and has not failed."""
        folder, plan = self._folder / run.name, self._plan
        if Workdir(folder).result.is_file() or run.name in self._failed:
            return False
        if pause_at < 1 and plan.halving and halving.figure_at(folder, pause_at, plan.halving.metric) is not None:
            return False
        return self._retry_failed or not self._has_failed(folder)

    @staticmethod
    def _has_failed(folder: Path) -> bool:
        """Whether its latest start ended with an error of the run itself, and not of the disk."""
        if not is_run(folder):
            return False
        status = read_status(folder)
        return status.state in (run_status.FAILED, run_status.DAMAGED) and status.code != WorkdirError.exit_code

    def _wait_for_savers(self, tasks: Sequence[Task]) -> None:
        """Waits until runs of a sweep that was killed have saved and ended."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for task in tasks:
            holder = lease.look(task.folder)
            while holder is not None and holder.lives and not self._signals:
                if time.monotonic() > deadline:
                    raise WorkdirError(
                        f"The run {task.folder} is trained by {holder.owner}; wait for its end, or stop it with: jaxtrain stop "
                        f"{task.folder}."
                    )
                with self._view.waiting(f"waiting for {task.name}, which {holder.owner} saves"):
                    time.sleep(_LOOK_SECONDS)
                holder = lease.look(task.folder)

    def _stopped(self) -> JaxtrainError:
        done = sum(Workdir(self._folder / run.name).result.is_file() for run in self._plan.runs)
        kind = InterruptedRunError if self._signals[0] == signal.SIGINT else PreemptedError
        return kind(
            f"Stopped the sweep {self._folder}: {done} of {len(self._plan.runs)} runs are done, and those begun are saved; the "
            "same command goes on."
        )

    def _over(self, run: PlannedRun) -> SweepRun:
        workdir = Workdir(self._folder / run.name)
        result = read_json(workdir.result)
        if result is not None:
            state, reason = DONE, ""
        elif run.name in self._failed or self._has_failed(workdir.path):
            state, reason = FAILED, self._failed.get(run.name) or read_status(workdir.path).reason
        else:
            state, reason = HALVED, ""
        return SweepRun(run.name, run.settings, workdir, state, reason, result)
