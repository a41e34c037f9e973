"""A few steps of a run, with its own programs and data, in a temporary directory: `jaxtrain train --config FILE --smoke`.

It shows that the run will work on this machine, how long it will take, and leaves its programs in the compile cache. The
run's work directory is neither made nor read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.resume_point import Position, ResumePoint
from jaxtrain.config import Config, to_dict
from jaxtrain.distributed import coordination
from jaxtrain.distributed.coordination import allgather_str, barrier, broadcast_str, unique_key
from jaxtrain.distributed.interrupt import Interrupt, catch_signals
from jaxtrain.distributed.watchdog import Watchdog, watching
from jaxtrain.durations import Duration
from jaxtrain.errors import CheckpointError, EnvironmentMismatchError, NumericError, WorkdirError
from jaxtrain.host.backend import on_cpu
from jaxtrain.host.files import closing
from jaxtrain.models import settings as models
from jaxtrain.observability.anomaly import AnomalyDetector
from jaxtrain.observability.progress import Progress
from jaxtrain.observability.rendering import duration
from jaxtrain.observability.text_log import TextLog, make_console
from jaxtrain.parallel.mesh import Device
from jaxtrain.precision import require_hardware
from jaxtrain.step.train_state import TrainState, state_shapes
from jaxtrain.training.cadence import Timetable
from jaxtrain.training.compiled import CompiledRun, compile_run, explain_out_of_memory
from jaxtrain.training.jax_settings import compile_cache_note, no_implicit_transfers, set_environment, settings
from jaxtrain.training.plan.auto import choose_layout, memory_remedies
from jaxtrain.training.recovery import not_finite
from jaxtrain.training.run_view import evaluation_left
from jaxtrain.training.setup import (
    RunSpec,
    check_names,
    load_data,
    make_run_spec,
    resolve_for_machine,
    select_devices,
)
from jaxtrain.training.speed import forward_operations
from jaxtrain.training.startup_report import warn_of_settings
from jaxtrain.workdir import Workdir

log = logging.getLogger("jaxtrain")

CALLS = 2  # of the train step, and batches of the evaluation
_KEPT = "--smoke has left nothing behind"
_SEE_SECONDS = 60.0  # in which every process must have looked for the directory


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of each part, the compilation left out."""

    step: float
    evaluation_batch: float
    """Of all weights that the run evaluates; 0 where it has nothing to evaluate on."""
    save: float
    restore: float


def smoke(
    config: Config,
    recipe: str = "the run",
    *,
    num_devices: int = 0,
    quiet: bool = False,
    interrupt: Interrupt | None = None,
) -> float:
    """Makes two steps, evaluates two batches, saves and restores, as the run that `config` describes would.

    Args:
      config: the run's.
      recipe: its name, for what is printed.
      num_devices: use the first so many devices of each host; 0 uses all.
      quiet: print nothing.
      interrupt: of `catch_signals`, where the caller catches them; else they are caught here.

    Returns:
      The seconds that the whole run should take, without compiling.

    Raises:
      JaxtrainError: what the run would raise. EnvironmentMismatchError: the hosts of the run share no temporary directory.
    """
    set_environment(config)
    check_names(config)
    with contextlib.ExitStack() as stack:
        interrupt = interrupt or stack.enter_context(catch_signals())
        interrupt.kept = _KEPT
        interrupt.connect()
        directory = Workdir(stack.enter_context(_temporary_directory(interrupt)))
        process = jax.process_index()
        console = make_console(quiet=quiet)
        stack.enter_context(TextLog(directory.log(process), process, console))
        progress = stack.enter_context(contextlib.closing(Progress(console if process == 0 else None)))
        watchdog = Watchdog(config.train.hang_seconds)
        stack.enter_context(watching(watchdog, interrupt.leave, directory.log(process)))
        log.info("smoke: %s in %s, which is deleted at the end; no work directory is touched", recipe, directory.path)
        devices = select_devices(num_devices)
        config = resolve_for_machine(choose_layout(config, directory.plan, devices), None, devices)
        require_hardware(config.train.precision, devices)
        models.require_hardware(config.model, devices)
        stack.enter_context(settings(config))
        watchdog.feed("prepare the data")
        run = make_run_spec(config, load_data(config.data), devices)
        warn_of_settings(run)
        stack.enter_context(explain_out_of_memory(lambda: memory_remedies(config, devices)))
        whole = _SmokeTest(run, directory, watchdog, interrupt).run(progress)
        barrier("the smoke test is over")
    return whole


