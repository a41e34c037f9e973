"""Precision by name, how products are rounded, and fp16's dynamic loss scale."""

import re
import types

import jax
import jax.numpy as jnp
import pytest
from runs import EXACT, RECIPE, here

from jaxtrain import precision
from jaxtrain.config import ModelConfig, from_dict, nested_dicts
from jaxtrain.errors import ConfigError
from jaxtrain.models import registry
from jaxtrain.models.layers import Context, normalize
from jaxtrain.precision import LossScale
from jaxtrain.recipes import load_config
from jaxtrain.training import session
from jaxtrain.training.smoke import smoke


@pytest.mark.parametrize(
    ("name", "backend", "resolved"),
    [
        ("auto", "cpu", "f32"),
        ("auto", "gpu", "bf16"),
        ("auto", "cuda", "bf16"),
        ("auto", "rocm", "bf16"),
        ("auto", "tpu", "bf16"),
        ("fp16", "cpu", "fp16"),
        ("f32", "gpu", "f32"),
    ],
)
def test_auto_follows_the_backend_and_a_named_precision_does_not(name, backend, resolved):
    assert precision.resolve_precision(name, backend) == resolved


@pytest.mark.parametrize("name", ["f32", "bf16", "fp16"])
def test_parameters_are_stored_in_f32_whatever_is_computed_in(name):
    policy = precision.precision_policy(name)
    assert policy.param_dtype == jnp.float32
    assert policy.compute_dtype == {"f32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}[name]


def test_f64_needs_x64():
    with pytest.raises(ConfigError, match=r"config\.train\.precision='f64'.*JAX_ENABLE_X64=1"), jax.enable_x64(False):
        precision.precision_policy("f64")
    with jax.enable_x64(True):
        assert precision.precision_policy("f64") == precision.Policy(jnp.float64, jnp.float64, "highest")


@pytest.mark.parametrize(("name", "rounding", "stages"), [("f32", "HIGHEST", 2), ("tf32", "HIGH", 1)])
def test_every_product_of_a_run_is_rounded_as_its_precision_says(tmp_path, monkeypatch, name, rounding, stages):
    """In the programs that XLA is given: a GPU takes HIGHEST for f32 and the others for TF32; a CPU rounds none."""
    programs, compile_program = [], jax.stages.Lowered.compile

    def recorded(self, *arguments, **options):
        programs.append(self.as_text())
        return compile_program(self, *arguments, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", recorded)
    monkeypatch.setattr(session, "require_hardware", lambda *_: None)  # this one has no TF32
    fields = EXACT | {"optim.name": "muon", "train.steps": 1}
    here(tmp_path, fields, devices=stages, train__precision=name, layout__stages=stages, layout__microbatches=stages)
    products = re.findall(r"stablehlo\.(dot_general|convolution)\b(.*)", "\n".join(programs))
    assert {kind for kind, _ in products} == {"dot_general", "convolution"}
    found = {word for _, rest in products for word in re.findall("HIGHEST|HIGH|DEFAULT|$", rest)[:2]}
    assert found == {rounding}


GPUS = {"V100": "7.0", "A100": "8.0", "L4": "8.9", "H100": "9.0", "B200": "10.0", "MI300X": "gfx942"}


def test_tf32_needs_hardware_that_has_it():
    for kind, capability in GPUS.items():
        gpu = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
        precision.require_hardware("f32", [gpu])
        if kind in ("V100", "MI300X"):
            with pytest.raises(ConfigError, match=rf"'tf32': needs .* 8\.0 \(Ampere\) .*{kind}.*precision=f32"):
                precision.require_hardware("tf32", [gpu])
        else:
            precision.require_hardware("tf32", [gpu])


def test_tf32_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.train\.precision='tf32': needs NVIDIA GPUs .* is on cpu;"):
        here(tmp_path, EXACT, train__precision="tf32")
    with pytest.raises(ConfigError, match="'tf32': needs"):
        smoke(
            from_dict(nested_dicts(load_config(RECIPE, EXACT | {"train.precision": "tf32"}))),
            "quickstart",
            num_devices=1,
        )
    assert jax.config.jax_default_matmul_precision is None


def scale(value, good_steps=0):
    return LossScale(jnp.float32(value), jnp.int32(good_steps))


def numbers(loss_scale):
    return float(loss_scale.scale), int(loss_scale.good_steps)


def test_only_fp16_has_a_loss_scale():
    assert numbers(precision.initial_loss_scale(precision.precision_policy("fp16"))) == (2.0**15, 0)
    for name in ("f32", "bf16"):
        none = precision.initial_loss_scale(precision.precision_policy(name))
        assert jax.tree.leaves(none) == []
        assert precision.adjust_loss_scale(none, jnp.bool_(False)) == none
        assert precision.scale_factor(none, jnp.float32) == 1
        assert not precision.at_floor(none)


def test_an_overflow_halves_the_scale_and_starts_the_count_again():
    adjusted = precision.adjust_loss_scale(scale(2.0**15, 1500), jnp.bool_(False))
    assert numbers(adjusted) == (2.0**14, 0)


def test_the_scale_doubles_after_2000_good_steps():
    last, count = precision.adjust_loss_scale(scale(2.0**15, 1998), jnp.bool_(True)), 1999
    assert numbers(last) == (2.0**15, count)
    assert numbers(precision.adjust_loss_scale(last, jnp.bool_(True))) == (2.0**16, 0)


def test_the_scale_stays_within_its_bounds():
    """flax's DynamicScale reaches infinity here and never returns (google/flax#2547)."""

    def adjust_many(loss_scale, finite, times):
        step = lambda _, s: precision.adjust_loss_scale(s, finite)  # noqa: E731
        return jax.jit(lambda s: jax.lax.fori_loop(0, times, step, s))(loss_scale)

    top = adjust_many(scale(2.0**15), jnp.bool_(True), 300_000)  # 150 doublings would pass f32's largest number
    assert float(top.scale) == 2.0**24
    bottom = adjust_many(top, jnp.bool_(False), 100)
    assert float(bottom.scale) == 1.0


def test_at_floor():
    assert precision.at_floor(scale(1.0))
    assert not precision.at_floor(scale(2.0))


def test_no_leaf_changes_its_type():
    before = jax.eval_shape(lambda: precision.initial_loss_scale(precision.precision_policy("fp16")))
    after = jax.eval_shape(precision.adjust_loss_scale, before, jax.ShapeDtypeStruct((), bool))
    assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(before)] == [
        (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(after)
    ]


def test_scaling_saves_a_gradient_that_fp16_would_flush_to_zero():
    loss_scale = precision.initial_loss_scale(precision.precision_policy("fp16"))
    factor = precision.scale_factor(loss_scale, jnp.float32)

    def loss(weight, factor):
        y = weight.astype(jnp.float16) * jnp.float16(1.0)
        return y.astype(jnp.float32) * 1e-9 * factor

    gradient = jax.grad(loss)
    assert gradient(jnp.float32(1.0), 1.0) == 0
    assert gradient(jnp.float32(1.0), factor) / factor == pytest.approx(1e-9, rel=1e-2)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig("resnet18", width=8, depths=(1, 1, 1, 1)),
        ModelConfig("resnet50", width=8, depths=(1, 1, 1, 1)),
        ModelConfig("vgg11_bn", width=8),
        ModelConfig("swin_tiny", width=32, depths=(2, 1, 1, 1)),
    ],
    ids=lambda config: config.name,
)
def test_bf16_keeps_no_wide_copy_of_an_activation_for_the_backward_pass(config):
    batch = 6  # a size that no other dim has
    model = registry.build(config, (32, 32, 3), 10, jnp.bfloat16, jnp.float32)
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.bfloat16)
    params, stats = jax.eval_shape(lambda key: model.init(key, images.shape, images.dtype), jax.random.key(0))

    def kept(params, stats, images):
        context = Context(jnp.arange(batch), train=True)
        run = lambda params: model.apply(params, stats, images, context, jax.random.key(0))  # noqa: E731
        return jax.vjp(run, params, has_aux=True)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, params, stats, images))
    maps = [leaf for leaf in leaves if leaf.ndim >= 4 and batch in leaf.shape[:2] and leaf.shape[-1] > 1]
    assert len(maps) > 10
    assert {leaf.dtype for leaf in maps if jnp.issubdtype(leaf.dtype, jnp.floating)} == {jnp.dtype(jnp.bfloat16)}


def test_batch_statistics_of_bf16_are_f32():
    x = 100 + jax.random.normal(jax.random.key(0), (1, 4096, 8)).astype(jnp.bfloat16)
    y, mean, var = normalize(x, jnp.ones(8), jnp.zeros(8), 1e-5)
    exact = x.astype(jnp.float32)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert jnp.allclose(mean, exact.mean(1, keepdims=True), rtol=1e-6)
    assert jnp.allclose(var, exact.var(1, keepdims=True), rtol=0.02)  # of E[x^2] - E[x]^2 at a mean of 100: 1e4 * 1e-7
