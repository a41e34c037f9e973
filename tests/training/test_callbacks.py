"""Callbacks: when hooks are called, that their state survives a kill, what an error of theirs says; early stopping."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from own_callbacks import Notes
from runs import RECIPE, SMALL, assert_same_bits, checkpoints, command_line, epochs, rows
from runs import arguments as words_of
from runs import main as started
from safetensors.numpy import load_file

from jaxtrain import Callback, load_config, train
from jaxtrain.errors import CallbackError, CheckpointError, ConfigError, JaxtrainError, PreemptedError

REST = ("on_start", "on_epoch", "on_evaluation", "on_checkpoint")


class Checkpoints(Callback):
    """Writes down which checkpoints it hears of, and whether they are complete."""

    def __init__(self):
        self.told: list[tuple[int, bool]] = []

    def on_checkpoint(self, run, step, folder):
        self.told.append((step, (folder / "manifest.json").exists()))


class Fails(Callback):
    """Fails in one hook."""

    name = "fails"

    def __init__(self, hook: str):
        def fail(*_):
            raise ValueError("no such thing")

        setattr(self, hook, fail)


def fit(workdir: Path, *callbacks: Callback, devices: int = 1, **fields):
    changed = {name.replace("__", "."): value for name, value in fields.items()}
    return train(load_config(RECIPE, SMALL | changed), workdir, num_devices=devices, quiet=True, callbacks=callbacks)


# ------------------------------------------------------------------------------------------------------------ the hooks


def test_hooks_are_called_in_order_with_the_numbers_of_the_run(tmp_path):
    notes, told = Notes(), Checkpoints()
    found = fit(tmp_path, notes, told)
    losses = [row["loss"] for row in rows(tmp_path)]
    validations = [row["loss"] for row in rows(tmp_path, "val")]
    wanted = []
    for epoch in range(3):
        wanted += [["step", step, losses[step - 1]] for step in range(4 * epoch + 1, 4 * epoch + 5)]
        wanted += [["epoch", epoch, 4 * epoch + 4, pytest.approx(np.mean(losses[4 * epoch : 4 * epoch + 4]))]]
        wanted += [["evaluation", 4 * epoch + 4, validations[epoch]]]
    assert notes.calls == wanted
    assert found.result["callbacks"] == {"notes": {"calls": len(wanted), "at": 12}}
    assert json.loads((tmp_path / "result.json").read_text())["callbacks"] == found.result["callbacks"]
    assert [step for step, _ in told.told] == checkpoints(tmp_path)
    assert all(complete for _, complete in told.told)


class Pauses(Callback):
    """Pauses the run at its second epoch."""

    def on_epoch(self, run, epoch, state, metrics):
        if epoch == 1:
            run.pause("to think")


def test_a_callback_pauses_a_run_which_goes_on_as_one_that_was_not(tmp_path):
    with pytest.raises(
        PreemptedError, match=r"Stopped after step 8 and saved it \(to think\); the same command goes on"
    ):
        fit(tmp_path / "paused", Pauses())
    assert max(checkpoints(tmp_path / "paused")) == 8
    assert not (tmp_path / "paused/result.json").exists()
    assert_same_bits(fit(tmp_path / "paused"), fit(tmp_path / "plain"))
    assert rows(tmp_path / "paused", "val") == rows(tmp_path / "plain", "val")


def test_callbacks_change_no_number_of_a_run(tmp_path):
    plain, called = fit(tmp_path / "plain"), fit(tmp_path / "called", Notes(), callbacks__names=("swa",))
    assert_same_bits(called, plain)
    assert rows(tmp_path / "plain") == rows(tmp_path / "called")


def test_a_config_names_a_class_and_a_run_directory_that_does_is_evaluated_without_trust(tmp_path, capsys):
    words = words_of(
        tmp_path / "run",
        SMALL | {"callbacks.names": "('own_callbacks:Notes',)", "data.name": "digits", "train.epochs": 1},
    )
    assert command_line(["train", *words]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["callbacks"]["notes"]["at"] == 4
    assert command_line(["evaluate", str(tmp_path / "run")]) == 0


# ------------------------------------------------------------------------------------------------------------ the state


def assert_same_average(run: Path, other: Path) -> None:
    """The averages that both runs have written are the same, bit for bit."""
    a, b = (load_file(path / "swa.safetensors") for path in (run, other))
    assert {name: tensor.tobytes() for name, tensor in a.items()} == {k: tensor.tobytes() for k, tensor in b.items()}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Kills(Callback):
    """Ends the run as a kill would, once, at a step."""

    def __init__(self, step: int):
        self._step = step

    def on_step(self, run, step, metrics):
        if step == self._step:
            raise Killed


def test_a_killed_run_goes_on_as_one_that_was_not(tmp_path):
    whole, begun, resumed = Notes(), Notes(), Notes()
    straight = fit(tmp_path / "straight", whole, callbacks__names=("swa",), callbacks__swa_start=0.3)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", begun, Kills(11), callbacks__names=("swa",), callbacks__swa_start=0.3)
    assert checkpoints(tmp_path / "killed")[-1] in (8, 10)
    again = fit(tmp_path / "killed", resumed, callbacks__names=("swa",), callbacks__swa_start=0.3)
    assert resumed.begun_at in (8, 10)
    assert resumed.calls == whole.calls
    assert_same_bits(again, straight)
    assert again.result["callbacks"] == straight.result["callbacks"]
    assert_same_average(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_really_killed_keeps_the_state_of_its_callbacks(tmp_path, number):
    fields = SMALL | {
        "callbacks.names": "('own_callbacks:Notes','swa')",
        "callbacks.swa_start": 0.1,
        "train.epochs": 100,
    }
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    with started(tmp_path / "straight.txt", *words_of(straight, fields)) as run:
        assert run.end() == 0, run.output
    with started(tmp_path / "killed.txt", *words_of(killed, fields)) as run:
        run.wait_for(lambda: (killed / "checkpoints").exists() and len(checkpoints(killed)) > 15, "checkpoint")
        run.send(number)
        assert run.end() in (-signal.SIGKILL, 75)
    with started(tmp_path / "again.txt", *words_of(killed, fields)) as run:
        assert run.end() == 0, run.output
    states = [
        json.loads((path / "checkpoints" / "400" / "manifest.json").read_text())["position"]["callbacks"]
        for path in (straight, killed)
    ]
    assert len(states[0]["notes"]["calls"]) == 400 + 100 + 100
    assert states[0] == states[1]
    assert_same_average(straight, killed)


def test_a_callback_that_is_new_begins_anew_with_a_warning(tmp_path):
    fit(tmp_path, train__epochs=1)
    notes = Notes()
    notes.calls = [["before"]]
    fit(tmp_path, notes, train__epochs=2)
    assert notes.calls[0] == ["before"]
    assert "has no state of the callback notes, which begins anew" in (tmp_path / "logs" / "process_0.log").read_text()


def test_a_roll_back_takes_the_state_of_its_checkpoint(tmp_path, monkeypatch):
    """The loss of step 7 is a spike for the loop; steps 7 to 9 are undone, and so is what the callback has noted of them."""
    from jaxtrain.observability.anomaly import Anomaly, AnomalyDetector  # noqa: PLC0415

    seen: list[int] = []

    def observe(self, step, *_, **__):
        seen.append(step)
        spike = step == 7 and seen.count(7) == 1
        return Anomaly("a spike", "roll back", 7) if spike else Anomaly()

    monkeypatch.setattr(AnomalyDetector, "observe", observe)
    notes = Notes()
    fit(tmp_path, notes, train__rollbacks=1)
    assert seen.count(7) == 2
    found = [call[1] for call in notes.calls if call[0] == "step"]
    assert found == list(range(1, 12)), "the batch of step 7 is passed over, in a run of 12 batches"


def test_state_that_does_not_fit_is_an_error_that_names_the_callback(tmp_path):
    fit(tmp_path, Notes(), train__epochs=1)

    class Other(Notes):
        def load_state_dict(self, state):
            if state["calls"]:
                raise KeyError("version")

    with pytest.raises(CheckpointError, match=r"callback notes does not take the state that step 4 has.*KeyError"):
        fit(tmp_path, Other(), train__epochs=2)


def test_a_checkpoint_whose_callback_state_was_changed_by_hand_is_damaged(tmp_path):
    fit(tmp_path, Notes(), train__epochs=2)
    manifest = tmp_path / "checkpoints" / "8" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"epoch",', '"epoche",'))
    notes = Notes()
    fit(tmp_path, notes, train__epochs=2)
    assert notes.begun_at == 6, "the next older one"
    assert "8 is damaged" in (tmp_path / "logs" / "process_0.log").read_text()


# ----------------------------------------------------------------------------------------------------------- the errors


@pytest.mark.parametrize(
    "hook", ["on_step", "on_end", *(pytest.param(hook, marks=pytest.mark.faults) for hook in REST)]
)
def test_an_error_names_the_callback_the_hook_and_the_line(tmp_path, hook):
    with pytest.raises(CallbackError) as caught:
        fit(tmp_path, Fails(hook))
    text = str(caught.value)
    assert text.startswith("The callback fails failed in fail (ValueError: no such thing), at ")
    assert "test_callbacks.py:" in text
    assert "\n" not in text
    assert "Traceback" in (tmp_path / "logs" / "process_0.log").read_text()


def test_state_that_json_does_not_have_names_the_callback(tmp_path):
    class Array(Callback):
        def state_dict(self):
            return {"array": np.zeros(3)}

    with pytest.raises(CallbackError, match="The callback Array failed in state_dict"):
        fit(tmp_path, Array())


class NotACallback:
    def __init__(self, config):
        pass


@pytest.mark.parametrize(
    ("names", "own", "said"),
    [
        (("early_stoping",), (), "callbacks.names"),
        (("test_callbacks:Nothing",), (), "has no 'Nothing'"),
        (("test_callbacks:Fails",), (), "making it failed with TypeError"),
        (("test_callbacks:NotACallback",), (), "is a NotACallback"),
        (("own_callbacks:Notes",), (Notes(),), "Two callbacks are called 'notes'"),
    ],
)
def test_a_bad_name_is_refused_before_anything_is_trained(tmp_path, names, own, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")) as caught:
        fit(tmp_path, *own, callbacks__names=names)
    assert isinstance(caught.value, JaxtrainError)
    assert not (tmp_path / "result.json").exists()


# ------------------------------------------------------------------------------------------------------- early stopping

STILL = {"optim__learning_rate": 0.0, "callbacks__names": ("early_stopping",), "callbacks__patience": 2}


def test_early_stopping_ends_a_run_that_gets_no_better(tmp_path):
    found = fit(tmp_path, **STILL, train__epochs=10)
    assert found.result["steps"] == 12, "the first validation is the best one, and two more are no better"
    assert found.result["ended"]["by"] == "early_stopping"
    assert "val_accuracy got no better in 2 validations" in found.result["ended"]["reason"]
    assert "test" in found.result["last"]
    assert len([line for line in epochs(tmp_path) if "train" in line]) == 3


def test_a_run_that_was_ended_is_complete_and_more_patience_goes_on(tmp_path):
    first = fit(tmp_path, **STILL, train__epochs=10)
    written = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "metrics.csv").read_bytes()
    again = fit(tmp_path, **STILL, train__epochs=10)
    assert again.result["steps"] == 12
    assert again.result["ended"] == first.result["ended"]
    assert rows(tmp_path) == [row for row in rows(tmp_path) if row["step"] <= 12]
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b'"train"') == written[0].count(b'"train"')
    longer = fit(tmp_path, **STILL | {"callbacks__patience": 4}, train__epochs=10)
    assert longer.result["steps"] == 20
    assert "4 validations" in longer.result["ended"]["reason"]
    unbounded = fit(tmp_path, optim__learning_rate=0.0, train__epochs=10)
    assert unbounded.result["steps"] == 40
    assert "ended" not in unbounded.result


def test_early_stopping_in_the_middle_of_an_epoch_keeps_the_row_of_the_epoch(tmp_path):
    found = fit(tmp_path, **STILL, train__epochs=10, train__eval_every="3 steps")
    assert found.result["steps"] == 9
    before = epochs(tmp_path)
    assert len([line for line in before if "train" in line]) == 3
    fit(tmp_path, **STILL, train__epochs=10, train__eval_every="3 steps")
    assert sorted(epochs(tmp_path)) == sorted(before)


def test_a_better_figure_by_less_than_min_delta_is_none(tmp_path):
    fields = {**STILL, "optim__learning_rate": 0.05, "checkpoint__best": "val_loss"}
    assert "ended" not in fit(tmp_path / "any", **fields, train__epochs=6).result
    found = fit(tmp_path / "much", **fields, train__epochs=6, callbacks__min_delta=10.0)
    assert found.result["steps"] == 12


def test_own_code_may_end_the_run_and_its_wish_survives_a_kill(tmp_path):
    class Enough(Callback):
        def on_step(self, run, step, metrics):
            if step == 5:
                run.stop("enough")

    found = fit(tmp_path / "straight", Enough())
    assert found.result["steps"] == 6, "the next save is after step 6"
    assert found.result["ended"] == {"by": "Enough", "reason": "enough"}


def test_the_command_says_why_the_run_has_ended(tmp_path, capsys):
    fields = {name.replace("__", "."): value for name, value in STILL.items()}
    assert command_line(["train", *words_of(tmp_path, SMALL | fields | {"train.epochs": 10})]) == 0
    assert "ended by early_stopping: val_accuracy got no better" in "".join(capsys.readouterr())
