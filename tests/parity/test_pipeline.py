"""Pipeline stages: the same numbers as one device, and each stage's part on its own devices alone."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
import weakref

import jax
import numpy as np
import parity
import pytest
import runs

from jaxtrain import evaluate, load_config
from jaxtrain.checkpoint.resume_point import Position, ResumePoint
from jaxtrain.config import LayoutConfig, from_dict, nested_dicts
from jaxtrain.errors import ConfigError
from jaxtrain.optim.updates import global_norm
from jaxtrain.parallel.layout import path_of
from jaxtrain.step import update
from jaxtrain.step.pipeline import programs
from jaxtrain.step.pipeline.chunks import ForwardBackward
from jaxtrain.step.pipeline.schedule import in_flight
from jaxtrain.step.pipeline.train_step import StepExecution
from jaxtrain.training.compiled import compile_run
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.layout_report import describe_layout, read_trace
from jaxtrain.training.setup import load_data, make_run_spec

RESNET = {"model.name": "resnet18", "optim.learning_rate": 0.1}
SWIN = {"model.name": "swin_tiny", "model.width": 16, "optim.learning_rate": 1e-3}
# At least two layers a chunk, also where four stages hold one each: `interleaved_1f1b` with 2 x 2 chunks.
DEEP = {
    "mlp": {"model.depths": (7,)},
    "resnet": RESNET | {"model.depths": (2, 2, 1, 1)},
    "vgg": {},
    "convnet": {},
    "swin": SWIN | {"model.depths": (2, 2, 1, 1)},
}


def layout(
    schedule: str = "1f1b", stages: int = 2, data: int = 1, zero: int = 0, parts: int = 4, **more
) -> LayoutConfig:
    chunks = 2 if schedule == "interleaved_1f1b" else 1
    return LayoutConfig(
        data=data, zero=zero, stages=stages, schedule=schedule, chunks=chunks, microbatches=parts, **more
    )


# Two layers a chunk where four stages hold two each.
DEEPER = {
    "mlp": {"model.depths": (15,)},
    "resnet": RESNET | {"model.depths": (4, 4, 4, 2)},
    "swin": SWIN | {"model.depths": (4, 4, 4, 2)},
}


@functools.cache
def reference(model: str) -> dict[str, np.ndarray]:
    return parity.numbers(parity.run(model, LayoutConfig(data=1), **DEEP[model]))


TABLE = {
    "gpipe-2": layout("gpipe"),
    "gpipe-3-zero1": layout("gpipe", 3, 2, 1),
    "1f1b-2-zero3": layout("1f1b", 2, 2, 3),
    "1f1b-4-zero2": layout("1f1b", 4, 2, 2),
    "1f1b-3-one-microbatch": layout("1f1b", 3, parts=1),
    "interleaved-2-zero2": layout("interleaved_1f1b", 2, 2, 2),
    "1f1b-2-hybrid": layout("1f1b", 2, 2, 3, replica=2),
    "1f1b-2-tensor2": layout("1f1b", 2, 2, 1, tensor=2),
    "1f1b-2-ring-tensor2": layout("1f1b", 2, 2, 1, tensor=2, reduce="ring"),
    "interleaved-2-hierarchical-zero3": layout("interleaved_1f1b", 2, 2, 3, replica=2, reduce="hierarchical"),
    "gpipe-2-tree-zero2": layout("gpipe", 2, 4, 2, reduce="tree"),
}
# By default each schedule and each kind of sharding in it, with the cheapest model; `pairs`, below, has BatchNorm.
DEFAULT = (
    "gpipe-3-zero1",
    "interleaved-2-zero2",
    "1f1b-2-hybrid",
    "1f1b-2-tensor2",
    "interleaved-2-hierarchical-zero3",
)
# Reductions of our own with the cheapest model, and in `pairs` with BatchNorm; the rest is in the slow group.
CASES = [
    pytest.param(model, name, marks=pytest.mark.slow)
    if TABLE[name].reduce != "auto" and model != "mlp"
    else parity.case(model, name, default=model == "mlp" and name in DEFAULT)
    for model in parity.MODELS
    for name in TABLE
]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_stages_change_no_number(model, name):
    found = parity.numbers(parity.run(model, TABLE[name], **DEEP[model]))
    parity.assert_equal(found, reference(model), 1e-12)


# Six layers, of which the second and the fifth have parameters, and the third has statistics.
SPARSE = {"model.name": "tiny:sparse", "model.width": 16, "model.bn_groups": 4, "data.image_size": 8}
WITHOUT = {
    "the first": layout("gpipe", data=2, zero=3, boundaries=(1,)),
    "the last": layout(data=2, zero=2, boundaries=(5,)),
    "the middle": layout(stages=3, data=2, zero=1, boundaries=(2, 4), stage_placement="hosts"),
    "two of four": layout("interleaved_1f1b", data=2, zero=2, boundaries=(1, 4, 5)),
    "four of six": layout(stages=6, boundaries=(1, 2, 3, 4, 5)),
    "by their cost": layout(stages=4, data=2, zero=3, balance="time"),
}


@functools.cache
def sparse() -> dict[str, np.ndarray]:
    return parity.numbers(parity.run("mlp", LayoutConfig(data=1), **SPARSE))


@pytest.mark.parity
@pytest.mark.parametrize(
    "which", [parity.case(which, default="middle" in which or "two" in which) for which in WITHOUT]
)
def test_a_slice_may_have_no_parameters(which):
    """Pooling, dropout, a softmax, or what has statistics alone; with EMA, clipping and both evaluations."""
    found = parity.numbers(parity.run("mlp", WITHOUT[which], **SPARSE))
    parity.assert_equal(found, sparse(), 1e-12)


# Groups of two examples.
PAIRS = {"model.name": "tiny:resnet", "model.width": 4, "model.bn_groups": 8, "data.image_size": 8}
PAIRS |= {"model.drop_path": 0.2, "data.global_batch": 16, "data.mixup": 0.0}


@functools.cache
def pairs() -> dict[str, np.ndarray]:
    return parity.numbers(parity.run("mlp", LayoutConfig(data=1), **PAIRS))


@pytest.mark.parity
@pytest.mark.parametrize(
    "where",
    [
        pytest.param(layout(data=4, balance="time"), id="timed", marks=pytest.mark.parity),
        pytest.param(layout(data=2, replica=2, zero=3, parts=0), id="microbatches chosen"),
        pytest.param(layout(data=2, replica=2, parts=2, reduce="tree"), id="by messages"),
    ],
)
def test_a_batch_norm_group_may_span_the_devices_of_a_stage(where):
    """A device has one example of a microbatch."""
    parity.assert_equal(parity.numbers(parity.run("mlp", where, **PAIRS)), pairs(), 1e-12)


def test_threads_of_stages_do_not_disturb_each_other(tmp_path):
    """Two that asked for the shards of one array at the same time got them twice: here they change places all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        fields = {"layout.stages": 2, "layout.microbatches": 2, "model.depths": "(1,)", "checkpoint.every": "0"}
        result = runs.here(tmp_path, runs.SMALL | fields | {"train.steps": 40}, devices=8)
    finally:
        sys.setswitchinterval(interval)
    assert len([row for row in result.history if row["phase"] == "train"]) == 40


