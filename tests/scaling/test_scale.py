"""`jaxtrain scale` as it is called: bad input, simulated devices from end to end, real processes, and how it ends."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs
from runs import command_line

from jaxtrain.checkpoint.resume_point import Position, ResumePoint
from jaxtrain.config import Config
from jaxtrain.errors import DataError, EnvironmentMismatchError, JaxtrainError
from jaxtrain.observability.op_times import Known, OpRun, Trace
from jaxtrain.recipes import change
from jaxtrain.scaling import crew, paced
from jaxtrain.scaling.measuring import PARTS
from jaxtrain.scaling.protocol import Failure, Job
from jaxtrain.scaling.traffic import traffic_of
from jaxtrain.step.pipeline.transfer import TRANSFER_MODULE
from jaxtrain.training.compiled import compile_run
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.setup import load_data, make_run_spec

SCALE = ["scale", "--config", "mlp_synthetic"]
TINY = ["--config.data.examples=256", "--config.model.width=16", "--config.data.global_batch=64"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", "0"], "0 is no number of devices"),
        (["--devices", "1,x"], "x is no number of devices"),
        (["--devices", "1,,2"], "an empty place is no number"),
        (["--devices", "²"], "is no number of devices"),
        (["--devices", "2,1,2"], "2 stands there twice"),
        (
            ["--devices", "1,3", "--simulate"],
            "does not divide by 3 shards of the batch; the nearest that do are 63 and 66",
        ),
        (["--devices", "1,9999", "--processes"], "--devices 9999: this machine has"),
        (
            ["--devices", "1,2", "--simulate", "--config.layout.tensor=2"],
            "needs a multiple of 2 devices; the nearest is 2",
        ),
        (["--devices", "2,4", "--simulate", "--config.layout.data=2"], "fits one number of devices"),
        (["--devices", "16", "--target", "8xh100"], "--target 8xh100 has 8"),
        (["--devices", "16,32", "--target", "2x8xh100"], "--target 2x8xh100 has 16"),
        (["--devices", "12", "--target", "2x8xh100", "--config.data.global_batch=48"], "must be a multiple of 8"),
        (["--processes", "--simulate"], "leave both out"),
        (["--target", "8xh100", "--processes"], "runs nothing here"),
        (["--target", "8xh9000"], "there is no GPU 'h9000'"),
        (["--steps", "-1"], "--steps -1"),
        (["--repeats", "0"], "--repeats 0"),
        (["--json", "--csv"], "give one of them"),
        (["--output", "s3://bucket/x"], "s3://bucket/x"),
        (["--config.layout.strategy=auto"], "jaxtrain plan"),
        (["--config.model.name=mpl"], "mlp"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(words, said, capsys, monkeypatch):
    monkeypatch.setattr(crew, "package_command", lambda _: pytest.fail("a process was started"))
    assert command_line([*SCALE, *words]) == 64
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert said in line


def test_what_was_measured_is_shown_where_it_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    words = ["--target", "2xh100", "--devices", "1,2", "--strong", "--json", "--output", str(tmp_path / "file/below")]
    assert command_line([*SCALE, *words]) == 73
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tables"]
    assert "cannot be written" in printed.err


def test_simulated_devices_from_end_to_end(tmp_path, capsys):
    words = ["--simulate", "--devices", "1,2", "--strong", "--steps", "3", "--repeats", "1", "--output", str(tmp_path)]
    assert command_line([*SCALE, *TINY, *words]) == 0
    printed = capsys.readouterr().out
    assert "simulated: strong scaling" in printed
    assert "shows what the layout costs" in printed
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert written["command"].startswith("jaxtrain")
    (table,) = written["tables"]
    assert (table["kind"], table["scaling"]) == ("simulated", "strong")
    assert [row[:2] for row in table["rows"]] == [[1, 64], [2, 64]]
    two = dict(zip(table["columns"], table["rows"][1], strict=True))
    assert two["communication %"] > 0
    assert sum(two[f"{name} %"] for name in PARTS) == pytest.approx(100, abs=1e-3)
    assert two["profile off %"] is not None
    assert written["fits"] == []  # devices that share cores gain nothing
    assert written["bottleneck"].startswith("simulated, strong scaling, 2 devices")
    with (tmp_path / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"simulated"}
    assert [float(row["value"]) for row in rows if row["column"] == "step ms"] == [row[2] for row in table["rows"]]


def test_the_error_of_a_process_is_the_error_of_the_command(tmp_path):
    config = change(Config(), **{"data.name": f"folder:{tmp_path}/none", "model.name": "mlp"})
    with (
        pytest.raises(DataError, match="none"),
        crew.started([Job(config, str(tmp_path / "run"), simulated=True)]) as started,
    ):
        started.wait()
    assert type(crew._error(Failure(70, "text"))) is JaxtrainError


def test_a_process_that_dies_is_named_with_what_it_said_last(tmp_path, monkeypatch):
    code = "print('one', 'two', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(crew, "package_command", lambda _: [sys.executable, "-c", f"import sys; {code}"])
    said = r"Process 0 of the 1 .* ended before its time; it said last: one two\."
    with pytest.raises(EnvironmentMismatchError, match=said), crew.started([Job(Config(), str(tmp_path))]) as started:
        started.wait()


def test_the_messages_and_bytes_of_a_step_are_those_of_its_program():
    fields = {"data.name": "synthetic", "data.examples": 64, "data.global_batch": 32, "train.precision": "f32"}
    fields |= {"model.name": "mlp", "model.width": 16, "layout.microbatches": 2, "model.dropout": 0.0}
    config = change(Config(), **fields)
    with settings(config):
        run = make_run_spec(config, load_data(config.data), jax.devices()[:4])
        compiled, state = compile_run(run, ResumePoint(None, Position(), None))
        traffic = traffic_of(compiled)
        gradients = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
        reduced = sum(each.times * sum(each.arrays) for each in traffic if each.kind == "all-reduce")
        assert (
            2 * gradients <= reduced < 2 * gradients + 1000
        )  # each microbatch reduces them; the rest are sums of numbers
        sent = sum(each.sent(run.layout.mesh) for each in traffic)
        assert sent == pytest.approx(2 * 3 / 4 * reduced, rel=0.01)
        assert sum(each.messages(run.layout.mesh) for each in traffic) >= 2 * 2 * 3 * len(jax.tree.leaves(state.params))


def test_in_a_transfer_between_stages_a_device_waits_and_its_profile_is_deleted(tmp_path, monkeypatch):
    (tmp_path / "profile" / "steps_1_2" / "process_0" / "plugins").mkdir(parents=True)
    (tmp_path / "profile" / "steps_1_2" / "process_0" / "plugins" / "x.xplane.pb").touch()
    made = [OpRun("GPU", "jit_chunk_0_forward", "fusion", 0, 6, 6), OpRun("GPU", "jit_finish", "all-reduce", 9, 10, 1)]
    made.append(OpRun("GPU", TRANSFER_MODULE, "collective-permute", 6, 9, 3))
    monkeypatch.setattr(paced, "read_trace", lambda _: Trace(made, [Known(10, 1)]))
    mesh = SimpleNamespace(devices=np.array(jax.devices()[:1]))
    run = SimpleNamespace(
        workdir=tmp_path, compiled=SimpleNamespace(run=SimpleNamespace(layout=SimpleNamespace(mesh=mesh)))
    )
    found = paced._breakdown(run, {})  # pyright: ignore[reportArgumentType]
    assert (found.compute, found.communication, found.idle) == pytest.approx((6e-9, 1e-9, 3e-9))
    assert not list((tmp_path / "profile").rglob("*.pb"))
    assert paced._breakdown(run, {}) is None  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------- real processes


def children_of(marker):
    found = subprocess.run(["pgrep", "-f", marker], capture_output=True, text=True, check=False)
    return found.stdout.split()


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_stopped_leaves_no_process(number, tmp_path):
    words = [
        *SCALE,
        *TINY,
        "--simulate",
        "--devices",
        "1,2",
        "--repeats",
        "1000",
        "--steps",
        "3",
        "--output",
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT), "TMPDIR": str(tmp_path)}
    command = [
        "env",
        "--default-signal=INT",
        sys.executable,
        "-m",
        "jaxtrain",
        *words,
    ]  # what a shell starts with & ignores it
    started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    mine = f"jaxtrain.scaling.worker import main; main\\(\\) [0-9]+ {started.pid}"
    until = time.monotonic() + 120
    while len(children_of(mine)) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    assert len(children_of(mine)) == 2
    started.send_signal(number)
    said = started.communicate(timeout=60)[1]
    if number != signal.SIGKILL:
        assert started.returncode == 130
        assert "Stopped; nothing was written" in said
        assert not list(tmp_path.glob("jaxtrain-scale-*"))
    until = time.monotonic() + 60  # after SIGKILL they notice by themselves
    while children_of(mine) and time.monotonic() < until:
        time.sleep(0.2)
    assert not children_of(mine)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_profiles_of_two_pinned_processes_are_like_their_steps(tmp_path):
    """For two cores without other work."""
    words = ["--processes", "--devices", "1,2", "--repeats", "7", "--output", str(tmp_path)]
    fields = ["--config.model.width=2048", "--config.data.global_batch=256"]
    assert runs.Started(tmp_path / "said", ["-m", "jaxtrain", *SCALE, *fields, *words]).end() == 0
    tables = json.loads((tmp_path / "scaling.json").read_text())["tables"]
    assert [table["kind"] for table in tables] == ["measured", "measured"]
    for table in tables:
        for row in table["rows"]:
            assert abs(dict(zip(table["columns"], row, strict=True))["profile off %"]) <= 5
