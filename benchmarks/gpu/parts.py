"""The GPU suite's cases, arithmetic and files: nothing here needs a device, JAX or PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"

Row = dict[str, Any]

# Of the device's memory, each side's: both are there at the same time.
MEMORY_SHARE = 0.45


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what it is trained with; both sides are built from this.

    gmacs: multiply-adds of a forward pass an image, in units of 1e9 (timm's tables; at 32 px counted from our own model).
    candidates: ways to run the peer, the likeliest first; the fastest is compared with.
    small: fields of `ModelConfig` for the self-check, whose model need only be quick.
    """

    model: str
    image: int
    batch: int
    classes: int
    optimizer: str
    gmacs: float
    candidates: tuple[str, ...]
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    smoke: bool = False

    @property
    def flops(self) -> float:
        """Of one training step: forward 2 a multiply-add, backward twice that."""
        return 6e9 * self.gmacs * self.batch

    def shrunk(self) -> Case:
        """The same path in seconds on a CPU."""
        return dataclasses.replace(self, image=32, batch=4, classes=10, gmacs=0.01, smoke=True)


PLAIN, _GRAPH, OWN_GRAPH, _TUNED = "default", "reduce-overhead", "whole-graph", "max-autotune-no-cudagraphs"
EAGER = "eager"  # not compiled: only where nothing else could be built
_BLOCKS = {"width": 8, "depths": (1, 1, 1, 1)}
CASES: Mapping[str, Case] = {
    "resnet50_224": Case("resnet50", 224, 256, 1000, "sgd", 4.11, (PLAIN, OWN_GRAPH, _TUNED), _BLOCKS),
    "vgg19_224": Case("vgg19", 224, 128, 1000, "sgd", 19.63, (PLAIN, _TUNED), {"width": 8, "depths": (1,) * 5}),
    "swin_tiny_224": Case(
        "swin_tiny", 224, 256, 1000, "adamw", 4.51, (PLAIN, OWN_GRAPH, _TUNED), {"width": 32, "depths": (1, 1, 1, 1)}
    ),
    "resnet18_32": Case("resnet18", 32, 1024, 10, "sgd", 0.556, (PLAIN, OWN_GRAPH, _GRAPH, _TUNED), _BLOCKS),
    "resnet50_32": Case("resnet50", 32, 512, 100, "sgd", 1.30, (PLAIN, OWN_GRAPH, _GRAPH, _TUNED), _BLOCKS),
}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "cnn224": ("resnet50_224", "vgg19_224"),
    "swin224": ("swin_tiny_224",),
    "cifar": ("resnet18_32", "resnet50_32"),
} | {name: (name,) for name in CASES}

# XLA flags, each alone against the defaults; those that need several GPUs to matter are left out.
FLAGS: Mapping[str, str] = {
    "command buffers with convolutions": "--xla_gpu_enable_command_buffer=+CONVOLUTION",
    "command buffers off": "--xla_gpu_enable_command_buffer=",
    "command buffers from one kernel on": "--xla_gpu_graph_min_graph_size=1",
    "latency hiding on": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "conv fusion": "--xla_gpu_experimental_enable_conv_fusion=true",
    "runtime fusion": "--xla_gpu_use_runtime_fusion=true",
    "no autotuning": "--xla_gpu_autotune_level=0",
    "Triton products off": "--xla_gpu_enable_triton_gemm=false",
    "cuDNN products": "--xla_gpu_cudnn_gemm_fusion_level=1",
}
# Fields of the config, likewise: what a part of the step costs, or another way to the same numbers.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "8 steps a call": {"train.steps_per_call": 8},
    "no augmentation": {"data.augmentation": "none"},
    "BatchNorm in 8 groups": {"model.bn_groups": 8},
}


# ----------------------------------------------------------------------------------------------------------- arithmetic