EVERYTHING = list(itertools.product(("gpipe", "1f1b", "interleaved_1f1b"), (2, 3, 4), (1, 2), (0, 1, 2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "stages", "data", "zero"), EVERYTHING)
@pytest.mark.parametrize("model", parity.MODELS)
def test_the_whole_table(model, schedule, stages, data, zero):
    """With at least two layers a chunk, but for VGG and `convnet_fast`, whose layers are too few for 4 x 2 chunks."""
    deeper, parts = schedule == "interleaved_1f1b", 6 if stages == 3 else 4
    found = parity.numbers(parity.run(model, layout(schedule, stages, data, zero, parts), **fields_of(model, deeper)))
    parity.assert_equal(found, larger_reference(model, deeper), 1e-12)


def fields_of(model: str, deeper: bool) -> dict[str, object]:
    """A batch, and BatchNorm groups, that four and six microbatches divide."""
    more = DEEPER.get(model, {}) if deeper else DEEP[model]
    groups = {"model.bn_groups": 12} if model in ("resnet", "vgg", "convnet") else {}
    return {"data.global_batch": 96, "data.examples": 96, **groups, **more}


@functools.cache
def larger_reference(model: str, deeper: bool) -> dict[str, np.ndarray]:
    return parity.numbers(parity.run(model, LayoutConfig(data=1), **fields_of(model, deeper)))


@pytest.mark.parametrize(("batch", "groups"), [(12, 4), (4, 2)])
def test_a_devices_part_need_not_hold_whole_batch_norm_groups(batch, groups):
    """Layers are cut by their costs on one device: with three of two groups of three, or one of two, on a map of one pixel."""
    large = {"model.name": "resnet18", "model.depths": (1, 1, 1, 1), "model.stem": "imagenet", "data.image_size": 32}
    fields = {"data.global_batch": batch, "model.bn_groups": groups}
    config = parity.config("resnet", layout("gpipe", 2, 2, parts=2), **large, **fields)
    with settings(config):
        run = make_run_spec(config, load_data(config.data), jax.devices()[:4])
    assert run.partition is not None
    assert sum(map(len, run.partition.chunks)) == len(run.task.model.layers)


# ------------------------------------------------------------------------------------------------------ planted faults


def clip_by_stage(monkeypatch):
    def own(task, shardings, updating, state, gradients, batch_stats, communication, decision):
        decision = decision.replace(norm=global_norm(gradients))
        return update.apply_update(task, shardings, updating, state, gradients, batch_stats, communication, decision)

    monkeypatch.setattr(programs, "apply_update", own)


def average_by_stage(monkeypatch):
    """Each stage's average warms up in its own time: that of the later stage runs ahead."""

    def own(task, shardings, updating, state, *more):
        late = "layers_00" not in state.params
        after, updates = update.apply_update(task, shardings, updating, state.replace(step=state.step + late), *more)
        return after, updates

    monkeypatch.setattr(programs, "apply_update", own)


def a_gradient_twice(monkeypatch):
    backward = ForwardBackward.backward

    def twice(self, cotangent, kept, output, *arguments):
        found = backward(self, cotangent, kept, output, *arguments)
        times = 1 + (arguments[-1]["index"] == 1)
        return (jax.tree.map(lambda g: g * times, found[0]), *found[1:])

    monkeypatch.setattr(ForwardBackward, "backward", twice)


def residuals_of_another_microbatch(monkeypatch):
    class Swapped(dict):
        def pop(self, key):
            chunk, microbatch = key
            return self[chunk, microbatch ^ (chunk == 0)]  # of all chunks alike it would only be another order

    init = StepExecution.__init__

    def swapped(self, *arguments):
        init(self, *arguments)
        self._residuals = Swapped()

    monkeypatch.setattr(StepExecution, "__init__", swapped)


FAULTS = [clip_by_stage, average_by_stage, a_gradient_twice, residuals_of_another_microbatch]


@functools.cache
def clipped(where: str) -> dict[str, np.ndarray]:
    """Of a run whose gradients are all clipped, on one device or in stages."""
    layouts = {"one": LayoutConfig(data=1), "stages": TABLE["gpipe-2"]}
    return parity.numbers(parity.run("mlp", layouts[where], **{"optim.clip_norm": 0.05} | DEEP["mlp"]))


@pytest.mark.parity
@pytest.mark.parametrize("fault", parity.planted(FAULTS, default=clip_by_stage))
def test_a_planted_fault_shows(fault, monkeypatch):
    wanted = clipped("one")
    parity.assert_equal(clipped("stages"), wanted, 1e-12)
    fault(monkeypatch)
    found = clipped.__wrapped__("stages")
    with pytest.raises(AssertionError, match="relative error"):
        parity.assert_equal(found, wanted, 1e-12)


# -------------------------------------------------------------------------------------------------------------- memory


@contextlib.contextmanager
def started(model: str, where: LayoutConfig, **fields):
    config = parity.config(model, where, **{"train.precision": "f32", **DEEP[model], **fields})
    with settings(config):
        run = make_run_spec(config, load_data(config.data), jax.devices()[: parity.devices_of(where)])
        yield run, *compile_run(run, ResumePoint(None, Position(), None))


def one_step(engine, state):
    for data in engine.batches(first_step=0, first_example=0, steps=1):
        state, metrics = engine.step(state, data, engine.inputs.resident)
    return jax.block_until_ready(state), metrics


@pytest.mark.parametrize("zero", [parity.case(0, default=False), 3])
def test_a_stage_holds_its_own_layers_and_nothing_of_the_others(zero):
    with started("mlp", layout(stages=4, data=2, zero=zero), **{"optim.name": "adamw"}) as (run, engine, state):
        for after in (False, True):
            whole, found = one_step(engine, state)[0] if after else state, set()
            for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
                name = next((part for part in path_of(path).split("/") if part in run.layout.stage_of), None)
                stage = run.layout.stage_of.get(name)
                found.add(stage)
                mesh = run.layout.mesh if stage is None else run.layout.on_stage(stage).mesh
                assert {shard.device for shard in leaf.addressable_shards} == set(mesh.devices.flat)
            assert found == {0, 1, 2, 3, None}


@pytest.mark.parametrize("schedule", [parity.case("gpipe", default=False), "1f1b"])
def test_activations_in_flight_follow_the_schedule(schedule, monkeypatch):
    """Counts the microbatches of which a stage's residuals live, whoever holds them."""
    peaks, residuals, do = {}, {}, StepExecution.do

    def counted(self, op):
        result = do(self, op)
        own = residuals.setdefault(op.chunk, {})
        if op.kind == "F":
            kept, *_ = self._residuals[op.chunk, op.microbatch]
            own[op.microbatch] = [weakref.ref(leaf) for leaf in jax.tree.leaves(kept)]
        held = sum(any(leaf() is not None for leaf in leaves) for leaves in own.values())
        peaks[op.chunk] = max(peaks.get(op.chunk, 0), held)
        return result

    monkeypatch.setattr(StepExecution, "do", counted)
    stages, parts = 4, 8
    fields = {"data.global_batch": 32, "model.dropout": 0.3}
    with started("mlp", layout(schedule, stages, parts=parts), **fields) as (_, engine, state):
        one_step(engine, state)
        plan = engine.step.schedule
    wanted = tuple(parts if schedule == "gpipe" else stages - stage for stage in range(stages))
    assert in_flight(plan) == wanted
    assert tuple(peaks[stage] for stage in range(stages)) == wanted


@pytest.mark.parity
@pytest.mark.parametrize(
    ("model", "precision", "zero"),
    [
        ("mlp", "bf16", 3),
        *(parity.case("mlp", *others, default=False) for others in (("f32", 0), ("f32", 3), ("bf16", 0))),
        parity.case("swin", "bf16", 3, default=False),
    ],
)
def test_a_microbatch_in_flight_holds_no_parameter(model, precision, zero, monkeypatch):
    """What it keeps doubles with the batch: whatever does not is no activation, and may not be larger than a few vectors."""
    do, sizes = StepExecution.do, {}

    def weighed(self, op):
        result = do(self, op)
        if op.kind == "F":
            kept = self._residuals[op.chunk, op.microbatch][0]
            sizes[op.chunk] = sum(leaf.nbytes for leaf in kept)
        return result

    monkeypatch.setattr(StepExecution, "do", weighed)
    found = []
    for batch in (32, 64):
        where = layout(data=2, zero=zero, boundaries=(4,))
        fields = {"data.global_batch": batch, "train.precision": precision, "model.width": 64 if model == "mlp" else 32}
        with started(model, where, **fields) as (_, engine, state):
            parameters = [
                sum(leaf.nbytes for leaf in jax.tree.leaves(p.params)) for p in _stage_states(engine.step, state)
            ]
            one_step(engine, state)
        found.append(dict(sizes))
    for chunk, whole in enumerate(parameters):
        constant = 2 * found[0][chunk] - found[1][chunk]
        assert constant < 0.01 * whole, (found, parameters)


def _stage_states(step, state):
    leaves = jax.tree.leaves(state)
    return [step.state_of(stage, leaves) for stage in step.stages]


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parity
def test_a_checkpoint_fits_any_number_of_stages(tmp_path):
    """Four stages on eight devices, then one with ZeRO-3 on two, then two stages on two: the loss curve of one device."""
    whole = runs.here(tmp_path / "whole", runs.EXACT, model__name="tiny:resnet18")
    assert whole.result["steps"] == 12
    ways = [
        (4, 8, {"layout.stages": 4, "layout.microbatches": 4, "layout.zero": 1}),
        (8, 2, {"layout.zero": 3}),
        (12, 2, {"layout.stages": 2, "layout.microbatches": 2, "layout.schedule": "gpipe"}),
    ]
    for last, devices, fields in ways:
        more = runs.EXACT | fields | {"train.steps": last, "model.name": "tiny:resnet18"}
        runs.here(tmp_path / "run", more, devices=devices)
    np.testing.assert_allclose(runs.losses(tmp_path / "run"), runs.losses(tmp_path / "whole"), rtol=1e-12)
    evaluated = [
        evaluate(tmp_path / name, "test", checkpoint="latest", trust=True).result.loss for name in ("run", "whole")
    ]
    np.testing.assert_allclose(*evaluated, rtol=1e-12)


@pytest.mark.parity
def test_a_checkpoint_fits_stages_without_parameters(tmp_path):
    fields = runs.SMALL | {k: v for k, v in SPARSE.items() if k != "data.image_size"}
    fields |= {"train.precision": "f64", "optim.ema": 0.9}
    runs.here(tmp_path / "whole", fields)
    for last, stages, boundaries in ((4, 3, "(2, 4)"), (8, 2, "(5,)"), (12, 1, "()")):
        more = {"layout.stages": stages, "layout.boundaries": boundaries, "layout.microbatches": 4}
        runs.here(tmp_path / "run", fields | more | {"train.steps": last}, devices=stages)
    np.testing.assert_allclose(runs.losses(tmp_path / "run"), runs.losses(tmp_path / "whole"), rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------- what is said

REFUSED = [
    (["stages=4"], ["config.layout.stages=4 makes 4 chunks", "3 layers", "at most 3"]),
    (["stages=2", "boundaries=(3,)"], ["config.layout.boundaries=(3,)", "between 1 and 2"]),
    (["stages=2", "boundaries=(1,2)"], ["2 chunks need 1, the first layer"]),
    (["stages=2", "microbatches=3"], ["config.data.global_batch=64", "layout.microbatches=3", "63 and 66"]),
    (["stages=2", "schedule=interleaved_1f1b"], ["config.layout.chunks=1", "--config.layout.chunks=2"]),
    (["stages=2", "chunks=2"], ["layout.chunks=2 makes 4 chunks", "3 layers"]),
    (["stages=3"], ["layout.stages=3", "needs", "devices"]),
]


@pytest.mark.parametrize(("settings_", "parts"), REFUSED, ids=lambda value: " ".join(value)[:50])
def test_what_does_not_fit_is_answered_in_one_sentence(settings_, parts, capsys):
    recipe = ["--config", str(runs.ROOT / "configs" / "mlp_synthetic.py"), "--config.data.examples=64"]
    assert runs.command_line(["layout", *recipe, *(f"--config.layout.{field}" for field in settings_)]) == 64
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(part in said for part in parts), said


@pytest.mark.parity
@pytest.mark.parametrize(("batch", "per_device"), [(16, 1), (32, 2)])
def test_a_plan_asks_no_more_of_batch_norm_than_the_run(batch, per_device, capsys):
    """The last blocks see one pixel. A group of 2 or 4 examples has enough of them, however few a device has."""
    words = ["--config", str(runs.ROOT / "configs" / "resnet18_cifar10.py"), "--devices", "8", "--json"]
    fields = {"data.image_size": 8, "data.global_batch": batch, "model.width": 8, "model.bn_groups": 8}
    fields |= {"layout.stages": 2, "layout.microbatches": 4, "layout.data": 4}
    assert runs.command_line(["layout", *words, *(f"--config.{k}={v}" for k, v in fields.items())]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["microbatches"] == 4
    assert batch // 4 // found["mesh"]["data"] == per_device


@pytest.mark.parametrize("stages", [1, 2])
def test_a_plan_refuses_what_the_run_refuses(stages, tmp_path):
    """Statistics over single values, in the same words."""
    fields = {"model.name": "resnet18", "model.width": 8, "model.depths": (1, 1, 1, 1), "model.bn_groups": 8}
    fields |= {"data.name": "synthetic", "data.examples": 64, "data.image_size": 8, "data.global_batch": 8}
    fields |= {"layout.stages": stages}
    with pytest.raises(ConfigError, match="would take its statistics over a single value") as trained:
        runs.here(tmp_path, fields, devices=4)
    with pytest.raises(ConfigError) as planned:
        describe_layout(from_dict(nested_dicts(load_config(runs.RECIPE, fields))), jax.devices()[:4])
    assert str(planned.value) == str(trained.value)


def test_a_stage_without_parameters_is_in_the_table(capsys):
    fields = SPARSE | {"data.name": "synthetic", "data.examples": 64, "layout.stages": 3, "layout.boundaries": "(2, 4)"}
    words = ["--config", str(runs.RECIPE), *(f"--config.{k}={v}" for k, v in fields.items()), "--devices", "3"]
    assert runs.command_line(["layout", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, middle, last = found["bytes_by_stage"]["params"].values()
    assert (middle, first + last) == (0, 4 * found["parameters"])
    assert first > 0 < last
    assert "stage 1: layers_02-03, 0 parameters" in found["stages"][1]
    assert runs.command_line(["layout", *words]) == 0
    totals = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("params ")]
    assert totals == [[f"{count / 2**20:.2f}" for count in (first, 0, last)]]


def test_a_batch_norm_that_allows_one_microbatch_is_said(tmp_path):
    fields = runs.SMALL | {"layout.stages": 2, "layout.microbatches": 0, "train.steps": 1}
    runs.here(tmp_path / "bn", fields | {"model.name": "tiny:resnet", "model.width": 4}, devices=2)
    runs.here(tmp_path / "mlp", fields, devices=2)
    bn, mlp = ((tmp_path / name / "logs" / "process_0.log").read_text() for name in ("bn", "mlp"))
    assert "1 microbatch for 2 pipeline stages: the stages work one after the other" in bn
    assert "--config.model.bn_groups=8" in bn
    assert "one after the other" not in mlp
    assert "INFO stage 1: layers_0" in mlp


def test_planned_and_recorded_schedules_are_drawn(tmp_path, capsys):
    fields = runs.SMALL | {"layout.stages": 2, "layout.microbatches": 4}
    runs.here(tmp_path / "run", fields | {"layout.trace_step": 3, "train.steps": 4}, devices=2)
    timeline = read_trace(tmp_path / "run")
    assert len(timeline.events) == 2 * 2 * 4
    assert 0 <= timeline.bubble < 1
    for before, after in itertools.pairwise(sorted((e.start, e.end) for e in timeline.events if e.stage == 0)):
        assert before[1] <= after[0]
    command = ["layout", *runs.arguments(tmp_path, fields)[:2], *(f"--config.{k}={v}" for k, v in fields.items())]
    for more, panels in (([], 1), (["--trace", str(tmp_path / "run")], 2)):
        out = tmp_path / f"{panels}.svg"
        assert runs.command_line([*command, "--devices", "2", "--schedule-plot", str(out), *more]) == 0
        assert out.read_text().count("bubble") >= panels
    assert runs.command_line([*command, "--devices", "2", "--trace", str(tmp_path)]) == 64
    capsys.readouterr()
