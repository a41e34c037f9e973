"""What devices hold under each ZeRO stage, against the formula; and the audit that compares the two in every run."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.checkpoint.resume_point import Position, ResumePoint
from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.data import registry
from jaxtrain.parallel.audit import AuditError, audit, count_collectives, held_bytes
from jaxtrain.parallel.layout import Layout
from jaxtrain.step.train_state import TrainState
from jaxtrain.step.train_step import MeshTrainStep
from jaxtrain.training.compiled import CompiledRun, compile_run
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.setup import RunSpec, make_run_spec
from jaxtrain.training.startup_report import layout_table

FRESH = ResumePoint(None, Position(), None)
MODELS = {
    "mlp": ModelConfig("mlp", width=256),  # 235,146 parameters; only the last layer's ten biases ever do not divide
    "resnet": ModelConfig("resnet18", width=8, depths=(1, 1, 1, 1), bn_groups=2),
}


def config(
    model: str = "mlp", optimizer: str = "adamw", *, ema: float = 0.0, momentum: float = 0.9, **layout
) -> Config:
    return Config(
        data=DataConfig(name="synthetic", global_batch=16, examples=32, image_size=8 if model == "resnet" else 0),
        model=MODELS[model],
        optim=OptimConfig(optimizer, ema=ema, momentum=momentum),
        train=TrainConfig(precision="f32"),
        layout=LayoutConfig(**layout),
    )


@dataclasses.dataclass
class Started:
    run: RunSpec
    engine: CompiledRun
    state: TrainState

    @property
    def step(self) -> MeshTrainStep:
        return self.engine.step

    @property
    def layout(self) -> Layout:
        return self.run.layout

    def audit(self, **changed):
        """The audit, with some of its arguments exchanged."""
        table = layout_table(self.run, self.state)
        given = {"layout": self.layout, "table": table, "state": self.state, "step": self.step}
        return audit(**given | changed)

    def batches(self):
        return self.engine.batches(first_step=0, first_example=0, steps=3)


@contextlib.contextmanager
def started(wanted: Config, devices: int) -> Iterator[Started]:
    """A run brought onto the devices, as `train` does it."""
    with settings(wanted):
        run = make_run_spec(
            wanted, registry.load(wanted.data, image_size=wanted.data.image_size), jax.devices()[:devices]
        )
        engine, state = compile_run(run, FRESH)
        yield Started(run, engine, state)


def whole_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def on_each_device(tree) -> set[int]:
    """Bytes of a tree of arrays on each device, as a set: of one number where all devices hold the same."""
    held = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


def formula(tree, ways: int, sharded: bool) -> tuple[float, int]:
    """P or P / N, and the bytes of the leaves that N does not divide: these stay whole."""
    whole = [leaf for leaf in jax.tree.leaves(tree) if not any(n % ways == 0 for n in leaf.shape)]
    return whole_bytes(tree) / (ways if sharded else 1), whole_bytes(whole) if sharded else 0


# -------------------------------------------------------------------------------------------------------------- bytes

SHARDED_FROM = {"opt_state": 1, "gradients": 2, "params": 3}


@pytest.mark.parametrize(
    "devices", [pytest.param(2, marks=pytest.mark.parity), pytest.param(4, marks=pytest.mark.parity), 8]
)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bytes_per_device_are_the_formulas(zero, devices):
    with started(config(zero=zero, microbatches=2), devices) as it:
        state, accumulator = it.state, it.step.programs["zeros"]().gradients
        for batch in it.batches():
            state, metrics = it.step(state, batch, it.engine.inputs.resident)
        assert int(metrics["made"]) == 1
        found = it.audit(state=state)
        assert found.notes == ()
        trees = {"params": state.params, "opt_state": state.opt_state, "gradients": accumulator}
        for name, tree in trees.items():
            share, indivisible = formula(tree, devices, zero >= SHARDED_FROM[name])
            (held,) = on_each_device(tree)
            assert held == pytest.approx(share + indivisible, rel=0.01), name
            assert found.bytes_per_device[name] == held
            assert indivisible < 0.01 * whole_bytes(tree)
            assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(tree)} == {devices}
        # the same from the programs: what each is given, by the compiler's own account
        expected = {name: sum(formula(tree, devices, zero >= SHARDED_FROM[name])) for name, tree in trees.items()}
        given = {name: program.memory_analysis().argument_size_in_bytes for name, program in it.step.programs.items()}
        assert given["update"] == pytest.approx(sum(expected.values()), rel=0.01)
        resident = whole_bytes(it.engine.inputs.resident)
        assert given["gradients"] == pytest.approx(expected["params"] + expected["gradients"] + resident, rel=0.01)
        assert whole_bytes(state.params) == 4 * 235_146
        assert whole_bytes(state.opt_state) == pytest.approx(2 * whole_bytes(state.params), rel=0.01)


def test_one_program_holds_no_accumulator():
    with started(config(zero=3, ema=0.9), 8) as it:
        params, average = whole_bytes(it.state.params), whole_bytes(it.state.ema)
        given = it.step.programs["step"].memory_analysis()
        resident = whole_bytes(it.engine.inputs.resident)
        assert average == params
        assert given.argument_size_in_bytes == pytest.approx((3 * params + average) / 8 + resident, rel=0.01)
        # the state is donated: the new one takes its place
        assert given.alias_size_in_bytes == pytest.approx((3 * params + average) / 8, rel=0.01)


def test_hybrid_holds_what_one_replica_group_holds():
    with started(config(zero=3, replica=2), 8) as it:
        (held,) = on_each_device(it.state.params)
        assert held == pytest.approx(whole_bytes(it.state.params) / 4, rel=0.01)


# --------------------------------------------------------------------------------------------------------- collectives


def sharded(it: Started, tree: str) -> int:
    return sum("data" in leaf.spec for leaf in layout_table(it.run, it.state)[tree])


@pytest.fixture(scope="module")
def resnet():
    with started(config("resnet", ema=0.9, zero=1), 4) as it:
        yield it


def test_zero1_gathers_each_parameter_once(resnet):
    """One all-gather for each leaf whose optimizer state is sharded; not another for its gradient."""
    found = resnet.audit().collectives["step"]
    moments = sharded(resnet, "opt_state")
    assert found["all-gather"] == moments / 2 == 37


def test_every_leaf_keeps_its_place_type_and_shape_over_steps(resnet):
    before = jax.tree.leaves(jax.tree.map(_described, resnet.state), is_leaf=_is_described)
    state = jax.tree.map(jnp.copy, resnet.state)  # which is donated
    for batch in resnet.batches():
        state, _ = resnet.step(state, batch, resnet.engine.inputs.resident)
    after = jax.tree.leaves(jax.tree.map(_described, state), is_leaf=_is_described)
    assert len(before) == len(after) > 150
    for (shape, dtype, sharding), found in zip(before, after, strict=True):
        assert (shape, dtype) == found[:2]
        assert sharding.is_equivalent_to(found[2], len(shape))


def _described(leaf):
    return leaf.shape, leaf.dtype, leaf.sharding


def _is_described(node) -> bool:
    return isinstance(node, tuple) and len(node) == 3 and isinstance(node[2], jax.sharding.Sharding)


def test_gradients_are_not_gathered_where_the_accumulator_is_sharded():
    """Pinned to whole first: or XLA gathers whatever a convolution's gradient needs, 84 times here."""
    with started(config("resnet", "sgd", zero=2, microbatches=2), 4) as it:
        found = it.audit().collectives
        assert found["gradients"].get("all-gather", 0) == 0
        assert found["update"]["all-gather"] == sharded(it, "opt_state")


