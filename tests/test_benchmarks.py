"""The GPU suite without a GPU: its arithmetic, traces, result files and processes. (Its figures are measured, not tested.)"""

import dataclasses
import gzip
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_runs
from benchmarks.gpu import ours, parts
from benchmarks.gpu.child import Child, ChildError
from benchmarks.gpu.parts import CASES, Budget, Session


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
