"""What a run records for those who watch it: events, its layout, the times of its rows, where its settings came from."""

import json
import logging

import jax
import pytest
import runs
from runs import SMALL, here

from jaxtrain.observability import events
from jaxtrain.observability.text_log import FILE_ONLY

log = logging.getLogger("jaxtrain")


def recorded(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def kinds(folder):
    return [(each["kind"], each["step"]) for each in recorded(folder)]


def test_a_run_its_resume_and_their_rows(tmp_path):
    here(tmp_path, SMALL, train__steps=6)
    here(tmp_path, SMALL, train__steps=12)
    found = kinds(tmp_path)
    assert [each for each in found if each[0] in ("start", "end")] == [
        ("start", 0),
        ("end", 6),
        ("start", 6),
        ("end", 12),
    ]
    saved = [step for kind, step in found if kind == "checkpoint"]
    assert saved == sorted(set(saved))
    assert set(runs.checkpoints(tmp_path)) <= set(saved)
    times = [each["time"] for each in recorded(tmp_path)]
    assert times == sorted(times)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert times[0] < rows[0]["time"] <= rows[-1]["time"] < times[-1] + 1
    assert "val" in {row["phase"] for row in rows}
    assert not list(tmp_path.glob("tensorboard/**/*time")), "it is no scalar of TensorBoard"


def test_an_anomaly_and_a_roll_back(tmp_path, monkeypatch):
    from jaxtrain.observability.anomaly import Anomaly, AnomalyDetector  # noqa: PLC0415

    seen = []

    def observe(self, step, *_, **__):
        seen.append(step)
        return Anomaly("a spike", "roll back", 7) if step == 7 and seen.count(7) == 1 else Anomaly()

    monkeypatch.setattr(AnomalyDetector, "observe", observe)
    here(tmp_path, SMALL, train__steps=12, train__rollbacks=1, checkpoint__every="4")
    found = recorded(tmp_path)
    (anomaly,) = [each for each in found if each["kind"] == "anomaly"]
    assert (anomaly["step"], anomaly["message"].partition(";")[0]) == (7, "a spike")
    assert ("roll_back", 4) in kinds(tmp_path)
    assert kinds(tmp_path).count(("start", 4)) == 1, "training goes on from there"


def test_lines_that_are_no_events_and_a_line_that_a_kill_cut(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1.0, "ste')
    with events.recording(path, lambda: 5):
        log.error("too early", extra=events.event("end"))
        log.error("on", extra=events.event("start", 5))
        log.warning("nothing of note")
        log.warning("a slow one: %s", "3", extra=events.event("slow_device"))
        log.error("kept", extra=events.event("profile", 3, also=FILE_ONLY))
    log.warning("afterwards", extra=events.event("gpu"))
    cut, *lines = path.read_text().splitlines()
    assert cut == '{"time": 1.0, "ste'
    assert [(each["kind"], each["step"], each["message"]) for each in map(json.loads, lines)] == [
        ("start", 5, "on"),
        ("slow_device", 5, "a slow one: 3"),
        ("profile", 3, "kept"),
    ]


@pytest.mark.parametrize("stages", [1, 2])
def test_the_layout_is_that_of_the_arrays(tmp_path, stages):
    layout = {"layout.stages": stages, "layout.microbatches": 2}
    state = here(tmp_path, SMALL | layout, devices=2, train__steps=2).state
    stored = json.loads((tmp_path / "layout.json").read_text())
    assert (stored["devices"], stored["mesh"]["stage"], stored["microbatches"]) == (2, stages, 2)
    held = dict.fromkeys(jax.devices()[:2], 0)
    for leaf in jax.tree.leaves(state.params):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert stored["bytes_per_device"]["params"] == max(held.values())
    assert (tmp_path / "schedule.svg").exists() == (stages > 1)
    here(tmp_path, SMALL, train__steps=4)
    assert not (tmp_path / "schedule.svg").exists(), "the latest start has no pipeline"


def test_where_settings_came_from(tmp_path):
    words = ["train", *runs.arguments(tmp_path / "run", SMALL | {"train.steps": 1})]
    assert runs.command_line(words) == 0
    (start,) = runs.starts(tmp_path / "run")
    assert start["origins"]["train.steps"] == "flag"
    assert "recipe" in start["origins"].values()
    assert "default" not in start["origins"].values()
