"""What a study's points become: tables of one kind each, shares that add up, and the verdict on what limits."""

import dataclasses

import pytest

from jaxtrain import scale
from jaxtrain.config import Config
from jaxtrain.errors import ConfigError
from jaxtrain.recipes import change
from jaxtrain.scaling import advice, tables
from jaxtrain.scaling.measuring import MEASURED, PARTS, SIMULATED, Machine, Point, Spread
from jaxtrain.scaling.protocol import LinkFit, Ready
from jaxtrain.scaling.study import STRONG, WEAK, Study

TOLD = Ready(1000, 3, 6, 4e6, 4, "cpu", "0")
ALL = {"compute": 36e-3, "overlap": 4e-3, "communication": 30e-3, "input": 5e-3, "bubble": 0.0, "host": 1e-3}
CONFIG = change(Config(), **{"data.global_batch": 64, "train.epochs": 3, "model.name": "mlp", "model.width": 8})
SMALL = {"data.name": "synthetic", "data.examples": 640, "train.precision": "f32"}


def point(devices, seconds, parts, *, batch=64, speedup=1.0):
    return Point(devices, batch, Spread(seconds, seconds, seconds), speedup, parts, 0.05 if parts else None, 4, TOLD)


def row(table, index=-1):
    return dict(zip(table["columns"], table["rows"][index], strict=True))


NOTHING = dict.fromkeys(ALL, 0.0)
BASE = point(1, 80e-3, NOTHING | {"compute": 78e-3, "input": 1e-3, "host": 1e-3})


def test_the_shares_add_up_and_what_profiling_adds_is_said():
    two = point(2, 80e-3, ALL | {"host": 5e-3}, speedup=1.0)
    table = tables.of_points(STRONG, [BASE, two], CONFIG, MEASURED, "processes")
    found = row(table)
    assert found["profile off %"] == pytest.approx(5)
    assert found["communication %"] == pytest.approx(100 * 30 / 80)
    assert sum(found[f"{name} %"] for name in PARTS) == pytest.approx(100)
    assert (found["ideal examples/s"], found["speed-up"], found["efficiency %"]) == (2 * 800, 1.0, 50.0)
    assert (found["epoch s"], found["whole run s"]) == (1.25, 3.75)


def test_without_a_profile_the_parts_are_not_known_and_nothing_is_blamed():
    without = row(tables.of_points(STRONG, [BASE, point(2, 70e-3, {})], CONFIG, MEASURED, "processes"))
    assert (without["compute %"], without["profile off %"], without["step ms"]) == (None, None, 70)
    assert advice.of_points(MEASURED, STRONG, BASE, point(2, 70e-3, {}), CONFIG, None).name == "unknown"


def test_simulated_devices_are_compared_with_one_on_the_same_cores():
    two = point(2, 100e-3, ALL, speedup=0.8)
    found = row(tables.of_points(STRONG, [BASE, two], CONFIG, SIMULATED, "simulated devices"))
    assert (found["ideal examples/s"], found["efficiency %"]) == (800, 80.0)


@pytest.mark.parametrize(
    ("changed", "name", "helps"),
    [
        ({}, "communication", "With twice the examples a device they would run for"),
        ({"overlap": 50e-3, "communication": 1e-3}, "communication", "1 % of it with nothing beside"),
        ({"input": 60e-3}, "input", "config.data.workers"),
        ({"bubble": 60e-3}, "bubble", "config.layout.microbatches=8 in place of 4"),
        ({"host": 60e-3}, "host", "config.train.steps_per_call"),
        ({"compute": 99e-3}, "compute", "config.data.global_batch"),
    ],
)
def test_the_largest_loss_is_named_with_what_helps(changed, name, helps):
    parts = ALL | changed
    two = point(2, sum(parts.values()), parts, speedup=BASE.step.median / sum(parts.values()))
    config = change(CONFIG, **{"layout.stages": 2}) if name == "bubble" else CONFIG
    verdict = advice.of_points(MEASURED, STRONG, BASE, two, config, None)
    assert verdict.name == name
    assert helps in verdict.advice


def test_communication_is_told_apart_by_the_fitted_link():
    two = point(2, 76e-3, ALL, speedup=80 / 76)
    said = {}
    for what, link in (("latency", LinkFit(4e-3, 1e9, 0.1, ())), ("bandwidth", LinkFit(1e-4, 2e8, 0.1, ()))):
        said[what] = advice.of_points(MEASURED, STRONG, BASE, two, CONFIG, link).advice
        assert f"most of it is {what}" in said[what]
    assert "compression does not" in said["latency"]
    assert "compress=bf16" in said["bandwidth"]


