"""The GPU suite without a GPU: its arithmetic, traces, files and processes; tables. (Its figures are measured, not tested.)"""

import dataclasses
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_runs
from benchmarks.cpu import framework
from benchmarks.gpu import ours, parts, quickstart, suite
from benchmarks.gpu.child import Child, ChildError
from benchmarks.gpu.parts import CASES, EAGER, OWN_GRAPH, PLAIN, Budget, Session
from jaxtrain.config import flatten, to_dict


def named(kind, pid, name, tid=0):
    return {"ph": "M", "pid": pid, "tid": tid, "name": f"{kind}_name", "args": {"name": name}}


def span(name, start, length, **fields):
    return {"ph": "X", "pid": 1, "tid": 1, "name": name, "ts": start, "dur": length, **fields}


def test_a_trace_of_xla_counts_each_kernel_once_and_overlapping_streams_once(tmp_path):
    events = [
        named("process", 1, "/device:GPU:0"),
        named("process", 2, "/host:CPU"),
        *(named("thread", 1, f"Stream #{i}(Compute)", i) for i in (1, 2)),
        named("thread", 1, "XLA Ops", 3),  # repeats the streams' kernels by operation
        named("thread", 2, "Stream #1", 1),
        span("loop_fusion_7", 0, 400),
        span("loop_fusion_12.1", 500, 100),
        span("cudnn_kernel", 350, 100, tid=2),
        span("loop_fusion_7", 0, 400, tid=3),
        span("host", 0, 9000, pid=2),
    ]
    path = tmp_path / "vm.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = parts.profile(parts.read_trace(path), steps=2, step_seconds=550e-6)
    assert found["busy_seconds"] == pytest.approx(275e-6)  # 0 - 450 and 500 - 600, over two steps
    assert found["outside_kernels"] == pytest.approx(0.5)
    assert found["outside_kernels_in_trace"] == pytest.approx(50 / 600)
    assert [(each["name"], each["calls"]) for each in found["operations"]] == [
        ("loop_fusion", 1),
        ("cudnn_kernel", 0.5),
    ]
    assert found["operations"][0]["share"] == pytest.approx(500 / 600)


def test_a_trace_of_pytorch_counts_kernels_and_not_what_launches_them(tmp_path):
    events = [
        span("aten::mm", 0, 900, cat="cpu_op"),
        span("gemm", 10, 100, cat="kernel"),
        span("launch", 0, 5, cat="runtime"),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert parts.device_events(parts.read_trace(path)) == [("gemm", pytest.approx(1e-5), pytest.approx(1e-4))]
    assert "error" in parts.profile({"traceEvents": []}, 1, 1.0)


def test_a_result_file_keeps_what_was_measured_and_takes_in_others(tmp_path):
    path, other = tmp_path / "gpu.json", tmp_path / "other.json"
    session = Session(path, {"device": "NVIDIA H200", "driver": "1", "versions": {"jax": "0"}, "date": "today"})
    row = {"kind": "compare", "name": "resnet50_224", "batch": 256, "ours": {}, "peer": {}}
    session.put(row)
    session.put(row | {"ours": {"step_seconds": {"median": 0.05}, "images_per_second": 5120, "tflops": 126}})
    session.put(row | {"name": "vgg19_224", "error": "out of memory"})
    session.leave_out("swin_tiny_224", "10 s were left")
    (stored,) = parts.read_results(path)
    assert [each["name"] for each in stored["rows"]] == ["resnet50_224", "vgg19_224"]
    assert stored["left_out"][0]["name"] == "swin_tiny_224"

    parts.write_results(other, [stored | {"id": "1"}, stored | {"rows": []}])
    merged = parts.merge([*parts.read_results(other), *parts.read_results(path)])
    assert [(each["id"], len(each["rows"])) for each in merged] == [("1", 2), (stored["id"], 2)]

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{parts.BEGIN}\nstale\n{parts.END}\nafter\n")
    parts.write_table(readme, merged)
    text = readme.read_text()
    assert "| resnet50_224, batch 256: step | 50.00 ms, 5120 images/s, 126 TFLOP/s |" in text
    assert (text[:7], text[-6:]) == ("before\n", "after\n")
    assert not any(word in text for word in ("stale", "vgg19"))


def test_a_budget_is_shared_and_never_negative():
    budget = Budget(100, began=time.monotonic() - 40)
    assert budget.left == pytest.approx(60, abs=1)
    assert budget.share(3).left == pytest.approx(20, abs=1)
    assert Budget(1, began=0.0).left == 0
    assert parts.steps_for(1.5, 0.05) == 30
    assert parts.steps_for(1.5, 10) == 3


def test_mfu_is_of_the_devices_own_peak():
    found = parts.rates(CASES["resnet50_224"], 0.05, "NVIDIA H100 80GB HBM3", ceiling=790e12)
    assert found["images_per_second"] == pytest.approx(5120)
    assert found["mfu_of_datasheet"] == pytest.approx(6 * 4.11e9 * 5120 / 989e12)
    assert found["mfu_of_matrix_product"] == pytest.approx(6 * 4.11e9 * 5120 / 790e12)
    assert parts.rates(CASES["resnet50_224"], 0.05, "another")["mfu_of_datasheet"] is None


def test_counted_multiply_adds_are_what_xla_counts():
    def network(x, kernel, weights):
        y = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.jit(lambda y: y.reshape(4, -1) @ weights)(y)

    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 9, 9, 3), (3, 3, 3, 8), (128, 10))]
    counted = ours.macs(network, *arguments)
    assert counted == 4 * 16 * 8 * 27 + 4 * 128 * 10
    assert jax.jit(network).lower(*arguments).cost_analysis()["flops"] == pytest.approx(2 * counted, rel=0.01)


