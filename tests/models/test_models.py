"""Models: sizes, initialisation, BatchNorm, per-example masks, dtypes, own models by dotted name, refusals."""

from __future__ import annotations

import functools
import itertools
import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config import ModelConfig
from jaxtrain.data import augment
from jaxtrain.errors import ConfigError
from jaxtrain.models import convnet, mlp, registry, swin, vgg
from jaxtrain.models.classifier import Classifier
from jaxtrain.models.layers import BatchNorm, Context, Dropout, DropPath, add_bias, matmul
from jaxtrain.models.pooling import max_pool
from jaxtrain.plugins import load_dotted

# One small model of each family; stochastic, so that every path is taken.
TINY = {
    "mlp": (ModelConfig(name="mlp", width=16, dropout=0.3), (8, 8, 1)),
    "vgg11": (ModelConfig(name="vgg11", width=4, dropout=0.5), (32, 32, 3)),
    "vgg11_bn": (ModelConfig(name="vgg11_bn", width=4, dropout=0.5), (64, 64, 3)),
    "resnet18": (ModelConfig(name="resnet18", width=4, depths=(1, 1, 1, 1), drop_path=0.3, dropout=0.2), (8, 8, 3)),
    "resnet50": (ModelConfig(name="resnet50", width=4, depths=(1, 1, 1, 1), drop_path=0.3), (64, 64, 3)),
    "swin_tiny": (ModelConfig(name="swin_tiny", width=16, depths=(1, 2, 1, 1), dropout=0.1), (32, 32, 3)),
    "convnet_fast": (ModelConfig(name="convnet_fast", width=4, depths=(1, 2, 1), dropout=0.2), (9, 9, 3)),
    "vit": (ModelConfig(name="vit_plugin:ViT", dropout=0.2, drop_path=0.2), (8, 8, 3)),
}
WITHOUT_BATCH_NORM = ("mlp", "vgg11", "swin_tiny", "vit")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def build(config, image_shape, classes=10, dtype=jnp.float32, param_dtype=jnp.float32):
    return registry.build(config, image_shape, classes, dtype, param_dtype)


def shapes(model, image_shape, dtype=jnp.float32):
    return jax.eval_shape(lambda key: model.init(key, (2, *image_shape), dtype), jax.random.key(0))


def paths(tree):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def filled(tree, seed=0):
    """Random arrays of the shapes in `tree`: quicker than to compile an initialisation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype), tree)


def tiny(name, batch=6):
    """The model `name` of TINY with random parameters and statistics, and a batch of images."""
    config, image_shape = TINY[name]
    model = build(config, image_shape)
    x = np.random.default_rng(1).standard_normal((batch, *image_shape), np.float32)
    return model, *filled(shapes(model, image_shape)), jnp.asarray(x)


def recorder(seen, what):
    """A `wrap` for `Classifier.apply` that notes `what(y)` of each layer's output in the dict `seen`."""

    def wrap(function, name):
        def recording(*args):
            y, stats = function(*args)
            seen[name] = what(y)
            return y, stats

        return recording

    return wrap


# --------------------------------------------------------------------------------------------------------------- sizes

PARAMETERS = {
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "swin_tiny": 28_288_354,
    "swin_small": 49_606_258,
    "swin_base": 87_768_224,
}


def parameters(model, image_shape):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(model, image_shape)[0]))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_at_224_pixels_and_1000_classes(name):
    model = build(ModelConfig(name=name), (224, 224, 3), 1000)
    assert parameters(model, (224, 224, 3)) == PARAMETERS[name]


def test_parameter_counts_on_small_images():
    assert parameters(build(ModelConfig(name="mlp"), (28, 28, 1)), (28, 28, 1)) == 535_818
    cifar = (32, 32, 3)
    # chenyaofo/pytorch-cifar-models: 39.3M; without pooling before its classifier.
    assert parameters(build(ModelConfig(name="vgg19_bn"), cifar, 100), cifar) == 39_327_652
    # cifar10-airbench's network: its six kernels, biases and head; without the 288 values of its fixed first kernel.
    assert parameters(build(ModelConfig(name="convnet_fast"), cifar), cifar) == 1_971_352


def test_every_name_builds():
    assert len(set(registry.names())) == 1 + 8 + 5 + 3 + 1
    for name in registry.names():
        assert len(build(ModelConfig(name=name), (32, 32, 3)).layers) > 2
    model = build(ModelConfig(name="resnet50"), (32, 32, 3))
    assert shapes(model, (32, 32, 3))[0].keys() == {f"layers_{i:02d}" for i in range(18)}


