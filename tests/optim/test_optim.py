"""Schedules at fixed points; optimizers against torch.optim or the paper's formula; masks, clipping, the average."""

import dataclasses
import functools
import math
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.utils.class_weight import compute_class_weight

from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.data.augment import Preprocess, mix_shares, train_targets
from jaxtrain.errors import ConfigError
from jaxtrain.models.registry import build
from jaxtrain.optim import losses, optimizers, schedules, updates
from jaxtrain.optim.param_groups import ParamGroups
from jaxtrain.optim.schedules import make_schedule
from jaxtrain.step.gradients import scaled_loss

# ------------------------------------------------------------------------------------------------------ learning rate


@pytest.mark.parametrize(
    ("scaling", "batch", "rate"),
    [
        ("linear", 128, 0.1), ("linear", 512, 0.4), ("linear", 1024, 0.8), ("linear", 64, 0.05),
        ("sqrt", 128, 0.1), ("sqrt", 512, 0.2), ("none", 1024, 0.1),
    ],
)  # fmt: skip
def test_the_rate_is_carried_from_the_reference_batch(scaling, batch, rate):
    config = OptimConfig(learning_rate=0.1, lr_reference_batch=128, lr_scaling=scaling)
    assert schedules.peak_learning_rate(config, batch) == pytest.approx(rate, rel=1e-15)


# 100 steps, 10 of warm-up, peak 2. Where a cosine is a half: (1 + cos(pi / 3)) / 2 = 3/4.
FIXED_POINTS = [
    ({"schedule": "constant"}, {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 99: 2.0}),
    ({"schedule": "step", "step_at": (0.3, 0.6), "step_gamma": 0.1}, {0: 0.2, 29: 2.0, 30: 0.2, 59: 0.2, 60: 0.02}),
    ({"schedule": "cosine"}, {0: 0.2, 9: 2.0, 10: 2.0, 40: 1.5, 55: 1.0, 70: 0.5, 100: 0.0, 120: 0.0}),
    ({"schedule": "cosine", "final_scale": 0.5}, {9: 2.0, 40: 1.75, 55: 1.5, 100: 1.0}),
    ({"schedule": "linear"}, {0: 0.2, 10: 2.0, 55: 1.0, 99: 2 / 90, 100: 0.0}),
    ({"schedule": "linear", "final_scale": 0.1}, {55: 1.1, 100: 0.2}),
    ({"schedule": "wsd", "decay_share": 0.2}, {0: 0.2, 10: 2.0, 79: 2.0, 80: 2.0, 90: 1.0, 95: 0.5, 100: 0.0}),
    ({"schedule": "wsd", "decay_share": 1.0}, {9: 2.0, 10: 2.0, 55: 1.0}),
]


@pytest.mark.parametrize(("fields", "points"), FIXED_POINTS)
def test_schedules_at_fixed_points(fields, points):
    rate = schedules.learning_rate_schedule(
        OptimConfig(learning_rate=1.0, lr_reference_batch=128, **fields), 100, 10, 256
    )
    assert {t: rate(t) for t in points} == pytest.approx(points, rel=1e-14, abs=1e-15)
    in_jit = jax.jit(jax.vmap(rate))(jnp.array(list(points), jnp.int32))
    np.testing.assert_allclose(in_jit, list(points.values()), rtol=2e-6, atol=2e-6)


def test_without_warmup_the_first_step_has_the_peak_rate():
    rate = schedules.learning_rate_schedule(OptimConfig(learning_rate=0.3, lr_scaling="none"), 10, 0, 64)
    assert rate(0) == 0.3


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "linear", "wsd"])
def test_a_warmup_longer_than_the_run_goes_on_to_its_end(name):
    config = OptimConfig(learning_rate=1.0, lr_scaling="none", schedule=name, step_at=())
    rates = schedules.learning_rate_schedule(config, 5, 20, 64)(np.arange(5))
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.15, 0.2, 0.25], rtol=1e-15)


def test_a_schedule_computes_in_the_runs_own_precision():
    rate = schedules.learning_rate_schedule(OptimConfig(learning_rate=0.1), 1000, 7, 256)
    assert jax.jit(rate)(jnp.int32(3)).dtype == jnp.float32
    assert isinstance(rate(3), float)
    with jax.enable_x64(True):
        steps = np.arange(1000, dtype=np.int32)
        rates = jax.jit(rate)(jnp.asarray(steps))
        assert rates.dtype == jnp.float64
        np.testing.assert_allclose(rates, rate(steps), rtol=1e-13, atol=1e-17)


