"""The cost model of collectives (`jaxtrain.parallel.collective_cost`) against gloo: two and four real processes.

python -m benchmarks.run NAME collectives

The processes join as those of a run do, over the loopback interface, and are not pinned to cores. For each collective and
number of processes, latency and bandwidth are fitted to every second size. The sizes between are predicted. There is no
reduce-scatter, which gloo adds up wrongly from 1 MiB a process on, and nothing between hosts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.cpu.pipeline import apart, free_port
from jaxtrain.distributed.cluster import ProcessInfo
from jaxtrain.distributed.initialize import initialize
from jaxtrain.host.links import Link
from jaxtrain.parallel.bench.fit import fit_link
from jaxtrain.parallel.collective_cost import collective_seconds, wire_bytes

KINDS = ("all-reduce", "all-gather")
PROCESSES = (2, 4)
SIZES = tuple(1 << power for power in range(12, 27))  # bytes of the result: 4 KiB to 64 MiB
FITTED, PREDICTED = SIZES[::2], SIZES[1::2]
REPEATS = 7


def measure() -> list[dict[str, Any]]:
    """Per collective and number of processes: the fitted link, and each size measured and predicted."""
    rows = []
    for processes in PROCESSES:
        port = free_port()
        found = apart(*((_seconds, index, processes, port) for index in range(processes)))[0]
        for kind in KINDS:
            link = fit(kind, processes, {size: found[kind][size] for size in FITTED})
            predicted = {size: collective_seconds(kind, size, processes, 1, link, link) for size in SIZES}
            errors = [abs(predicted[size] / found[kind][size] - 1) for size in PREDICTED]
            rows.append(
                {
                    "kind": kind,
                    "processes": processes,
                    "latency": link.latency,
                    "bandwidth": link.bandwidth,
                    "median_error": statistics.median(errors),
                    "sizes": [
                        {
                            "bytes": size,
                            "fitted": size in FITTED,
                            "measured": found[kind][size],
                            "predicted": predicted[size],
                        }
                        for size in SIZES
                    ],
                }
            )
    print(table(rows))
    return rows


def fit(kind: str, devices: int, seconds: Mapping[int, float]) -> Link:
    """The link whose modelled times are nearest to `seconds` by size, in relative terms (least squares)."""
    hop = Link("a second a hop", math.inf, 1.0)
    messages = [collective_seconds(kind, size, devices, 1, hop, hop) for size in seconds]
    sent = [wire_bytes(kind, size, devices) for size in seconds]
    found = fit_link("fitted", messages, sent, list(seconds.values()))
    if found is None:
        raise RuntimeError(f"the times of {kind} do not grow with its bytes: {dict(seconds)}")
    return found.link


def _seconds(index: int, processes: int, port: int) -> dict[str, dict[int, float]]:
    """Seconds of a call by collective and size, of one of `processes` processes: the median of `REPEATS` rounds over all."""
    jax.config.update("jax_num_cpu_devices", 1)
    initialize(ProcessInfo(f"127.0.0.1:{port}", processes, index), {}, 120)
    calls = {(kind, size): _program(kind, size, index, processes) for kind in KINDS for size in SIZES}
    blocks: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(REPEATS + 1):
        for (kind, size), (compiled, rows) in calls.items():
            count = 50 if size < 1 << 20 else 6
            began = time.perf_counter()
            for _ in range(count):
                jax.block_until_ready(compiled(rows))
            blocks[kind, size].append((time.perf_counter() - began) / count)
    medians = {key: statistics.median(seconds[1:]) for key, seconds in blocks.items()}  # the first round warms up
    return {kind: {size: medians[kind, size] for size in SIZES} for kind in KINDS}


def _program(kind: str, size: int, index: int, processes: int) -> tuple[Any, jax.Array]:
    """A program that is one collective with a result of `size` bytes, and its argument, of which each process has a row."""
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    columns = size // 4 if kind == "all-reduce" else size // 4 // processes
    part = np.random.default_rng(index).standard_normal((1, columns), np.float32)
    rows = jax.make_array_from_process_local_data(NamedSharding(mesh, P("all")), part, (processes, columns))
    functions = {"all-reduce": lambda x: jnp.sum(x, 0), "all-gather": lambda x: x}
    compiled = jax.jit(functions[kind], out_shardings=NamedSharding(mesh, P())).lower(rows).compile()
    if f" {kind}" not in str(compiled.as_text()):
        raise RuntimeError(f"the compiled program has no {kind}")
    return compiled, rows


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: the predicted sizes, measured -> predicted, with the error of the prediction; then the fitted links."""
    rows = list(rows)
    titles = [f"{row['kind']}, {row['processes']} processes" for row in rows]
    lines = [f"| bytes of the result | {' | '.join(titles)} |", "| -- " * (len(rows) + 1) + "|"]
    for size in PREDICTED:
        cells = [f"{size >> 10:,} KiB"]
        for row in rows:
            (each,) = (each for each in row["sizes"] if each["bytes"] == size)
            times = f"{1e3 * each['measured']:.2f} -> {1e3 * each['predicted']:.2f} ms"
            cells.append(f"{times} ({100 * (each['predicted'] / each['measured'] - 1):+.0f} %)")
        lines.append(f"| {' | '.join(cells)} |")
    errors = (f"{100 * row['median_error']:.0f} %" for row in rows)
    lines.append(f"| median error | {' | '.join(errors)} |")
    links = (f"{1e6 * row['latency']:.0f} us, {row['bandwidth'] / 1e9:.2f} GB/s" for row in rows)
    lines.append(f"| fitted: a hop; each way | {' | '.join(links)} |")
    return "\n".join(lines)
