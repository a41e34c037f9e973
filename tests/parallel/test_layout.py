"""The layout's table: which leaf is split over which axis, and what is refused or reported by name."""

import dataclasses
import itertools
import math
import random
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.data import registry
from jaxtrain.errors import ConfigError
from jaxtrain.host.nccl import chosen, set_nccl
from jaxtrain.optim.optimizers import OPTIMIZERS
from jaxtrain.parallel.layout import LARGE_LEAF_BYTES, Layout, bytes_per_device, check_batch
from jaxtrain.parallel.mesh import AXES, batch_ways, make_mesh, mesh_shape
from jaxtrain.training.layout_report import describe_layout
from jaxtrain.training.setup import make_run_spec, unused_settings
from jaxtrain.training.startup_report import collectives, layout_table, summary

TREES = ("params", "opt_state", "ema", "gradients")


def layout(rules=(), **fields) -> Layout:
    config = LayoutConfig(**fields)
    count = math.prod(max(size, 1) for size in (config.data, config.replica, config.tensor))
    return Layout(make_mesh(config, jax.devices()[:count]), config, config.rules + tuple(rules))


MLP = Config(
    data=DataConfig(name="synthetic", global_batch=48, examples=96),
    model=ModelConfig("mlp", width=16),
    optim=OptimConfig("adamw", ema=0.9),
    train=TrainConfig(precision="f32"),
)
MODELS = {
    "mlp": MLP.model,
    "resnet": ModelConfig("resnet18", width=8, depths=(1, 1, 1, 1)),
    "vgg": ModelConfig("vgg11_bn", width=4),
    "swin": ModelConfig("swin_tiny", depths=(1, 1, 1, 1)),  # as wide as Swin-T: 3, 6, 12 and 24 heads
}


def describe(model="mlp", devices=8, optimizer="adamw", **fields) -> dict[str, dict]:
    """The leaves of `jaxtrain layout --json`, by path."""
    config = dataclasses.replace(
        MLP,
        model=MODELS[model],
        data=dataclasses.replace(MLP.data, image_size=0 if model == "mlp" else 32),
        optim=dataclasses.replace(MLP.optim, name=optimizer),
        layout=LayoutConfig(**fields),
    )
    return {leaf["path"]: leaf for leaf in describe_layout(config, jax.devices()[:devices])["leaves"]}


def axes(leaf) -> set[str]:
    return {axis for axis in leaf["spec"] if axis}


# ---------------------------------------------------------------------------------------------------------------- mesh


@pytest.mark.parametrize(
    ("fields", "devices", "shape"),
    [
        ({}, 8, (1, 1, 8, 1)), ({}, 1, (1, 1, 1, 1)),
        ({"tensor": 2}, 8, (1, 1, 4, 2)), ({"replica": 2}, 8, (1, 2, 4, 1)),
        ({"replica": 2, "tensor": 2}, 8, (1, 2, 2, 2)), ({"replica": 4, "tensor": 2}, 8, (1, 4, 1, 2)),
        ({"data": 3, "tensor": 2}, 6, (1, 1, 3, 2)),
    ],
)  # fmt: skip
def test_data_fills_the_devices(fields, devices, shape):
    assert mesh_shape(LayoutConfig(**fields), devices) == shape


def test_tensor_neighbours_are_next_to_each_other():
    mesh = make_mesh(LayoutConfig(replica=2, tensor=2), jax.devices())
    assert mesh.axis_names == AXES == ("stage", "replica", "data", "tensor")
    ids = [device.id for device in mesh.devices.ravel()]
    assert ids == list(range(8))
    assert [device.id for device in mesh.devices[0, 1, 0]] == [4, 5]
    assert batch_ways(mesh) == 4


