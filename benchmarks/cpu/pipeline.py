"""Pipeline stages: the idle share of each schedule, what dispatching an operation costs, and the gain of two processes.

Each function measures in processes of its own, which this one needs no devices for. The stages of `bubble` sleep, since
simulated devices share this machine's cores; those of `efficiency` compute, each process on a core that no other uses.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from benchmarks.common import Spread, batches, block_seconds, settings, start, synthetic
from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig
from jaxtrain.distributed.cluster import ProcessInfo
from jaxtrain.distributed.initialize import initialize
from jaxtrain.models.classifier import Classifier
from jaxtrain.models.layers import Context, Layer
from jaxtrain.step.pipeline import schedule as schedules
from jaxtrain.step.pipeline.dispatch import StageExecutors
from jaxtrain.step.pipeline.schedule import Op
from jaxtrain.step.pipeline.timeline import Event, Timeline, ideal_bubble, simulate
from jaxtrain.step.train_state import create_state

STAGES, BUBBLE_PARTS, DISPATCH_PARTS, EFFICIENCY_PARTS = (2, 4, 8), (4, 8, 16), (4, 16), (8, 32)
DEPTHS = (15, 31, 63)  # hidden layers of the MLP whose operations compute next to nothing
NAP = 0.02  # seconds that a sleepy layer's forward takes; its backward takes twice as long
REPEATS = 5
SECONDS = 900  # that a process may take
# name: (model, examples of a microbatch, which takes a core about a tenth of a second).
MODELS = {
    "resnet18 of width 16": (ModelConfig("resnet18", width=16), 64),
    "mlp of width 1024": (ModelConfig("mlp", width=1024, depths=(15,)), 256),
}


def _config(model: ModelConfig, batch: int, layout: LayoutConfig) -> Config:
    optim = OptimConfig(learning_rate=0.01, schedule="constant")
    return synthetic(Config(data=DataConfig(global_batch=batch), model=model, optim=optim, layout=layout))


def apart(*calls: tuple[Any, ...]) -> list[Any]:
    """What each call (function, *arguments) returns, each in a new process, all at once. Kills what does not end well."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        numbers: dict[Any, int] = {}
        answers: dict[int, Any] = {}
        for number, call in enumerate(calls):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(writer, *call))
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)  # not terminate: JAX's coordination service catches SIGTERM and waits
            writer.close()
            numbers[reader] = number
        while len(answers) < len(calls):
            ready: list[Any] = multiprocessing.connection.wait(
                [r for r in numbers if numbers[r] not in answers], SECONDS
            )
            if not ready:
                raise TimeoutError(f"no answer from {calls} in {SECONDS} s")
            answers |= {numbers[reader]: reader.recv() for reader in ready}  # EOFError where the process has died
        return [answers[number] for number in range(len(calls))]


def _answer(writer: Any, function: Callable[..., Any], *arguments: Any) -> None:
    writer.send(function(*arguments))
    threading.Event().wait()  # until it is killed: who leaves first would end the others


# -------------------------------------------------------------------------------------------------------------- bubble

_naps: list[tuple[str, int, float, float]] = []  # of this process: "F" or "B", layer, start, end


class Sleepy(Layer):
    """Scales its input, [B, ...] -> [B, features], and sleeps `NAP` seconds, in the backward pass twice as long."""

    number: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """The first layer takes some of the pixels."""
        scale = self.param("scale", nn.initializers.ones, (self.features,), self.param_dtype)
        return _slept(self.number, x.reshape(x.shape[0], -1)[:, : self.features] * scale.astype(x.dtype))


def _nap(kind: str, layer: int, x: jax.Array) -> jax.Array:
    """`x`, once somebody has slept on the host, where other threads go on; it notes when that was."""

    def nap(zero: Any) -> Any:
        began = time.perf_counter()
        time.sleep(NAP if kind == "F" else 2 * NAP)
        _naps.append((kind, layer, began, time.perf_counter()))
        return np.zeros_like(zero)

    first = x[0, 0]  # one number is all that goes to the host and back
    return x + jax.pure_callback(nap, jax.ShapeDtypeStruct((), x.dtype), first)