def test_zero3_gathers_parameters_and_not_updates():
    with started(config("mlp", "sgd", zero=3, microbatches=2), 4) as it:
        found = it.audit().collectives
        assert found["gradients"]["all-gather"] >= sharded(it, "params") == 5
        assert "all-gather" not in found["update"]


def test_without_layout_there_are_no_collectives():
    with started(config(), 1) as it:
        assert it.audit().collectives == {"step": {}}


def test_collectives_are_counted_by_kind():
    hlo = """
  %all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  ROOT %ag = (f32[4]{0}, f32[8]{0}) all-gather-start(%all-reduce.1), dimensions={0}
  %done = f32[8]{0} all-gather-done(%ag)
  %rs = f32[2]{0} reduce-scatter(%x), dimensions={0}
  %y = f32[8]{0} add(%all-reduce.1, %done), metadata={op_name="all-gather"}
"""
    assert count_collectives(hlo) == {"all-reduce": 1, "all-gather": 1, "reduce-scatter": 1}


# --------------------------------------------------------------------------------------------------------------- audit

GOOD = {
    "one device": (1, {}),
    "hybrid": (8, {"zero": 3, "replica": 2}),
    "tensor": (2, {"tensor": 2}),
    "tensor-zero3": (8, {"tensor": 2, "zero": 3}),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_audit_passes_what_is_as_asked(name):
    devices, layout = GOOD[name]
    with started(config(ema=0.9, **layout), devices) as it:  # it audits itself: it would have raised
        found = it.audit()
        (params,), (opt_state,) = on_each_device(it.state.params), on_each_device(it.state.opt_state)
        assert found.bytes_per_device["params"] == params
        assert found.bytes_per_device["opt_state"] == opt_state
        assert "gradients" not in found.bytes_per_device
        assert all("microbatches=1" in note for note in found.notes)


@pytest.mark.parametrize(
    ("fields", "devices", "note"),
    [
        (
            {"zero": 2},
            4,
            "layout.zero=2 shards the gradient accumulator, and with microbatches=1 there is none: it acts as zero=1",
        ),
        (
            {"zero": 3},
            4,
            "layout.zero=3 shards the gradient accumulator, and with microbatches=1 there is none: the gradients stay whole",
        ),
        ({"zero": 2}, 1, "layout.zero=2 has nothing to shard over: layout.data=1."),
        (
            {"zero": 1, "optimizer": "sgd", "momentum": 0.0},
            4,
            "layout.zero=1 has nothing to shard: the optimizer keeps no state",
        ),
    ],
)
def test_what_can_have_no_effect_is_said_in_one_line(caplog, fields, devices, note):
    caplog.set_level("INFO", logger="jaxtrain")
    with started(config(**fields), devices) as it:
        (said,) = it.audit().notes
        assert said.startswith(note)
        assert "\n" not in said
        assert said in caplog.messages  # where the user sees it


@pytest.fixture(scope="module")
def zero0():
    with started(config(microbatches=2), 4) as it:
        yield it


@pytest.fixture(scope="module")
def zero3():
    with started(config(zero=3, microbatches=2), 4) as it:
        yield it


def failure(it: Started, **changed) -> str:
    with pytest.raises(AuditError) as caught:
        it.audit(**changed)
    assert caught.value.exit_code == 70
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_state_that_lies_elsewhere_fails_with_the_leafs_name(zero3):
    whole = jax.device_put(zero3.state, zero3.layout.sharding())
    assert "params/layers_00/linear/bias holds 1024 bytes per device" in failure(zero3, state=whole)
    one_leaf = dataclasses.replace(zero3.state, opt_state=whole.opt_state)
    assert "opt_state/0/mu/layers_00/linear/bias holds" in failure(zero3, state=one_leaf)


def test_a_step_compiled_for_another_layout_fails(zero0, zero3):
    """The state is sharded, but the step would leave it whole; and the other way round."""
    said = failure(zero3, step=zero0.step)
    assert "params after a step: layers_00/linear/bias" in said
    assert "the layout says P" in said
    assert said.endswith("('data',).")
    assert "after a step: " in failure(zero0, step=zero3.step)


def test_a_whole_accumulator_fails(zero0, zero3):
    step = dataclasses.replace(zero3.step, accumulator=zero0.step.accumulator)
    assert "gradients: layers_00/linear/bias" in failure(zero3, step=step)


def test_a_layout_that_shards_nothing_fails_with_the_settings_name(monkeypatch):
    """ZeRO asked for, and every leaf left whole: what a broken table would give."""
    monkeypatch.setattr(Layout, "_with_data", lambda self, path, compute, shape: compute)
    with pytest.raises(AuditError, match=r"layout\.zero=3 had no effect on opt_state"), started(config(zero=3), 4):
        pass


def test_a_step_that_reduces_nothing_fails(zero0):
    """Each device would go its own way."""
    with started(config(data=1, microbatches=2), 1) as alone:
        quiet = dataclasses.replace(zero0.step, programs=alone.step.programs)
    assert "layout.data=4: no program reduces the gradients" in failure(zero0, step=quiet)


def test_a_step_that_gathers_nothing_fails(zero3, zero0):
    quiet = dataclasses.replace(zero3.step, programs=zero0.step.programs)
    assert "layout.zero=3 had no effect: no program gathers" in failure(zero3, step=quiet)


def test_a_tensor_setting_without_effect_fails():
    with started(config(tensor=2, data=1), 2) as it, started(config(data=1), 1) as alone:
        bare = dataclasses.replace(it.step, programs=alone.step.programs)
        assert "layout.tensor=2 had no effect" in failure(it, step=bare)
        # The collectives of a pipeline's update say nothing about its gradients.
        for name in ("decide", "finish", "stage 0: measure", "stage 1: update"):
            updating = dataclasses.replace(bare, programs={**bare.programs, name: it.step.programs["step"]})
            assert "layout.tensor=2 had no effect" in failure(it, step=updating)


def test_held_bytes_is_the_most_that_a_device_holds():
    layout = Layout(jax.sharding.Mesh(jax.devices()[:2], ("data",)), LayoutConfig())
    halves = jax.device_put(jnp.zeros(8, jnp.float32), layout.sharding(jax.P("data")))
    assert (held_bytes(halves), held_bytes(jax.device_put(halves, layout.sharding()))) == (16, 32)


@pytest.mark.parametrize(
    ("wanted", "devices"),
    [
        (config(), 1),
        pytest.param(config("resnet", "sgd"), 1, marks=pytest.mark.parity),
        (config(zero=3), 2),
        (config(microbatches=2), 1),
    ],
    ids=["one", "resnet", "zero3", "microbatches"],
)
def test_the_new_state_is_written_where_the_old_one_lay(wanted, devices):
    """XLA copies a leaf that something may still read; once it copied all parameters and moments at each step."""
    with started(wanted, devices) as run:
        text = "\n".join(program.as_text() for program in run.step.programs.values())
    assert re.findall(r"\[\d\S* copy\(%?(state_\w*(?:params|opt_state)\w*)", text) == []
