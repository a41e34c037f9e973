"""Brings a run onto the devices: state, compiled programs, batches. Says what lies where, and checks that it does."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxtrain.checkpoint.checkpointer import Checkpointer, holds, restore_leaves
from jaxtrain.checkpoint.resume_point import ResumePoint
from jaxtrain.errors import DeviceMemoryError
from jaxtrain.host.backend import on_cpu
from jaxtrain.host.files import closing
from jaxtrain.host.limits import limits_named
from jaxtrain.observability.text_log import FILE_ONLY, NOT_LIVE, to_screen
from jaxtrain.parallel.audit import audit
from jaxtrain.parallel.layout import Placement
from jaxtrain.step.answers import Answers, make_answer_step
from jaxtrain.step.batch import RATES, Batch, EvalBatch
from jaxtrain.step.communication import shared_out
from jaxtrain.step.eval_step import EvalResult, EvalStep, make_eval_step
from jaxtrain.step.local_sgd import averages
from jaxtrain.step.pipeline.eval_step import PipelineEvalStep, make_pipeline_eval_step
from jaxtrain.step.pipeline.train_step import make_pipeline_train_step
from jaxtrain.step.train_state import TrainState, create_state, state_shapes
from jaxtrain.step.train_step import NO_COMMAND_BUFFERS, NO_OPTIONS, TrainStep, make_train_step
from jaxtrain.training.initial_weights import initial_weights
from jaxtrain.training.input_pipeline import InputPipeline, make_input_pipeline
from jaxtrain.training.jax_settings import compile_cache_note
from jaxtrain.training.setup import RunSpec
from jaxtrain.training.speed import Speed
from jaxtrain.training.startup_report import headlines, idle_stages, layout_table, one_step_a_call, summary
from jaxtrain.trees import PyTree, by_path

log = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True)
class CompiledRun:
    """A run on its devices.

    Attributes:
      run: what is computed.
      step: one update, or several as one program.
      evaluate: weights, on a split.
      inputs: batches.
      weights: what is recorded of the weights that were not drawn (`initial_weights`); empty where a run goes on.
      speed: tells FLOP/s.
      table: where each leaf of the state lies (`layout_table`).
      averages: under `optim.sync_every`, the program of `local_sgd.averages`.
    """

    run: RunSpec
    step: TrainStep
    evaluate: Evaluator
    inputs: InputPipeline
    weights: Mapping[str, Any]
    speed: Speed
    table: Mapping[str, list[Placement]]
    averages: Callable[[TrainState], dict[str, PyTree]] | None = None

    @property
    def steps_per_call(self) -> int:
        """How many updates one call of `step` makes, of as many batches stacked."""
        return self.step.per_call

    def averaged(self, state: TrainState) -> TrainState:
        """`state` for whoever looks at its weights: under `optim.sync_every` they are made the average of the local ones."""
        return state if self.averages is None else dataclasses.replace(state, **self.averages(state))

    @functools.cached_property
    def step_for_profile(self) -> TrainStep:
        """The step with operations that a profile can tell apart: on GPUs compiled anew, without command buffers.

        The programs of pipeline stages stay as they are. With several processes all must call it.
        """
        if self.run.layout.stages > 1 or on_cpu(self.run.layout.mesh.devices.flat):
            return self.step
        state = state_shapes(self.run.init, self.run.layout)
        return compile_train_step(self.run, self.inputs, state, options=NO_COMMAND_BUFFERS)

    def batches(
        self, *, first_step: int, first_example: int, steps: int, calls: Iterable[int] | None = None
    ) -> Generator[Batch]:
        """The batches of `steps` updates from `first_step` on; see `InputPipeline.train`."""
        config = self.run.config
        return self.inputs.train(
            seed=config.seed,
            schedule=self.run.task.schedule,
            weight_decay=config.optim.weight_decay,
            global_batch=config.data.global_batch,
            first_step=first_step,
            first_example=first_example,
            steps=steps,
            calls=calls,
        )


def compile_run(
    run: RunSpec, resume: ResumePoint, trace: Path = Path("pipeline_trace.json")
) -> tuple[CompiledRun, TrainState]:
    """Makes or restores the state, compiles the step (beside it, in a run of one process) and audits the layout.

    Args:
      run: what to compile.
      resume: where the run goes on from.
      trace: the file of `layout.trace_step`.

    Raises:
      AuditError: something lies elsewhere than the layout says.
      CheckpointError: the checkpoint is damaged, or of another model.
      WeightsError: the weights that a new run begins with are.
    """
    began = time.perf_counter()
    shapes = state_shapes(run.init, run.layout)
    given, weights = initial_weights(run, shapes) if resume.start is None else ({}, {})
    table = layout_table(run, shapes)
    inputs = make_input_pipeline(run.dataset, run.layout, run.config.data.residency, run.config.data.workers)
    compiler = concurrent.futures.ThreadPoolExecutor(1, "compile")
    compiling = compiler.submit(compile_train_step, run, inputs, shapes, trace)
    speed = Speed(run, compiler)
    if jax.process_count() > 1:
        compiling.result()  # both ask the other processes (Orbax, arrays over all devices): one after the other on each
    state = _restored(run, resume, shapes) if resume.start is not None else None
    for line in headlines(run, table, inputs.where):
        to_screen(line)
    for line in summary(run, table, inputs.where):
        log.info("%s", line, extra=FILE_ONLY)
    if text := idle_stages(run, shapes):
        log.warning("%s", text)
    log.info("compiling the step (%s)", compile_cache_note(), extra=NOT_LIVE)
    if state is None:
        state = create_state(run.init, run.layout, run.config.seed, given)
    step = compiling.result()
    for note in audit(run.layout, table, state, step).notes:
        log.info("%s", note)
    averaging = _compile_averages(run, shapes) if run.layout.trains_by_device else None
    log.info("compiled in %.1f s", time.perf_counter() - began)
    return CompiledRun(run, step, Evaluator(run, inputs, compiler), inputs, weights, speed, table, averaging), state


def _compile_averages(run: RunSpec, state: TrainState) -> Callable[[TrainState], dict[str, PyTree]]:
    """The program of `local_sgd.averages`. state: shapes."""
    trees = {name: getattr(state, name) for name in ("params", "batch_stats", "opt_state", "ema")}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trees)
    return jax.jit(functools.partial(averages, run.task, run.layout), out_shardings=shardings).lower(state).compile()


def _restored(run: RunSpec, resume: ResumePoint, shapes: TrainState) -> TrainState:
    """The state that the run goes on from."""
    assert resume.start is not None
    changes = run.config.checkpoint.allow_changes  # then a tree may stay as it is in a fresh state
    template = create_state(run.init, run.layout, run.config.seed) if changes else shapes
    with closing(Checkpointer(resume.start.directory, read_only=True)) as checkpoints:
        state = checkpoints.restore(resume.start.step, template, allow_changes=changes)
        state = _with_communication(run, checkpoints, resume.start.step, state, shapes)
    log.info("resumed from %s", resume.start.directory / str(resume.start.step))
    return state


def _with_communication(
    run: RunSpec, checkpoints: Checkpointer, step: int, state: TrainState, shapes: TrainState
) -> TrainState:
    """`state`, restored from `step`, with what it kept for each shard of the batch, for as many shards as there are now."""
    there = {
        path.removeprefix("communication/"): shape
        for path, (shape, _) in checkpoints.stored_shapes(step).items()
        if path.startswith("communication/")
    }
    if holds(checkpoints, step, "communication", shapes.communication):
        return state
    here = by_path(shapes.communication)
    if not here:
        log.warning(
            "what the shards of the batch held at step %d (optim.compress, optim.sync_every) is left out: this run keeps none",
            step,
        )
        return state

    def read(path: str, shape: tuple[int, ...] | None) -> jax.Array | None:
        if path not in there or shape not in (None, there[path]):
            return None
        like: Any = here[path]
        spec = P() if shape is None else like.sharding.spec
        where = jax.sharding.NamedSharding(like.sharding.mesh, spec)
        key = f"communication/{path}"
        target = jax.ShapeDtypeStruct(there[path], like.dtype, sharding=where)
        return restore_leaves(checkpoints, step, {key: target}, run.layout.mesh)[key]

    if there:
        log.info("what the shards of the batch held at step %d is shared out anew: they differ now", step)
    fresh = create_state(run.init, run.layout, run.config.seed).communication
    return dataclasses.replace(state, communication=shared_out(run.task, run.layout, state, fresh, read))


class Evaluator:
    """Evaluates weights on a split. Compiled in a thread, at the first call or from `begin` on."""

    def __init__(self, run: RunSpec, inputs: InputPipeline, compiler: concurrent.futures.Executor | None = None):
        self._run, self._inputs = run, inputs
        self._compiler = compiler or concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._compiled: dict[Any, concurrent.futures.Future[EvalStep | PipelineEvalStep]] = {}

    def wait(self, state: TrainState) -> None:
        """Returns when the programs for the weights of `state`, and for their average, are compiled."""
        for weights in _weights(state).values():
            self._program(*weights).result()

    def begin(self, state: TrainState) -> None:
        """Compiles beside what comes next for the weights of `state`, and for their average.

        Not with pipeline stages: their evaluation would share the devices' dispatching threads with the step. Not with other
        processes: the steps communicate with them meanwhile.
        """
        dataset, alone = self._run.dataset, self._run.layout.stages == 1 and jax.process_count() == 1
        if not alone or not (len(dataset.validation) or len(dataset.test)):
            return
        for weights in _weights(state).values():
            self._program(*weights)

    def __call__(
        self, split: str, params: PyTree, batch_stats: PyTree, before_batch: Callable[[], None] = lambda: None
    ) -> EvalResult:
        """Evaluates weights; calls `before_batch` before every batch."""

        program = self._program(params, batch_stats).result()
        with self._batches(split, before_batch) as batches:
            return program(params, batch_stats, batches, self._inputs.resident)

    def answers(
        self,
        split: str,
        params: PyTree,
        batch_stats: PyTree,
        before_batch: Callable[[], None] = lambda: None,
        *,
        flip: bool = False,
    ) -> tuple[EvalResult, Answers]:
        """As a call, with the answer to each example; not with pipeline stages. flip: see `make_answer_step`."""
        batch = self._inputs.evaluation_shapes(self._run.evaluation_batch)
        weights = (params, batch_stats, batch, self._inputs.resident)
        step = make_answer_step(self._run.task, self._run.layout, *weights, flip=flip)
        with self._batches(split, before_batch) as batches:
            return step(params, batch_stats, batches, self._inputs.resident)

    @contextlib.contextmanager
    def _batches(self, split: str, before_batch: Callable[[], None]) -> Iterator[Iterator[EvalBatch]]:
        """The batches of a split; `before_batch` is called before each."""

        def watched(batches: Iterator[EvalBatch]) -> Iterator[EvalBatch]:
            for batch in batches:
                before_batch()
                yield batch

        size, examples = self._run.evaluation_batch, self._run.config.train.eval_examples
        with contextlib.closing(self._inputs.evaluation(split, size, examples)) as batches:
            yield watched(batches)

    def of_state(
        self, state: TrainState, split: str, before_batch: Callable[[], None] = lambda: None
    ) -> dict[str, EvalResult]:
        """Evaluates the weights of a state, and their moving average where the run keeps one.

        Args:
          state: on the devices.
          split: `train`, `validation` or `test`.
          before_batch: called before every batch.

        Returns:
          Results by weights: `raw`, and perhaps `ema`.
        """
        return {name: self(split, *trees, before_batch) for name, trees in _weights(state).items()}

    def _program(self, *weights: PyTree) -> concurrent.futures.Future[EvalStep | PipelineEvalStep]:
        leaves, structure = jax.tree.flatten(weights)
        # Under ZeRO-1 and 2 the average is sharded and the weights are not: two programs.
        where = tuple(leaf.sharding for leaf in leaves)
        if where not in self._compiled:
            # Shapes: a step may donate and delete the arrays meanwhile.
            shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in leaves]
            params, batch_stats = structure.unflatten(shapes)
            batch, resident = self._inputs.evaluation_shapes(self._run.evaluation_batch), self._inputs.resident
            make = make_pipeline_eval_step if self._run.layout.stages > 1 else make_eval_step
            task, layout = self._run.task, self._run.layout
            self._compiled[where] = self._compiler.submit(make, task, layout, params, batch_stats, batch, resident)
        return self._compiled[where]


def _weights(state: TrainState) -> dict[str, tuple[PyTree, PyTree]]:
    """The parameters and running statistics that are evaluated: `raw`, and `ema` where the run keeps an average."""
    weights = {"raw": (state.params, state.batch_stats)}
    if state.ema:
        weights["ema"] = state.ema["params"], state.ema["batch_stats"]
    return weights


def compile_train_step(
    run: RunSpec,
    inputs: InputPipeline,
    state: TrainState,
    trace: Path = Path("pipeline_trace.json"),
    options: Mapping[str, str] = NO_OPTIONS,
) -> TrainStep:
    """The step for the run's layout: one program over the whole mesh, or programs by pipeline stage.

    Args:
      run: what to compile.
      inputs: whose batches it takes.
      state: shapes and shardings.
      trace: the file of `layout.trace_step`.
      options: of XLA's compiler; not for pipeline stages.
    """
    batch, asked = inputs.train_shapes(run.config.data.global_batch), min(run.config.train.steps_per_call, RATES)
    if run.layout.stages > 1:
        step: TrainStep = make_pipeline_train_step(run.task, run.layout, state, batch, inputs.resident, trace)
    else:
        step = make_train_step(run.task, run.layout, state, batch, inputs.resident, asked, options)
    if step.per_call < asked:
        log.info("%s", one_step_a_call(run.config))
    return step


@contextlib.contextmanager
def explain_out_of_memory(remedies: Callable[[], list[str]]) -> Iterator[None]:
    """Turns XLA's out-of-memory error into a `DeviceMemoryError` that says what helps; names the system's limits too.

    remedies: gives flags, the best first.
    """
    try:
        with limits_named():
            yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        what = (
            f"These need less, the fastest first (modelled): {'; or '.join(found)}."
            if (found := remedies())
            else "Raise config.layout.microbatches or config.layout.zero, use config.train.remat, or config.layout.stages."
        )
        raise DeviceMemoryError(
            f"The run does not fit the devices' memory. {what} `jaxtrain plan` shows what each layout needs, and "
            "--config.layout.strategy=auto chooses one. Else use more devices, or lower config.data.global_batch. "
            f"XLA said: {str(error).splitlines()[0]}"
        ) from error