# --------------------------------------------------------------------------------------------------------- decay mask

SHAPES = {
    "layers_00/conv/kernel": (3, 3, 2, 4),
    "layers_00/norm/bias": (4,),
    "layers_00/norm/scale": (4,),
    "layers_01/attn/position_table": (9, 2),
    "layers_01/attn/proj/bias": (4,),
    "layers_01/attn/proj/kernel": (2, 2, 4),
    "layers_01/attn/qkv/bias": (3, 2, 2),
    "layers_01/attn/qkv/kernel": (4, 3, 2, 2),
    "layers_02/conv/kernel": (2, 1, 4, 6),
    "layers_03/head/bias": (5,),
    "layers_03/head/kernel": (6, 5),
}
DECAYED = {path for path in SHAPES if path.endswith("kernel")}
HIDDEN = {"layers_01/attn/proj/kernel", "layers_01/attn/qkv/kernel", "layers_02/conv/kernel"}
NO_DECAY = ("position_table$",)


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *keys, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), keys, tree)[name] = leaf
    return tree


def flattened(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def random_leaves(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {path: scale * rng.standard_normal(shape) for path, shape in SHAPES.items()}


def test_weight_decay_applies_to_kernels_alone():
    mask = flattened(optimizers.decay_mask(nested(random_leaves(0)), NO_DECAY))
    assert {path for path, decays in mask.items() if decays} == DECAYED
    assert mask.keys() == SHAPES.keys()
    without = flattened(optimizers.decay_mask(nested(random_leaves(0))))
    assert {path for path, decays in without.items() if decays} == DECAYED | {"layers_01/attn/position_table"}


@pytest.mark.parametrize("name", ["mlp", "vgg11", "vgg11_bn", "resnet18", "swin_tiny"])
def test_weight_decay_applies_to_the_kernels_of_every_model(name):
    config = ModelConfig(name=name, width=32 if name == "swin_tiny" else 8)
    model = build(config, (32, 32, 3), 10, jnp.float32, jnp.float32)
    params, _ = jax.eval_shape(lambda: model.init(jax.random.key(0), (1, 32, 32, 3), jnp.float32))
    mask = flattened(optimizers.decay_mask(params, model.no_decay))
    assert {path for path, decays in mask.items() if decays} == {path for path in mask if path.endswith("/kernel")}


# --------------------------------------------------------------------------------------------------------- optimizers

CLIP = 9.0
GRADIENT_SCALES = (0.5, 2.0, 1.0)  # the first norm is about 8 and is not clipped, the others are


def config_of(name, **fields):
    defaults = {"learning_rate": 0.05, "lr_scaling": "none", "schedule": "constant", "weight_decay": 0.1, "eps": 1e-6}
    return OptimConfig(name=name, clip_norm=CLIP, b2=0.95, **(defaults | fields))


def gradients_of_steps():
    return [random_leaves(10 + step, scale) for step, scale in enumerate(GRADIENT_SCALES)]


def ours(config):
    """Parameters after three steps in f64, the rate warming up over two."""
    with jax.enable_x64(True):
        optimizer = optimizers.make_optimizer(config, schedules.learning_rate_schedule(config, 3, 2, 256), NO_DECAY)

        @jax.jit
        def step(params, state, gradients):
            clipped = updates.clip_by_global_norm(gradients, updates.global_norm(gradients), config.clip_norm)
            changes, state = optimizer.update(clipped, state, params)
            return optax.apply_updates(params, changes), state

        params = jax.tree.map(jnp.asarray, nested(random_leaves(0)))
        state = optimizer.init(params)
        for gradients in gradients_of_steps():
            params, state = step(params, state, nested(gradients))
        return jax.tree.map(np.asarray, flattened(params))


def rate_of(config, step):
    return config.learning_rate * (0.5, 1.0, 1.0)[step]


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert found[path].dtype == np.float64
        np.testing.assert_allclose(found[path], leaf, rtol=1e-12, atol=1e-13, err_msg=path)


def test_the_gradients_of_these_tests_are_clipped_at_some_steps_and_not_at_others():
    norms = [math.sqrt(sum((leaf**2).sum() for leaf in gradients.values())) for gradients in gradients_of_steps()]
    assert [norm > CLIP for norm in norms] == [False, True, True]


@pytest.mark.parametrize(
    ("name", "fields"),
    [("sgd", {}), ("sgd", {"nesterov": True}), ("sgd", {"momentum": 0.0}), ("adamw", {})],
    ids=["sgd", "nesterov", "plain", "adamw"],
)
def test_three_steps_equal_torch(name, fields):
    torch = pytest.importorskip("torch", reason="torch is not installed: extra 'parity'")
    config = config_of(name, **fields)
    params = {path: torch.nn.Parameter(torch.tensor(leaf)) for path, leaf in random_leaves(0).items()}
    groups = [
        {"params": [p for path, p in params.items() if path in DECAYED], "weight_decay": config.weight_decay},
        {"params": [p for path, p in params.items() if path not in DECAYED], "weight_decay": 0.0},
    ]
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, nesterov=config.nesterov)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(config.b1, config.b2), eps=config.eps)
    for step, gradients in enumerate(gradients_of_steps()):
        for path, leaf in gradients.items():
            params[path].grad = torch.tensor(leaf)
        torch.nn.utils.clip_grad_norm_(params.values(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(config, step)
        optimizer.step()
    assert_equal(ours(config), {path: p.detach().numpy() for path, p in params.items()})


def formula(update, config):
    """Three steps of `update(path, w, g, memory, now) -> w` in NumPy; `memory` is a leaf's own dict, `now.t` from 1."""
    params, memory = random_leaves(0), {path: {} for path in SHAPES}
    for step, gradients in enumerate(gradients_of_steps()):
        norm = math.sqrt(sum((leaf**2).sum() for leaf in gradients.values()))
        factor = min(1.0, CLIP / (norm + 1e-6))
        now = types.SimpleNamespace(t=step + 1, rate=rate_of(config, step))
        for path, g in gradients.items():
            params[path] = update(path, params[path], factor * g, memory[path], now)
    return params


def decay_of(config, path):
    return config.weight_decay if path in DECAYED else 0.0


def adam_direction(config, t, g, memory):
    memory["m"] = config.b1 * memory.get("m", 0.0) + (1 - config.b1) * g
    memory["v"] = config.b2 * memory.get("v", 0.0) + (1 - config.b2) * g**2
    return memory["m"] / (1 - config.b1**t) / (np.sqrt(memory["v"] / (1 - config.b2**t)) + config.eps)


def test_lamb_equals_the_paper():
    """You 2020, algorithm 2; leaves without decay take plain Adam's step."""
    config = config_of("lamb")

    def update(path, w, g, memory, now):
        direction = adam_direction(config, now.t, g, memory) + decay_of(config, path) * w
        adapted = np.linalg.norm(w.ravel()) / np.linalg.norm(direction.ravel()) if path in DECAYED else 1.0
        return w - now.rate * adapted * direction

    assert_equal(ours(config), formula(update, config))


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_equals_the_paper(nesterov):
    """You 2017, algorithm 1 with trust coefficient 0.001; leaves without decay take plain momentum's step."""
    config = config_of("lars", learning_rate=20.0, nesterov=nesterov)

    def update(path, w, g, memory, now):
        decay = decay_of(config, path)
        weight_norm, gradient_norm = np.linalg.norm(w.ravel()), np.linalg.norm(g.ravel())
        local = 0.001 * weight_norm / (gradient_norm + decay * weight_norm) if path in DECAYED else 1.0
        step = now.rate * local * (g + decay * w)
        memory["v"] = config.momentum * memory.get("v", 0.0) + step
        return w - (step + config.momentum * memory["v"] if nesterov else memory["v"])

    assert_equal(ours(config), formula(update, config))


def test_lars_moves_a_kernel_of_zeros():
    config = OptimConfig(name="lars", learning_rate=0.1, lr_scaling="none", schedule="constant", momentum=0.0)
    optimizer = optimizers.make_optimizer(config, schedules.learning_rate_schedule(config, 1, 0, 1))
    params, gradients = {"kernel": jnp.zeros((2, 2))}, {"kernel": jnp.ones((2, 2))}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-6)


def test_lion_equals_the_paper():
    """Chen 2023, algorithm 2."""
    config = config_of("lion")

    def update(path, w, g, memory, now):
        m = memory.get("m", np.zeros_like(g))
        memory["m"] = config.b2 * m + (1 - config.b2) * g
        return w - now.rate * (np.sign(config.b1 * m + (1 - config.b1) * g) + decay_of(config, path) * w)

    assert_equal(ours(config), formula(update, config))


def orthogonal(matrix, eps):
    """Jordan 2024: Newton-Schulz iterations from the matrix divided by its Frobenius norm."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (np.linalg.norm(matrix) + eps)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return 0.2 * math.sqrt(max(matrix.shape)) * x


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_equals_the_paper(nesterov):
    """Jordan 2024 at AdamW's size (Liu 2025, equation 4) for hidden kernels, AdamW for the rest.

    The momentum is bias-corrected like Adam's, and Nesterov's like NAdam's (Dozat 2016), which only matters to the mix
    of momentum and gradient: the size of the momentum drops out.
    """
    config = config_of("muon", nesterov=nesterov)
    beta = config.momentum

    def update(path, w, g, memory, now):
        if path not in HIDDEN:
            return w - now.rate * (adam_direction(config, now.t, g, memory) + decay_of(config, path) * w)
        memory["m"] = beta * memory.get("m", 0.0) + (1 - beta) * g
        m = memory["m"] / (1 - beta**now.t)
        if nesterov:
            m = beta * memory["m"] / (1 - beta ** (now.t + 1)) + (1 - beta) * g / (1 - beta**now.t)
        if "qkv" in path:  # query, key and value: one matrix [in, heads * head_dim] each
            matrices = [orthogonal(m[:, i].reshape(4, 4), config.eps).reshape(4, 2, 2) for i in range(3)]
            direction = np.stack(matrices, axis=1)
        else:
            direction = orthogonal(m.reshape(-1, m.shape[-1]), config.eps).reshape(m.shape)
        return w - now.rate * (direction + config.weight_decay * w)

    assert_equal(ours(config), formula(update, config))


def test_muon_on_some_of_the_layers_equals_muon_on_all():
    """A slice of the tree keeps each leaf's optimizer, although its first and last layer are others."""
    params, gradients = (jax.tree.map(jnp.float32, nested(random_leaves(seed))) for seed in (0, 1))
    optimizer = optimizers.make_optimizer(config_of("muon"), lambda step: 0.1, NO_DECAY)
    state = optimizer.init(params)

    def part(tree):
        of_layers = lambda node: isinstance(node, dict) and "layers_01" in node  # noqa: E731
        pick = lambda node: {k: node[k] for k in ("layers_01", "layers_02")} if of_layers(node) else node  # noqa: E731
        return jax.tree.map(pick, tree, is_leaf=of_layers)

    update = jax.jit(optimizer.update)
    whole, _ = update(gradients, state, params)
    some, _ = update(part(gradients), part(state), part(params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), part(whole), some)


def test_muon_refuses_a_model_without_hidden_kernels():
    params = {"layers_00": {"kernel": jnp.ones((2, 2))}, "layers_01": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ConfigError, match=r"config\.optim\.name='muon'.*use adamw"):
        optimizers.make_optimizer(OptimConfig(name="muon"), lambda step: 0.1).init(params)


# ---------------------------------------------------------------------------------------------------------- fine-tuning

LAYERS = tuple(f"layers_{index:02d}" for index in range(4))
TUNED = {"layer_decay": 0.6, "head_rate": 4.0, "freeze": ("attn/qkv", "layers_00/norm")}
RATES = {"layers_00": 0.6**3, "layers_01": 0.6**2, "layers_02": 0.6, "layers_03": 4.0}


def tuned(config, rates=None):
    """As `ours`, for `ParamGroups`; with `rates` each leaf is from a run of all leaves at its own rate instead."""
    groups = ParamGroups(config, LAYERS)
    with jax.enable_x64(True):
        params = groups.trained(jax.tree.map(jnp.asarray, nested(random_leaves(0))))

        def after(config, wrap):
            optimizer = wrap(
                optimizers.make_optimizer(config, schedules.learning_rate_schedule(config, 3, 2, 256), NO_DECAY)
            )

            @jax.jit
            def step(params, state, gradients):
                clipped = updates.clip_by_global_norm(gradients, updates.global_norm(gradients), config.clip_norm)
                changes, state = optimizer.update(clipped, state, params)
                return optax.apply_updates(params, changes), state

            weights, state = params, optimizer.init(params)
            for gradients in gradients_of_steps():
                weights, state = step(weights, state, groups.trained(nested(gradients)))
            return flattened(weights), flattened(state)

        if rates is None:
            return after(config, groups.with_rates)
        found = {}
        for layer, rate in rates.items():
            alone = dataclasses.replace(config, learning_rate=config.learning_rate * rate)
            leaves, state = after(alone, lambda optimizer: optimizer)
            found |= {path: leaf for path, leaf in leaves.items() if path.startswith(layer)}
        return found, state


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_layers_rate_is_that_of_a_run_at_this_rate(name):
    """Under every optimizer, weight decay and trust ratios too; what is frozen has no state."""
    config = config_of(name, **TUNED)
    (found, state), (wanted, _) = tuned(config), tuned(config, RATES)
    assert not [path for path in (*found, *state) if "qkv" in path or "layers_00/norm" in path]
    assert_equal({path: np.asarray(leaf) for path, leaf in found.items()}, wanted)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_rates_and_frozen_leaves_are_param_groups_of_torch(name):
    torch = pytest.importorskip("torch", reason="torch is not installed: extra 'parity'")
    config = config_of(name, **TUNED)
    found, _ = tuned(config)
    params = {path: torch.nn.Parameter(torch.tensor(leaf)) for path, leaf in random_leaves(0).items()}
    for path, parameter in params.items():
        parameter.requires_grad = path in found
    groups = [
        {"params": [params[path]], "weight_decay": decay_of(config, path), "scale": RATES[path[:9]]} for path in found
    ]
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(config.b1, config.b2), eps=config.eps)
    for step, gradients in enumerate(gradients_of_steps()):
        for path in found:
            params[path].grad = torch.tensor(gradients[path])
        torch.nn.utils.clip_grad_norm_([params[path] for path in found], CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(config, step) * group["scale"]
        optimizer.step()
    assert_equal(
        {path: np.asarray(leaf) for path, leaf in found.items()},
        {path: params[path].detach().numpy() for path in found},
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"freeze": ("layers_01/attn/qvk",)},
            "'layers_01/attn/qvk' matches no parameter. Did you mean 'layers_01/attn/qkv",
        ),
        ({"freeze": ("layers_",)}, "freeze all parameters"),
        ({"freeze": ("layers_03",), "freeze_layers": 3}, "freeze all parameters"),
        ({"freeze_layers": 4}, "must be between -3 and 3, as the model has 4 layers"),
        ({"freeze_layers": -4}, "must be between -3 and 3"),
    ],
)
def test_a_pattern_without_a_leaf_and_a_run_without_a_trained_one_are_refused(fields, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        ParamGroups(config_of("sgd", **fields), LAYERS).check(nested(random_leaves(0)))


@pytest.mark.parametrize(("count", "trained"), [(0, LAYERS), (1, LAYERS[1:]), (-1, LAYERS[3:]), (-2, LAYERS[2:])])
def test_the_first_layers_are_frozen(count, trained):
    groups = ParamGroups(config_of("sgd", freeze_layers=count), LAYERS)
    assert {path[:9] for path in flattened(groups.trained(nested(random_leaves(0))))} == set(trained)


# -------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_no_leaf_of_the_state_changes_and_each_is_a_scalar_or_shaped_like_its_parameter(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        config = config_of(name)
        optimizer = optimizers.make_optimizer(config, schedules.learning_rate_schedule(config, 10, 2, 256), NO_DECAY)
        params = nested({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in SHAPES.items()})
        before = jax.eval_shape(optimizer.init, params)
        updates, after = jax.eval_shape(optimizer.update, params, before, params)
        assert jax.tree.structure(before) == jax.tree.structure(after)
        assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(before)] == [
            (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(after)
        ]
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))
        for path, leaf in flattened(before).items():
            owners = [shape for parameter, shape in SHAPES.items() if path.endswith(parameter)]
            assert leaf.shape == (owners[0] if owners else ()), path
            assert leaf.dtype == (dtype if owners else jnp.int32), path