# Dense bf16 of the datasheets, FLOP/s; the first that is part of the device's name.
_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s by the datasheet, or `None` for a device that is not in the table."""
    return next((peak for name, peak in _PEAKS if name.lower() in device_kind.lower()), None)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most, as in the other results."""
    values = list(values)
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def rates(case: Case, seconds: float, device_kind: str, ceiling: float | None = None) -> Row:
    """Images/s, TFLOP/s and MFU of a step of `seconds`. ceiling: FLOP/s that a matrix product reached on this machine."""
    achieved, peak = case.flops / seconds, peak_flops(device_kind)
    return {
        "images_per_second": case.batch / seconds,
        "tflops": achieved / 1e12,
        "mfu_of_datasheet": achieved / peak if peak else None,
        "mfu_of_matrix_product": achieved / ceiling if ceiling else None,
    }


def steps_for(target_seconds: float, step_seconds: float) -> int:
    """Steps of a block that takes about `target_seconds`."""
    return max(3, min(500, round(target_seconds / max(step_seconds, 1e-6))))


class Budget:
    """Seconds that are left of a command's."""

    def __init__(self, seconds: float, began: float | None = None):
        self._ends = (time.monotonic() if began is None else began) + seconds
        self.seconds = seconds

    @property
    def left(self) -> float:
        """Never below 0."""
        return max(0.0, self._ends - time.monotonic())

    def share(self, parts: int) -> Budget:
        """An equal share of what is left for the first of `parts`."""
        return Budget(self.left / parts)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all commands take. Their defaults inside a call are the call's, as `benchmarks.gpu.item` has set them."""
    given = os.environ
    parser.add_argument("--budget-seconds", type=float, default=float(given.get("ITEM_SECONDS", "520")))
    parser.add_argument("--results", type=Path, default=Path(given.get("ITEM_RESULTS", RESULTS)))
    parser.add_argument(
        "--scratch", type=Path, default=given.get("ITEM_SCRATCH"), help="keep logs and compile caches in this folder"
    )
    parser.add_argument("--commit", default=given.get("COMMIT", ""), help="of the source, where there is no git")
    parser.add_argument(
        "--smoke", action="store_true", default=bool(given.get("SMOKE")), help="on a CPU, with tiny shapes"
    )


@contextlib.contextmanager
def scratch_folder(kept: Path | None) -> Iterator[Path]:
    """`kept`, made where it is missing, or a temporary folder."""
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


# --------------------------------------------------------------------------------------------------------------- traces


def read_trace(path: Path) -> dict[str, Any]:
    """A Chrome trace, of `jax.profiler` (.json.gz) or `torch.profiler` (.json)."""
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)