def _slept(layer: int, x: jax.Array) -> jax.Array:
    slept = jax.custom_vjp(lambda x: _nap("F", layer, x))
    slept.defvjp(lambda x: (_nap("F", layer, x), None), lambda _, g: (_nap("B", layer, g),))
    return slept(x)


def sleepy(config: ModelConfig, *, image_shape: Any, num_classes: int, dtype: Any, param_dtype: Any) -> Classifier:
    """`config.depths=(n,)` layers that all cost the same; named in configs as `benchmarks.cpu.pipeline:sleepy`."""
    return Classifier(tuple(Sleepy(dtype, param_dtype, number, num_classes) for number in range(config.depths[0])))


def bubble() -> list[dict[str, Any]]:
    """Each schedule of sleepy stages, two layers a stage: the idle share of its forwards and backwards, beside the formula."""
    cases = [
        (name, stages, parts)
        for name, stages, parts in itertools.product(schedules.SCHEDULES, STAGES, BUBBLE_PARTS)
        if name != "interleaved_1f1b" or parts % stages == 0
    ]
    return apart((_bubbles, cases))[0]


def _bubbles(cases: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    jax.config.update("jax_num_cpu_devices", max(STAGES))
    return [_bubble(*case) for case in cases]


def _bubble(name: str, stages: int, parts: int) -> dict[str, Any]:
    chunks = 2 if name == "interleaved_1f1b" else 1
    layers, each = 2 * stages, 2 // chunks  # in the model, in a chunk
    boundaries = tuple(range(each, layers, each))
    layout = LayoutConfig(stages=stages, schedule=name, chunks=chunks, microbatches=parts, boundaries=boundaries)
    config = _config(ModelConfig("benchmarks.cpu.pipeline:sleepy", depths=(layers,)), 2 * parts, layout)
    found = []
    with settings(config):
        run, engine, state = start(config, stages)
        for batch in batches(run, engine, 0, REPEATS + 1):  # the first step warms up
            _naps.clear()
            state, metrics = engine.step(state, batch, engine.inputs.resident)
            jax.block_until_ready((state, metrics))
            found.append(_timeline(stages, parts, each))
    schedule = schedules.make_pipeline_schedule(name, stages, parts, chunks)
    costs = [each * NAP] * schedule.model_chunks
    simulated = simulate(schedule, costs, [2 * cost for cost in costs])
    spread = Spread.of([timeline.bubble for timeline in found[1:]])
    makespan = Spread.of([timeline.makespan for timeline in found[1:]])
    formula = ideal_bubble(name, stages, parts, chunks)
    return {
        "schedule": name,
        "stages": stages,
        "microbatches": parts,
        "chunks": chunks,
        "bubble": dataclasses.asdict(spread),
        "formula": formula,
        "over_formula": spread.median - formula,
        "makespan": dataclasses.asdict(makespan),
        "simulated_makespan": simulated.makespan,
        "simulated_over_measured": simulated.makespan / makespan.median,
    }


def _timeline(stages: int, parts: int, each: int) -> Timeline:
    """What the naps of a step were, an event for each; a chunk takes the microbatches in their order."""
    counts, events = collections.Counter(), []
    for kind, layer, began, ended in sorted(_naps, key=lambda nap: nap[2]):
        chunk = layer // each
        events.append(Event(Op(kind, chunk, counts[kind, layer]), chunk % stages, began, ended))
        counts[kind, layer] += 1
    if set(counts.values()) != {parts}:
        raise RuntimeError(f"every layer sleeps {parts} times each way in a step, and these slept: {dict(counts)}")
    return Timeline(stages, tuple(events))


# ------------------------------------------------------------------------------------------------------------ dispatch


def dispatch() -> list[dict[str, Any]]:
    """Seconds of a step for each of its operations (2 V M), where these compute next to nothing: an MLP of width 8."""
    cases = [(stages, parts, DEPTHS[0]) for stages, parts in itertools.product(STAGES, DISPATCH_PARTS)]
    cases += [(STAGES[0], DISPATCH_PARTS[-1], depth) for depth in DEPTHS[1:]]
    return apart((_dispatches, cases))[0]


def _dispatches(cases: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    jax.config.update("jax_num_cpu_devices", max(STAGES))
    return [_dispatch(*case) for case in cases]


def _dispatch(stages: int, parts: int, depth: int) -> dict[str, Any]:
    layers = depth + 1
    boundaries = tuple(range(layers // stages, layers, layers // stages))  # as many leaves on every stage
    layout = LayoutConfig(stages=stages, microbatches=parts, boundaries=boundaries)
    config = _config(ModelConfig("mlp", width=8, depths=(depth,), dropout=0.0), 2 * parts, layout)
    operations = 2 * stages * parts
    with settings(config):
        run, engine, state = start(config, stages)
        leaves = len(jax.tree.leaves(state.params))
        seconds = block_seconds(run, engine, state, 10, REPEATS)
        step: Any = engine.step
        one = dataclasses.replace(
            engine, step=dataclasses.replace(step, executors=StageExecutors(range(stages), threads=False))
        )
        by_one = block_seconds(run, one, create_state(run.init, run.layout, run.config.seed), 10, REPEATS)
    return {
        "stages": stages,
        "microbatches": parts,
        "operations": operations,
        "leaves": leaves,
        "seconds_per_operation": dataclasses.asdict(Spread.of([s / operations for s in seconds])),
        "seconds_per_operation_by_one": dataclasses.asdict(Spread.of([s / operations for s in by_one])),
        "seconds": dataclasses.asdict(Spread.of(seconds)),
    }


# ---------------------------------------------------------------------------------------------------------- efficiency


def efficiency() -> list[dict[str, Any]]:
    """Examples/s of two stages on two processes with a core each, over twice those of one such process without stages.

    bound: M / (M + S - 1), of the schedule. two_apart_over_twice_one: what two such processes without stages reach, which
    share the machine's memory. imbalance: the dearer stage's time over the average, as the split measured it.
    """
    rows = []
    for (name, (model, size)), parts in itertools.product(MODELS.items(), EFFICIENCY_PARTS):
        work = (_throughput, model, size, parts)
        (alone,) = apart((*work, 0))
        two = apart((*work, 0), (*work, 1))
        port = free_port()
        staged = apart((*work, 0, port), (*work, 1, port))[0]
        bound = parts / (parts + 1)
        spread = Spread.of([statistics.median(alone["seconds"]) / (2 * seconds) for seconds in staged["seconds"]])
        two_seconds = statistics.mean(statistics.median(each["seconds"]) for each in two)
        rows.append(
            {
                "name": name,
                "stages": 2,
                "microbatches": parts,
                "batch": size * parts,
                "examples_per_second": size * parts / statistics.median(staged["seconds"]),
                "efficiency": dataclasses.asdict(spread),
                "bound": bound,
                "efficiency_over_bound": spread.median / bound,
                "two_apart_over_twice_one": statistics.median(alone["seconds"]) / two_seconds,
                "imbalance": staged["imbalance"],
            }
        )
    return rows


def free_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _throughput(model: ModelConfig, size: int, parts: int, core: int, port: int = 0) -> dict[str, Any]:
    """A process on one core: a stage of two where the processes meet at `port`, else the whole model."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    jax.config.update("jax_num_cpu_devices", 1)
    layout = LayoutConfig(microbatches=parts)
    if port:
        layout = LayoutConfig(microbatches=parts, stages=2, stage_placement="hosts", balance="time")
        initialize(ProcessInfo(f"127.0.0.1:{port}", 2, core), {}, 120)
    groups = parts if model.name.startswith("resnet") else 1
    config = _config(dataclasses.replace(model, bn_groups=groups), size * parts, layout)
    with settings(config):
        run, engine, state = start(config, len(jax.devices()))
        seconds = block_seconds(run, engine, state, 1, REPEATS)
    weights = run.partition.weights if run.partition else (1.0,)
    return {"seconds": seconds, "imbalance": max(weights) / statistics.mean(weights)}


__all__ = ["apart", "bubble", "dispatch", "efficiency", "free_port", "sleepy"]