def test_the_variant_follows_the_image_size_unless_set():
    def leaf(path, side, **settings):
        shape = (side, side, 3)
        return paths(shapes(build(ModelConfig(**settings), shape), shape)[0])[path].shape

    assert leaf("layers_00/conv/kernel", 32, name="resnet18") == (3, 3, 3, 64)
    assert leaf("layers_00/conv/kernel", 64, name="resnet18") == (7, 7, 3, 64)
    assert leaf("layers_00/conv/kernel", 32, name="resnet18", stem="imagenet") == (7, 7, 3, 64)
    assert leaf("layers_00/conv/kernel", 224, name="resnet18", stem="cifar") == (3, 3, 3, 64)
    assert leaf("layers_08/linear/kernel", 32, name="vgg11") == (512, 4096)
    assert leaf("layers_08/linear/kernel", 64, name="vgg11") == (512 * 49, 4096)
    assert leaf("layers_08/linear/kernel", 64, name="vgg11", stem="cifar") == (512 * 4, 4096)
    assert leaf("layers_00/conv/kernel", 32, name="swin_tiny") == (2, 2, 3, 96)
    assert leaf("layers_00/conv/kernel", 224, name="swin_tiny") == (4, 4, 3, 96)
    assert leaf("layers_00/conv/kernel", 32, name="swin_tiny", patch=1) == (1, 1, 3, 96)
    table = "layers_02/attn/bias_table"
    assert leaf(table, 32, name="swin_tiny") == (7**2, 3)
    assert leaf(table, 224, name="swin_tiny") == (13**2, 3)
    assert leaf(table, 32, name="swin_tiny", window=5) == (9**2, 3)
    assert leaf("layers_15/attn/bias_table", 32, name="swin_tiny") == (3**2, 24)  # a 2 x 2 map in a window of 4


@pytest.mark.parametrize(("stem", "sides"), [("imagenet", [16, 2]), ("cifar", [64, 8])])
def test_the_stem_reduces_the_image(stem, sides):
    model, seen = build(ModelConfig(name="resnet18", width=4, stem=stem), (64, 64, 3)), {}
    wrap = recorder(seen, jnp.shape)
    x, context = jnp.ones((1, 64, 64, 3)), Context(jnp.arange(1))
    jax.eval_shape(lambda *trees: model.apply(*trees, x, context, wrap=wrap), *shapes(model, (64, 64, 3)))
    assert [seen["layers_00"][1], seen["layers_08"][1]] == sides


# ------------------------------------------------------------------------------------------------------ initialisation


def initialised(name, index, x_shape, **settings):
    """{path: value} of the newly initialised layer `index` of a model, called with x of `x_shape`."""
    layer = build(ModelConfig(name=name, **settings), (32, 32, 3)).layers[index]
    x, context = jnp.zeros(x_shape), Context(jnp.arange(x_shape[0]))
    return jax.jit(lambda key: paths(layer.init(key, x, context)["params"]))(jax.random.key(1))


def is_normal(values, std):
    values = np.asarray(values, np.float64).ravel()
    spread = 4 * std / values.size**0.5
    assert abs(values.mean()) < spread
    assert abs(values.std() - std) < spread
    if values.size > 10_000:
        assert np.abs(values).max() > 3.5 * std  # not cut at 2 deviations


def is_uniform(values, bound):
    values = np.asarray(values, np.float64).ravel()
    assert 0.9 * bound < np.abs(values).max() <= bound
    assert abs(values.std() - bound / 3**0.5) < 4 * bound / values.size**0.5


def test_resnet_initialisation():
    leaves = initialised("resnet50", 4, (1, 8, 8, 128), width=16, depths=(1, 1, 1, 1))
    for name, leaf in leaves.items():
        if name.endswith("kernel"):
            is_normal(leaf, (2 / (leaf.shape[0] * leaf.shape[1] * leaf.shape[3])) ** 0.5)
        else:
            assert (leaf == (1 if name in ("bn1/scale", "bn2/scale", "shortcut_bn/scale") else 0)).all(), name
    leaves = initialised("resnet50", 5, (1, 1, 1, 512), width=16, depths=(1, 1, 1, 1))
    is_uniform(leaves["linear/kernel"], 512**-0.5)
    is_uniform(leaves["linear/bias"], 512**-0.5)


def test_vgg_initialisation():
    leaves = initialised("vgg11_bn", 7, (1, 2, 2, 64), width=8)
    is_normal(leaves["conv/kernel"], (2 / (9 * 64)) ** 0.5)
    assert (leaves["bn/scale"] == 1).all()
    is_normal(initialised("vgg11_bn", 9, (1, 512), width=8)["linear/kernel"], 0.01)
    head = initialised("vgg11_bn", 10, (1, 512), width=8)
    is_normal(head["linear/kernel"], 0.01)
    assert (head["linear/bias"] == 0).all()