# ------------------------------------------------------------------------------------------------- names and user code


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A user's module, importable as `own_optim`."""
    (tmp_path / "own_optim.py").write_text(
        "import jax, optax\n"
        "def factory(config, rate, mask):\n"
        "    signs = optax.stateless(lambda updates, params: jax.tree.map(jax.numpy.sign, updates))\n"
        "    decay = optax.add_decayed_weights(config.weight_decay, mask)\n"
        "    return optax.chain(signs, decay, optax.scale_by_learning_rate(rate))\n"
        "def not_an_optimizer(config, rate, mask):\n"
        "    return 0.1\n"
        "number = 0.1\n"
        "def squared(logits, targets):\n"
        "    return ((logits - targets) ** 2).sum(-1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_module")
def test_a_users_own_optimizer_by_dotted_name():
    config = config_of("own_optim:factory", weight_decay=0.5)
    optimizer = optimizers.make_optimizer(config, schedules.learning_rate_schedule(config, 4, 2, 256))
    params = {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full((2,), 4.0)}
    gradients = jax.tree.map(lambda p: -0.3 * p, params)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.025 * (-1 + 0.5 * 4), rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], 0.025, rtol=1e-6)
    updates, _ = optimizer.update(gradients, state, params)
    np.testing.assert_allclose(updates["bias"], 0.05, rtol=1e-6)


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("load", "field"),
    [
        (lambda name: optimizers.make_optimizer(config_of(name), lambda step: 0.1), "optim.name"),
        (losses.loss_fn, "optim.loss"),
    ],
)
def test_a_dotted_name_must_be_a_functions(load, field):
    with pytest.raises(ConfigError, match=rf"config\.{field}='own_optim:number': is a float; it must be a function"):
        load("own_optim:number")


