"""Two processes with a core each against the model of `scale_model`: the all-reduce first, then whole steps.

    python -m benchmarks.run NAME scale
    python -m benchmarks.cpu.scale                 # the modelled table of docs/scaling.md; measures nothing

A step is predicted from what two such processes take when each computes its half of the batch for itself at the same time,
and from the arrays that its compiled program adds over both, at the latency and bandwidth that were measured before. XLA
merges all-reduces into a few of many arrays each, but gloo adds one array after the other.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.common import Spread, block_seconds, settings, start, synthetic
from benchmarks.cpu import collectives, scale_model
from benchmarks.cpu.pipeline import apart, free_port
from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig
from jaxtrain.distributed.cluster import ProcessInfo
from jaxtrain.distributed.initialize import initialize, set_threads
from jaxtrain.parallel.collective_cost import collective_seconds

SIZES = tuple(1 << power for power in range(10, 27, 2))  # bytes of an all-reduce: 1 KiB to 64 MiB
# name: (model, global batch)
MODELS = {
    "resnet18 of width 16": (ModelConfig("resnet18", width=16), 64),
    "resnet18 of width 16, BatchNorm of a process": (ModelConfig("resnet18", width=16, bn_groups=2), 64),
    "mlp of width 2048": (ModelConfig("mlp", width=2048), 256),
}
REPEATS = 5
_REDUCED = re.compile(r"= (.*?) all-reduce(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def measure() -> dict[str, Any]:
    """reduces: seconds by size. latency, bandwidth: fitted to them. steps: measured and predicted, for each of MODELS."""
    port = free_port()
    reduces = apart((_reduces, 0, port), (_reduces, 1, port))[0]
    link = collectives.fit("all-reduce", 2, reduces)
    rows = []
    for name, (model, batch) in MODELS.items():
        half = dataclasses.replace(model, bn_groups=1)
        halves = apart((_step, half, batch // 2, 0, 0), (_step, half, batch // 2, 1, 0))
        (whole,) = apart((_step, model, batch, 0, 0))
        port = free_port()
        both = apart((_step, model, batch, 0, port), (_step, model, batch, 1, port))[0]
        compute = statistics.mean(statistics.median(half["seconds"]) for half in halves)
        communication = sum(collective_seconds("all-reduce", size, 2, 1, link, link) for size in both["reduces"])
        spread = Spread.of(both["seconds"])
        rows.append(
            {
                "name": name,
                "batch": batch,
                "one": statistics.median(whole["seconds"]),
                "compute": compute,
                "communication": communication,
                "reduces": len(both["reduces"]),
                "reduced_bytes": sum(both["reduces"]),
                "predicted": compute + communication,
                "measured": dataclasses.asdict(spread),
                "error": (compute + communication) / spread.median - 1,
            }
        )
    return {
        "reduces": {str(size): seconds for size, seconds in reduces.items()},
        "latency": link.latency,
        "bandwidth": link.bandwidth,
        "steps": rows,
    }


def _alone_on(core: int, port: int) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    jax.config.update("jax_num_cpu_devices", 1)
    if port:
        initialize(ProcessInfo(f"127.0.0.1:{port}", 2, core), {}, 120)
    else:
        set_threads()  # the same, so that joining adds nothing but communication


def _reduces(core: int, port: int) -> dict[int, float]:
    _alone_on(core, port)
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    add = jax.jit(lambda x: jnp.sum(x, 0), out_shardings=NamedSharding(mesh, P()))
    found = {}
    for size in SIZES:
        shape = (2, size // 4)
        part = np.random.default_rng(core).standard_normal((1, size // 4), np.float32)
        rows = jax.make_array_from_callback(shape, NamedSharding(mesh, P("all")), lambda _, part=part: part)
        count = 20 if size < 1 << 22 else 4
        blocks = []
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            for _ in range(count):
                jax.block_until_ready(add(rows))
            blocks.append((time.perf_counter() - began) / count)
        found[size] = statistics.median(blocks[1:])
    return found


def _step(model: ModelConfig, batch: int, core: int, port: int) -> dict[str, Any]:
    _alone_on(core, port)
    optim = OptimConfig(learning_rate=0.01, schedule="constant")
    config = synthetic(Config(data=DataConfig(global_batch=batch), model=model, optim=optim))
    with settings(config):
        run, engine, state = start(config, len(jax.devices()))
        step: Any = engine.step
        sizes = reduced_bytes(step.programs["step"].as_text())
        return {"seconds": block_seconds(run, engine, state, 3, REPEATS), "reduces": sizes}


def reduced_bytes(program: str) -> list[int]:
    """Bytes of each array that the all-reduces of a compiled program add."""
    arrays = (array for match in _REDUCED.finditer(program) for array in _ARRAY.findall(match[1]))
    return [int(bits) // 8 * math.prod(int(n) for n in dims.split(",") if n) for _, bits, dims in arrays]


# ------------------------------------------------------------------------------------------------------------ modelled

DEVICES = (1, 8, 64, 1024, 16384)
# name: (images/s of one device alone, images a device, parameters, BatchNorm layers). The rates are expectations of
# one H200 at 224 px in bf16, not measurements; gradients are added in f32.
EXPECTED = {
    "ResNet-50": (5000.0, 256, 25.6e6, 53),
    "VGG-19": (3000.0, 128, 143.7e6, 0),
    "Swin-T": (3000.0, 256, 28.3e6, 0),
}


def modelled() -> str:
    """Markdown: efficiency (weak scaling) and the parts of a step, by model and devices."""
    lines = [
        "| model | GPUs | compute | gradients, not hidden | BatchNorm | efficiency |",
        "| -- | -- | -- | -- | -- | -- |",
    ]
    for name, (rate, batch, parameters, layers) in EXPECTED.items():
        compute = batch / rate
        # two statistics forward in one message, two sums backward in one; two thirds of the compute is backward
        work = scale_model.Work(compute, 4 * parameters, statistics=2 * layers, hidden=compute * 2 / 3)
        for devices in DEVICES:
            step = scale_model.step(work, scale_model.H200, devices)
            parts = " | ".join(f"{1e3 * part:.2f} ms" for part in (step.compute, step.gradients, step.statistics))
            lines.append(f"| {name}, {batch} a GPU | {devices:,} | {parts} | {100 * step.efficiency:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(modelled())