@pytest.mark.parametrize("name", ["resnet18_32", "vgg19_224", "swin_tiny_224"])
def test_the_table_of_multiply_adds_is_that_of_the_models(name):
    assert ours.forward_macs(CASES[name]) == pytest.approx(1e9 * CASES[name].gmacs, rel=0.01)


def test_the_suite_runs_the_trainers_step():
    case = dataclasses.replace(CASES["resnet18_32"].shrunk(), model="mlp", image=8, small={"width": 8})
    training = ours.Training.make(ours.config_of(case))
    losses = [float(training.run(training.batches(3))["loss"]) for _ in range(2)]
    assert np.isfinite(losses).all()
    assert int(training.state.step) == 6  # every update was accepted


def test_a_child_answers_errors_and_its_end_is_one_too(tmp_path):
    with Child("ours", tmp_path / "log", {"JAX_PLATFORMS": "cpu"}) as child:
        assert child.ask("info", 120)["platform"] == "cpu"
        with pytest.raises(ChildError, match="block: AssertionError: build comes first"):
            child.ask("block", 120, steps=1)
        with pytest.raises(ChildError, match=r"no answer in 0 s.*build comes first"):
            child.ask("ceilings", 0, size=8192)
        with pytest.raises(ChildError, match="the process has ended"):
            child.ask("info", 120)
    assert ChildError("build: RESOURCE_EXHAUSTED: Out of memory while trying").out_of_memory


