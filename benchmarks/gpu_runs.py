"""Whole runs on a GPU, from real data to a test accuracy: seconds, accuracy, curves, how busy the GPU was, MFU.

python -m benchmarks.gpu_runs wheels .wheels                 # where there is a package index: what the GPU machine lacks
python -m benchmarks.gpu_runs install .wheels SITE           # there, without an index; SITE is for PYTHONPATH
python -m benchmarks.gpu_runs run resnet18_cifar10 resnet_fast_cifar10 --seeds 0,1,2 --data DIR
python -m benchmarks.gpu_runs run resnet50_cifar100 --set train.epochs=30 --set data.global_batch=512

Rows go into the result file of `benchmarks.gpu.suite`, after every run. DIR is a JAXTRAIN_DATA_DIR, prepared or with the
official files in downloads/manual; with --packs these are made of CIFAR-10's packs first.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import ROOT, Budget, Row, Session, add_options, peak_flops, scratch_folder
from benchmarks.gpu.suite import machine

# What a machine with JAX, Flax, Optax, Orbax and PyTorch does not have yet; their own needs are there.
WHEELS = (
    "tensorflow-datasets", "grain", "clu", "ml_collections", "tensorboardX", "array_record", "dm-tree", "immutabledict",
    "simple_parsing", "docstring-parser", "tensorflow-metadata", "googleapis-common-protos", "termcolor", "toml",
    "cloudpickle", "portpicker", "importlib_resources", "protobuf", "wrapt", "six",
)  # fmt: skip
SOURCES = (
    "promise",
    str(ROOT),
)  # the one has no wheel, though it is pure Python; the other's version a run wants to know
PYTHON, PLATFORMS = "3.12", ("2_28", "2_27", "2_17", "2014", "1")

# What `unpack` needs.
PACKS = (
    "unpack.py", *(f"cifar10/train_{number}.xz" for number in range(5)), "cifar10/test.xz",
    "cifar10/labels.npz", "cifar10/names_train.xz", "cifar10/names_test.xz",
)  # fmt: skip
# The changes of a rehearsal on a CPU.
SMOKE = ("data.name=synthetic", "data.examples=128", "data.global_batch=16", "train.steps=8", "model.width=8")

# Multiply-adds of a forward pass an image, counted from the models (`benchmarks.gpu.ours.forward_macs`).
GMACS: Mapping[str, float] = {"resnet18": 0.555, "resnet50": 1.298, "swin_tiny": 0.358}
SAMPLE_SECONDS = 0.2


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("wheels", help="download what the GPU machine lacks")
    fetching.add_argument("directory", type=Path)
    installing = commands.add_parser("install", help="install them where there is none")
    installing.add_argument("directory", type=Path)
    installing.add_argument("site", type=Path)
    running = commands.add_parser("run", help="train recipes end to end")
    running.add_argument("recipes", nargs="+", help="names of files in configs/, with arguments behind a colon")
    running.add_argument("--seeds", default="0", help="such as 0,1,2")
    running.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    running.add_argument("--data", default=os.environ.get("JAXTRAIN_DATA_DIR", ""), help="a JAXTRAIN_DATA_DIR")
    running.add_argument("--packs", type=Path, help="make CIFAR-10's official files of the packs in this folder")
    add_options(running)
    arguments = parser.parse_args()
    if arguments.command == "wheels":
        download(arguments.directory)
        return
    if arguments.command == "install":
        install(arguments.directory, arguments.site)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(run_all(arguments))


def download(directory: Path) -> None:
    """Wheels for Python 3.12 on Linux into `directory`; says how much there is to carry."""
    pip = [sys.executable, "-m", "pip"]
    tags = [f"--platform=manylinux{'_' * ('_' in each)}{each}_x86_64" for each in PLATFORMS]
    wanted = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *tags]
    subprocess.run([*pip, "download", "-q", *wanted, "-d", str(directory), *WHEELS], check=True)
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(directory), *SOURCES], check=True)
    files = list(directory.glob("*.whl"))
    print(f"{len(files)} wheels, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {directory}")


def install(wheels: Path, site: Path) -> None:
    """Into a directory for PYTHONPATH: a virtual environment would not see the packages of another one."""
    options = [
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "-q",
        "--upgrade",
    ]
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(site), *files], check=True)


def unpack(packs: Path, data: Path, seconds: float) -> str:
    """CIFAR-10's official files, where the trainer looks for them in `data`; why not, if that failed.

    packs: a folder with unpack.py and cifar10/. The parts of a half come with each of two calls to the same machine.
    """
    manual = data / "downloads" / "manual"
    if (manual / "cifar-10-batches-py" / "test_batch").exists():
        return ""
    missing = [name for name in PACKS if not (packs / name).exists()]
    if missing:
        return f"{', '.join(missing)} missing in {packs}: send the other half to the same machine first"
    command = [sys.executable, str(packs / "unpack.py"), "cifar10", str(manual), "--official"]
    try:
        subprocess.run(command, check=True, timeout=seconds, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return ""


def run_all(arguments: argparse.Namespace) -> int:
    """Every recipe with every seed, as far as the budget goes. The exit code: 1 where one failed or has no data."""
    budget = Budget(arguments.budget_seconds)
    session = Session(arguments.results, machine(arguments.commit, arguments.smoke))
    changes = [*arguments.changes, *(SMOKE if arguments.smoke else ())]
    why = ""
    if arguments.packs and not arguments.smoke:
        why = unpack(arguments.packs, Path(arguments.data), budget.left)
        _say(budget, f"packs: {why or 'unpacked'}")
    with scratch_folder(arguments.scratch) as scratch:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(scratch / "caches" / "xla")}
        environment["JAX_PLATFORMS"] = "cpu" if arguments.smoke else "cuda"
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if arguments.data:
            environment["JAXTRAIN_DATA_DIR"] = arguments.data
        session.machine["versions"] |= _versions(environment)
        longest: dict[str, float] = {}
        for recipe in arguments.recipes:
            for seed in arguments.seeds.split(","):
                name = " ".join([f"{recipe}, seed {seed}", *changes])
                if why or budget.left < 1.1 * longest.get(recipe, 30.0):
                    session.leave_out(name, why or f"{budget.left:.0f} s were left")
                    _say(budget, f"{name}: left out; {why}")
                    continue
                began = budget.left
                workdir = scratch / f"{re.sub(r'[^a-zA-Z0-9]', '_', recipe)}-{seed}"
                shutil.rmtree(workdir, ignore_errors=True)  # of an earlier call
                command = [sys.executable, "-m", "jaxtrain.main", "--config", _spec(recipe), "--workdir", str(workdir)]
                command += [f"--config.{each}" for each in (f"seed={seed}", *changes)]
                row: Row = {"kind": "run", "name": name, "recipe": recipe, "seed": int(seed)}
                row |= one_run(command, workdir, environment, budget)
                session.put(row)
                _say(budget, f"{name}: {row.get('error') or {key: row.get(key) for key in _SAID}}")
                longest[recipe] = began - budget.left
    return 1 if why or session.failures else 0


_SAID = ("test_accuracy", "train_seconds", "total_seconds", "gpu_utilization", "mfu_of_datasheet", "images_per_second")


def _spec(recipe: str) -> str:
    name, colon, variant = recipe.partition(":")
    return str(ROOT / "configs" / f"{name}.py") + colon + variant


def _say(budget: Budget, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {budget.left:4.0f} s left  {text}", flush=True)


def _versions(environment: Mapping[str, str]) -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    try:
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return json.loads(found.stdout)


def one_run(command: list[str], workdir: Path, environment: Mapping[str, str], budget: Budget) -> Row:
    """Trains, and reads what it left; an `error` where it failed or the budget ended first."""
    output = workdir.with_suffix(".output")
    began = time.time()
    with open(output, "wb") as file, Utilization() as utilization:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(budget.left)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    ended = time.time()
    try:
        row = read_run(workdir, began, ended, utilization.samples)
    except (KeyError, ValueError, TypeError, OSError) as error:  # a run that was cut off leaves torn files
        row = {"total_seconds": ended - began, "unread": f"{type(error).__name__}: {error}"}
    if code:
        why = "the budget ended first" if code == -1 else f"exit code {code}"
        row["error"] = f"{why}: " + " / ".join(output.read_text(errors="replace").splitlines()[-5:])
    return row


# ------------------------------------------------------------------------------------------------------ what a run left


def read_run(workdir: Path, began: float, ended: float, samples: list[tuple[float, float]]) -> Row:
    """Everything of one run. began, ended: of its process. samples: (time, percent) of the GPU's utilization.

    train_seconds: from the first step to the end of the last epoch, validations in between included; total_seconds: from
    the command to the end of the process, compilation, the test and the last checkpoint included. curve: (epoch from 1,
    seconds since the first step, validation accuracy).
    """
    row: Row = {"total_seconds": ended - began}
    log = workdir / "logs" / "process_0.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    first = next((_time(line) for line in lines if re.search(r" compiled in [0-9.]+ s", line)), None)
    epochs = [_time(line) for line in lines if re.search(r" epoch \d+/\d+ (train|val): ", line)]
    if first is not None:
        row["start_seconds"] = first - began
        validated = [(m, _time(line)) for line in lines if (m := re.search(_VALIDATED, line))]
        row["curve"] = [[int(m[1]), round(at - first, 3), float(m[2])] for m, at in validated]
        if epochs:
            row["train_seconds"] = epochs[-1] - first
            used = [percent for at, percent in samples if first <= at <= epochs[-1]]
            row["gpu_utilization"] = statistics.fmean(used) if used else None
    metrics = workdir / "metrics.csv"
    if metrics.exists():
        row["metrics"] = metrics.read_text()
        trained = [float(each["throughput"]) for each in csv.DictReader(metrics.open()) if each["phase"] == "train"]
        if trained:
            row["images_per_second"] = statistics.median(trained)
    result = workdir / "result.json"
    if result.exists():
        found = json.loads(result.read_text())
        row |= {key: found[key] for key in ("steps", "epochs", "seconds", "precision", "device_kind")}
        row["test_accuracy"] = found["last"]["test"]["accuracy"]
        row["best"] = found.get("best")
        row |= _mfu(workdir, row)
    return row


_VALIDATED = r" epoch (\d+)/\d+ val: loss [^,]+, accuracy ([0-9.]+)"


def _time(line: str) -> float:
    return datetime.datetime.fromisoformat(line.split(maxsplit=1)[0]).timestamp()


def _mfu(workdir: Path, row: Row) -> Row:
    model = json.loads((workdir / "config.json").read_text())["model"]
    plain = not (model["width"] or model["depths"])
    macs, peak = GMACS.get(model["name"]) if plain else None, peak_flops(row["device_kind"])
    if not macs or not peak or "images_per_second" not in row:
        return {}
    return {"mfu_of_datasheet": 6e9 * macs * row["images_per_second"] / peak}


# --------------------------------------------------------------------------------------------------------- utilization


class Utilization:
    """Samples the first GPU's utilization while it is entered, by NVML, or by `nvidia-smi` where there is no binding."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        with contextlib.suppress(Exception):  # a machine without a GPU has no samples
            nvml: Any = importlib.import_module("pynvml")
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByIndex(0)
            while not self._ends.wait(SAMPLE_SECONDS):
                self.samples.append((time.time(), float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)))
            return
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            while not self._ends.wait(SAMPLE_SECONDS):
                found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
                self.samples.append((time.time(), float(found.strip())))

    def __enter__(self) -> Utilization:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join(15)


if __name__ == "__main__":
    main()
