"""What the loop is made of, part by part: when something is due, an epoch's totals, recovery, the result."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxtrain.checkpoint.manifest import is_better, write_manifest
from jaxtrain.checkpoint.resume_point import Position
from jaxtrain.config import CheckpointConfig, Config, DataConfig, TrainConfig
from jaxtrain.errors import NumericError
from jaxtrain.observability.anomaly import Anomaly
from jaxtrain.observability.clock import CATEGORIES, Span, StepClock
from jaxtrain.observability.progress import Progress
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.training import recovery
from jaxtrain.training.cadence import Due, Timetable
from jaxtrain.training.results import closing_lines, deciding_figures, done_lines, figures
from jaxtrain.training.run_view import Pace, RunView, seconds_left

# Epochs of 100 examples in batches of 30: they end with the steps 4, 7, 10, 14, ...
CONFIG = Config(
    data=DataConfig(global_batch=30),
    train=TrainConfig(steps=14, eval_every="2 epochs", check_replicas_every=5),
    checkpoint=CheckpointConfig(every="4 steps", milestone_every="1000 examples"),
)


START = Position()


def timetable(position: Position = START, config: Config = CONFIG, **more) -> Timetable:
    return Timetable(config, 100, 14, position, **more)


def steps_with(field: str, table: Timetable) -> list[int]:
    return [step for step in range(1, 15) if getattr(table.due(step), field)]


def test_what_is_due_after_which_step():
    table = timetable()
    assert steps_with("epoch_end", table) == [4, 7, 10, 14]
    assert steps_with("validation", table) == [7, 14]
    assert steps_with("save", table) == [4, 8, 12]
    assert steps_with("milestone", table) == []
    assert steps_with("replica_check", table) == [5, 10]
    assert steps_with("last", table) == [14]
    assert table.due(1) == Due()


@pytest.mark.parametrize("every", ["0", "4 steps", "2 epochs", "70 examples"])
def test_what_is_left_is_what_counting_every_step_finds(every):
    train, checkpoint = (dataclasses.replace(CONFIG.train, eval_every=every), CheckpointConfig(every=every))
    for position in (START, Position(step=6, examples=180)):
        table = timetable(position, dataclasses.replace(CONFIG, train=train, checkpoint=checkpoint))
        left = range(position.step + 1, 15)
        validations = sum(table.due(step).validation for step in left)
        saves = sum(table.due(step).save or table.due(step).last for step in left)
        assert table.left_after(position.step) == (validations, saves)


def test_the_last_step_is_validated_whenever_there_is_something_to_validate_on():
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, eval_every="0"))
    assert steps_with("validation", timetable(config=config)) == [14]
    assert steps_with("validation", timetable(config=config, validates=False)) == []


def test_a_start_in_between_has_the_same_dues_as_the_whole_run():
    whole, later = timetable(), timetable(Position(step=6, examples=180))
    assert all(whole.due(step) == later.due(step) for step in range(7, 15))
    assert all(whole.epoch_of(step) == later.epoch_of(step) for step in range(7, 15))
    assert [whole.epoch_of(step) for step in (1, 4, 5, 14)] == [0, 0, 1, 3]


def test_how_much_validating_and_saving_is_left():
    table = timetable()
    assert [table.left_after(step) for step in (0, 6, 7, 13, 14)] == [(2, 4), (2, 3), (1, 3), (1, 1), (0, 0)]
    assert timetable(validates=False).left_after(0) == (0, 4)


def test_an_epoch_is_shown_as_people_count():
    """A batch of 300 holds three epochs of 100: the metrics count that of its first example, a person the last it ends."""
    table = timetable()
    assert [table.epoch_shown(step) for step in (1, 4, 5, 14)] == [1, 1, 2, 4]
    assert [list(table.epoch_steps(step)) for step in (1, 4, 5, 14)] == [[1, 2, 3, 4]] * 2 + [
        [5, 6, 7],
        [11, 12, 13, 14],
    ]
    large = timetable(config=dataclasses.replace(CONFIG, data=DataConfig(global_batch=300)))
    assert [large.epoch_of(step) for step in (1, 2, 14)] == [0, 3, 39]
    assert [large.epoch_shown(step) for step in (1, 2, 14)] == [3, 6, 42]


def test_the_time_left_has_evaluations_and_saves_or_says_that_it_has_not():
    assert seconds_left(Pace(step=0.5, batch=0.1, save=2.0), steps=10, batches=30, saves=2) == (12.0, "")
    assert seconds_left(Pace(0.5, None, None), 10, 30, 2) == (5.0, "evaluation and saves")
    assert seconds_left(Pace(0.5, None, None), 10, 0, 1) == (5.0, "saves")
    assert math.isnan(seconds_left(Pace(None, 0.1, 2.0), 10, 30, 2)[0])


def test_the_end_is_foreseen_during_evaluations_too(monkeypatch):
    """A step takes a second, a batch of an evaluation two, a save three; the best weights are not the last."""
    now = [0.0]
    monkeypatch.setattr("jaxtrain.training.run_view.time.monotonic", lambda: now[0])
    num_batches, table, ends = {"validation": 5, "test": 7}, timetable(), []
    view = RunView(table, SimpleNamespace(step_seconds=1.0), Progress(), 30, num_batches=num_batches, ema=True)

    def evaluate(split):
        with view.evaluating(split):
            for _ in range(2 * num_batches[split]):
                view.next_batch()
                ends.append(view._evaluation.ends)
                now[0] += 2

    for step in range(1, 15):
        now[0] += 1
        view.step(step, 0.0, 0.0, 0.1)
        ends.append(view._training.ends)
        if table.due(step).validation:
            evaluate("validation")
        if table.due(step).save or table.due(step).last:
            with view.saving(step):
                now[0] += 3
    for split in ("test", "validation", "test"):
        evaluate(split)
    known = ends.index(next(end for end in ends if end == now[0]))
    assert known == 7 + 10  # all of it was measured once
    assert set(ends[known:]) == {now[0]}


@pytest.mark.parametrize("per_call", [1, 2, 3, 100])
def test_calls_cover_every_step_once_and_pause_where_something_is_due(per_call):
    table = timetable()
    calls = list(table.calls(per_call))
    assert [step for steps, _ in calls for step in steps] == list(range(1, 15))
    assert {len(steps) for steps, _ in calls} <= {1, per_call}
    paused = {steps[-1] for steps, pause in calls if pause}
    assert paused == {step for step in range(1, 15) if table.due(step) != Due()}
    assert table.next_pause(4) == 5


def test_epoch_totals_leave_out_a_batch_that_was_passed_over():
    position = Position().after_step(1, 10, 2.0, 4.0, skipped=False)
    position = position.after_step(2, 10, math.inf, 0.0, skipped=True).after_step(3, 10, 1.0, 8.0, skipped=False)
    assert (position.step, position.examples) == (3, 30)
    assert position.epoch_means() == (1.5, 0.6)
    fresh = position.at_new_epoch()
    assert fresh.epoch_means() == (0.0, 0.0)
    assert (fresh.step, fresh.examples) == (3, 30)


@pytest.mark.parametrize(
    ("action", "left", "response"),
    [
        ("go on", 0, "go on"),
        ("go on", 3, "go on"),
        ("roll back", 1, "roll back"),
        ("roll back", 0, "go on"),
        ("stop", 2, "roll back"),
        ("stop", 0, "stop"),
    ],
)
def test_what_is_done_about_an_anomaly(action, left, response):
    assert recovery.respond(Anomaly("text", action, 5), left) == response


def test_a_roll_back_goes_to_before_the_first_bad_step_and_past_its_examples(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / str(step)).mkdir()
        position = Position(step=step, examples=30 * step).to_json({})
        others = {
            "step": step,
            "versions": {},
            "config_sha256": "",
            "epoch": -1,
            "val_accuracy": None,
            "milestone": False,
            "owner": "",
        }
        write_manifest(tmp_path / str(step), position=position, **others)
    point = recovery.rollback_point(tmp_path, Anomaly("text", "stop", first=6), 240, CONFIG)
    assert point.start is not None
    assert (point.start.step, point.position.step, point.position.examples) == (4, 4, 240)
    point = recovery.rollback_point(tmp_path, Anomaly("text", "stop", first=2), 240, CONFIG)
    assert (point.start, point.position.step, point.position.examples) == (None, 0, 240)


def test_copies_that_differ_concern_all_steps_since_the_comparison_before():
    assert recovery.replicas_differ(20, 5, "x of devices 0 and 1 differs").first == 16
    assert recovery.replicas_differ(3, 5, "x").first == 1
    assert isinstance(recovery.not_finite(3, {"loss": math.inf, "grad_norm": 1.0}, "kept"), NumericError)


RESULT = EvalResult(loss=0.5, accuracy=0.75, top5=1.0, examples=4, per_class=(1.0, 0.5))


def test_a_figure_that_is_not_finite_is_never_the_best():
    wild = dataclasses.replace(RESULT, loss=math.nan, accuracy=0.5)
    assert deciding_figures({"raw": wild}) == {"val_accuracy": 0.5, "val_loss": None, "val_top5": 1.0}
    assert deciding_figures({"raw": wild, "ema": RESULT})["val_loss"] == 0.5
    assert not is_better("val_loss", None, None)
    assert is_better("val_loss", 0.5, None)
    assert is_better("val_loss", 0.4, 0.5)
    assert not is_better("val_loss", 0.5, 0.5)
    assert is_better("val_top5", 0.6, 0.5)
    assert not is_better("val_accuracy", 0.4, 0.5)


def test_the_best_so_far_of_an_older_version_is_an_accuracy():
    position = Position.from_json({"step": 4, "best_accuracy": 0.175})
    assert (position.best_by, position.best) == ("val_accuracy", 0.175)
    assert Position.from_json({"step": 4, "best_accuracy": -1.0}).best is None


def test_figures_of_a_result_are_those_of_each_split_and_weights():
    both = {"raw": RESULT, "ema": dataclasses.replace(RESULT, accuracy=0.8)}
    assert figures({"validation": both}, tested=False) == {
        "test": None,
        "validation": {"loss": 0.5, "accuracy": 0.75, "top5": 1.0, "examples": 4},
        "validation_ema": {"loss": 0.5, "accuracy": 0.8, "top5": 1.0, "examples": 4},
    }
    assert list(figures({"validation": both, "test": both}, tested=True)) == [
        "validation",
        "validation_ema",
        "test",
        "test_ema",
    ]


def test_the_closing_lines_say_what_was_tested_and_by_which_weights():
    tested = figures({"validation": {"raw": RESULT}, "test": {"raw": RESULT}}, tested=True)
    best = {"step": 4, "weights": "raw", "by": "val_accuracy"} | tested
    result = {"last": {"step": 9} | tested, "best": best, "goodput": 0.5, "starts": 2}
    result["splits"] = {"train": 8, "validation": 4, "test": 4}
    lines = list(closing_lines(result, Config(), StepClock().now(), tested=True, has_best=True))
    assert lines[0] == "last, step 9: validation accuracy 0.7500, test accuracy 0.7500"
    assert lines[1].startswith(
        "best, step 4, by the validation accuracy of the raw weights: validation accuracy 0.7500"
    )
    assert lines[-1] == "goodput 50.0% over 2 starts (jaxtrain goodput)"
    lines = list(closing_lines(result | {"starts": 1}, Config(), StepClock().now(), tested=False, has_best=False))
    assert lines[1] == "nothing was tested: digits has no test examples"
    assert not any(line.startswith("best") for line in lines)


def test_the_end_on_a_screen_is_a_few_short_lines():
    tested = figures({"validation": {"raw": RESULT}, "test": {"raw": RESULT}}, tested=True)
    splits = {"train": 8, "validation": 4, "test": 40}
    result = {"last": {"step": 9} | tested, "best": {"step": 4, "weights": "raw"} | tested, "splits": splits}
    seconds = dict.fromkeys(CATEGORIES, 0.0) | {"compile": 4.1, "step": 4.0, "evaluation": 0.5}
    span = Span(seconds, 9, 90, 90, 4.0)
    config = Config(train=TrainConfig(eval_examples=4))
    assert list(done_lines(result, config, span, lambda step: step // 2, Path("runs/q/result.json"))) == [
        "done in 8.6 s: best epoch 2 (step 4), validation 75.0 %, test 75.0 %",
        "last step 9: validation 75.0 %, test 75.0 %",
        "evaluated on 4 of 40 test examples (config.train.eval_examples); jaxtrain evaluate takes the whole split",
        "compile 4.1 s, steps 4.0 s, evaluation 0.5 s",
        "this run was bound by compile (48% of 8.6 s); "
        "the next start of the same program finds it, where the compile cache can be written",
        "runs/q/result.json",
    ]
    untested = figures({}, tested=False)
    result = {
        "last": {"step": 9} | untested,
        "best": {"step": 9, "weights": "ema"} | untested,
        "splits": {"train": 8, "validation": 0, "test": 0},
        "goodput": 0.5,
        "starts": 2,
    }
    lines = list(done_lines(result, config, span, lambda step: 3, Path("r")))
    assert lines[:2] == [
        "done in 8.6 s: last average of the weights, epoch 3 (step 9)",
        "nothing was tested: the data set has no test examples",
    ]
    assert lines[-2] == "goodput 50.0% over 2 starts (jaxtrain goodput)"