def test_a_whole_run_is_read_from_what_it_left(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "process_0.log").write_text(
        "2026-01-01T00:00:10.000Z INFO data resident on the devices; compiled in 9.0 s\n"
        "2026-01-01T00:00:20.000Z INFO epoch 1/2 train: loss 1.5, accuracy 0.4\n"
        "2026-01-01T00:00:21.000Z INFO epoch 1/2 val: loss 0.6, accuracy 0.8403\n"
        "2026-01-01T00:00:30.500Z INFO epoch 2/2 train: loss 1.0, accuracy 0.5\n"
        "2026-01-01T00:00:33.000Z INFO epoch 2/2 test: loss 0.1, accuracy 0.9610\n"
    )
    (tmp_path / "metrics.csv").write_text(
        "epoch,phase,loss,accuracy,throughput\n0,train,1,0.4,20000\n0,val,1,0.8,9\n1,train,1,0.5,40000\n"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model": {"name": "resnet50", "width": 0, "depths": []}}))
    result = {"steps": 2, "epochs": 2, "seconds": {}, "precision": "bf16", "device_kind": "NVIDIA H200"}
    (tmp_path / "result.json").write_text(json.dumps(result | {"last": {"test": {"accuracy": 0.961}}}))
    began = 1767225600.0  # 2026-01-01
    samples = [(began + second, 50.0 if second < 10 else 95.0) for second in range(40)]
    row = gpu_runs.read_run(tmp_path, began, began + 35, samples)
    assert [row[key] for key in ("total_seconds", "train_seconds", "start_seconds")] == [35, 20.5, 10]
    assert [row[key] for key in ("curve", "gpu_utilization", "test_accuracy")] == [[[1, 11.0, 0.8403]], 95, 0.961]
    assert row["mfu_of_datasheet"] == pytest.approx(6 * 1.298e9 * 30000 / 989e12)


def test_the_frameworks_table_says_of_which_kind_each_figure_is():
    """Its ways are legal trainings; a column is simulated or compiled, and what was not compiled has no figure."""
    for fields in framework.WAYS.values():
        found = flatten(to_dict(framework.run_config(32, fields, "f32")))
        plain = flatten(to_dict(framework.run_config(32, {}, "f32")))
        assert {key for key in found if found[key] != plain[key]} == set(fields)
    spread = {"median": 0.5, "least": 0.25, "most": 1.0}
    row = {
        "name": "ZeRO-2",
        "settings": {"layout.zero": 2},
        "seconds": spread,
        "over_vanilla": spread,
        "peak_bytes": 2e6,
    }
    measured = {"batch": 32, "compiled_batch": 1024, "target": "4xh100", "not_compiled": ""}
    heading, _, line = framework.table(measured | {"rows": [row | {"compiled_peak_bytes": 3e9}]}).split("\n")
    assert all(cell.strip().startswith(("simulated", "compiled for 4xh100")) for cell in heading.split("|")[3:-1])
    assert line == "| ZeRO-2 | `layout.zero=2` | 64.0 (32.0 - 128.0) | 0.50 x (0.25 - 1.00) | 2 | 3.00 |"
    without = framework.table(measured | {"not_compiled": "no compiler", "rows": [row | {"compiled_peak_bytes": None}]})
    assert without.split("\n")[2].endswith("| 2 | not compiled |")
    assert without.endswith("\nNot compiled: no compiler")


# ------------------------------------------------------------------------------------------------- comparing, with stand-ins


class Side:
    """A child whose builds take seconds, fail or hang, and whose steps take what they are told to."""

    def __init__(self, build, step_seconds):
        self.build, self.step_seconds = build, step_seconds

    def send(self, command, **arguments):
        self.began, self.batch = time.monotonic(), arguments["batch"]

    def answer(self, timeout):
        build = self.build(self.batch) if callable(self.build) else self.build
        if isinstance(build, str):
            raise ChildError(build)
        left = self.began + build - time.monotonic()
        time.sleep(max(0.0, min(left, timeout)))
        if left > timeout:
            raise ChildError("build: no answer")
        return {"seconds": build, "parameters": 1, "cache_hits": 0, "temporary_bytes": 0}

    def ask(self, command, timeout, **arguments):
        assert timeout > 0
        if command == "block":
            time.sleep(arguments["steps"] * self.step_seconds)
        return {"device": "", "versions": {}} if command == "info" else {"seconds": self.step_seconds, "loss": 1.0}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def compared(monkeypatch, tmp_path, seconds, our_side, peers):
    """The row of resnet18_32 with a budget of `seconds`. peers: by their ways of running; what is not there cannot be built."""
    broken = Side("build: no compiler", 0)
    monkeypatch.setattr(suite.Suite, "ours", lambda self, cache, flags="": our_side)
    monkeypatch.setattr(suite.Suite, "peer", lambda self, cache: peers.get(cache.split("-", 2)[2], broken))
    monkeypatch.setattr(suite, "BLOCK_SECONDS", 0.02)
    monkeypatch.setattr(suite, "LOOK_SECONDS", 0.1)
    session = Session(tmp_path / "gpu.json", {"versions": {}})
    of = suite.Suite(session, Budget(seconds), tmp_path, smoke=False, ceiling=None)
    suite.compare(of, "resnet18_32")
    (stored,) = parts.read_results(tmp_path / "gpu.json")
    return stored["rows"][0], session.failures


def test_both_sides_are_built_at_once_and_the_fastest_way_to_run_the_peer_counts(monkeypatch, tmp_path):
    peers = {
        PLAIN: Side(0.5, 0.002),
        "reduce-overhead": Side(0.1, 0.001),
        "max-autotune-no-cudagraphs": Side(0.1, 0.004),
    }
    row, failures = compared(monkeypatch, tmp_path, 10, Side(0.5, 0.002), peers)
    assert (row["peer"]["best"], failures) == ("reduce-overhead", [])
    assert row["ratio"]["median"] == pytest.approx(0.5)
    assert row["peer"]["candidates"]["max-autotune-no-cudagraphs"]["ratio"]["median"] == pytest.approx(2)
    assert row["ours"]["step_seconds"]["median"] == pytest.approx(0.002)
    # One after the other they would take longer than the budget.
    row, failures = compared(monkeypatch, tmp_path / "again", 1.2, Side(0.7, 0.002), {PLAIN: Side(0.7, 0.002)})
    assert (row["ratio"]["median"], failures) == (pytest.approx(1), [])


def test_a_peer_that_hangs_or_cannot_be_built_leaves_time_for_one_that_is_not_compiled(monkeypatch, tmp_path):
    row, failures = compared(monkeypatch, tmp_path, 3, Side(0.1, 0.002), {PLAIN: Side(60, 0), EAGER: Side(0.1, 0.006)})
    assert (row["peer"]["best"], failures) == (EAGER, [])
    assert row["ratio"]["median"] == pytest.approx(3)
    found = row["peer"]["candidates"]
    assert (found[PLAIN]["error"], list(found[OWN_GRAPH])) == ("build: no answer", ["left_out"])
    row, failures = compared(monkeypatch, tmp_path / "none", 4, Side(0.1, 0.002), {})
    assert failures == ["resnet18_32"]
    assert row["ours"]["step_seconds"]["median"] == pytest.approx(0.002)


def test_there_is_a_ratio_when_building_takes_nearly_the_whole_budget(monkeypatch, tmp_path):
    row, failures = compared(monkeypatch, tmp_path, 3, Side(2.5, 0.002), {PLAIN: Side(2.55, 0.004)})
    assert (row["ratio"]["median"], failures) == (pytest.approx(2), [])
    assert "left_out" in row["peer"]["candidates"][OWN_GRAPH]


def test_too_little_memory_halves_the_batch(monkeypatch, tmp_path):
    def build(batch):
        return 0.1 if batch <= 512 else "build: RESOURCE_EXHAUSTED: Out of memory"

    row, failures = compared(monkeypatch, tmp_path, 10, Side(build, 0.002), {PLAIN: Side(0.1, 0.002)})
    assert (row["batch"], failures) == (512, [])


# ------------------------------------------------------------------------------------------------------------- the two calls

# Stands in for python3: runs the items as they are, and in place of their commands what a test wants.
PYTHON = """#!/bin/sh
case "$*" in
  "-m benchmarks.gpu.item "*) exec {python} "$@" ;;
  *"suite probe"*)
    mkdir -p "$ITEM_SCRATCH/caches"
    echo x > "$ITEM_SCRATCH/caches/x"
    echo seen > "$ITEM_SCRATCH/probe.log" ;;
  *quickstart*)
    trap '' TERM
    setsid sh -c 'echo $$ >> "$KEEP/pids"; sleep 900' &
    echo $$ >> "$KEEP/pids"
    sleep 900; sleep 900 ;;
  *"suite resnet18_32"*) kill -SEGV $$ ;;
  *) echo "$ITEM_SECONDS" ;;
esac
"""


def call(folder, script, seconds):
    """Exit code, seconds, result file, lines of call.log of one of the two calls, with `PYTHON`."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").write_text(PYTHON.format(python=sys.executable))
    (folder / "bin" / "python3").chmod(0o755)
    shutil.copytree(parts.ROOT / "benchmarks", folder / "tree" / "benchmarks")
    given = {"OUT": str(folder / "out"), "KEEP": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    began = time.monotonic()
    path = folder / "tree" / "benchmarks" / "gpu" / script
    done = subprocess.run(["bash", str(path), str(seconds)], env=os.environ | given, check=False, capture_output=True)
    took = time.monotonic() - began
    log = (folder / "out" / "call.log").read_text()
    assert done.stdout.decode() == log
    return done.returncode, took, parts.read_results(folder / "out" / "gpu.json"), log


def runs(pid):
    stat = Path("/proc", pid, "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_call_goes_on_when_an_item_hangs_or_crashes_and_nothing_stays_behind(tmp_path):
    code, took, sessions, log = call(tmp_path, "first_call.sh", 12)
    assert (code, took < 12) == (1, True)
    rows = {row["name"]: row for session in sessions for row in session["rows"]}
    codes = {name: row["code"] for name, row in rows.items()}
    assert codes == {"ceilings": 0, "quickstart": 124, "resnet18_32": -11, "resnet50_224": 0, "flags": 0}
    assert rows["quickstart"]["error"].startswith("ended after 2 s")
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    assert not any(map(runs, pids))
    assert "quickstart: failed, exit code 124" in log
    assert "==> ceilings/probe.log\nseen" in (tmp_path / "out" / "items.log").read_text()
    assert (tmp_path / "out" / "caches_ceilings.tar.gz").exists()


def test_a_call_without_time_says_what_it_left_out(tmp_path):
    code, took, sessions, _ = call(tmp_path, "second_call.sh", 1)
    assert (code, took < 10) == (1, True)
    left = [each["name"] for session in sessions for each in session["left_out"]]
    assert left == ["ceilings", "swin_tiny_224", "vgg19_224", "accuracy"]


def test_the_quickstarts_losses_are_compared(tmp_path):
    def write(name, change=0.0, at=0):
        (tmp_path / name).mkdir(exist_ok=True)
        losses = {step: 2.0 / step + (change if step >= at else 0) for step in range(1, 121)}
        rows = [{"step": step, "phase": "train", "loss": loss, "grad_norm": 1.0} for step, loss in losses.items()]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        result = {"last": {"test": {"accuracy": 0.9}}, "device_kind": "cpu"}
        (tmp_path / name / "result.json").write_text(json.dumps(result))

    (tmp_path / "stopped_at").write_text("50")
    for name, change, at in (("gpu", 0, 0), ("cpu", 1e-3, 90), ("parts", 0, 0)):
        write(name, change, at)
    row = quickstart.compare(tmp_path)
    assert "error" not in row
    assert (row["loss_differs"]["10"], row["loss_differs"]["100"]) == (0, pytest.approx(1e-3 / (0.02 + 1e-3)))
    machine = {"device": "x", "driver": "", "versions": {}, "date": ""}
    row |= {"kind": "quickstart", "name": "quickstart"}
    assert "stopped at step 50" in parts.table([{"machine": machine, "rows": [row]}])
    write("parts", 1e-9, 51)
    assert quickstart.compare(tmp_path)["error"] == "the resumed run differs from step 51 on"
    write("parts")
    write("cpu", 1e-3, 1)
    assert "the first loss differs" in quickstart.compare(tmp_path)["error"]


def test_packs_are_unpacked_when_both_halves_are_there(monkeypatch, tmp_path, capsys):
    packs, data = tmp_path / "packs", tmp_path / "data"
    (packs / "cifar10").mkdir(parents=True)
    for name in gpu_runs.PACKS[:4]:
        (packs / name).touch()
    command = [
        "run",
        "resnet_fast_cifar10",
        "--packs",
        str(packs),
        "--data",
        str(data),
        "--results",
        str(tmp_path / "r"),
    ]
    monkeypatch.setattr(sys, "argv", ["gpu_runs", *command])
    with pytest.raises(SystemExit, match="1"):
        gpu_runs.main()
    (session,) = parts.read_results(tmp_path / "r")
    assert session["left_out"][0]["name"] == "resnet_fast_cifar10, seed 0"
    assert session["left_out"][0]["why"].startswith("cifar10/train_3.xz, cifar10/train_4.xz, cifar10/test.xz, ")

    for name in gpu_runs.PACKS:
        (packs / name).touch()
    (packs / "unpack.py").write_text(
        "import sys, pathlib; pathlib.Path(sys.argv[2], *sys.argv[3:]).mkdir(parents=True)"
    )
    assert gpu_runs.unpack(packs, data, 60) == ""
    assert (data / "downloads" / "manual" / "--official").exists()
    (packs / "unpack.py").write_text("import time; time.sleep(60)")
    assert "timed out" in gpu_runs.unpack(packs, data, 1)