def test_swin_initialisation():
    is_uniform(initialised("swin_tiny", 0, (1, 8, 8, 3))["conv/kernel"], 12**-0.5)
    leaves = initialised("swin_tiny", 1, (1, 8, 8, 96))
    for name in ("attn/qkv/kernel", "attn/proj/kernel", "attn/bias_table", "fc1/kernel", "fc2/kernel"):
        is_normal(leaves[name], 0.02)
    assert (leaves["attn/qkv/bias"] == 0).all()
    is_normal(initialised("swin_tiny", 3, (1, 8, 8, 96))["linear/kernel"], 0.02)


def test_convnet_initialisation():
    leaves = initialised("convnet_fast", 3, (1, 8, 8, 64))
    assert leaves.keys() == {"conv/kernel", "bn/bias"}
    kernel = leaves["conv/kernel"]
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 64))
    y = jax.lax.conv(jnp.moveaxis(x, -1, 1), jnp.transpose(kernel, (3, 2, 0, 1)), (1, 1), "SAME")
    np.testing.assert_allclose(y[:, :64], jnp.moveaxis(x, -1, 1), rtol=1e-6)  # the inputs pass
    is_uniform(kernel[..., 64:], (9 * 64) ** -0.5)
    is_normal(initialised("convnet_fast", 7, (1, 3, 3, 256), width=64)["linear/kernel"], 1.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_whitening_filters_are_orthogonal_and_come_in_pairs(channels):
    patterns, scales = convnet.whitening_filters(channels)
    filters = (patterns * scales).reshape(4 * channels, 8 * channels)
    first, second = np.split(filters, 2, axis=1)
    np.testing.assert_array_equal(first, -second)
    gram = first.T @ first
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-9)
    brightness = first[:, 0]  # of natural images by far the largest variance, and so the smallest weight
    np.testing.assert_allclose(brightness, brightness[0])
    assert np.argmin(np.diag(gram)) == 0


def test_mlp_initialisation():
    leaves = initialised("mlp", 1, (1, 256), width=256)
    is_uniform(leaves["linear/kernel"], 256**-0.5)
    is_uniform(leaves["linear/bias"], 256**-0.5)


def test_initialisation_is_a_function_of_key_and_layer_alone():
    layer = mlp.Hidden(jnp.float32, jnp.float32, 4, dropout=0.0)
    model = Classifier((layer, layer))
    one, two = (model.init(jax.random.key(5), (batch, 4), jnp.float32)[0] for batch in (1, 3))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    kernels = [one[f"layers_0{i}"]["linear"]["kernel"] for i in (0, 1)]
    assert (kernels[0] != kernels[1]).all()


# ----------------------------------------------------------------------------------------------------------- BatchNorm


def numpy_batch_norm(x, groups, leaves):
    """(y, new mean, new var) from the definition; `leaves`: scale, bias, mean, var."""
    scale, bias, mean, var = leaves
    y, means, variances = [], [], []
    for group in np.split(x, groups):
        axes = tuple(range(x.ndim - 1))
        means.append(group.mean(axes))
        variances.append(group.var(axes, ddof=1))
        y.append((group - means[-1]) / np.sqrt(group.var(axes) + 1e-5) * scale + bias)
    return np.concatenate(y), 0.9 * mean + 0.1 * np.mean(means, 0), 0.9 * var + 0.1 * np.mean(variances, 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8, 3, 5, 4), (8, 4)])
def test_batch_norm_is_numpys(x64, groups, shape):
    rng = np.random.default_rng(groups)
    x = 2 + 3 * rng.standard_normal(shape)
    scale, bias, mean, var = rng.uniform(0.5, 2, (4, 4))
    norm = BatchNorm(jnp.float64)
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}

    train = Context(jnp.arange(8), train=True, bn_groups=groups)
    y, new = norm.apply(variables, x, train, mutable=["batch_stats"])
    wanted, new_mean, new_var = numpy_batch_norm(x, groups, (scale, bias, mean, var))
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(new["batch_stats"]["mean"], new_mean, rtol=1e-13)
    np.testing.assert_allclose(new["batch_stats"]["var"], new_var, rtol=1e-12)

    y = norm.apply(variables, x, Context(jnp.arange(8)))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-12, atol=1e-12)