@pytest.mark.parametrize(
    ("fields", "devices", "fix"),
    [
        ({"data": 3}, 8, "use --config.layout.data=8 or --devices 3"),
        ({"data": 4, "tensor": 4}, 8, "use --config.layout.data=2."),
        ({"tensor": 3}, 8, "divide 8 are 2 and 4"),
        ({"replica": 3, "tensor": 2}, 8, "divide 8 are 4 and 8"),
        ({"replica": 9}, 8, "divide 8 are 8."),
        ({"tensor": 2}, 1, "divide 1 are 1."),
    ],
)
def test_a_mesh_that_does_not_multiply(fields, devices, fix):
    with pytest.raises(ConfigError) as caught:
        mesh_shape(LayoutConfig(**fields), devices)
    assert f"the run has {devices}" in str(caught.value)
    assert fix in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- ZeRO


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_says_which_trees_carry_the_data_axis(zero):
    leaves = describe(zero=zero)
    sharded = {tree: any("data" in axes(leaf) for leaf in leaves.values() if leaf["tree"] == tree) for tree in TREES}
    assert sharded == {"params": zero >= 3, "opt_state": zero >= 1, "ema": zero >= 1, "gradients": zero >= 2}
    for tree in TREES:
        if sharded[tree]:  # and then every leaf that divides does
            prefix = {"opt_state": "opt_state/0/mu", "ema": "ema/params"}.get(tree, tree)
            assert leaves[f"{prefix}/layers_00/linear/kernel"]["spec"] == ["data", None]
            assert leaves[f"{prefix}/layers_01/linear/bias"]["spec"] == ["data"]
            assert leaves[f"{prefix}/layers_02/linear/bias"]["spec"] == [None]  # 10 does not divide by 8
    assert not axes(leaves["step"])


def test_batch_statistics_are_never_sharded_over_data():
    leaves = describe("resnet", zero=3)
    found = [leaf for leaf in leaves.values() if leaf["tree"] == "batch_stats"]
    assert len(found) == 2 * 12
    assert not any(axes(leaf) for leaf in found)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), P()), ((8,), P("data")), ((4,), P(None)), ((12,), P(None)), ((1, 1), P(None, None)),
        ((784, 16), P("data", None)), ((16, 784), P(None, "data")),
        ((16, 16), P(None, "data")),  # of equals, the last
        ((3, 3, 8, 16), P(None, None, None, "data")), ((3, 3, 16, 8), P(None, None, "data", None)),
        ((784, 1001), P("data", None)),  # the largest does not divide: the largest that does
        ((7, 9, 8), P(None, None, "data")), ((0, 8), P(None, "data")),
    ],
)  # fmt: skip
def test_the_largest_dim_that_divides_is_split(shape, spec):
    place = layout(data=8, zero=3).place("params", "layers_00/kernel", shape, jnp.float32)
    assert place.spec == spec
    assert place.compute_spec == P(*[None] * len(shape))  # while computing, a ZeRO leaf is whole
    assert place.bytes_total == 4 * math.prod(shape)
    assert place.bytes_per_device == place.bytes_total // (8 if "data" in spec else 1)