def test_where_no_gradients_are_sent_nothing_is_said_of_compressing_them():
    two = point(2, 76e-3, ALL, speedup=80 / 76)
    said = advice.of_points(MEASURED, STRONG, BASE, two, change(CONFIG, **{"layout.tensor": 2}), None)
    assert said.name == "communication"
    assert "no gradients are sent" in said.advice


def test_nothing_limits_what_scales():
    two = point(2, 41e-3, ALL, speedup=80 / 41)
    assert advice.of_points(MEASURED, STRONG, BASE, two, CONFIG, None).name == "none"
    assert advice.of_points(MEASURED, WEAK, BASE, BASE, CONFIG, None).name == "none"


def test_what_is_no_part_of_a_step_is_left_out_of_a_measured_run():
    config = change(CONFIG, **{"layout.zero": 2, "sinks.names": ("wandb",)})
    study = Study(config, (1, 2, 4), (STRONG, WEAK))
    assert [study.batch(WEAK, count) for count in study.counts] == [64, 128, 256]
    whole = study.measured(WEAK, 4)
    assert (whole.data.global_batch, whole.layout.zero, whole.sinks.names) == (256, 2, ())
    jobs = Machine(MEASURED, ((0,), (1,))).whole(whole, 2, "folder")
    assert [(job.cores, job.processes, job.index) for job in jobs] == [((0,), 2, 0), ((1,), 2, 1)]
    assert len({job.workdir for job in jobs}) == 1  # one run


# ----------------------------------------------------------------------------------------------------------- a target


def test_a_target_is_modelled_in_tables_of_its_own():
    found = scale(change(CONFIG, **SMALL), (1, 8, 16), target="2x8xh100")
    kinds = {table["kind"] for table in found["tables"]}
    assert kinds in ({"modelled"}, {"modelled", "compiled"})
    assert ("compiled" in kinds) == (not found["notes"])  # else it says why not
    for table in found["tables"]:
        assert all(len(each) == len(table["columns"]) for each in table["rows"])
    strong, weak = (table for table in found["tables"] if table["kind"] == "modelled")
    assert [each[:2] for each in weak["rows"]] == [[1, 64], [8, 512], [16, 1024]]
    assert row(strong, 0)["efficiency %"] == 100
    assert row(strong, 0)["communication %"] == 0 < row(strong)["communication %"]
    assert row(weak)["speed-up"] > row(strong)["speed-up"]
    assert [fit["name"] for fit in found["fitted"]] == ["Amdahl", "Gustafson"]
    assert all("input %" not in table["columns"] for table in found["tables"])


def test_batch_norm_over_the_whole_batch_costs_what_groups_save():
    config = change(CONFIG, **SMALL, **{"model.name": "tiny:resnet", "model.width": 4})
    whole = row(scale(config, (1, 8), modes=(WEAK,), target="8xh100")["tables"][0])
    groups = row(scale(change(config, **{"model.bn_groups": 8}), (1, 8), modes=(WEAK,), target="8xh100")["tables"][0])
    assert groups["BatchNorm %"] == 0 < whole["BatchNorm %"]
    assert groups["step ms"] < whole["step ms"]


def test_a_link_is_of_a_target():
    with pytest.raises(ConfigError, match="--link is of the GPUs of --target"):
        scale(CONFIG, (1,), links=("within=pcie5",))
    slow, fast = (
        row(scale(change(CONFIG, **SMALL), (8,), target="8xh100", links=(f"within={link}",))["tables"][0])
        for link in ("0.1:100", "nvlink4")
    )
    assert slow["communication %"] > fast["communication %"]


def test_a_spread_is_of_repeats():
    assert dataclasses.astuple(Spread.of([3.0, 1.0, 2.0])) == (2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"how": "simulate"}, "how='simulate': must be one of auto, processes, simulated"),
        ({"modes": ("week",)}, "modes='week': must be one of strong, weak"),
        ({"devices": (0, 2)}, "0 is no number of devices"),
        ({"devices": (2, 2)}, "2 stands there twice"),
    ],
)
def test_wrong_words_from_python_are_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        scale(CONFIG, **words)