def test_statistics_of_microbatches_average_to_those_of_the_batch(x64):
    x = np.random.default_rng(0).standard_normal((8, 2, 2, 3))
    norm = BatchNorm(jnp.float64)
    variables = norm.init(jax.random.key(0), x, Context(jnp.arange(8)))

    def run(part, example, groups):
        context = Context(example, train=True, bn_groups=groups)
        return norm.apply(variables, part, context, mutable=["batch_stats"])

    whole, stats = run(x, jnp.arange(8), 4)
    parts = [run(x[i : i + 4], jnp.arange(i, i + 4), 2) for i in (0, 4)]
    np.testing.assert_allclose(np.concatenate([y for y, _ in parts]), whole, rtol=1e-13)
    average = jax.tree.map(lambda a, b: (a + b) / 2, parts[0][1], parts[1][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), average, stats)


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_with_relu_is_relu_of_it(x64, groups):
    rng = np.random.default_rng(groups)
    x, g = rng.standard_normal((2, 8, 3, 5, 4))
    leaves = {"scale": rng.uniform(-2, 2, 4), "bias": rng.standard_normal(4)}

    def run(x, leaves, rectify):
        norm, context = BatchNorm(jnp.float64, rectify=rectify), Context(jnp.arange(8), train=True, bn_groups=groups)
        variables = {"params": leaves, "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
        y, _ = norm.apply(variables, x, context, mutable=["batch_stats"])
        return y if rectify else jax.nn.relu(y)

    found, wanted = (jax.vjp(lambda x, p: run(x, p, rectify), x, leaves) for rectify in (True, False))  # noqa: B023
    np.testing.assert_array_equal(found[0], wanted[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), found[1](g), wanted[1](g))


def test_batch_norm_refuses_groups_of_one_value():
    norm, x = BatchNorm(), jnp.ones((4, 1, 1, 3))
    variables = norm.init(jax.random.key(0), x, Context(jnp.arange(4)))
    with pytest.raises(ConfigError, match=r"model\.bn_groups.*single value"):
        norm.apply(variables, x, Context(jnp.arange(4), train=True, bn_groups=4), mutable=["batch_stats"])


def test_what_a_gpu_computes_instead_is_the_same(x64, monkeypatch):
    """Convolutions instead of products, the two sums of BatchNorm as one: on a CPU in f64, with all gradients."""
    config, image_shape = TINY["resnet50"]
    model = build(config, image_shape, dtype=jnp.float64, param_dtype=jnp.float64)
    params, stats = filled(shapes(model, image_shape, jnp.float64))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((6, *image_shape)))
    context = Context(jnp.arange(6), train=True, bn_groups=2)

    def run():
        def loss(params):
            y, new = model.apply(params, stats, x, context, jax.random.key(0))
            return jnp.sum(jnp.sin(y)), new

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    wanted = run()
    chosen = []
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cuda, default: chosen.append(cuda) or cuda(*x))
    found = run()
    assert chosen
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, wanted)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    g = jnp.ones((3, 1000, 2), jnp.bfloat16)  # in bf16, 256 + 1 is 256
    _, backward = jax.vjp(add_bias, g, jnp.zeros(2))
    np.testing.assert_array_equal(backward(g)[1], [3000, 3000])


# ------------------------------------------------------------------------------------------------- per-example masks


@pytest.mark.parametrize("module", [Dropout(0.3), DropPath(0.3)], ids=["dropout", "drop_path"])
def test_masks_are_functions_of_key_and_example(module):
    x = jnp.ones((64, 5, 5, 8))

    def run(x, example, key=0):
        context = Context(jnp.asarray(example, jnp.int32), train=True)
        return np.asarray(module.apply({}, x, context, rngs={"dropout": jax.random.key(key)}))

    whole = run(x, range(64))
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(run(x, order), whole[order])  # another order
    np.testing.assert_array_equal(run(x[:7], range(20, 27)), whole[20:27])  # a microbatch
    assert (run(x, range(64), key=1) != whole).any()
    assert (run(x, range(64, 128)) != whole).any()
    assert set(np.unique(whole)) == {0, np.float32(1 / 0.7)}
    per_example = {tuple(np.unique(row)) for row in whole}
    assert (len(per_example) == 1) == isinstance(module, Dropout)  # drop-path keeps or drops an example as a whole
    rate = (whole == 0).mean()
    assert abs(rate - 0.3) < (0.02 if isinstance(module, Dropout) else 0.15)
    np.testing.assert_array_equal(module.apply({}, x, Context(jnp.arange(64))), x)  # evaluation