@pytest.mark.usefixtures("own_module")
def test_a_factory_must_return_an_optimizer():
    with pytest.raises(ConfigError, match=r"own_optim:not_an_optimizer.*returned a float.*GradientTransformation"):
        optimizers.make_optimizer(config_of("own_optim:not_an_optimizer"), lambda step: 0.1)


@pytest.mark.usefixtures("own_module")
def test_a_users_own_loss_by_dotted_name():
    loss = losses.loss_fn("own_optim:squared")
    np.testing.assert_allclose(loss(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])), [5.0])


def test_an_unknown_optimizer_is_answered_with_the_names():
    with pytest.raises(ConfigError, match=r"config\.optim\.name='admw'.*sgd, adamw, lamb.*Did you mean 'adamw'\?"):
        optimizers.make_optimizer(config_of("admw"), lambda step: 0.1)


def test_an_unknown_loss_is_answered_with_the_names():
    with pytest.raises(ConfigError, match=r"config\.optim\.loss='crossentropy'.*Did you mean 'cross_entropy'\?"):
        losses.loss_fn("crossentropy")


# ------------------------------------------------------------------------------------------------ norm, average, loss


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 500.0])
def test_clipping_equals_torch(max_norm):
    torch = pytest.importorskip("torch", reason="torch is not installed: extra 'parity'")
    leaves = random_leaves(3)
    parameters = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in leaves.values()]
    for parameter, leaf in zip(parameters, leaves.values(), strict=True):
        parameter.grad = torch.tensor(leaf)
    wanted_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    with jax.enable_x64(True):
        gradients = jax.tree.map(jnp.asarray, nested(leaves))
        norm = updates.global_norm(gradients)
        clipped = flattened(updates.clip_by_global_norm(gradients, norm, max_norm))
        assert float(norm) == pytest.approx(wanted_norm.item(), rel=1e-14)
        assert_equal(clipped, {path: p.grad.numpy() for path, p in zip(leaves, parameters, strict=True)})