class _SmokeTest:
    """The parts of a run, one after the other; each says what it found."""

    def __init__(self, run: RunSpec, directory: Workdir, watchdog: Watchdog, interrupt: Interrupt):
        self._run, self._directory, self._watchdog, self._interrupt = run, directory, watchdog, interrupt
        self._batch = run.config.data.global_batch
        self._split = next((split for split in ("validation", "test") if len(getattr(run.dataset, split))), "")

    def run(self, progress: Progress) -> float:
        """The seconds that the whole run should take. progress: shows what is done."""
        self._watchdog.feed("compile")  # a signal meanwhile ends the process at once
        log.info("smoke: %s", expectation(self._run))
        few = dataclasses.replace(self._run.config.train, eval_examples=CALLS * self._run.evaluation_batch)
        run = dataclasses.replace(self._run, config=dataclasses.replace(self._run.config, train=few))
        trace = self._directory.trace(jax.process_index())
        with progress.activity("compiling the step", note=compile_cache_note()):
            compiled, state = compile_run(run, ResumePoint(None, Position(), None), trace)
        with no_implicit_transfers(), progress.activity("steps, evaluation, save and restore"):
            state, step = self._steps(compiled, state)
            evaluation = self._evaluation(compiled, state) if self._split else 0.0
            save, restore = self._save_and_restore(state, CALLS * compiled.steps_per_call)
        whole, text = whole_run(self._run, Measured(step, evaluation, save, restore))
        log.info("smoke: all of it works. %s", text)
        return whole

    def _begin(self, phase: str) -> None:
        """Before a part of the test. Raises `InterruptedRunError` or `PreemptedError` where a signal has come."""
        self._watchdog.feed(phase)
        if self._interrupt.poll():
            raise self._interrupt.error(f"Stopped; {_KEPT}.")

    def _steps(self, compiled: CompiledRun, state: TrainState) -> tuple[TrainState, float]:
        """The state after two calls of the step, and the seconds of a step in the second one."""
        count = compiled.steps_per_call
        batches = compiled.batches(first_step=0, first_example=0, steps=CALLS * count, calls=[count] * CALLS)
        seconds, made = 0.0, 0
        with contextlib.closing(batches):
            for _ in range(CALLS):
                self._begin("compile")  # the first call may be slow: nothing is known of its length
                began = time.perf_counter()
                state, metrics = compiled.step(state, next(batches), compiled.inputs.resident)
                rows = metrics.rows()
                seconds = (time.perf_counter() - began) / count
                for row in rows:
                    made += 1
                    self._check(made, row)
                log.info("smoke: step %d: loss %.4f, %.3g s a step", made, rows[-1]["loss"], seconds)
        return state, seconds

    def _check(self, step: int, row: dict[str, float]) -> None:
        """Raises `NumericError` where the run would stop, or roll back, after this step."""
        if not row["made"]:
            raise not_finite(step, row, _KEPT)
        norms = row["grad_norm"], row["update_norm"]
        anomaly = AnomalyDetector(self._run.config.train.nonfinite_skips, 0.0).observe(
            step, row["loss"], *norms, skipped=bool(row["skipped"])
        )
        if anomaly.action != "go on" and not row["overflowed"]:
            raise NumericError(f"{anomaly.text}; {_KEPT}.")

    def _evaluation(self, compiled: CompiledRun, state: TrainState) -> float:
        """Seconds of a batch, for all weights that the run evaluates."""
        self._begin("evaluation")
        starts: list[float] = []
        results = compiled.evaluate.of_state(state, self._split, lambda: starts.append(time.perf_counter()))
        # Each of the weights has a program, which is compiled before its first batch.
        seconds = (time.perf_counter() - starts[len(starts) - len(starts) // len(results)]) * len(results)
        batches = len(starts) // len(results)
        raw = results["raw"]
        text = "smoke: evaluated %d examples of %s: loss %.4f, %.3g s a batch"
        log.info(text, raw.examples, self._split, raw.loss, seconds / batches)
        return seconds / batches

    def _save_and_restore(self, state: TrainState, step: int) -> tuple[float, float]:
        """Seconds of a save and of a restore. Raises `CheckpointError` where the state comes back as another."""
        self._begin("save")
        position = Position(step=step, examples=step * self._batch, dataset=self._run.data_record)
        with closing(Checkpointer(self._directory.checkpoints)) as checkpoints:
            began = time.perf_counter()
            try:
                checkpoints.save(step, state, position.to_json(to_dict(self._run.config)), epoch=-1, last=True)
                checkpoints.wait()
            except WorkdirError as error:
                text = (
                    f"A checkpoint could not be written to {self._directory.path}; set TMPDIR to a directory with room."
                )
                raise WorkdirError(text) from error
            save = time.perf_counter() - began
            before = jax.tree.map(_on_host, state)
            jax.tree.map(lambda leaf: leaf.delete(), state)  # a resumed run has the memory of one state
            self._begin("restore")
            began = time.perf_counter()
            restored = checkpoints.restore(step, state_shapes(self._run.init, self._run.layout))
            jax.block_until_ready(restored)
            restore = time.perf_counter() - began
            if not jax.tree.all(jax.tree.map(_same, before, jax.tree.map(_on_host, restored), is_leaf=_is_parts)):
                raise CheckpointError("What was restored is not what was saved; run jaxtrain doctor on this machine.")
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(restored)) / 2**20
        log.info("smoke: saved %.1f MiB in %.2g s, restored in %.2g s, equal bit for bit", size, save, restore)
        return save, restore


def _on_host(leaf: jax.Array) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(shard.data) for shard in leaf.addressable_shards)