def test_masks_are_the_same_in_every_precision(x64):
    context = Context(jnp.arange(16), train=True)
    rngs = {"dropout": jax.random.key(0)}
    masks = [Dropout(0.5).apply({}, jnp.ones((16, 9), d), context, rngs=rngs) for d in (jnp.bfloat16, "f4", "f8")]
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask == 0, masks[0] == 0)


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_an_examples_logits_do_not_depend_on_its_neighbours_or_place(name):
    model, params, stats, x = tiny(name)
    key = jax.random.key(7)
    order = jnp.array([4, 1, 5, 0, 3, 2])

    @jax.jit
    def run(x, example, key):
        return model.apply(params, stats, x, Context(example, train=True), key)[0]

    logits = run(x, jnp.arange(6), key)
    np.testing.assert_allclose(run(x[order], order, key), logits[order], atol=1e-6)
    assert np.abs(run(x, jnp.arange(6) + 6, key) - logits).max() > 1e-4  # the masks matter
    assert np.abs(run(x, jnp.arange(6), jax.random.key(8)) - logits).max() > 1e-4


def test_layers_and_modules_draw_different_masks():
    model, params, stats, _ = tiny("mlp", batch=1)
    x, seen = jnp.ones((64, 8, 8, 1)), {}
    params = jax.tree.map(jnp.ones_like, params)  # every unit is active: a zero is a dropped one
    context = Context(jnp.arange(64), train=True)
    model.apply(params, stats, x, context, jax.random.key(0), wrap=recorder(seen, lambda y: np.asarray(y[:, :8]) == 0))
    assert (seen["layers_00"] != seen["layers_01"]).any()

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, context):
            return Dropout(0.5)(x, context), Dropout(0.5)(x, context)

    one, two = Twice().apply({}, jnp.ones((64, 3)), context, rngs={"dropout": jax.random.key(0)})
    assert (one != two).any()


def test_drop_path_rises_linearly_to_the_configured_rate():
    def rates(**settings):
        layers = build(ModelConfig(**settings), (32, 32, 3)).layers
        return [layer.drop_path for layer in layers if hasattr(layer, "drop_path")]

    np.testing.assert_allclose(rates(name="swin_tiny"), np.linspace(0, 0.2, 12))
    np.testing.assert_allclose(rates(name="swin_small"), np.linspace(0, 0.3, 24))
    np.testing.assert_allclose(rates(name="swin_base"), np.linspace(0, 0.5, 24))
    np.testing.assert_allclose(rates(name="swin_tiny", drop_path=0.1), np.linspace(0, 0.1, 12))
    assert set(rates(name="resnet50")) == {0}
    np.testing.assert_allclose(rates(name="resnet18", drop_path=0.7), np.linspace(0, 0.7, 8))


# -------------------------------------------------------------------------------------------------------------- dtypes

WIDER = ("float16", "float32", "float64")


@pytest.mark.parametrize("dtype", ["bfloat16", *(pytest.param(name, marks=pytest.mark.parity) for name in WIDER)])
@pytest.mark.parametrize("name", TINY)
def test_dtypes_of_activations_and_leaves(x64, name, dtype):
    config, image_shape = TINY[name]
    dtype = jnp.dtype(dtype)
    wide = param_dtype = jnp.promote_types(dtype, jnp.float32)
    model = build(config, image_shape, dtype=dtype, param_dtype=param_dtype)
    params, stats = shapes(model, image_shape, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {param_dtype}
    seen = {}
    wrap = recorder(seen, lambda y: y.dtype)

    def step(params, stats, x):
        def loss(params):
            context = Context(jnp.arange(4), train=True, bn_groups=2)
            logits, new_stats = model.apply(params, stats, x, context, jax.random.key(0), wrap=wrap)
            return logits.sum(), new_stats

        gradients, new_stats = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), new_stats

    new = jax.eval_shape(step, params, stats, jnp.ones((4, *image_shape), dtype))
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), ((params, stats), new))
    assert kinds[0] == kinds[1]
    assert list(seen.values()) == [dtype] * (len(model.layers) - 1) + [wide]


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny"])
def test_bf16_logits_are_near_those_of_f32(name):
    config, image_shape = TINY[name]
    model, params, stats, x = tiny(name)
    rough = build(config, image_shape, dtype=jnp.bfloat16)

    @jax.jit
    def run(x):
        contexts = Context(jnp.arange(6))
        return model.apply(params, stats, x, contexts)[0], rough.apply(params, stats, x, contexts)[0]

    exact, rounded = run(x)
    assert np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


# ------------------------------------------------------------------------------------------------------ a layer's parts


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_wrapping_each_layer_in_remat_changes_nothing(name):
    model, params, stats, x = tiny(name)
    context, names = Context(jnp.arange(6), train=True, bn_groups=2), []

    def remat(function, layer):
        names.append(layer)
        return jax.checkpoint(function)

    def step(wrap):
        def loss(params):
            logits, new = model.apply(params, stats, x, context, jax.random.key(3), wrap=wrap)
            return (logits**2).mean(), new

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    plain, wrapped = step(None), step(remat)
    assert names == [f"layers_{i:02d}" for i in range(len(model.layers))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, wrapped)
    assert stats.keys() == wrapped[1].keys()


