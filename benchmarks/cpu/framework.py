"""One training in the ways of a framework: plain data parallelism, pipeline, ZeRO-2, own communication; speed and memory.

    python -m benchmarks.run NAME framework

VGG-19 with BatchNorm and momentum, as `configs/vgg19_cifar10.py` trains it, on random images of CIFAR's shape; four devices.

- *simulated*: the devices are threads on this machine's cores. All ways are on them at the same time and take turns, block by
  block. Throughput shows what a way costs here, not what it would gain.
- *compiled*: the same run with a real batch in bf16, for four H100s that need not be there. Bytes are those of XLA's memory
  analysis, on the fullest device. Needs the extra `gpu-compiler`. There is no time in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import jax

from benchmarks.common import ROOT, Spread, batches, settings, start, synthetic
from benchmarks.cpu.steps import peak_bytes
from jaxtrain.config import Config
from jaxtrain.host.targets import parse_target
from jaxtrain.parallel.topology import compiler_problem
from jaxtrain.recipes import change, resolve
from jaxtrain.training.plan.compiling import compile_layouts

DEVICES, TARGET = 4, "4xh100"
BATCH, COMPILED_BATCH = 32, 1024
STEPS, REPEATS = 2, 7  # steps of a block; blocks of each way, after one that warms up
WAYS: dict[str, dict[str, Any]] = {
    "vanilla: data parallel, XLA's sum": {},
    "pipeline: 4 stages, 4 microbatches": {"layout.stages": 4, "layout.microbatches": 4},
    "ZeRO-2": {"layout.zero": 2},
    "own communication: ring": {"layout.reduce": "ring"},
    "own communication: ring, PowerSGD": {"layout.reduce": "ring", "optim.compress": "powersgd"},
}


def measure() -> dict[str, Any]:
    """Plain values: `rows`, one for each of `WAYS`, and `not_compiled`, why none of them was compiled, or ""."""
    problem = compiler_problem()
    configs = [run_config(COMPILED_BATCH, fields, "bf16") for fields in WAYS.values()]
    compiled = [None] * len(WAYS) if problem else compile_layouts(configs, parse_target(TARGET), print)
    simulated = _simulated([run_config(BATCH, fields, "f32") for fields in WAYS.values()])
    rows = [
        {"name": name, "settings": fields} | found | {"compiled_peak_bytes": gpu and gpu["peak_bytes"]}
        for (name, fields), found, gpu in zip(WAYS.items(), simulated, compiled, strict=True)
    ]
    return {
        "devices": DEVICES,
        "batch": BATCH,
        "target": TARGET,
        "compiled_batch": COMPILED_BATCH,
        "steps_per_block": STEPS,
        "repeats": REPEATS,
        "not_compiled": problem,
        "rows": rows,
    }


def run_config(batch: int, fields: dict[str, Any], precision: str) -> Config:
    """Four groups of BatchNorm, so that the pipeline's four microbatches normalize as the other ways do."""
    config = resolve(str(ROOT / "configs" / "vgg19_cifar10.py"), []).config
    common = {"data.global_batch": batch, "model.bn_groups": 4, "data.residency": "stream"}
    return change(synthetic(config, **common), **fields, **{"train.precision": precision})


def _simulated(configs: list[Config]) -> list[dict[str, Any]]:
    """Of each config: seconds a step, images a second, and bytes of the fullest device; blocks of steps in turns."""
    with settings(configs[0]), contextlib.ExitStack() as stack:
        runs = [start(config, DEVICES) for config in configs]
        states = [state for _, _, state in runs]
        blocks: list[list[float]] = [[] for _ in runs]
        streams = [
            stack.enter_context(contextlib.closing(batches(run, engine, 0, STEPS * (REPEATS + 1))))
            for run, engine, _ in runs
        ]
        for _ in range(REPEATS + 1):
            for i, (_, engine, _) in enumerate(runs):
                block = [next(streams[i]) for _ in range(STEPS)]
                began = time.perf_counter()
                for batch in block:
                    states[i], metrics = engine.step(states[i], batch, engine.inputs.resident)
                jax.block_until_ready((states[i], metrics))
                blocks[i].append((time.perf_counter() - began) / STEPS)
        return [
            {
                "seconds": dataclasses.asdict(Spread.of(seconds[1:])),
                "over_vanilla": dataclasses.asdict(
                    Spread.of([first / mine for first, mine in zip(blocks[0][1:], seconds[1:], strict=True)])
                ),
                "peak_bytes": peak_bytes(engine.step),
            }
            for seconds, (_, engine, _) in zip(blocks, runs, strict=True)
        ]


def table(measured: dict[str, Any]) -> str:
    """Markdown: a row for each way; each column says which kind it is."""
    batch, compiled_batch, target = (measured[key] for key in ("batch", "compiled_batch", "target"))
    lines = [
        f"| way | settings | simulated: images/s, batch {batch} | simulated: over vanilla | simulated: MB a device | "
        f"compiled for {target}: GB a GPU, batch {compiled_batch:,} |",
        "| -- | -- | -- | -- | -- | -- |",
    ]
    for row in measured["rows"]:
        fields = ", ".join(f"`{name}={value}`" for name, value in row["settings"].items()) or "the defaults"
        rates = [batch / row["seconds"][key] for key in ("median", "most", "least")]
        ratios = [row["over_vanilla"][key] for key in ("median", "least", "most")]
        peak = row["compiled_peak_bytes"]
        gpu = "not compiled" if measured["not_compiled"] else f"{peak / 1e9:.2f}" if peak else "refused by XLA"
        lines.append(
            f"| {row['name']} | {fields} | {rates[0]:.1f} ({rates[1]:.1f} - {rates[2]:.1f}) | "
            f"{ratios[0]:.2f} x ({ratios[1]:.2f} - {ratios[2]:.2f}) | {row['peak_bytes'] / 1e6:.0f} | {gpu} |"
        )
    if measured["not_compiled"]:
        lines += ["", f"Not compiled: {measured['not_compiled']}"]
    return "\n".join(lines)


__all__ = ["WAYS", "measure", "run_config", "table"]
