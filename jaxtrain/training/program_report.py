"""Compiles a run's programs for GPUs that need not be there, and says what is in them: memory, kernels, collectives."""

from __future__ import annotations

import collections
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.config import Config
from jaxtrain.data import registry
from jaxtrain.errors import CompilerRefusalError
from jaxtrain.host.targets import Target
from jaxtrain.parallel.audit import AuditError, audit_programs
from jaxtrain.parallel.gpu_program import Collective, GpuProgram, Kernel, read_program
from jaxtrain.parallel.layout import Placement, bytes_by_stage, bytes_per_device
from jaxtrain.parallel.topology import lowering_for, target_devices
from jaxtrain.step.batch import Resident
from jaxtrain.step.eval_step import make_eval_step
from jaxtrain.step.pipeline import schedule as schedules
from jaxtrain.step.pipeline.eval_step import make_pipeline_eval_step
from jaxtrain.step.train_state import state_shapes
from jaxtrain.training.compiled import compile_train_step
from jaxtrain.training.input_pipeline import RESIDENT_BYTES, RESIDENT_SHARE, InputPipeline, is_resident
from jaxtrain.training.jax_settings import no_compile_cache, settings
from jaxtrain.training.remedies import remedies
from jaxtrain.training.setup import RunSpec, make_run_spec, resolve_for_machine
from jaxtrain.training.startup_report import layout_table

RESERVE = 1 << 30
"""Bytes for what a program's memory does not count: cuDNN's workspaces, and what is split into pieces. An estimate."""


def compile_report(
    config: Config, target: Target, *, hlo: Path | None = None, evaluation: bool = True
) -> dict[str, Any]:
    """Compiles what the run would compile on `target`, as its process 0, without autotuning.

    Args:
      config: of the run.
      target: the devices.
      hlo: a folder for the programs' texts.
      evaluation: whether its programs are compiled too.

    Returns:
      Plain values: `target`, `devices`, `mesh`, `precision`, `data`, `parameters`, `state_bytes` (per device, at rest),
      `programs` (by name: `kernels`, `small_kernels`, `gigabytes`, `argument_bytes`, `output_bytes`, `donated_bytes`,
      `temporary_bytes`, `peak_bytes`, `kinds`, `dearest`, `collectives`, `f32_products`, `host_callbacks`), `peak_bytes` (the
      largest program's, a lower bound), `stage_peak_bytes` (with pipeline stages, what the programs of one keep together),
      `reserve_bytes`, `memory_bytes` (a GPU's), `usable_bytes` (what JAX takes of them),
      `fits` (as far as the programs show), `remedies` (flags, where it does not), `audit` (`passed`, `error`, `notes`).

    Raises:
      ConfigError: the target is unknown, or the layout does not fit its devices.
      EnvironmentMismatchError: XLA's GPU compiler is not there.
      CompilerRefusalError: XLA does not compile a program.
    """
    devices = target_devices(target)
    config = resolve_for_machine(config, None, devices)
    with settings(config), no_compile_cache(), lowering_for(devices[0]):
        run = make_run_spec(config, registry.outline(config.data, image_size=config.data.image_size), devices)
        inputs = _input_shapes(run, target)
        table = layout_table(run, state_shapes(run.init, run.layout))
        programs, verdict = _compile(run, inputs, table, evaluation=evaluation)
    if hlo is not None:
        _write_texts(hlo, programs)
    described = {name: describe_program(program, run) for name, program in programs.items()}
    peak = max(program["peak_bytes"] for program in described.values())
    resting = sum(bytes_per_device(table[name]) for name in ("params", "batch_stats", "opt_state", "ema"))
    usable = usable_memory(target.memory)
    fits = peak + RESERVE <= usable
    return {
        "target": target.name,
        "devices": target.devices,
        "device_kind": devices[0].device_kind,
        "mesh": dict(run.layout.mesh.shape),
        "microbatches": run.layout.config.microbatches,
        "precision": run.config.train.precision,
        "data": "resident" if inputs.offsets else "streamed",
        "parameters": sum(math.prod(leaf.shape) for leaf in table["params"]),
        "state_bytes": resting,
        "programs": described,
        "peak_bytes": peak,
        "stage_peak_bytes": _stage_peak(run, table, described),
        "reserve_bytes": RESERVE,
        "memory_bytes": target.memory,
        "usable_bytes": usable,
        "bandwidth": target.bandwidth,
        "fits": fits,
        "remedies": [] if fits else remedies(run, devices, resting, peak, usable - RESERVE),
        "audit": verdict,
    }