def test_statistics_move_in_training_only():
    model, params, stats, x = tiny("resnet18")

    @jax.jit
    def run(x, key):
        contexts = Context(jnp.arange(6)), Context(jnp.arange(6), train=True)
        return [model.apply(params, stats, x, context, key)[1] for context in contexts]

    evaluated, trained = run(x, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, evaluated, stats)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(stats), strict=True))


@pytest.mark.parametrize("window", [2, 4, 7])
def test_relative_position_bias_looks_up_the_offset(window):
    table = np.random.default_rng(0).standard_normal(((2 * window - 1) ** 2, 3))
    bias = np.asarray(swin.relative_position_bias(jnp.asarray(table), window))
    for a in range(window**2):
        for b in range(window**2):
            row = a // window - b // window + window - 1
            column = a % window - b % window + window - 1
            np.testing.assert_allclose(bias[:, a, b], table[row * (2 * window - 1) + column], rtol=1e-6)


def test_shifted_windows_keep_what_is_not_adjacent_apart():
    block = swin.Block(jnp.float32, jnp.float32, 1, 4, True, 0.0, 0.0, "plain")
    x = jax.random.normal(jax.random.key(0), (8, 8, 8))
    changed = x + np.eye(64).reshape(64, 8, 8, 1) * np.arange(1.0, 9)  # one pixel changed in each of 64 examples
    context = Context(jnp.arange(65))
    trees = filled(jax.eval_shape(lambda: block.init(jax.random.key(0), x[None], context)))
    y = jax.jit(block.apply)(trees, jnp.stack([x, *changed]), context)
    heard = np.abs(y[1:] - y[0]).max(-1).reshape(8, 8, 8, 8) > 0  # [row, column] changed is heard at [row, column]

    def window(at):  # of 4, shifted by 2: rows 0-1, 2-5, 6-7
        return (at + 2) // 4

    rows, columns = np.indices((8, 8))
    wanted = (window(rows)[..., None, None] == window(rows)) & (window(columns)[..., None, None] == window(columns))
    np.testing.assert_array_equal(heard, wanted)


PRODUCTS = {  # x, kernel, axes: with x the smaller, and the larger, of what the kernel's gradient may transpose
    "small x": ((8, 6), (6, 4), 1),
    "large x": ((90, 7), (7, 2), 1),
    "to heads": ((2, 3, 5), (5, 3, 2, 4), 1),
    "from heads": ((9, 90, 4, 6), (4, 6, 3), 2),
}


@pytest.mark.parametrize(("x", "kernel", "axes"), PRODUCTS.values(), ids=PRODUCTS)
def test_matmul_has_the_gradients_of_a_plain_product(x64, x, kernel, axes):
    draw = np.random.default_rng(0)
    x, kernel = draw.normal(size=x), draw.normal(size=kernel)
    found, wanted = (
        jax.grad(lambda x, kernel, product=product: jnp.sum(jnp.sin(product(x, kernel, axes))), (0, 1))(x, kernel)
        for product in (matmul, jnp.tensordot)
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_kernels_gradient_is_added_over_devices_as_the_kernel_lies():
    """Added as its transpose, it would be transposed afterwards, and the optimizer would read it against its order."""
    model, params, stats, images = tiny("mlp")
    mesh = jax.make_mesh((2,), ("data",))
    split, whole = (NamedSharding(mesh, P(*names)) for names in (["data"], []))

    def loss(params, images):
        return jnp.sum(model.apply(params, stats, images, Context(example=jnp.arange(6)))[0] ** 2)

    program = jax.jit(jax.grad(loss), in_shardings=(whole, split), out_shardings=whole).lower(params, images).compile()
    reduced = "".join(re.findall(r"= (.*?) all-reduce(?:-start)?\(", program.as_text()))
    assert "f32[64,16]" in reduced
    assert "f32[16,64]" not in reduced


def test_softmax_keeps_its_gradient(x64):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)))
    weights = jnp.arange(5.0)
    gradient = jax.grad(lambda x: (swin.softmax_to(x, jnp.float64) * weights).sum())(x)
    wanted = jax.grad(lambda x: (jax.nn.softmax(x, -1) * weights).sum())(x)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-12)
    assert swin.softmax_to(x.astype(jnp.float32), jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("size", "stride", "padding", "sides"),
    [
        (3, 2, 1, (8, 8)),
        (3, 2, 1, (9, 11)),
        (2, 2, 0, (9, 11)),
        (3, 1, 1, (5, 6)),
        (2, 3, 0, (8, 9)),
        (5, 2, 2, (8, 9)),
    ],
)
@pytest.mark.parametrize("rectify", [False, True])
def test_max_pool_is_that_of_linen(x64, size, stride, padding, sides, rectify):
    """With its gradient, also of equal values, where windows overlap, and at the borders."""
    draw = np.random.default_rng(0)
    x = draw.integers(-2, 3, (2, *sides, 5)).astype(float)

    def linens(x):
        x = jax.nn.relu(x) if rectify else x
        return nn.max_pool(x, (size, size), (stride, stride), padding=((padding, padding), (padding, padding)))

    y, backward = jax.vjp(functools.partial(max_pool, size=size, stride=stride, padding=padding, rectify=rectify), x)
    wanted, wanted_backward = jax.vjp(linens, x)
    np.testing.assert_array_equal(y, wanted)
    g = draw.standard_normal(y.shape)
    np.testing.assert_allclose(backward(g)[0], wanted_backward(g)[0], rtol=1e-14, atol=1e-14)