def _is_parts(node: Any) -> bool:
    return isinstance(node, tuple) and bool(node) and all(isinstance(part, np.ndarray) for part in node)


def _same(before: tuple[np.ndarray, ...], after: tuple[np.ndarray, ...]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True))


@contextlib.contextmanager
def _temporary_directory(interrupt: Interrupt) -> Iterator[Path]:
    """A temporary directory of process 0, which all processes must see: they write one checkpoint together.

    It is deleted afterwards, also where `interrupt` ends the process.
    """
    mine = tempfile.mkdtemp(prefix="jaxtrain-smoke-") if coordination.index() == 0 else ""

    def clean() -> None:
        if mine:
            shutil.rmtree(mine, ignore_errors=True)

    def clean_and_leave(leave: Callable[[Any], None], error: Any) -> None:
        clean()
        leave(error)

    if interrupt.leave is not None:
        interrupt.leave = functools.partial(clean_and_leave, interrupt.leave)
    try:
        path = Path(broadcast_str("the smoke test's directory", mine, _SEE_SECONDS))
        host = "" if path.is_dir() else socket.gethostname()
        if blind := sorted({*allgather_str(unique_key("smoke seen"), host, _SEE_SECONDS)} - {""}):
            raise EnvironmentMismatchError(
                f"{', '.join(blind)} does not see {path}: --smoke saves one checkpoint of all processes, in a temporary "
                "directory that all hosts must share; set TMPDIR on process 0's host to one that they do."
            )
        yield path
    finally:
        clean()


# ---------------------------------------------------------------------------------------------------------- how long


def expectation(run: RunSpec) -> str:
    """How long two steps should take, before anything is compiled: the model's operations at this machine's rate."""
    device = run.layout.mesh.local_devices[0]
    # The backward pass takes twice what the forward pass takes.
    operations = 3 * forward_operations(run) * run.config.data.global_batch
    rate = measured_rate(device, run.task.preprocess.dtype)
    # The CPU devices of a process share its cores.
    devices = jax.process_count() if on_cpu([device]) else run.layout.mesh.size
    if not operations:
        return "how long two steps take is known after the first; compiling them comes before"
    return (
        f"two steps should take about {_rough(CALLS * operations / devices / rate)}, and compiling them comes first "
        f"(a guess: {operations / 1e9:,.3g} GFLOP a step, and {rate / 1e9:,.3g} GFLOP/s in a convolution here)"
    )


def measured_rate(device: Device, dtype: DTypeLike) -> float:
    """Floating point operations per second of a 3x3 convolution on a device: the best of three."""
    examples, side, channels = 64, 32, 64
    with jax.default_device(device):
        images = jnp.ones((examples, side, side, channels), dtype)
        kernel = jnp.ones((3, 3, channels, channels), dtype)
        convolve = jax.jit(
            lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
        seconds = []
        for _ in range(4):  # the first one compiles
            began = time.perf_counter()
            jax.block_until_ready(convolve(images, kernel))
            seconds.append(time.perf_counter() - began)
    return 2.0 * images.size * channels * 9 / min(seconds[1:])


def whole_run(run: RunSpec, measured: Measured) -> tuple[float, str]:
    """How long the whole run should take: seconds, and a sentence that says what they are made of.

    Args:
      run: with its own config.
      measured: what its parts take.
    """
    config, dataset = run.config, run.dataset
    table = Timetable(config, len(dataset.train), run.steps, Position(), validates=len(dataset.validation) > 0)
    validations, saves = table.left_after(0)
    num_batches = {split: run.num_evaluation_batches(split) for split in ("validation", "test")}
    evaluated = evaluation_left(num_batches, 1, validations)  # `measured` is of all weights
    steps, evaluation = run.steps * measured.step, evaluated * measured.evaluation_batch
    every = Duration.parse(config.checkpoint.every, "config.checkpoint.every", minutes=True)
    if every.unit == "minutes" and every.value:
        saves = max(saves, math.ceil((steps + evaluation) / every.seconds))
    saving = saves * measured.save
    whole = steps + evaluation + saving
    return whole, (
        f"The whole run should take about {_rough(whole)}, compiled: {run.steps:,} steps {_rough(steps)}, {validations:,} "
        f"validations and the test {_rough(evaluation)}, {saves:,} saves {_rough(saving)}, without those of a new best."
    )


def _rough(seconds: float) -> str:
    """Seconds in two digits, or H:MM:SS from ten minutes on."""
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s" if seconds < 600 else duration(seconds)
