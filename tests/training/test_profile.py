"""Profiles of a run's steps: what they hold, and that the run is the same with and without them, whatever goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
from jax.profiler import ProfileData
from runs import EXACT, SMALL, here

from jaxtrain import Callback, load_config, train
from jaxtrain.errors import CallbackError, DataError, PreemptedError
from jaxtrain.observability.op_times import Known, OpRun, Trace, read_trace
from jaxtrain.parallel.gpu_program import Origin
from jaxtrain.training.callback_list import Callbacks
from jaxtrain.training.profile_summary import Window, breakdown, origins_of, summary

# Twelve steps in epochs of four, and nothing due within one.
NET = EXACT | {"train.precision": "f32", "checkpoint.every": "0"}
STREAMED = SMALL | {
    "data.residency": "stream", "data.workers": 0, "data.examples": 1280, "train.epochs": 1, "train.eval_every": "0",
    "checkpoint.every": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Any:
    """A run on two devices that nobody profiles, with a validation after each epoch of four steps."""
    return here(tmp_path_factory.mktemp("plain"), NET, devices=2)


def log(workdir: Path) -> str:
    return (workdir / "logs" / "process_0.log").read_text()


def share(text: str, what: str) -> float:
    found = re.search(rf"{what} for [\d.]+ ms.*?\(([\d.]+) %\)", text)
    assert found, text
    return float(found[1])


def test_a_window_leaves_a_trace_and_a_summary_and_changes_no_bit(tmp_path, plain):
    found = here(tmp_path, NET, devices=2, profile__steps=(6, 7))
    runs.assert_same_bits(found, plain)
    for phase in ("train", "val", "test"):
        assert runs.rows(tmp_path, phase) == runs.rows(plain.workdir.path, phase)
    folder = tmp_path / "profile" / "steps_6_7" / "process_0"
    assert f"profile of steps 6 to 7: {folder / 'summary.txt'}" in log(tmp_path)
    (trace,), (perfetto,) = folder.rglob("*.xplane.pb"), folder.rglob("*.trace.json.gz")
    assert perfetto.stat().st_size > 100
    text = (folder / "summary.txt").read_text()
    assert text.startswith("steps 6 to 7 of process 0, on 2 x cpu: ")
    assert "layers_01 backward" in text
    assert "all-reduce" in text
    assert 0 < share(text, "and collectives") < share(text, "a device ran operations") <= 100
    found = read_trace(trace)
    operations = found.runs
    assert len(found.known) == 2, "of both steps their numbers were read"
    assert {run.device for run in operations} == {"CPU 0", "CPU 1"}
    assert {run.module for run in operations} == {"jit_step"}  # the metrics of the steps before are read already
    reduces = [run for run in operations if run.device == "CPU 1" and run.name.startswith("all-reduce")]
    assert len(reduces) % 2 == 0, "two steps"
    assert reduces


def test_a_window_ends_where_an_evaluation_comes_next(tmp_path, plain):
    runs.assert_same_bits(here(tmp_path, NET, devices=2, profile__steps=(3, 6)), plain)
    assert "profile of steps 3 to 4: " in log(tmp_path)
    assert "steps 3 to 4 of process 0" in (tmp_path / "profile" / "steps_3_6" / "process_0" / "summary.txt").read_text()


class Asks(Callback):
    """Asks for a profile of four steps once step 1 is known, and for others meanwhile."""

    def on_step(self, run, step, metrics):
        if step == 1:
            run.profile(np.int64(4))
            run.profile(2)
        if step == 5:
            run.profile(3)


def test_a_callback_asks_for_a_window_that_goes_on_over_what_comes_between(tmp_path, plain):
    found = train(load_config(runs.RECIPE, NET), tmp_path, num_devices=2, quiet=True, callbacks=[Asks()])
    runs.assert_same_bits(found, plain)
    (folder,) = (tmp_path / "profile").iterdir()  # two more steps were under way; the epoch ends after step 4
    text = (folder / "process_0" / "summary.txt").read_text()
    assert folder.name == "steps_4_7"
    assert text.startswith("steps 4 to 7 of process 0")
    (trace,) = folder.rglob("*.xplane.pb")
    assert len(read_trace(trace).known) == 4


def test_a_window_that_ends_between_two_syncs_of_local_sgd_changes_no_bit(tmp_path):
    local = NET | {"optim.sync_every": 4}
    plain = here(tmp_path / "plain", local, devices=2)
    runs.assert_same_bits(here(tmp_path / "profiled", local, devices=2, profile__steps=(1, 2)), plain)
    assert "profile of steps 1 to 2: " in log(tmp_path / "profiled")


def test_the_layers_of_each_stage_are_told_apart(tmp_path):
    here(tmp_path, NET, devices=2, profile__steps=(2, 3), layout__stages=2, layout__microbatches=4)
    text = (tmp_path / "profile" / "steps_2_3" / "process_0" / "summary.txt").read_text()
    assert {"layers_00", "layers_01", "layers_01 backward", "update"} <= set(re.findall(r"%  ([\w ]+)$", text, re.M))
    assert "several" not in text
    assert "jit_chunk_1_backward/" in text


def test_a_signal_asks_for_a_window(tmp_path, monkeypatch):
    """It comes while a batch is read, as from another program."""
    sent = runs.module("sends", SENDS)
    monkeypatch.setitem(sys.modules, "sends", sent)
    before = signal.getsignal(signal.SIGUSR2)
    found = here(tmp_path / "sent", STREAMED, data__name="sends:digits", profile__length=3)
    assert signal.getsignal(signal.SIGUSR2) == before
    wanted = here(tmp_path / "plain", STREAMED)
    runs.assert_same_bits(found, wanted)
    (folder,) = (tmp_path / "sent" / "profile").iterdir()
    first, last = map(int, re.findall(r"\d+", folder.name))
    assert last - first == 2
    assert (folder / "process_0" / "summary.txt").is_file()


SENDS = """
import dataclasses, os, signal
import tiny

