"""Several steps in one program (`train.steps_per_call`): every number, row, checkpoint and stop is that of single steps."""

from __future__ import annotations

import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import SMALL, here

from jaxtrain.distributed.interrupt import Interrupt
from jaxtrain.durations import Duration
from jaxtrain.errors import PreemptedError
from jaxtrain.step.train_step import MeshTrainStep
from jaxtrain.training.cadence import Cadence

# Twelve steps in epochs of four, cut by whatever may be due; and twelve in which nothing is.
CUT = SMALL | {
    "checkpoint.every": "5", "train.eval_every": "6 steps", "data.mixup": 0.2, "optim.name": "adamw", "optim.ema": 0.9,
}  # fmt: skip
ONE_EPOCH = SMALL | {"checkpoint.every": "0", "train.eval_every": "0", "data.examples": 384, "train.epochs": 1}
CONVOLUTIONS = SMALL | {"model.name": "tiny:resnet", "model.width": 4}
STREAMED = {"data.residency": "stream", "data.workers": 0}
SHARDED = {"layout.zero": 3, "optim.clip_norm": 1.0, "model.dropout": 0.1}


@pytest.fixture
def calls(monkeypatch):
    """How many steps each call made."""
    sizes, inner = [], MeshTrainStep.__call__

    def counted(self: MeshTrainStep, state: Any, batch: Any, resident: Any) -> Any:
        sizes.append(batch.step.size)
        return inner(self, state, batch, resident)

    monkeypatch.setattr(MeshTrainStep, "__call__", counted)
    return sizes


def assert_same_files(workdir: Path, wanted: Path) -> None:
    """Both directories hold the same rows, in full precision, and checkpoints of the same steps."""
    for phase in ("train", "val", "test"):
        assert runs.rows(workdir, phase) == runs.rows(wanted, phase)
    assert runs.epochs(workdir) == runs.epochs(wanted)
    assert runs.checkpoints(workdir) == runs.checkpoints(wanted)


@pytest.mark.parametrize(
    ("more", "devices"), [pytest.param({}, 1, marks=pytest.mark.parity), (STREAMED, 2)], ids=["one", "streamed"]
)
def test_the_run_is_that_of_single_steps_bit_for_bit(tmp_path, calls, more, devices):
    wanted = here(tmp_path / "ones", CUT | more, devices=devices)
    assert calls == [1] * 12
    calls.clear()
    found = here(tmp_path / "twos", CUT | more, devices=devices, train__steps_per_call=2)
    assert calls == [2, 2, 1, 1, 2, 2, 2], "something is due after 4, 5, 6, 8, 10 and 12"
    runs.assert_same_bits(found, wanted)
    assert_same_files(tmp_path / "twos", tmp_path / "ones")


@pytest.mark.parity
def test_the_run_is_that_of_single_steps_when_sharded(tmp_path, monkeypatch):
    """As XLA compiles by itself: what the tests' own $XLA_FLAGS choose rounds otherwise in a loop of sharded steps."""
    monkeypatch.setenv("XLA_FLAGS", "")
    for name, per_call in (("ones", 1), ("twos", 2)):
        fields = CUT | SHARDED | {"train.steps_per_call": per_call}
        with runs.main(
            tmp_path / f"{name}.txt", *runs.arguments(tmp_path / name, fields, "--simulate-devices", "4")
        ) as run:
            assert run.end() == 0, run.output
    assert_same_files(tmp_path / "twos", tmp_path / "ones")
    states = []
    for name in ("ones", "twos"):  # the run is complete: it is restored and tested again
        result = here(tmp_path / name, CUT | SHARDED, devices=4)
        assert not [row for row in result.history if row["phase"] == "train"]
        states.append(result)
    runs.assert_same_bits(*states)


def test_every_row_has_the_time_of_its_call(tmp_path):
    result = here(tmp_path / "run", ONE_EPOCH, train__steps_per_call=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait"] for line in lines if line["phase"] == "train"]
    assert len(waits) == 12
    assert all(wait > 0 for wait in waits)
    assert result.result["throughput"] > 0


def test_a_signal_stops_it_after_a_call_and_another_number_of_steps_goes_on(tmp_path, calls, monkeypatch):
    wanted = here(tmp_path / "whole", ONE_EPOCH)
    inner, points = Interrupt.poll, itertools.count(1)

    def poll(self: Interrupt) -> bool:
        if next(points) == 2:
            self.asked(signal.SIGTERM, 1)
        return inner(self)

    monkeypatch.setattr(Interrupt, "poll", poll)
    with pytest.raises(PreemptedError, match="Stopped after step 6 and saved it"):
        here(tmp_path / "run", ONE_EPOCH, train__steps_per_call=3)
    assert runs.checkpoints(tmp_path / "run") == [6]
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    calls.clear()
    found = here(tmp_path / "run", ONE_EPOCH, train__steps_per_call=4)
    assert calls == [4, 1, 1]
    runs.assert_same_bits(found, wanted)
    assert runs.rows(tmp_path / "run") == runs.rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fields", "why"),
    [(CONVOLUTIONS, "this model has convolutions"), (SMALL | {"layout.microbatches": 2}, "the host drives")],
    ids=["convolutions", "microbatches"],
)
def test_where_it_has_no_effect_one_line_says_so(tmp_path, calls, fields, why):
    here(tmp_path / "run", fields | {"train.steps": 4}, train__steps_per_call=4)
    assert calls == [1] * 4
    log = (tmp_path / "run" / "logs" / "process_0.log").read_text()
    assert log.count(f"train.steps_per_call=4 has no effect here, where each call makes one step: {why}") == 1


def test_a_call_that_never_fits_between_two_pauses_is_told_of(tmp_path, calls):
    here(tmp_path / "run", SMALL | {"train.steps": 8, "checkpoint.every": "0"}, train__steps_per_call=5)
    assert calls == [1] * 8
    log = (tmp_path / "run" / "logs" / "process_0.log").read_text()
    assert (
        log.count("train.steps_per_call=5 is more than the 4 steps to the next evaluation, save or end of an epoch")
        == 1
    )
    here(tmp_path / "fits", SMALL | {"train.steps": 8, "checkpoint.every": "0"}, train__steps_per_call=4)
    assert calls[8:] == [4, 4]
    assert "is more than" not in (tmp_path / "fits" / "logs" / "process_0.log").read_text()


@pytest.mark.parametrize("text", ["7", "1 step", "100 examples", "1 epoch", "0.3 epochs", "2.5 epochs", "0"])
def test_what_is_due_next_is_what_counting_every_step_finds(text):
    batch, examples, start = 32, 1000, 70  # that many examples were done before, in batches of another size
    cadence = Cadence(Duration.parse(text, "every"), examples)
    counts = [cadence.count(step, start + step * batch) for step in range(300)]
    due = [step for step in range(1, 300) if counts[step] > counts[step - 1]]
    for step in range(200):
        wanted = next((each for each in due if each > step), math.inf)
        assert cadence.next_after(step, start + step * batch, batch) == wanted
