"""The training run: set up, resume, loop, evaluate, save. `train(config, workdir)` is the whole program; `main` calls it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxtrain import config as config_lib
from jaxtrain import workdir as workdir_lib
from jaxtrain.checkpoint import resume as resume_lib
from jaxtrain.checkpoint.checkpointer import Checkpointer, check_space
from jaxtrain.checkpoint.lease import LEASE_SECONDS, Lease, NoLease, held, wait_to_see
from jaxtrain.checkpoint.resume_point import Position, ResumePoint
from jaxtrain.config import Config
from jaxtrain.data import registry
from jaxtrain.data.base import Dataset
from jaxtrain.distributed import cluster, coordination
from jaxtrain.distributed.coordination import barrier, broadcast_str, first_on_process_zero
from jaxtrain.distributed.exit_report import ExitReport
from jaxtrain.distributed.interrupt import Interrupt, catch_signals
from jaxtrain.distributed.watchdog import Watchdog, watching
from jaxtrain.errors import InterruptedRunError, PreemptedError
from jaxtrain.host.backend import on_cpu
from jaxtrain.host.files import closing, writing
from jaxtrain.models import settings as models
from jaxtrain.observability import events, start_record
from jaxtrain.observability.clock import StepClock
from jaxtrain.observability.goodput import NullTimes, TimesFile
from jaxtrain.observability.progress import Progress
from jaxtrain.observability.sinks import require_packages
from jaxtrain.observability.text_log import FILE_ONLY, TextLog, make_console
from jaxtrain.parallel.mesh import Device
from jaxtrain.precision import require_hardware
from jaxtrain.training.callback_list import Callbacks, make_callbacks
from jaxtrain.training.callbacks import Callback
from jaxtrain.training.compiled import CompiledRun, compile_run, explain_out_of_memory
from jaxtrain.training.jax_settings import compile_cache_note, no_implicit_transfers, set_environment, settings
from jaxtrain.training.layout_report import overview, planned_svg
from jaxtrain.training.loop import Host, TrainLoop
from jaxtrain.training.plan.auto import choose_layout, memory_remedies
from jaxtrain.training.pretrained_settings import require_weights
from jaxtrain.training.profiling import catch_profile_signal
from jaxtrain.training.recovery import RollBack
from jaxtrain.training.results import TrainResult
from jaxtrain.training.setup import (
    RunSpec,
    check_names,
    load_data,
    make_run_spec,
    resolve_for_machine,
    select_devices,
)
from jaxtrain.training.startup_report import warn_of_settings
from jaxtrain.training.telemetry import Telemetry
from jaxtrain.workdir import Workdir

log = logging.getLogger("jaxtrain")


def train(
    config: Config | ConfigDict | Mapping[str, Any],
    workdir: str | Path,
    *,
    num_devices: int = 0,
    quiet: bool = False,
    interrupt: Interrupt | None = None,
    callbacks: Sequence[Callback] = (),
    origins: Mapping[str, str] = MappingProxyType({}),
) -> TrainResult:
    """Trains until the configured length, going on from whatever `workdir` holds, and returns the last state.

    Args:
      config: a `Config`, or nested mappings of its fields such as the `ConfigDict` that `load_config` returns.
      workdir: the directory of the run; made if it is not there.
      num_devices: use the first so many devices of each host; 0 uses all.
      quiet: print nothing (the log file is written all the same).
      interrupt: of `catch_signals`, where the caller catches them; else they are caught here.
      callbacks: of your own, called after those of `callbacks.names`; the same ones on every process and at every start.
      origins: where each value of the config came from (`recipes.Resolved.origins`), for the record.

    Raises:
      JaxtrainError: one of the types in `jaxtrain.errors`, with one clear sentence. Never exits the process.
    """
    config = config if isinstance(config, Config) else config_lib.from_dict(config_lib.nested_dicts(config))
    set_environment(config)
    check_names(config)
    directory = workdir_lib.prepare(workdir)
    with contextlib.ExitStack() as stack:
        console, called = make_console(quiet=quiet), make_callbacks(config, callbacks)
        progress = stack.enter_context(contextlib.closing(Progress(console if jax.process_index() == 0 else None)))
        stack.enter_context(TextLog(directory.log(jax.process_index()), jax.process_index(), console))
        log.info("work directory: %s", directory.path)
        clock, devices = StepClock(), select_devices(num_devices)
        interrupt = interrupt or stack.enter_context(catch_signals())
        interrupt.connect()
        watchdog = Watchdog(config.train.hang_seconds)
        stack.enter_context(watching(watchdog, interrupt.leave, directory.log(jax.process_index())))
        lease = _take_lease(directory, stack)
        first = jax.process_index() == 0
        times = _recorded(directory, clock, watchdog, stack) if first else NullTimes()
        stack.enter_context(_end_recorded(times, interrupt, watchdog))
        telemetry = stack.enter_context(contextlib.closing(Telemetry(config.telemetry, devices)))
        request = stack.enter_context(catch_profile_signal())
        host = Host(directory, interrupt, watchdog, clock, progress, lease, times, telemetry, called, request, origins)
        config = _choose_layout(config, host, devices)
        resume, config = resume_lib.where_to_start(directory, config, partial(resolve_for_machine, devices=devices))
        _check_before_data(resume, config, devices)
        stack.enter_context(settings(config))
        dataset = _read_data(config, host, resume.position.step)
        dataset, resume = resume_lib.may_go_on(directory, resume, config, dataset)
        if first:
            registry.record_contents(config.data, dataset)
        stack.enter_context(explain_out_of_memory(lambda: memory_remedies(config, devices)))
        for rollbacks_left in range(config.train.rollbacks, -1, -1):
            try:
                return _train_from(resume, config, dataset, devices, host, rollbacks_left)
            except RollBack as asked:
                dataset, resume = resume_lib.go_on_with(dataset, asked.resume, config)
    raise AssertionError("the last start rolls nothing back")


def _check_before_data(resume: ResumePoint, config: Config, devices: list[Device]) -> None:
    """Raises `ConfigError` where the run cannot be, before its data are prepared. Warns of numbers that will differ."""
    require_packages(config.sinks.names)
    if resume.start is None:
        require_weights(config)
    require_hardware(config.train.precision, devices)
    models.require_hardware(config.model, devices)
    if jax.process_index() == 0:
        resume_lib.warn_of_other_products(resume, config, devices[0].platform)


def _read_data(config: Config, host: Host, step: int) -> Dataset:
    host.watchdog.feed("prepare the data", step)
    with host.clock.charge("input"), host.progress.activity(f"reading the data set {config.data.name}"):
        return load_data(config.data)


def _choose_layout(config: Config, host: Host, devices: list[Device]) -> Config:
    """The config with its layout, chosen for the devices where it asks for that."""
    host.watchdog.feed("choose the layout")
    with host.clock.charge("compile"), host.progress.activity("choosing the layout"):
        return choose_layout(config, host.directory.plan, devices)


def _train_from(
    resume: ResumePoint, config: Config, dataset: Dataset, devices: list[Device], host: Host, rollbacks_left: int
) -> TrainResult:
    """From `resume` to the end of the run. Raises `RollBack` if that is better begun again."""
    directory, start = host.directory, resume.position
    run = make_run_spec(config, dataset, devices, start_step=start.step, start_example=start.examples)
    position = dataclasses.replace(start, dataset=run.data_record, jobs=tuple(sorted(cluster.job_ids())))
    warn_of_settings(run)
    # It may be a link to another disk; a new run makes it later.
    check_space(
        directory.checkpoints if directory.checkpoints.exists() else directory.path, jax.eval_shape(run.init, 0)
    )
    run, position = _as_ended(run, resume, position, host.callbacks)
    host.watchdog.feed("compile")
    compiling = f"{f'reading step {position.step}, ' if resume.start else ''}compiling the step"
    with host.clock.charge("compile"), host.progress.activity(compiling, note=compile_cache_note()):
        compiled, state = compile_run(run, resume, directory.trace(jax.process_index()))
    position = dataclasses.replace(position, weights=compiled.weights or start.weights)
    compiled.evaluate.begin(state)
    _take_over(host, resume, config, position, compiled)
    host.times.runs_on(0 if on_cpu(devices) else run.layout.mesh.size, config.cost.per_gpu_hour)
    host.times.goes_on_from(position.step, run.steps)
    said = events.event("start", position.step, also=FILE_ONLY)
    log.info("this start goes from step %d to step %d", position.step, run.steps, extra=said)
    checkpointer = Checkpointer(
        directory.checkpoints,
        config.checkpoint.keep,
        config.checkpoint.best,
        owner=host.lease.token,
        still_owner=host.lease.check,
    )
    with closing(checkpointer), no_implicit_transfers():
        loop = TrainLoop(run, compiled, checkpointer, host, position, rollbacks_left)
        with closing(loop.reporter):
            asks = loop.evaluator, host.clock.now, host.profiles.ask
            host.callbacks.begin(resume.start, position, compiled, directory.path, state, *asks)
            return loop.run(state)


def _as_ended(run: RunSpec, resume: ResumePoint, position: Position, callbacks: Callbacks) -> tuple[RunSpec, Position]:
    """A run that a callback has ended is complete, unless that callback is gone or its settings are others: it goes on then."""
    if not position.ended:
        return run, position
    by, reason = position.ending["by"], position.ending["reason"]
    if by in callbacks.names and resume.stored is not None and resume.stored.callbacks == run.config.callbacks:
        log.info("the run was ended by %s after step %d: %s", by, position.step, reason)
        return dataclasses.replace(run, steps=position.step), position
    log.warning(
        "the run, which was ended by %s after step %d, goes on: its callbacks are others now", by, position.step
    )
    return run, dataclasses.replace(position, ending={})


def _recorded(directory: Workdir, clock: StepClock, watchdog: Watchdog, stack: contextlib.ExitStack) -> TimesFile:
    """Process 0 records the events and the times of this start, until the end of `stack`."""

    def step() -> int:
        return watchdog.beat().step

    stack.enter_context(events.recording(directory.events, step))
    return TimesFile(directory.starts, clock, step)


@contextlib.contextmanager
def _end_recorded(times: NullTimes, interrupt: Interrupt, watchdog: Watchdog) -> Iterator[None]:
    """Records how this start ends: at the end of the block, or wherever `interrupt` ends it.

    Args:
      times: has it in its file, and is closed.
      interrupt: knows why the start ends, and may end it.
      watchdog: tells the launcher where the file is.
    """

    def record(error: BaseException) -> None:
        report = ExitReport.of(error, coordination.index())
        times.ends(report.code, report.sentence)
        level = logging.INFO if isinstance(error, (PreemptedError, InterruptedRunError)) else logging.ERROR
        said, trace = events.event("end", also=FILE_ONLY), error if report.trace else None
        log.log(level, "exit code %d: %s", report.code, report.sentence, extra=said, exc_info=trace)

    interrupt.last_words, watchdog.start_file = record, str(times.path or "")
    with closing(times):
        try:
            yield
        except BaseException as raised:
            record(interrupt.cause(raised))
            raise
        times.ends(0, "The run is complete.")
        log.info("the run is complete", extra=events.event("end", also=FILE_ONLY))


def _take_lease(directory: Workdir, stack: contextlib.ExitStack) -> Lease | NoLease:
    """Process 0 holds the directory's lock until the end of `stack`, and the others see it there."""
    directory.refuse_sweep()
    found: list[Lease] = []
    first_on_process_zero(
        "lock the work directory",
        lambda: found.append(stack.enter_context(held(directory.path))),
        2 * LEASE_SECONDS,
    )
    lease = found[0] if found else NoLease()
    wait_to_see(directory.path, broadcast_str("lease", lease.token, LEASE_SECONDS), jax.process_index())
    # Process 0 goes on when all have seen it: should it fail next, the lock is gone.
    coordination.allgather_str(coordination.unique_key("lease seen"), "seen", 3 * LEASE_SECONDS)
    return lease


def _take_over(host: Host, resume: ResumePoint, config: Config, position: Position, compiled: CompiledRun) -> None:
    """Process 0 makes the work directory this run's: sets aside what lies after its start, stores config, data, manifest."""
    directory, run = host.directory, compiled.run
    if jax.process_index() == 0:
        step = resume.position.step
        resume_lib.set_aside(directory, resume, config, run.steps, host.times.path)
        for old in directory.logs.glob("pipeline_trace_*.json"):  # of another start, maybe of other stages
            with writing(old):
                old.unlink()
        directory.write_config(config_lib.to_dict(config))
        directory.write_dataset(dataclasses.asdict(run.data_record))
        directory.write_skipped_images(run.dataset.skipped)
        directory.write_layout(overview(run, compiled.table), planned_svg(run))
        also = {"weights": position.weights} if position.weights else {}
        also |= {"origins": {key: origin for key, origin in host.origins.items() if origin != "default"}}
        start_record.append_start(directory.manifest, start_record.environment(step) | also)
    barrier("the work directory is this run's")