class Sends:
    def __init__(self, base): self.base, self.shape, self.reads = base, base.shape, 0
    def __len__(self): return len(self.base)
    def read(self, indices):
        self.reads += 1
        if self.reads in (6, 7):  # the second is of the same window
            os.kill(os.getpid(), signal.SIGUSR2)
        return self.base.read(indices)

def digits(config, image_size):
    found = tiny.digits(config, image_size=image_size)
    return dataclasses.replace(found, train=Sends(found.train))
"""


def test_a_profile_that_cannot_be_written_stops_no_training(tmp_path, plain):
    (tmp_path / "profile").write_text("in the way")  # so that even root cannot write there
    runs.assert_same_bits(here(tmp_path, NET, devices=2, profile__steps=(6, 7)), plain)
    assert re.search(r"WARNING no profile of steps 6 to 7 \(.+\); training goes on", log(tmp_path))
    with jax.profiler.trace(str(tmp_path / "next")):  # the profiler is given back
        pass


def test_somebody_elses_profile_goes_on(tmp_path):
    with jax.profiler.trace(str(tmp_path / "theirs")):
        here(tmp_path / "run", SMALL, profile__steps=(2, 3))
        assert "no profile of steps 2 to 3 (Profile has already been started." in log(tmp_path / "run")
    assert list((tmp_path / "theirs").rglob("*.xplane.pb"))
    assert not (tmp_path / "run" / "profile" / "steps_2_3" / "process_0").exists()


def test_an_error_in_a_window_gives_the_profiler_back(tmp_path, monkeypatch):
    code = SENDS.replace("os.kill(os.getpid(), signal.SIGUSR2)", "1 / 0").replace("(6, 7)", "(30,)")
    monkeypatch.setitem(sys.modules, "fails", runs.module("fails", code))
    with pytest.raises(DataError):
        here(tmp_path, STREAMED, data__name="fails:digits", profile__steps=(2, 1000))
    assert "profile" not in log(tmp_path)
    with jax.profiler.trace(str(tmp_path / "next")):
        pass
    assert not (tmp_path / "profile" / "steps_2_1000" / "process_0").exists()


@pytest.mark.faults
def test_a_run_that_is_killed_in_a_window_resumes_and_profiles_the_rest(tmp_path, monkeypatch):
    """At the 28th batch, once the checkpoint of step 16 is there: reading is a few batches ahead."""
    saved = tmp_path / "run" / "checkpoints" / "16" / "manifest.json"
    code = SENDS.replace("signal.SIGUSR2", "signal.SIGKILL").replace(
        "self.reads in (6, 7)", "self.reads == 28 and wait()"
    )
    wait = f"""
import pathlib, time
FIRST = not pathlib.Path("{saved}").exists()
def wait():
    while not pathlib.Path("{saved}").exists():
        time.sleep(0.05)
    time.sleep(0.5)  # the steps that were read meanwhile are done
    return FIRST
