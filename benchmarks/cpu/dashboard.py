"""`jaxtrain dashboard` over 1,000 runs with 10 million rows, and TensorBoard over the same: seconds, and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import ROOT, Spread
from jaxtrain.host.ports import free_port
from jaxtrain.observability.goodput import StartEnd, StartTimes
from jaxtrain.observability.tensorboard import EventFile

SMALL, SMALL_ROWS = 990, 5_000
HUGE, HUGE_ROWS = 10, 505_000
_CURVES = 200  # that are looked at, each of another run
_IDLE_SECONDS = 20.0
_PATIENCE = 240.0


def measure() -> dict[str, Any]:
    """Seconds and bytes of the two programs, one after the other, over the same runs."""
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as folder:
        root = Path(folder) / "runs"
        make_runs(Path(folder) / "made", root)
        return {
            "runs": SMALL + HUGE,
            "rows": SMALL * SMALL_ROWS + HUGE * HUGE_ROWS,
            "huge_bytes": (root / "huge0" / "metrics.jsonl").stat().st_size,
            "dashboard": _dashboard(root, Path(folder)),
            "tensorboard": _tensorboard(root),
        }


def rows(measured: dict[str, Any], row: Callable[..., str]) -> list[str]:
    """Lines of the table. row: makes one of a name, a spread, a factor, a unit and a number of decimals."""
    of = f"{measured['runs']:,} runs, {measured['rows'] / 1e6:.0f} million rows"
    ours, theirs = measured["dashboard"], measured["tensorboard"]
    lines = [row(f"dashboard of {of}: the overview", ours["overview"], 1e3, "ms")]
    for key, what in (("curve", "two curves"), ("huge_curve", "of a huge run"), ("huge_zoom", "of a part of it")):
        lines.append(row(f"dashboard: {what}, first look", ours[key], 1e3, "ms"))
    lines.append(row("TensorBoard of the same: a curve", theirs["curve"], 1e3, "ms"))
    for name, found, keys in (
        ("dashboard", ours, {"listens": "it answers", "all_runs": "it shows all runs"}),
        ("TensorBoard", theirs, {"listens": "it answers", "all_runs": "it lists all runs", "huge_read": "all is read"}),
    ):
        lines += [f"| {name}: from its start until {what} | {found[key]:.1f} s | |" for key, what in keys.items()]
        for when, size in found["resident_bytes"].items():
            lines.append(f"| {name}: resident memory, {when} | {size / 2**20:.0f} MiB | |")
    lines.append(f"| dashboard: of a core, where nothing changes | {100 * ours['idle_share_of_a_core']:.1f} % | |")
    return lines


def make_runs(made: Path, root: Path) -> None:
    """Writes a small run and a huge one, with metrics and event files, and links their files for all others."""
    for kind, count, rows in (("small", SMALL, SMALL_ROWS), ("huge", HUGE, HUGE_ROWS)):
        run = made / kind
        (run / "starts").mkdir(parents=True)
        (run / "logs").mkdir()
        values = {"seed": 0, "model": {"name": "resnet18"}, "data": {"name": "cifar10", "global_batch": 128}}
        (run / "config.json").write_text(json.dumps(values | {"train": {"epochs": 100, "steps": 0}}))
        end = StartEnd(time.time(), 0, "The run is complete.", rows, "host", "itself")
        start = StartTimes(time.time() - rows, 0, rows, 0, {"start": 3.0, "step": 0.9 * rows}, "host", end, rows)
        (run / "starts" / "000001.json").write_text(json.dumps(dataclasses.asdict(start)))
        _write_metrics(run, rows)
        for number in range(count):
            _link(run, root / f"{kind}{number}")


def _write_metrics(run: Path, rows: int) -> None:
    draw = random.Random(0)
    events = EventFile(run / "tensorboard" / "train", 0)
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, rows + 1):
            shown = {"loss": 2 / step**0.3 + 0.1 * draw.random(), "accuracy": draw.random(), "learning_rate": 0.1}
            row = {"step": step, "epoch": step // 1000, "phase": "train", **shown, "time": 1.7e9 + step}
            file.write(json.dumps(row) + "\n")
            events.scalars(step, shown)
            if step % 1000 == 0:
                file.write(json.dumps(row | {"phase": "val"}) + "\n")
    events.close()


def _link(run: Path, to: Path) -> None:
    for folder, _, names in os.walk(run):
        below = to / os.path.relpath(folder, run)
        below.mkdir(parents=True)
        for name in names:
            os.link(Path(folder, name), below / name)


def _dashboard(root: Path, state: Path) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "JAXTRAIN_STATE_DIR": str(state), "JAXTRAIN_QUEUE_DIR": str(state / "queue")
    }  # fmt: skip
    began = time.perf_counter()
    command = [sys.executable, "-m", "jaxtrain", "dashboard", "--root", str(root), "--port", "0"]
    with _running(command, environment) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        listens = time.perf_counter() - began
        parts = urllib.parse.urlsplit(address)
        token = urllib.parse.parse_qs(parts.query)["token"][0]

        def ask(path: str) -> Any:
            request = urllib.request.Request(f"http://{parts.netloc}/api/{path}")
            request.add_header("Authorization", f"Bearer {token}")
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)

        first = _seconds(lambda: ask("runs"))
        rows = _until(lambda: ask("runs"), lambda found: not found["server"]["scanning"])["runs"]
        complete = time.perf_counter() - began
        ids = {row["name"]: row["id"] for row in rows}
        memory = {"overview": _resident(process)}
        page = Spread.of([_seconds(lambda: ask("runs")) for _ in range(10)])
        columns = "series?columns=train/loss,val/accuracy"
        small = [_seconds(lambda n=n: ask(f"runs/{ids[f'small{n}']}/{columns}")) for n in range(_CURVES)]
        memory["small"] = _resident(process)
        huge = [_seconds(lambda n=n: ask(f"runs/{ids[f'huge{n}']}/{columns}")) for n in range(HUGE)]
        zoom = [
            _seconds(lambda n=n: ask(f"runs/{ids[f'huge{n}']}/{columns}&from=200000&to=230000")) for n in range(HUGE)
        ]
        memory["huge"] = _resident(process)
        return {
            "listens": listens,
            "first_answer": first,
            "all_runs": complete,
            "overview": vars(page),
            "curve": vars(Spread.of(small)),
            "huge_curve": vars(Spread.of(huge)),
            "huge_zoom": vars(Spread.of(zoom)),
            "idle_share_of_a_core": _idle(process),
            "resident_bytes": memory,
        }


def _tensorboard(root: Path) -> dict[str, Any]:
    """Until it lists all runs, and one curve; of a huge run as of a small one it keeps 1,000 points."""
    port = free_port()
    began = time.perf_counter()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(root), "--port", str(port)]
    with _running(command, dict(os.environ)) as process:

        def ask(path: str) -> Any:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}") as answer:
                    return json.load(answer)
            except OSError:  # it does not answer yet
                return None

        _until(lambda: ask("data/environment"))
        listens = time.perf_counter() - began
        scalars = "data/plugin/scalars"
        listed = _until(lambda: ask(f"{scalars}/tags"), lambda found: len(found or ()) == SMALL + HUGE, patient=False)
        complete = time.perf_counter() - began
        curves = []
        for name in list(listed or ())[:_CURVES]:
            query = urllib.parse.urlencode({"run": name, "tag": "loss"})
            curves.append(_seconds(lambda query=query: ask(f"{scalars}/scalars?{query}")))
        _until(lambda: _last_step(ask, "huge9"), lambda step: step == HUGE_ROWS, patient=False)
        return {
            "listens": listens,
            "runs_listed": len(listed or ()),
            "all_runs": complete,
            "huge_read": time.perf_counter() - began,
            "curve": vars(Spread.of(curves or [float("nan")])),
            "resident_bytes": {"all": _resident(process)},
        }


def _last_step(ask: Callable[[str], Any], run: str) -> int:
    query = urllib.parse.urlencode({"run": f"{run}/tensorboard/train", "tag": "loss"})
    points = ask(f"data/plugin/scalars/scalars?{query}")
    return points[-1][1] if points else 0


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    try:
        yield process
    finally:
        for each in psutil.Process(process.pid).children(recursive=True):
            each.terminate()
        process.terminate()
        process.wait()


def _seconds(ask: Callable[[], Any]) -> float:
    began = time.perf_counter()
    ask()
    return time.perf_counter() - began


def _until(look: Callable[[], Any], good: Callable[[Any], bool] = bool, *, patient: bool = True) -> Any:
    """What `look` gives once it is good, or at last. patient: it must become good."""
    deadline = time.perf_counter() + _PATIENCE
    while not good(found := look()) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert good(found) or not patient, found
    return found


def _resident(process: subprocess.Popen[str]) -> int:
    """Of the process and those that it has started."""
    own = psutil.Process(process.pid)
    return sum(each.memory_info().rss for each in (own, *own.children(recursive=True)))


def _idle(process: subprocess.Popen[str]) -> float:
    """The share of a core that it keeps busy where nobody asks and nothing changes."""
    own = psutil.Process(process.pid)
    before = sum(own.cpu_times()[:2])
    time.sleep(_IDLE_SECONDS)
    return (sum(own.cpu_times()[:2]) - before) / _IDLE_SECONDS