def test_max_pool_passes_nan_on():
    x = jnp.array([[1, 5, jnp.nan], [3, 5, 2]], jnp.float32)[None, :, :, None]
    np.testing.assert_array_equal(max_pool(x, 2, 1)[0, 0, :, 0], [5, jnp.nan])
    assert jnp.isnan(max_pool(jnp.full((1, 2, 2, 1), jnp.nan), 2, 2)).all()


def first_of_the_largest(window):
    """1 at the first of the largest values of a window [H, W], row by row; else 0."""
    return np.arange(window.size).reshape(window.shape) == window.argmax()


def test_of_equals_the_first_has_the_gradient_row_by_row(x64):
    draw = np.random.default_rng(0)
    x = draw.integers(0, 3, (1, 8, 8, 5)).astype(float)
    found = jax.jit(jax.grad(lambda x: max_pool(x, 2, 2).sum()))(x)
    for row, column, channel in itertools.product(range(0, 8, 2), range(0, 8, 2), range(5)):
        square = np.s_[0, row : row + 2, column : column + 2, channel]
        np.testing.assert_array_equal(found[square], first_of_the_largest(x[square]))

    head, context = convnet.Head(jnp.float64, jnp.float64, 2, dropout=0.0), Context(example=jnp.arange(1))
    variables = head.init(jax.random.key(0), x, context)
    found = np.asarray(jax.jit(jax.grad(lambda x: head.apply(variables, x, context)[0, 0]))(x))
    for channel in range(5):
        np.testing.assert_array_equal(found[0, ..., channel] != 0, first_of_the_largest(x[0, ..., channel]))


@pytest.mark.parametrize("mixup", [0.0, 0.4])
@pytest.mark.parametrize("usual", [True, False])
def test_patches_of_equal_differences_give_equal_bits(x64, mixup, usual):
    """Of images that rise by whole levels, mixed or not, all but the brightness is the same everywhere, to the last bit."""
    row, column, _ = np.mgrid[:16, :16, :3]
    slopes = [((3, 1, 2), (5, 5, 4)), ((1, 0, 7), (2, 9, 2))]
    images: Any = np.stack([10 + row * a + column * b for a, b in np.array(slopes)]).astype(np.uint8)
    mean, std = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)) if usual else ((0.5,) * 3, (0.5,) * 3)
    pre = augment.Preprocess(16, "none", mean, std, 2, mixup=mixup, dtype=jnp.float64)
    example = jnp.arange(2)
    stem, context = convnet.Stem(jnp.float64, jnp.float64), Context(example=example)
    variables = stem.init(jax.random.key(0), jnp.zeros((2, 16, 16, 3)), context)

    @jax.jit
    def outputs(images, key):
        return stem.apply(variables, augment.train_images(pre, images, example, key), context)

    for seed in range(5):
        y = np.asarray(outputs(images, jax.random.key(seed))).reshape(2, -1, 2, 12)[..., 3:]
        np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
        assert np.abs(y).max() > 0.1


@pytest.mark.parametrize(("side", "size"), [(7, 7), (2, 7), (3, 7), (10, 7), (14, 7)])
def test_adaptive_average_pool_is_that_of_pytorch(x64, side, size):
    x = np.random.default_rng(0).standard_normal((1, side, side + 1, 2))
    pooled = np.asarray(vgg.adaptive_average_pool(jnp.asarray(x), size))
    assert pooled.shape == (1, size, size, 2)
    for i in range(size):
        for j in range(size):
            rows = slice(math.floor(i * side / size), math.ceil((i + 1) * side / size))
            columns = slice(math.floor(j * (side + 1) / size), math.ceil((j + 1) * (side + 1) / size))
            np.testing.assert_allclose(pooled[0, i, j], x[0, rows, columns].mean((0, 1)), rtol=1e-12)