def test_a_large_leaf_that_cannot_be_sharded_is_named():
    zero3 = layout(data=8, zero=3)
    side = math.isqrt(LARGE_LEAF_BYTES // 4) | 1  # odd, and just large enough
    large = zero3.place("params", "a", (side, side + 2), jnp.float32)
    assert large.spec == P(None, None)
    assert large.note == "no dim divides by data=8: kept whole"
    assert zero3.place("params", "a", (9, 9), jnp.float32).note == ""
    assert layout(data=8, zero=2).place("params", "a", (side, side + 2), jnp.float32).note == ""  # nor asked for
    assert zero3.place("params", "a", (side + 2, side + 1, 8), jnp.float32).note == ""


def test_it_is_named_where_the_user_looks():
    """784 x 512 values of 4 bytes do not divide by three devices."""
    config = dataclasses.replace(MLP, model=ModelConfig("mlp", width=512), layout=LayoutConfig(zero=3))
    leaves = {leaf["path"]: leaf for leaf in describe_layout(config, jax.devices()[:3])["leaves"]}
    assert leaves["params/layers_00/linear/kernel"]["note"] == "no dim divides by data=3: kept whole"
    run = make_run_spec(config, registry.load(config.data), jax.devices()[:3])
    lines = summary(run, layout_table(run, jax.eval_shape(run.init, 0)), "")
    assert "params/layers_00/linear/kernel and 3 other leaves: no dim divides by data=3: kept whole" in lines


# -------------------------------------------------------------------------------------------------------------- hybrid


@pytest.mark.parametrize("zero", [1, 3])
def test_hybrid_shards_inside_a_replica_group(zero):
    hybrid, flat = describe(replica=2, zero=zero), describe(devices=4, zero=zero)
    assert hybrid == flat  # the same specs and bytes on twice as many devices
    assert not any("replica" in axes(leaf) for leaf in hybrid.values())


def test_the_batch_is_split_over_replica_and_data():
    found = layout(replica=2, data=2, tensor=2)
    assert found.batch.spec == P(None, ("replica", "data"))
    assert found.batch.shard_shape((3, 16, 5)) == (3, 4, 5)
    assert found.examples.shard_shape((16, 5)) == (4, 5)
    assert found.sharding().is_fully_replicated


# -------------------------------------------------------------------------------------------------------------- tensor


def test_swin_splits_heads_and_hidden_units():
    leaves = describe("swin", tensor=2)
    blocks = {int(m[1]): None for path in leaves if (m := re.match(r"params/layers_(\d+)/attn/qkv/kernel", path))}
    specs = {
        "attn/qkv/kernel": [None, None, "tensor", None],
        "attn/qkv/bias": [None, "tensor", None],
        "attn/bias_table": [None, "tensor"],
        "attn/proj/kernel": ["tensor", None, None],
        "attn/proj/bias": [None],
        "fc1/kernel": [None, "tensor"],
        "fc1/bias": ["tensor"],
        "fc2/kernel": ["tensor", None],
        "fc2/bias": [None],
        "norm1/scale": [None],
    }
    heads = [leaves[f"params/layers_{block:02d}/attn/qkv/kernel"]["shape"][2] for block in blocks]
    assert heads == [3, 6, 12, 24]
    for block, count in zip(blocks, heads, strict=True):
        for name, spec in specs.items():
            leaf = leaves[f"params/layers_{block:02d}/{name}"]
            if count == 3 and name.startswith("attn"):  # three heads: the layer stays whole, and is named
                assert not axes(leaf)
                assert leaf["note"] == ("" if name == "attn/proj/bias" else "3 does not divide by tensor=2: kept whole")
            else:
                assert (leaf["spec"], leaf["note"]) == (spec, "")


def test_three_heads_do_divide_by_three():
    leaves = describe("swin", devices=3, tensor=3)
    split = [path for path, leaf in leaves.items() if leaf["tree"] == "params" and "tensor" in axes(leaf)]
    assert "params/layers_01/attn/qkv/kernel" in split
    assert not any(leaf["note"] for leaf in leaves.values())


def test_mlp_and_vgg_split_the_hidden_units_of_their_classifier():
    for model, first in (("mlp", 0), ("vgg", 8)):
        leaves = describe(model, tensor=2)
        split = {path: leaf["spec"] for path, leaf in leaves.items() if leaf["tree"] == "params" and axes(leaf)}
        assert split == {
            f"params/layers_{first:02d}/linear/kernel": [None, "tensor"],
            f"params/layers_{first:02d}/linear/bias": ["tensor"],
            f"params/layers_{first + 1:02d}/linear/kernel": ["tensor", None],
        }


def test_resnet_splits_the_channels_between_two_convolutions():
    leaves = describe("resnet", tensor=2)
    assert leaves["params/layers_01/conv1/kernel"]["spec"] == [None, None, None, "tensor"]
    assert leaves["params/layers_01/conv2/kernel"]["spec"] == [None, None, "tensor", None]
    for path in ("params/layers_01/bn1/scale", "batch_stats/layers_01/bn1/mean", "ema/batch_stats/layers_01/bn1/var"):
        assert leaves[path]["spec"] == ["tensor"]
    for path in ("params/layers_00/conv/kernel", "params/layers_01/bn2/scale", "batch_stats/layers_01/bn2/mean"):
        assert not axes(leaves[path])


def test_tensor_and_zero_take_different_dims():
    kernel = describe("resnet", tensor=2, zero=3)["params/layers_04/conv1/kernel"]
    assert kernel["spec"] == [None, None, "data", "tensor"]
    assert kernel["bytes_per_device"] == 4 * math.prod(kernel["shape"]) // 8


def test_tensor_that_splits_no_layer_is_refused():
    config = dataclasses.replace(MLP, model=ModelConfig("mlp", width=17), layout=LayoutConfig(tensor=2))
    with pytest.raises(ConfigError, match=r"tensor=2 splits no layer \(.*layers_00/linear/kernel: 17 does not"):
        describe_layout(config, jax.devices())


# ---------------------------------------------------------------------------------------------------------- user rules


def test_of_rules_the_first_match_wins_and_the_users_come_first():
    rules = (("layers_00/linear/kernel$", ("tensor", None)), ("linear/kernel$", (None, "tensor")))
    leaves = describe(tensor=2, rules=rules)
    assert leaves["params/layers_00/linear/kernel"]["spec"] == ["tensor", None]  # the model says (None, tensor)
    assert leaves["params/layers_01/linear/kernel"]["spec"] == [None, "tensor"]  # the model says (tensor, None)
    assert leaves["params/layers_02/linear/kernel"]["spec"] == [None, "tensor"]  # the model says nothing
    assert leaves["params/layers_00/linear/bias"]["spec"] == ["tensor"]  # the model's own still holds
    assert leaves["opt_state/0/nu/layers_02/linear/kernel"]["spec"] == [None, "tensor"]


def test_a_rule_can_keep_a_leaf_whole():
    leaves = describe(tensor=2, rules=(("layers_00/linear/bias", (None,)),))
    assert leaves["params/layers_00/linear/bias"]["spec"] == [None]
    assert leaves["params/layers_00/linear/kernel"]["spec"] == [None, "tensor"]


def test_a_rule_can_choose_the_dim_of_zero():
    rules = (("layers_00/linear/kernel$", (None, "data")), ("layers_02/linear/kernel$", (None, "data")))
    leaves = describe(zero=3, rules=rules)
    assert leaves["params/layers_00/linear/kernel"]["spec"] == [None, "data"]  # 784 is larger, and divides
    assert leaves["params/layers_02/linear/kernel"]["spec"] == ["data", None]  # 10 does not divide: the fall-back
    whole = describe(zero=0, rules=rules)
    assert not axes(whole["params/layers_00/linear/kernel"])  # which trees carry it is for `zero` to say


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (("no/such/leaf", ("tensor",)), "'no/such/leaf' matches no parameter"),
        (("layers_00/linear/kernel", ("tensor",)), r"has 1 dims but layers_00/linear/kernel has shape \(784, 16\)"),
        (("linear", (None, "tensor")), r"has 2 dims but layers_00/linear/bias has shape \(16,\)"),
    ],
)
def test_a_wrong_rule_is_refused(tensor, rule, said):
    with pytest.raises(ConfigError, match=rf"config\.layout\.rules: .*{said}"):
        describe(tensor=tensor, rules=(rule,))