def test_the_norm_of_half_precision_leaves_is_summed_in_f32():
    norm = updates.global_norm({"a": jnp.ones((100, 100), jnp.bfloat16), "b": jnp.zeros(3, jnp.bfloat16)})
    assert norm.dtype == jnp.float32
    assert float(norm) == 100.0  # a bfloat16 sum stops at 256
    gradients = updates.clip_by_global_norm({"a": jnp.full((4,), 8.0, jnp.bfloat16)}, jnp.float32(16.0), 4.0)
    assert gradients["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradients["a"].astype(jnp.float32), 2.0)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (8, 0.5), (80, 0.9), (10**6, 0.99)])
def test_the_average_forgets_the_initial_weights_at_first(step, decay):
    with jax.enable_x64(True):
        old, new = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}
        average = jax.jit(updates.ema_update, static_argnums=2)(old, new, 0.99, jnp.int32(step))
        assert average["w"].dtype == jnp.float64
        wanted = [decay + 3 * (1 - decay), 2 * decay - 2 * (1 - decay)]
        np.testing.assert_allclose(average["w"], wanted, rtol=1e-14, atol=1e-15)


def test_the_average_keeps_the_type_of_its_leaves():
    for dtype in (jnp.float32, jnp.bfloat16):
        tree = {"w": jnp.ones(3, dtype)}
        assert updates.ema_update(tree, tree, 0.9, jnp.int32(5))["w"].dtype == dtype