def device_events(trace: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(name, start, length) in seconds of all that ran on the device.

    PyTorch marks kernels by category; XLA has a process `/device:GPU:0` with a thread for each stream (and others, which
    repeat the kernels' time by operation and module). On a CPU, where there are neither: XLA's operations, or ATen's.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") in ("X", "M")]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    spans = [e for e in events if e["ph"] == "X" and e.get("dur")]

    def on_stream(e: Mapping[str, Any]) -> bool:
        process, thread = str(processes.get(e["pid"], "")), str(threads.get((e["pid"], e.get("tid")), ""))
        return process.startswith("/device:") and thread.startswith("Stream")

    ways = (
        lambda e: e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"),
        on_stream,
        lambda e: "hlo_op" in (e.get("args") or {}),
        lambda e: e.get("cat") == "cpu_op",
    )
    for way in ways:
        if found := [(e["name"], float(e["ts"]) / 1e6, float(e["dur"]) / 1e6) for e in spans if way(e)]:
            return found
    return []


def profile(trace: Mapping[str, Any], steps: int, step_seconds: float, top: int = 10) -> Row:
    """Where the device's time goes. step_seconds: of a step without the profiler, which slows the host down.

    outside_kernels: share of a step in which no kernel runs; in_trace: the same by the trace's own clock.
    operations: the dearest, by name without numbers at its end, each with seconds and calls a step.
    """
    events = device_events(trace)
    if not events:
        return {"error": "the trace has no event of a device"}
    busy = _union((start, start + length) for _, start, length in events)
    wall = max(start + length for _, start, length in events) - min(start for _, start, _ in events)
    totals: dict[str, list[float]] = {}
    for name, _, length in events:
        totals.setdefault(_stem(name), []).append(length)
    dearest = sorted(totals.items(), key=lambda item: -sum(item[1]))[:top]
    everything = sum(length for _, _, length in events)
    return {
        "busy_seconds": busy / steps,
        "outside_kernels": max(0.0, 1 - busy / steps / step_seconds),
        "outside_kernels_in_trace": 1 - busy / wall if wall else 0.0,
        "kernels": len(events) / steps,
        "operations": [
            {
                "name": name,
                "seconds": sum(lengths) / steps,
                "share": sum(lengths) / everything,
                "calls": len(lengths) / steps,
            }
            for name, lengths in dearest
        ],
    }


def _stem(name: str) -> str:
    """`input_reduce_fusion_12.3` -> `input_reduce_fusion`: kernels of one kind together; long C++ names are cut."""
    return re.sub(r"([._]\d+)+$", "", name)[:100]


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union: kernels on several streams overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        if stop > end:
            total += stop - max(start, end)
            end = stop
    return total


# -------------------------------------------------------------------------------------------------------------- results


class Session:
    """One command's rows, written to the result file after each: what is there stays whatever happens next."""

    def __init__(self, path: Path, machine: Row):
        self._path = path
        self._session: Row = {"id": f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}", "machine": machine}
        self._session |= {"rows": [], "left_out": []}

    def put(self, row: Row) -> None:
        """Adds `row`, or replaces the one of its kind and name."""
        key = (row["kind"], row["name"])
        self._session["rows"] = [r for r in self._session["rows"] if (r["kind"], r["name"]) != key] + [row]
        self._write()

    def leave_out(self, name: str, why: str) -> None:
        """Says what was not measured."""
        self._session["left_out"].append({"name": name, "why": why})
        self._write()

    @property
    def failures(self) -> list[str]:
        """The names of rows with an error, and of comparisons without a ratio."""
        rows = self._session["rows"]
        return [r["name"] for r in rows if "error" in r or (r["kind"] == "compare" and "ratio" not in r)]

    @property
    def machine(self) -> Row:
        """Of this session; its versions grow as the processes name theirs."""
        return self._session["machine"]

    def _write(self) -> None:
        write_results(self._path, merge([*read_results(self._path), self._session]))


def read_results(path: Path) -> list[Row]:
    """The sessions of a result file; none where there is no file."""
    return json.loads(path.read_text())["sessions"] if path.exists() else []


def write_results(path: Path, sessions: list[Row]) -> None:
    """Replaces the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + f".{os.getpid()}")
    draft.write_text(json.dumps({"sessions": sessions}, indent=1) + "\n")
    draft.replace(path)


def merge(sessions: Iterable[Row]) -> list[Row]:
    """In the order of their beginning; of the same session, the last counts."""
    return [session for _, session in sorted({session["id"]: session for session in sessions}.items())]


def latest(sessions: list[Row]) -> dict[tuple[str, str, str], tuple[Row, Row]]:
    """(device, kind, name) -> (machine, row): the newest row of each that has a figure, and a line in the table."""
    found = {}
    for session in sessions:
        for row in session["rows"]:
            if "error" not in row and row["kind"] in _LINES:
                found[session["machine"].get("device", ""), row["kind"], row["name"]] = (session["machine"], row)
    return found


# ---------------------------------------------------------------------------------------------------------------- table

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"


def table(sessions: list[Row]) -> str:
    """Markdown of the newest row of each kind and device."""
    found = latest(sessions)
    lines: list[str] = []
    for device in dict.fromkeys(device for device, _, _ in found):
        machine = next(machine for key, (machine, _) in reversed(found.items()) if key[0] == device)
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        lines += ["", f"{device}, driver {machine['driver']}; {versions}; {machine['date']}.", ""]
        lines += ["| what | ours | peer | ratio: peer's time over ours |", "| -- | -- | -- | -- |"]
        for (of, kind, name), (_, row) in found.items():
            if of == device:
                lines += _LINES[kind](name, row)
    return "\n".join(lines).strip() or "Nothing was measured on a GPU yet."


def _compare_lines(name: str, row: Row) -> list[str]:
    ours, peer = row.get("ours", {}), row.get("peer", {})
    batch, inside = row["batch"], row.get("ratio")
    lines = [
        f"| {name}, batch {batch}: step | {_step(ours)} | {_step(peer)} {peer.get('best', '')} | {_ratio(inside)} |"
    ]
    if bare := row.get("ratio_to_peer_without_augmentation"):
        lines.append(f"| {name}: with the peer's augmentation left out | | | {_ratio(bare)} |")
    for key, label, factor, unit in (
        ("peak_bytes", "peak memory", 2**-30, "GiB"),
        ("cold_seconds", "to the first step, cold", 1, "s"),
        ("warm_seconds", "to the first step, warm", 1, "s"),
    ):
        cells = [f"{side[key] * factor:.1f} {unit}" if side.get(key) else "" for side in (ours, peer)]
        lines.append(f"| {name}: {label} | {cells[0]} | {cells[1]} | |")
    outside = [side.get("profile", {}).get("outside_kernels") for side in (ours, peer)]
    cells = ["" if share is None else f"{100 * share:.1f} %" for share in outside]
    return [*lines, f"| {name}: time outside kernels | {cells[0]} | {cells[1]} | |"]


def _step(side: Row) -> str:
    if "step_seconds" not in side:
        return side.get("error", "")[:60]
    mfu = f", MFU {100 * side['mfu_of_datasheet']:.1f} %" if side.get("mfu_of_datasheet") else ""
    ms, rate, tflops = 1e3 * side["step_seconds"]["median"], side["images_per_second"], side["tflops"]
    return f"{ms:.2f} ms, {rate:.0f} images/s, {tflops:.0f} TFLOP/s{mfu}"


def _ratio(values: Mapping[str, float] | None) -> str:
    return f"{values['median']:.3f} ({values['least']:.3f} - {values['most']:.3f})" if values else ""


def _sweep_lines(name: str, row: Row) -> list[str]:
    return [f"| {name} | | | {_ratio(row['ratio'])} (defaults' time over this) |"]


def _ceiling_lines(name: str, row: Row) -> list[str]:
    return [f"| {name} | {row['matrix_tflops']:.0f} TFLOP/s, {row['copy_tb_per_second']:.2f} TB/s | | |"]


def _run_lines(name: str, row: Row) -> list[str]:
    accuracy = f"test accuracy {row['test_accuracy']:.4f}"
    seconds = f"{row['train_seconds']:.1f} s from the first step, {row['total_seconds']:.1f} s in all"
    used = row.get("gpu_utilization")
    share = "" if used is None else f", GPU busy {used:.0f} %"
    mfu = f", MFU {100 * row['mfu_of_datasheet']:.1f} %" if row.get("mfu_of_datasheet") else ""
    return [f"| {name} | {accuracy}, {seconds}{share}{mfu} | | |"]


def _quickstart_lines(name: str, row: Row) -> list[str]:
    differs = ", ".join(f"{value:.1e} at step {step}" for step, value in row["loss_differs"].items())
    return [
        f"| {name}: {row['steps']} steps | test accuracy {row['test_accuracy']['gpu']:.4f} on the GPU, "
        f"{row['test_accuracy']['cpu']:.4f} on its CPU | | |",
        f"| {name}: the loss differs from the CPU's by | {differs} | | |",
        f"| {name}: stopped at step {row['stopped_at']} and resumed | every loss the same | | |",
    ]


_LINES = {
    "quickstart": _quickstart_lines,
    "compare": _compare_lines,
    "sweep": _sweep_lines,
    "ceiling": _ceiling_lines,
    "run": _run_lines,
}


def write_table(readme: Path, sessions: list[Row]) -> None:
    """Puts the table between its marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table(sessions)}\n{END}{rest.partition(END)[2]}")