# --------------------------------------------------------------------------------------------------- properties of all


def test_no_axis_twice_and_every_split_divides():
    """Over random shapes, rules and meshes."""
    draw = random.Random(0)
    meshes = [
        {"data": d, "tensor": t, "replica": r}
        for d, t, r in itertools.product((1, 2, 4, 8), repeat=3)
        if d * t * r <= 8
    ]
    seen = set()
    for _ in range(2000):
        fields, zero = draw.choice(meshes), draw.choice([0, 1, 2, 3])
        shape = tuple(draw.choice([1, 2, 3, 4, 6, 8, 16, 24, 64]) for _ in range(draw.randint(0, 4)))
        spec = [None] * len(shape)
        for axis in ("tensor", "data"):
            if shape and draw.random() < 0.5:
                spec[draw.randrange(len(shape))] = axis
        rules = [("kernel", tuple(spec))] if draw.random() < 0.7 else []
        place = layout(rules, zero=zero, **fields).place(draw.choice(TREES), "a/kernel", shape, jnp.float32)
        used = [axis for axis in place.spec if axis]
        assert len(used) == len(set(used))
        assert set(used) <= {"data", "tensor"}
        for size, axis in zip(shape, place.spec, strict=True):
            assert axis is None or size % fields[axis] == 0
        assert place.bytes_per_device * math.prod(fields[axis] for axis in used) == 4 * math.prod(shape)
        assert all(one is None or one == two for one, two in zip(place.compute_spec, place.spec, strict=True))
        seen.add((*sorted(used), zero))
    assert ("data", "tensor", 3) in seen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["resnet", "swin"])
def test_optimizer_state_lies_as_its_parameters_do(model, optimizer):
    leaves = describe(model, optimizer=optimizer, tensor=2, zero=1)
    gradients = {path: leaf for path, leaf in describe(model, tensor=2, zero=2).items() if leaf["tree"] == "gradients"}
    owners = set()
    for path, leaf in leaves.items():
        if leaf["tree"] == "opt_state" and leaf["shape"]:
            owner = next(o for o in gradients if path.endswith(o.removeprefix("gradients")))
            assert (leaf["shape"], leaf["spec"]) == (gradients[owner]["shape"], gradients[owner]["spec"]), path
            owners.add(owner)
    assert owners == set(gradients)  # each of these keeps something for every parameter
    assert any({"data", "tensor"} == axes(leaf) for leaf in leaves.values() if leaf["tree"] == "opt_state")


def test_an_optimizer_may_keep_a_scalar_for_a_parameter():
    """Whatever rule its parameter has."""
    rules = (("kernel$", (None, "tensor")),)
    assert (
        layout(rules, data=2, tensor=2, zero=3).place("opt_state", "0/scale/layers_00/kernel", (), jnp.float32).spec
        == P()
    )


