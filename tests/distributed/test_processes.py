"""Runs of several real processes on this host (gloo): the same numbers, and an answer when one of them is amiss."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from runs import EXACT, SMALL, here

from jaxtrain.distributed.initialize import fingerprint_of

LAST = 12  # the last step of `EXACT`
HALF = 6
TOLERANCE = 1e-12  # relative, in f64: a wrong scale, order or random key shows at 1e-3 and above

# Gradients accumulated over four microbatches, BatchNorm over four groups, every save kept.
ACCUMULATED = EXACT | {"layout.microbatches": 4}

ZEROS = (pytest.param(0, marks=pytest.mark.faults), 3)


def job(workdir: Path, zero: int, *more: str, **fields: Any) -> list[str]:
    """A job of `ACCUMULATED`; `fields` with a double underscore for the dot."""
    changed = {name.replace("__", "."): value for name, value in fields.items()}
    return runs.arguments(workdir, ACCUMULATED | {"layout.zero": zero} | changed, *more)


def assert_same(workdir: Path, whole: Path, first: int = 1) -> None:
    """From step `first` on, each logged number is that of `whole`, and no step is there twice."""
    for phase in ("train", "val", "test"):
        found, wanted = runs.rows(workdir, phase), [row for row in runs.rows(whole, phase) if row["step"] >= first]
        assert [row["step"] for row in found] == [row["step"] for row in wanted]
        for name in wanted[0].keys() - {"phase"}:
            a, b = ([row[name] for row in each] for each in (found, wanted))
            np.testing.assert_allclose(a, b, rtol=TOLERANCE, err_msg=f"{phase}: {name}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process, one device, one microbatch."""
    path = tmp_path_factory.mktemp("whole")
    return path, here(path, EXACT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(zero)`: a run of two processes of two devices each under ZeRO `zero`, and what two of one made of its step 6."""

    @functools.cache
    def start(zero: int) -> Path:
        path = tmp_path_factory.mktemp("saved")
        half = {"checkpoint__resume": path / "run" / "checkpoints" / str(HALF)}
        runs.train_in_turn(path, 2, 2, job(path / "run", zero), job(path / "2x1", zero, "--devices", "1", **half))
        return path

    return start


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The directory of other jobs that two processes of two devices did in turn."""
    path = tmp_path_factory.mktemp("others")
    stages = [
        job(path / placement, 3, layout__stages=2, layout__stage_placement=placement)
        for placement in ("spread", "hosts")
    ]
    often = {"telemetry__every": 0.05, "telemetry__probe_every": 2}
    reduced = job(path / "hierarchical", 2, layout__reduce="hierarchical", layout__replica=2, **often)
    minutes = job(path / "minutes", 0, checkpoint__every="0.000001 minutes", train__steps=3)
    slow = {"data.name": "tiny:slow_digits", "data.residency": "stream", "data.workers": 0}
    smoke = job(path / "smoke", 3, "--smoke")
    runs.train_in_turn(path, 2, 2, *stages, reduced, minutes, runs.arguments(path / "slow", SMALL | slow), smoke)
    return path


@pytest.mark.parametrize("zero", ZEROS)
def test_two_processes_have_the_numbers_of_one(saved, whole, tmp_path, zero):
    assert np.ptp(runs.losses(whole[0])) > 0.05 * runs.losses(whole[0])[0]
    assert_same(saved(zero) / "run", whole[0])
    copy = shutil.copytree(saved(zero) / "run", tmp_path / "copy")
    found, wanted = runs.leaves(here(copy, EXACT)), runs.leaves(whole[1])
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=TOLERANCE * max(1, np.abs(leaf).max()), err_msg=name)


@pytest.mark.parametrize("zero", ZEROS)
def test_saved_by_two_of_two_resumed_by_one_of_four(saved, whole, tmp_path, zero):
    copy = shutil.copytree(saved(zero) / "run", tmp_path / "copy")
    result = here(copy, ACCUMULATED, devices=4, layout__zero=zero, checkpoint__resume=str(HALF))
    assert min(row["step"] for row in result.history) == HALF + 1
    assert_same(copy, whole[0])


@pytest.mark.parametrize("zero", ZEROS)
def test_saved_by_two_of_two_resumed_by_two_of_one(saved, whole, zero):
    assert_same(saved(zero) / "2x1", whole[0], first=HALF + 1)


def test_gradients_by_messages_between_processes_change_no_number(others, whole):
    assert_same(others / "hierarchical", whole[0])


def test_the_rows_have_the_telemetry_of_all_processes(others):
    lines = (others / "hierarchical" / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if row["phase"] == "train"][-1]
    assert last["host0/process_memory"] > 0
    assert last["host1/process_memory"] > 0
    assert len([key for key in last if key.endswith("/probe_seconds")]) == 4
    assert "collectives: gloo; gradients by hierarchical" in (others / "hierarchical/logs/process_0.log").read_text()


@pytest.mark.faults
def test_the_other_reductions_between_processes_change_no_number(whole, tmp_path):
    jobs = {reduce: job(tmp_path / reduce, 0, layout__reduce=reduce) for reduce in ("ring", "tree")}
    int8 = job(tmp_path / "int8", 0, optim__compress="int8")
    runs.train_in_turn(tmp_path, 2, 2, *jobs.values(), int8)
    for reduce in jobs:
        assert_same(tmp_path / reduce, whole[0])
    here(tmp_path / "one process", ACCUMULATED | {"optim.compress": "int8"}, devices=4)
    assert_same(tmp_path / "int8", tmp_path / "one process")


@pytest.mark.faults
@pytest.mark.parametrize("zero", [0, 3])
def test_saved_by_two_of_two_resumed_by_four_of_one(saved, whole, tmp_path, zero):
    copy = shutil.copytree(saved(zero) / "run", tmp_path / "copy")
    runs.train_in_turn(tmp_path, 4, 1, job(copy, zero, checkpoint__resume=HALF))
    assert_same(copy, whole[0])
    assert runs.epochs(copy)[0] == "epoch,phase,loss,accuracy"
    assert len(runs.epochs(copy)) == 1 + 3 + 3 + 1
    starts = json.loads((copy / "manifest.json").read_text())["starts"]
    assert [start["devices"]["processes"] for start in starts] == [2, 4]


def test_process_zero_alone_writes_what_is_shared(saved):
    run = saved(3) / "run"
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["process_0.log", "process_1.log"]
    for phase in ("train", "val", "test"):
        assert len(list((run / "tensorboard" / phase).iterdir())) == 1
    assert len(json.loads((run / "manifest.json").read_text())["starts"]) == 1
    assert runs.checkpoints(run) == list(range(2, LAST + 1, 2))
    # under ZeRO-3 each process has written its own part
    parts = {path.name for path in (run / "checkpoints" / str(LAST) / "state").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= parts


@pytest.mark.faults
def test_the_clock_of_process_zero_decides_when_to_save(others):
    assert runs.checkpoints(others / "minutes") == [1, 2, 3]


@pytest.mark.faults
@pytest.mark.parametrize("placement", ["spread", "hosts"])  # two stages over both processes, or a process each
def test_stages_over_processes_have_the_numbers_of_one(others, whole, tmp_path, placement):
    run = others / placement
    assert_same(run, whole[0])
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / str(LAST))
    here(copy, ACCUMULATED, devices=2)  # without stages
    assert_same(copy, whole[0])


@pytest.mark.faults
def test_stages_of_four_processes(tmp_path, whole):
    fields = {"layout__stages": 2, "layout__microbatches": 2, "checkpoint__every": "0"}
    runs.train_in_turn(tmp_path, 4, 1, job(tmp_path / "run", 2, **fields))
    assert_same(tmp_path / "run", whole[0])


@pytest.mark.faults
def test_a_smoke_test_of_two_processes_saves_to_a_directory_that_both_see(others):
    said = (others / "0.txt").read_text()
    assert "equal bit for bit" in said
    (directory,) = re.findall(r"smoke: quickstart in (\S+),", said)
    assert not Path(directory).exists()
    assert not (others / "smoke").exists()


@pytest.mark.faults
def test_a_process_with_slow_data_is_named(others):
    zero, one = ((others / "slow" / "logs" / f"process_{process}.log").read_text() for process in (0, 1))
    assert f"WARNING imbalanced: process 1 on {socket.gethostname()} needs 0." in zero
    assert "WARNING slow data: training waited for its input" in one
    assert "imbalanced" not in one


# --------------------------------------------------------------------------------------------------------------- stops


@pytest.mark.faults
def test_a_sigterm_to_one_stops_all_at_one_step_and_one_process_goes_on(tmp_path):
    fields, run = SMALL | {"train.precision": "f64", "checkpoint.every": "0", "train.eval_every": "0"}, tmp_path / "run"
    arguments = runs.arguments(run, fields | {"train.epochs": 10_000}, "--simulate-devices", "2")
    port = runs.free_port()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(runs.main(tmp_path / "0.txt", *arguments, *runs.joined(0, 2, port)))
        time.sleep(3)  # whoever comes late is waited for
        second = stack.enter_context(runs.main(tmp_path / "1.txt", *arguments, *runs.joined(1, 2, port)))
        first.wait_for(functools.partial(has_rows, run, 3), "a few steps")
        second.send(signal.SIGTERM)
        assert (first.end(), second.end()) == (75, 75), first.output + second.output
        said = {process.output.splitlines()[-1] for process in (first, second)}
    steps = len(runs.losses(run))
    assert said == {f"jaxtrain: Stopped after step {steps} and saved it; the same command goes on from there."}
    assert runs.checkpoints(run) == [steps]
    here(run, fields, train__steps=steps + 4)
    here(tmp_path / "whole", fields, train__steps=steps + 4)
    assert_same(run, tmp_path / "whole")


def has_rows(workdir: Path, count: int) -> bool:
    return runs.count_rows(workdir) >= count


@pytest.mark.faults
def test_data_that_process_zero_cannot_prepare_end_all_with_its_sentence(tmp_path):
    fields = SMALL | {"data.name": f"folder:{tmp_path}/nowhere", "data.image_size": 8}
    port = runs.free_port()
    command = ["-m", "jaxtrain.main", *runs.arguments(tmp_path / "run", fields)]
    with runs.several(tmp_path, *([*command, *runs.joined(process, 2, port)] for process in range(2))) as started:
        assert [process.end() for process in started] == [65, 65]
        said = {process.output.splitlines()[-1] for process in started}
    assert len(said) == 1
    assert said.pop().startswith(f"jaxtrain: config.data.name='folder:{tmp_path}/nowhere': there is no such folder;")


# -------------------------------------------------------------------------------------------------------------- starts

at_length = functools.partial(pytest.param, marks=pytest.mark.faults)


@pytest.mark.parametrize(
    ("numbers", "counts", "said"),
    [
        at_length([0, 2], [3, 3], "process 1 of 3 did not come to 127.0.0.1:"),
        at_length(
            [0, 1, 1], [3, 3, 3], "two processes say that they are process 1 of 3; each needs its own --process-id."
        ),
        ([0, 1], [2, 3], "process 1 was started with --num-processes 3 and process 0 with 2."),
        at_length([1], [2], "cannot reach the coordinator 127.0.0.1:"),
    ],
    ids=["missing", "twice", "miscounted", "alone"],
)
def test_processes_that_do_not_fit_together_say_why(tmp_path, numbers, counts, said):
    port, seconds = runs.free_port(), 60 if len(set(numbers)) < len(numbers) or len(set(counts)) > 1 else 20
    command = ["-m", "jaxtrain.main", *runs.arguments(tmp_path / "run", SMALL, "--start-timeout", str(seconds))]
    places = [runs.joined(number, count, port) for number, count in zip(numbers, counts, strict=True)]
    with runs.several(tmp_path, *([*command, *place] for place in places)) as started:
        assert [process.end() for process in started] == [78] * len(started)
        for process in started:
            assert said in process.output.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_folder_may_lie_elsewhere_on_each_host():
    """What it holds is compared once it is read."""
    places = [fingerprint_of({"data.name": name}, "run") for name in ("folder:/a", "folder:/b", "digits")]
    assert places[0] == places[1] != places[2]


@pytest.mark.faults
def test_the_next_port_is_taken_where_another_program_has_the_first(tmp_path):
    command = ["-m", "jaxtrain.main", *runs.arguments(tmp_path / "run", SMALL | {"train.steps": 1})]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with runs.several(tmp_path, *([*command, *runs.joined(process, 2, port)] for process in range(2))) as started:
            assert [process.end() for process in started] == [0, 0]


@pytest.mark.faults
def test_a_second_process_zero_is_told_of_the_first(tmp_path):
    port = runs.free_port()
    command = ["-m", "jaxtrain.main", *runs.arguments(tmp_path / "run", SMALL), *runs.joined(0, 2, port)]
    with runs.main(tmp_path / "0.txt", *command[2:]) as first:
        first.wait_for(functools.partial(answers, port), "the first one")
        with runs.several(tmp_path / "again", command) as (second,):
            assert second.end() == 78
            assert "another process 0 waits there already" in second.output.splitlines()[-1]


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        return bool(connection.recv(64))
    return False


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (["--num-processes", "2"], "go together"),
        (runs.joined(2, 2, 1), "--process-id 2: must be below --num-processes 2."),
        (["--coordinator", "here", "--num-processes", "2", "--process-id", "1"], "'here': must be HOST:PORT."),
    ],
)
def test_arguments_that_make_no_sense_are_a_config_error(tmp_path, capsys, place, said):
    assert runs.command_line(["train", *runs.arguments(tmp_path / "run", SMALL), *place]) == 64
    assert said in capsys.readouterr().err