def test_cross_entropy_takes_probabilities_and_computes_in_f32():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])).astype(jnp.bfloat16)
    targets = jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    loss = losses.loss_fn("cross_entropy")(logits, targets)
    assert loss.dtype == jnp.float32
    wanted = [math.log(2), -(math.log(0.125) + math.log(0.75)) / 2]
    np.testing.assert_allclose(loss, wanted, rtol=5e-3)
    with jax.enable_x64(True):
        logits = jnp.log(jnp.array([[0.125, 0.75, 0.125]]))
        exact = losses.loss_fn("cross_entropy")(logits, jnp.array([[0.5, 0.5, 0.0]]))
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(exact, wanted[1:], rtol=1e-15)


@pytest.mark.parametrize("fields", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "mixup": 0.8}], ids=repr)
def test_class_weights_equal_torch(fields):
    """Three microbatches against PyTorch's loss of the whole batch; mixup against the mixture of both labels' losses."""
    torch = pytest.importorskip("torch", reason="torch is not installed: extra 'parity'")
    rng, weights = np.random.default_rng(0), (0.5, 1.0, 4.0, 2.5, 1.0)
    logits, labels = rng.normal(size=(12, 5)), rng.integers(0, 5, 12).astype(np.int32)
    key = jax.random.key(3)
    with jax.enable_x64(True):
        task: Any = types.SimpleNamespace(loss=losses.cross_entropy, class_weights=weights)
        pre = Preprocess(4, "none", (0.5,), (0.5,), 5, dtype=jnp.float64, **fields)

        def loss(logits):
            whole, parts = jnp.asarray(labels).reshape(3, 4), logits.reshape(3, 4, 5)
            sums = [
                scaled_loss(task, x, train_targets(pre, y, key), y, whole, ())
                for x, y in zip(parts, whole, strict=True)
            ]
            return sum(scaled for scaled, _ in sums)

        found, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
        share = float(mix_shares(pre, key)[1]) if pre.mixes else 1.0
    partners = labels.reshape(-1, 2)[:, ::-1].ravel()
    x = torch.tensor(logits, requires_grad=True)
    criterion = torch.nn.CrossEntropyLoss(torch.tensor(weights).double(), label_smoothing=pre.label_smoothing)
    wanted = share * criterion(x, torch.tensor(labels).long()) + (1 - share) * criterion(
        x, torch.tensor(partners.copy()).long()
    )
    wanted.backward()
    np.testing.assert_allclose(found, wanted.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-12)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.repeat([0, 1, 3], [5, 1, 10])
    wanted = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    found = losses.balanced_weights(np.bincount(labels, minlength=5))
    assert found == pytest.approx((*wanted[:2], 1.0, wanted[2], 1.0))


def test_after_a_change_of_the_batch_the_schedule_goes_on_by_examples():
    """Ten epochs of 1,000 examples: the first five in steps of 50, the others in steps of 250."""
    small = Config(data=DataConfig(global_batch=50), optim=OptimConfig(lr_scaling="none"), train=TrainConfig(epochs=10))
    large = dataclasses.replace(small, data=DataConfig(global_batch=250))
    before, whole = make_schedule(small, 1000), make_schedule(large, 1000)
    after = make_schedule(large, 1000, 100, 5000)  # 100 steps of 50 were made
    np.testing.assert_allclose(after(np.arange(100, 120)), whole(np.arange(20, 40)), rtol=1e-12)
    assert before(100) == pytest.approx(after(100), rel=1e-12)
    in_steps = dataclasses.replace(large, train=TrainConfig(steps=200))
    assert make_schedule(in_steps, 1000, 100, 5000)(100) == make_schedule(in_steps, 1000)(100)