def test_shardings_are_the_tables():
    config = dataclasses.replace(MLP, layout=LayoutConfig(data=4, tensor=2, zero=1))
    run = make_run_spec(config, registry.load(config.data), jax.devices())
    shapes = jax.eval_shape(run.init, 0)
    table, shardings = run.layout.table(shapes), run.layout.shardings(shapes)
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    for name, places in table.items():
        found = jax.tree.leaves(getattr(shardings, name))
        assert [sharding.spec for sharding in found] == [place.spec for place in places]
        assert all(sharding.mesh == run.layout.mesh for sharding in found)
    assert bytes_per_device(table["opt_state"]) == sum(place.bytes_per_device for place in table["opt_state"])


# -------------------------------------------------------------------------------------------------------------- batch


@pytest.mark.parametrize(
    ("batch", "fields", "near"),
    [
        (20, {"data": 8}, "are 16 and 24"),
        (20, {"data": 2, "replica": 4}, "are 16 and 24"),
        (12, {"data": 2, "microbatches": 4}, "are 8 and 16"),
        (4, {"data": 4, "microbatches": 2}, "is 8"),
    ],
)
def test_a_batch_that_does_not_divide_over_the_devices(batch, fields, near):
    with pytest.raises(ConfigError) as caught:
        check_batch(layout(**fields), batch, 1, False)
    assert f"config.data.global_batch={batch}" in str(caught.value)
    assert f"the nearest that do {near}." in str(caught.value)
    check_batch(layout(**fields), 32, 1, False)
    check_batch(layout(tensor=2, data=2), 2, 1, False)  # tensor neighbours see the same examples


def test_microbatches_must_hold_whole_batchnorm_groups():
    four = layout(data=1, microbatches=4)
    for groups in (4, 8):
        check_batch(four, 32, groups, True)
    check_batch(four, 32, 1, False)  # without BatchNorm it does not matter
    for groups in (1, 2, 6):
        with pytest.raises(ConfigError, match=rf"bn_groups={groups} does not .*--config\.model\.bn_groups=4"):
            check_batch(four, 48, groups, True)


# ------------------------------------------------------------------------------------------------------------ reductions


def planned(name: str, **fields):
    """The run of model `name` on eight devices. fields: of the layout."""
    layout_config = LayoutConfig(**fields)
    model = ModelConfig(name, width=16)
    data = dataclasses.replace(MLP.data, image_size=8)
    config = dataclasses.replace(MLP, model=model, data=data, layout=layout_config)
    return make_run_spec(config, registry.load(config.data), jax.devices())


def test_statistics_of_the_models_own_need_the_whole_batch():
    with pytest.raises(ConfigError, match=r"layout\.reduce='ring': layers_02 has statistics of the model's own"):
        planned("tiny:sparse", reduce="ring")


def test_a_reduction_that_has_nothing_to_reduce_says_so():
    one_level = unused_settings(planned("mlp", reduce="hierarchical"))
    assert one_level == [
        "config.layout.reduce='hierarchical' has no effect: layout.replica=1 x layout.data=8 has one level: it acts as 'ring'"
    ]
    assert not unused_settings(planned("mlp", reduce="hierarchical", replica=2, reduce_bucket=1.0))
    unread = unused_settings(planned("mlp", reduce_bucket=1.0, nccl_algo="ring"))
    assert [text.partition(" has")[0] for text in unread] == [
        "config.layout.reduce_bucket=1.0",
        "config.layout.nccl_algo='ring'",
    ]


def test_a_run_says_what_carries_its_collectives():
    assert collectives(planned("mlp").layout) == "XLA:CPU's, in this process; gradients by XLA's"
    text = collectives(planned("mlp", reduce="tree", reduce_bucket=0.5).layout)
    assert text == "XLA:CPU's, in this process; gradients by tree, in buckets of 0.5 MiB"


def test_what_is_asked_of_nccl_goes_to_its_environment(monkeypatch):
    for variable in ("NCCL_ALGO", "NCCL_PROTO"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    set_nccl("auto", "auto")
    assert chosen() == ""
    set_nccl("tree", "auto")
    set_nccl("tree", "simple")
    assert chosen() == "NCCL_ALGO=tree, NCCL_PROTO=simple"
    with pytest.raises(ConfigError, match=r"nccl_algo='ring': the environment has NCCL_ALGO=tree; unset it"):
        set_nccl("ring", "auto")