@pytest.mark.parametrize("name", TINY)
def test_tensor_rules_and_no_decay_fit_the_leaves(name):
    config, image_shape = TINY[name]
    model = build(config, image_shape)
    leaves = paths(shapes(model, image_shape)[0])
    for pattern, spec in model.tensor_rules:
        matched = [leaf for path, leaf in leaves.items() if re.search(pattern, path)]
        assert matched, pattern
        assert all(len(spec) == leaf.ndim and spec.count("tensor") == 1 for leaf in matched), pattern
    assert all(any(re.search(pattern, path) for path in leaves) for pattern in model.no_decay)
    # Whatever is decayed is a weight.
    decayed = {p for p, leaf in leaves.items() if leaf.ndim > 1 and not any(re.search(n, p) for n in model.no_decay)}
    assert {path.split("/")[-1] for path in decayed if not re.search("attn/(query|key|value)", path)} == {"kernel"}


# ------------------------------------------------------------------------------------------------------ a user's own


def test_a_users_model_by_dotted_name():
    model, params, stats, x = tiny("vit")
    assert type(model).__name__ == "ViT"
    assert stats == {}
    logits, _ = model.apply(params, stats, x, Context(jnp.arange(6), train=True), jax.random.key(0))
    assert logits.shape == (6, 10)
    assert np.isfinite(logits).all()


def test_dotted_names_are_imported_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "things.py").write_text("class Thing:\n    inner = 5\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.chdir(tmp_path)
    assert load_dotted("own_package.things:Thing", "model.name").__name__ == "Thing"
    assert load_dotted("own_package.things:Thing.inner", "model.name") == 5
    assert sys.path[-1] == str(tmp_path)  # behind all others: a file in it hides no installed package


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_package.x:Y",
            "importing 'no_such_package.x'.*ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("vit_plugin:ViTs", "module 'vit_plugin' has no 'ViTs'. Did you mean 'ViT'"),
        ("vit_plugin:", "'package.module:attribute'"),
        ("vit-plugin:ViT", "'package.module:attribute'"),
        ("vit_plugin:not_callable", "builtins.int, not a class or function"),
        ("vit_plugin:not_a_model", "must return a jaxtrain.models.classifier.Classifier.*builtins.str"),
        ("broken_plugin:ViT", "importing 'broken_plugin'.*failed with ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_wrong_with_a_dotted_name(tmp_path, monkeypatch, name, message):
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        build(ModelConfig(name=name), (8, 8, 3))
    assert f"config.model.name={name!r}" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "side", "message"),
    [
        (
            {"name": "resnet81"},
            32,
            "must be one of mlp, vgg11, .*convnet_fast, or package.module:Class. Did you mean 'resnet18'?",
        ),
        ({"name": "resnet18", "depths": (1, 2)}, 32, r"depths=\(1, 2\): resnet18 takes 4 numbers"),
        ({"name": "vgg16"}, 16, "at least 32 x 32 pixels, and these have 16 x 16"),
        ({"name": "resnet18"}, 4, "at least 8 x 8 pixels"),
        ({"name": "resnet18", "stem": "imagenet"}, 16, "at least 32 x 32 pixels.*stem='cifar'"),
        ({"name": "swin_tiny"}, 8, "at least 16 x 16 pixels.*smaller config.model.patch"),
        ({"name": "swin_tiny", "width": 100}, 32, "width=100: .*; 96 and 128 do"),
        ({"name": "swin_tiny", "stem": "cifar"}, 32, "stem='cifar': swin_tiny has no such setting"),
        ({"name": "mlp", "width": 1}, 8, "width=1: .* at least 2"),
        ({"name": "mlp", "depths": (2, 2)}, 8, "depths=.*: mlp takes 1 number"),
        ({"name": "mlp", "drop_path": 0.1}, 8, "drop_path=0.1: mlp has no such setting"),
        ({"name": "convnet_fast"}, 8, "at least 9 x 9 pixels"),
        ({"name": "convnet_fast", "stem": "cifar"}, 32, "stem='cifar': convnet_fast has no such setting"),
        ({"name": "vgg11", "patch": 4}, 32, "patch=4: vgg11 has no such setting"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(settings, side, message):
    with pytest.raises(ConfigError, match=message):
        build(ModelConfig(**settings), (side, side, 3))


def test_classes_and_shapes_must_make_sense():
    with pytest.raises(ConfigError, match="num_classes=1"):
        build(ModelConfig(), (32, 32, 3), classes=1)
    with pytest.raises(ConfigError, match="shape"):
        build(ModelConfig(), (32, 32))