"""
    (tmp_path / "dies.py").write_text(code + wait)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    more = {"data.name": "dies:digits", "profile.steps": "(18,1000)", "checkpoint.every": "16"}
    arguments = runs.arguments(tmp_path / "run", STREAMED | more)
    with runs.main(tmp_path / "first.txt", *arguments) as process:
        assert process.end() == -signal.SIGKILL, process.output
    folder = tmp_path / "run" / "profile" / "steps_18_1000" / "process_0"
    assert folder.exists()
    assert not list(folder.iterdir())
    with runs.main(tmp_path / "second.txt", *arguments) as process:
        assert process.end() == 0, process.output
    assert len(runs.losses(tmp_path / "run")) == 40
    assert "steps 18 to 32 " in (folder / "summary.txt").read_text()


@pytest.mark.parametrize("steps", [0, -1, True, 2.5, "3"])
def test_a_callback_that_asks_for_no_number_of_steps_is_blamed(steps, tmp_path):
    class Wrong(Asks):
        def on_step(self, run, step, metrics):
            run.profile(steps)

    with pytest.raises(
        CallbackError, match=r"callback Wrong failed in on_step .*must be a whole number of steps from 1 on"
    ):
        train(load_config(runs.RECIPE, NET), tmp_path, num_devices=1, quiet=True, callbacks=[Wrong()])


def test_of_several_processes_one_alone_asks_for_no_profile(monkeypatch):
    class Everywhere(Asks):
        every_process = True

    made = Callbacks([Asks(), Everywhere()])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    made._calling = "Everywhere"
    made._profile(3)
    made._calling = "Asks"
    with pytest.raises(ValueError, match="set every_process, and ask on all"):
        made._profile(3)


@pytest.mark.parametrize(("how", "last"), [("", 12), ("stop", 8), ("pause", 8)])
def test_a_window_of_a_callback_ends_with_the_run(how, last, tmp_path):
    class Late(Asks):
        def on_step(self, run, step, metrics):
            if step == 3:
                run.profile(1000)
            if step == 6 and how:
                getattr(run, how)("enough")

    expected = pytest.raises(PreemptedError) if how == "pause" else contextlib.nullcontext()
    with expected:
        train(load_config(runs.RECIPE, NET), tmp_path, num_devices=1, quiet=True, callbacks=[Late()])
    assert re.search(rf"profile of steps [56] to {last}: ", log(tmp_path))


@pytest.mark.faults
def test_a_profile_that_one_of_two_processes_cannot_write_keeps_none_waiting(tmp_path):
    """Under local SGD, where what comes after a pause is a collective."""
    fields = NET | {"optim.sync_every": "4", "profile.steps": "(5,6)"}
    (tmp_path / "run" / "profile" / "steps_5_6").mkdir(parents=True)
    (tmp_path / "run" / "profile" / "steps_5_6" / "process_1").write_text("in the way")
    runs.train_in_turn(tmp_path, 2, 1, runs.arguments(tmp_path / "run", fields))
    assert "profile of steps 5 to 6: " in log(tmp_path / "run")
    assert "no profile of steps 5 to 6" in (tmp_path / "run" / "logs" / "process_1.log").read_text()


@pytest.mark.faults
def test_every_process_profiles_its_own_devices(tmp_path):
    fields = NET | {"profile.steps": "(6,7)"}
    runs.train_in_turn(tmp_path, 2, 1, runs.arguments(tmp_path / "run", fields))
    for process in range(2):
        folder = tmp_path / "run" / "profile" / "steps_6_7" / f"process_{process}"
        text = (folder / "summary.txt").read_text()
        assert f"of process {process}, on 1 x cpu" in text
        assert share(text, "and collectives") > 0, "gloo's"


# -------------------------------------------------------------------------------------------------------- what is read


# A GPU's plane: two streams, and a line that was derived of them; and a thread of the host, with an operation inside another.
def event(name: int, begin: int, duration: int, **stats: str | int) -> str:
    """An event in the text form of XSpace: the number of its name, and times in nanoseconds."""
    shown = "".join(
        f" stats {{ metadata_id: {STATS.index(key) + 1} {'uint64' if isinstance(value, int) else 'str'}_value: "
        f"{value if isinstance(value, int) else repr(value)} }}"
        for key, value in stats.items()
    )
    return f"events {{ metadata_id: {name} offset_ps: {begin}000 duration_ps: {duration}000{shown} }}"


STATS = ["hlo_op", "hlo_module", "_p", "_c", "steps"]
TABLES = "".join(f' stat_metadata {{ key: {n} value {{ id: {n} name: "{name}" }} }}' for n, name in enumerate(STATS, 1))
NAMES = "".join(
    f' event_metadata {{ key: {n} value {{ id: {n} name: "{name}" }} }}'
    for n, name in enumerate(["kernel", "end: dot.4", "read metrics"], 1)
)
FUSION = event(1, 0, 4000, hlo_op="fusion.1", hlo_module="jit_step")
TRACE = f"""
planes {{ id: 1 name: "/device:GPU:0" {TABLES} {NAMES}
  lines {{ id: 1 name: "Stream #7(Compute)" {FUSION} {event(1, 6000, 2000, hlo_op="fusion.1", hlo_module="jit_step")} }}
  lines {{ id: 2 name: "Stream #9(Compute)" {event(1, 3000, 2000, hlo_op="all-reduce-start.2", hlo_module="jit_step")} }}
  lines {{ id: 3 name: "XLA Ops" {FUSION} }}
}}
planes {{ id: 2 name: "/host:CPU" {TABLES} {NAMES}
  lines {{ id: 1 name: "thread" {event(1, 0, 9000, hlo_op="while.3")} {event(1, 1000, 2000, hlo_op="dot.4", _p=77)} }}
  lines {{ id: 3 name: "python" {event(3, 8500, 250, steps=2)} {event(3, 100, 200, steps=1)} }}
  lines {{ id: 2 name: "another thread" {event(2, 6500, 500, _c=77)} }}
}}
"""


@pytest.fixture
def trace(tmp_path) -> Trace:
    path = tmp_path / "host.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(TRACE))
    return read_trace(path)


def test_operations_of_a_trace(trace):
    assert trace.known == [Known(300, 1), Known(8750, 2)]
    found = [(run.device, run.name, run.begin, run.end, run.busy) for run in trace.runs]
    assert found == [
        ("/device:GPU:0", "fusion.1", 0, 4000, 4000),
        ("/device:GPU:0", "fusion.1", 6000, 8000, 2000),
        ("/device:GPU:0", "all-reduce-start.2", 3000, 5000, 2000),
        ("CPU 0", "while.3", 0, 9000, 7000),
        ("CPU 0", "dot.4", 1000, 7000, 6000),  # to its end in another thread
    ]


def runs_of(device: str, *named: tuple[str, float, float]) -> list[OpRun]:
    return [OpRun(device, "jit_step", name, begin, end, end - begin) for name, begin, end in named]


def test_the_parts_of_a_step_are_told_apart(trace):
    on_gpu = Trace([run for run in trace.runs if "GPU" in run.device], [])
    found = breakdown(on_gpu, 2, {})  # from the first operation to the last: 4 us a step
    assert dataclasses.astuple(found) == pytest.approx((4e-6, 2.5e-6, 0.5e-6, 0.5e-6, 0.5e-6))
    assert breakdown(Trace([], []), 2, {}) is None


def test_a_loop_is_no_work_beside_the_collective_in_it():
    found = breakdown(Trace(runs_of("CPU 0", ("while.1", 0, 10), ("all-reduce.2", 4, 9), ("dot.3", 0, 4)), []), 1, {})
    assert (found.compute, found.overlap, found.communication, found.idle) == pytest.approx((4e-9, 0, 5e-9, 1e-9))


def test_a_collective_is_told_by_its_program_and_not_by_its_name():
    """`jax.lax.ppermute` makes an operation of that name, and a fusion may be called after what it holds."""
    made = Trace(runs_of("CPU 0", ("ppermute.3", 0, 4), ("all-reduce-scatter_fusion", 4, 10)), [])
    origins = {
        ("jit_step", "ppermute.3"): Origin("collective-permute", "", "ppermute"),
        ("jit_step", "all-reduce-scatter_fusion"): Origin("fusion: loop", "", "add"),
    }
    found = breakdown(made, 1, origins)
    assert (found.compute, found.communication) == pytest.approx((6e-9, 4e-9))
    assert "for 0.000 ms (40.0 %)" in summary(Window(range(1, 2), 0, "cpu"), made, origins)


def test_a_ring_of_jaxtrains_own_is_communication(tmp_path):
    here(tmp_path, NET, devices=2, profile__steps=(6, 7), layout__reduce="ring")
    text = (tmp_path / "profile" / "steps_6_7" / "process_0" / "summary.txt").read_text()
    assert "collective-permute" in text
    assert share(text, "and collectives") > 0


# Ten calls. The first four begin with nothing under way, and after the eighth nothing more is dispatched.
SLOW = [("dot.1", 100 * call, 100 * call + 90) for call in range(4)]
FAST = [("dot.1", 390, 430), ("all-reduce-start.2", 430, 450), ("dot.3", 450, 590)]
DRAIN = [("dot.1", 600, 1000)]
TIMES = [100, 200, 300, 400, 450, 500, 550, 600, 700, 1000]


def test_steps_in_full_flow_count_alone():
    runs_there = runs_of("CPU 0", *SLOW, *FAST, *DRAIN)
    found = breakdown(Trace(runs_there, [Known(time, 1) for time in TIMES]), 10, {})  # four steps from 400 to 600
    assert dataclasses.astuple(found) == pytest.approx((50e-9, (30 + 140) / 4 * 1e-9, 0, 5e-9, 2.5e-9))
    text = summary(Window(range(1, 11), 0, "cpu"), Trace(runs_there, [Known(time, 1) for time in TIMES]), {})
    assert re.findall(r"([\d.]+) %.*jit_step/(\S+)", text) == [("70.0", "dot.3"), ("10.0", "all-reduce-start.2")]
    for times, step in (((*TIMES[:5], 1000), 1000 / 6), ((*TIMES[:6], 1000), 50)):
        few = breakdown(Trace(runs_there, [Known(time, 1) for time in times]), len(times), {})
        assert few.step == pytest.approx(step * 1e-9), "where no call is in full flow all count"


def test_calls_of_several_steps_count_as_many():
    """The last calls before a pause make one step each."""
    known = [Known(time, steps) for time, steps in zip(TIMES, [10] * 6 + [1] * 4, strict=True)]
    found = breakdown(Trace(runs_of("CPU 0", *SLOW, *FAST, *DRAIN), known), 64, {})
    assert found.step == pytest.approx(200e-9 / (10 + 10 + 1 + 1))


def test_devices_that_share_cores_count_as_one():
    both = runs_of("CPU 0", ("dot.1", 0, 6), ("all-reduce.2", 6, 12)) + runs_of(
        "CPU 1", ("dot.1", 4, 10), ("all-reduce.2", 10, 12)
    )
    apart, shared = breakdown(Trace(both, []), 1, {}), breakdown(Trace(both, []), 1, {}, one_device=True)
    assert (apart.compute, apart.overlap, apart.communication) == pytest.approx((6e-9, 0, 4e-9))
    assert (shared.compute, shared.overlap, shared.communication) == pytest.approx((6e-9, 4e-9, 2e-9))


def test_the_dearest_come_first_with_their_layers(trace):
    origins = {("jit_step", "fusion.1"): Origin("fusion: loop", "layers_03 backward", "conv_general_dilated")}
    on_gpu = Trace([run for run in trace.runs if "GPU" in run.device], [])
    lines = summary(Window(range(5, 7), 0, "H100"), on_gpu, origins).splitlines()
    assert lines[0] == "steps 5 to 6 of process 0, on 1 x H100: 0.004 ms a step while profiled"
    assert lines[1] == "a device ran operations for 0.004 ms of a step (87.5 %)"
    assert lines[2] == "and collectives for 0.001 ms (25.0 %), for 0.001 ms of them nothing else"
    rows = [line.split("  ") for line in lines[6:9]]
    assert [re.split(r"\s{2,}", line.strip())[:4] for line in lines[7:8]] == [
        ["0.003", "75.0 %", "layers_03 backward", "conv_general_dilated"]
    ]
    assert rows[2][-1].endswith("jit_step/all-reduce-start.2")
    assert "the trace has no operations" in summary(Window(range(1, 2), 0, "cpu"), Trace([], []), {})


def test_an_instruction_without_a_name_has_that_of_what_uses_it():
    text = """HloModule jit_step, is_scheduled=true

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %convolution.1 = f32[8,4]{1,0} convolution(%a, %a)
  %copy.2 = f32[8,4]{1,0} copy(%convolution.1), metadata={op_name="jit(step)/transpose(jvp(layers_02))/conv"}
  ROOT %copy.3 = f32[8,4]{1,0} copy(%copy.2), metadata={op_name="jit(step)/update/mul"}
}
"""
    found = origins_of([text])
    assert found["jit_step", "convolution.1"] == Origin("convolution", "layers_02 backward", "conv")
    assert found["jit_step", "copy.3"] == Origin("copy", "update", "mul")
    other = text.replace("layers_02", "layers_05")
    assert origins_of([text, other])["jit_step", "convolution.1"].layer == "several"