def _write_texts(folder: Path, programs: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        (folder / f"{name.replace(': ', '_').replace(' ', '_')}.txt").write_text(program.as_text() or "")


def usable_memory(total: int) -> int:
    """What JAX takes of a GPU's `total` bytes: 75 %, or $XLA_PYTHON_CLIENT_MEM_FRACTION of it."""
    return int(total * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")))


def _input_shapes(run: RunSpec, target: Target) -> InputPipeline:
    """The run's batches as shapes: on the devices or streamed, as the run would decide with the target's memory."""
    limit = RESIDENT_BYTES if target.platform == "cpu" else usable_memory(target.memory) * RESIDENT_SHARE
    if not is_resident(run.dataset, run.config.data.residency, limit):
        return InputPipeline(run.dataset, run.layout, Resident(), {}, 0)
    splits = {name: getattr(run.dataset, name) for name in ("train", "validation", "test")}
    count = sum(len(source) for source in splits.values())
    images = jax.ShapeDtypeStruct((count, *run.dataset.train.shape), np.uint8, sharding=run.layout.sharding(stage=0))
    resident = Resident(images, jax.ShapeDtypeStruct((count,), np.int32, sharding=run.layout.sharding()))
    return InputPipeline(run.dataset, run.layout, resident, dict.fromkeys(splits, 0), 0)


def _compile(
    run: RunSpec, inputs: InputPipeline, table: Mapping[str, Any], *, evaluation: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The programs by name, and the verdict of the audit."""
    state = state_shapes(run.init, run.layout)
    try:
        step = compile_train_step(run, inputs, state)
        programs = {**step.programs, **(_compile_evaluation(run, inputs, state) if evaluation else {})}
    except jax.errors.JaxRuntimeError as error:
        raise _refusal(error) from error
    return programs, _audit(run, table, step)


def _refusal(error: Exception) -> CompilerRefusalError:
    """With the layer and the operation, where XLA's text names them."""
    text = str(error).splitlines()[0]
    name = re.search(r'op_name="([^"]+)"', text)
    said = text.partition(", metadata=")[0][:300].rstrip(".")
    return CompilerRefusalError(f"XLA does not compile {name[1] if name else 'this run'}: {said}.")


def _stage_peak(run: RunSpec, table: Mapping[str, list[Placement]], programs: Mapping[str, Any]) -> int:
    """Bytes of the stage that needs most: its state, what waits for the backward passes, a program's temporaries; or 0.

    What waits are the results of its forward programs, of as many microbatches as the schedule has in flight.
    """
    layout = run.layout
    if layout.stages == 1:
        return 0
    config = layout.config
    schedule = schedules.make_pipeline_schedule(config.schedule, config.stages, config.microbatches, config.chunks)
    trees = [bytes_by_stage(leaves, layout.stages) for leaves in table.values()]
    peaks = []
    for stage, waiting in enumerate(schedules.in_flight(schedule)):
        chunks = [f"chunk {k}: " for k in range(schedule.model_chunks) if schedule.stage_of(k) == stage]
        mine = {name: each for name, each in programs.items() if name.startswith((*chunks, f"stage {stage}: "))}
        prepared = sum(each["output_bytes"] for name, each in mine.items() if name.endswith("prepare"))
        forward = max((each["output_bytes"] for name, each in mine.items() if name.endswith("forward")), default=0)
        temporary = max((each["temporary_bytes"] for each in mine.values()), default=0)
        peaks.append(sum(tree[stage] for tree in trees) + prepared + waiting * forward + temporary)
    return max(peaks)


def _compile_evaluation(run: RunSpec, inputs: InputPipeline, state: Any) -> Mapping[str, Any]:
    batch = inputs.evaluation_shapes(run.evaluation_batch)
    arguments = (run.task, run.layout, state.params, state.batch_stats, batch, inputs.resident)
    if run.layout.stages == 1:
        return {"evaluation": make_eval_step(*arguments).add}
    return {f"evaluation: chunk {k}": program for k, program in make_pipeline_eval_step(*arguments).programs.items()}


def _audit(run: RunSpec, table: Mapping[str, Any], step: Any) -> dict[str, Any]:
    try:
        _, notes = audit_programs(run.layout, table, step)
    except AuditError as error:
        return {"passed": False, "error": str(error), "notes": []}
    return {"passed": True, "error": "", "notes": list(notes)}


def describe_program(program: Any, run: RunSpec) -> dict[str, Any]:
    """An entry of `programs` of `compile_report`."""
    read, memory = read_program(program.as_text() or "", run.layout.mesh), program.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    donated, temporary = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    return {
        "kernels": read.count,
        "small_kernels": read.small,
        "gigabytes": round(read.gigabytes, 6),
        "argument_bytes": arguments,
        "output_bytes": outputs,
        "donated_bytes": donated,
        "temporary_bytes": temporary,
        "peak_bytes": arguments + outputs - donated + temporary,
        "kinds": {
            kind: {"kernels": count, "gigabytes": round(size, 6)} for kind, (count, size) in read.by_kind().items()
        },
        "dearest": [_described(kernel) for kernel in _dearest(read)],
        "collectives": _by_axis(read.collectives),
        "f32_products": _by_layer(kernel for kernel in read.kernels if "f32" in kernel.products),
        "host_callbacks": read.host_callbacks,
    }


def _dearest(program: GpuProgram, count: int = 10) -> list[Kernel]:
    return sorted(program.kernels, key=lambda kernel: -kernel.times * kernel.bytes)[:count]


def _described(kernel: Kernel) -> dict[str, Any]:
    return {
        "gigabytes": round(kernel.times * kernel.bytes / 1e9, 6),
        "kind": kernel.kind,
        "layer": kernel.layer,
        "operation": kernel.operation,
        "times": kernel.times,
    }


def _by_layer(kernels: Iterable[Kernel]) -> dict[str, int]:
    counts: dict[str, int] = collections.Counter()
    for kernel in kernels:
        counts[kernel.layer] += kernel.times
    return dict(sorted(counts.items()))


def _by_axis(collectives: tuple[Collective, ...]) -> list[dict[str, Any]]:
    """Collectives of one kind over the same axes together."""
    totals: dict[tuple[str, tuple[str, ...]], list[int]] = collections.defaultdict(lambda: [0, 0])
    for each in collectives:
        total = totals[each.kind, each.axes]
        total[0] += each.times
        total[1] += each.times * each.bytes
    return [
        {"kind": kind, "axes": list(axes), "count": count, "bytes": size}
        for (kind, axes), (count, size) in totals.items()
    ]
