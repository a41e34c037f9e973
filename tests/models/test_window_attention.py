"""Swin's attention as one kernel, which JAX runs step by step on a CPU: it has the numbers of the plain operations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ConfigError
from jaxtrain.models import registry, settings, swin
from jaxtrain.models.layers import Context

# side of the map, window, heads: with a shift; whole map in one window; a map and windows that must be padded
MAPS = {"shifted": (8, 4, 2), "one window": (7, 7, 1), "padded": (9, 7, 3), "tiny": (2, 7, 1)}


def block_gradients(how, side, window, heads, batch=2, dtype=jnp.float32):
    """A block as (params, x, gradient) -> (its output, the gradients of params and x), and such arguments."""
    block = swin.Block(dtype, jnp.float32, heads, window, True, 0.0, 0.0, how)
    draw = np.random.default_rng(0)
    x, g = (jnp.asarray(draw.standard_normal((batch, side, side, 16 * heads)), dtype) for _ in range(2))
    context = Context(jnp.arange(batch), train=True)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, context))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape) / 4, leaf.dtype), shapes)

    def step(params, x, g):
        y, backward = jax.vjp(lambda params, x: block.apply({"params": params}, x, context), params, x)
        return y, backward(g)

    return step, (params, x, g)


def assert_near(found, wanted, tolerance):
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        exact = np.asarray(other, np.float32)
        bound = tolerance * np.abs(exact).max()
        np.testing.assert_allclose(np.asarray(leaf, np.float32), exact, atol=bound, err_msg=str(path))


@pytest.mark.parametrize("name", MAPS)
def test_the_kernel_has_the_values_and_gradients_of_the_plain_operations(name):
    plain, arguments = block_gradients("plain", *MAPS[name])
    kernel, _ = block_gradients("pallas", *MAPS[name])
    assert_near(jax.jit(kernel)(*arguments), jax.jit(plain)(*arguments), 1e-5)


def test_the_kernel_in_bf16_is_as_near_to_f32_as_the_plain_operations():
    exact, (params, x, g) = block_gradients("plain", *MAPS["shifted"])
    kernel, _ = block_gradients("pallas", *MAPS["shifted"], dtype=jnp.bfloat16)
    assert_near(
        jax.jit(kernel)(params, x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)), jax.jit(exact)(params, x, g), 0.03
    )


def test_each_device_computes_its_own_images_and_heads():
    kernel, (params, x, g) = block_gradients("pallas", *MAPS["shifted"], batch=4)
    wanted = jax.jit(kernel)(params, x, g)
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 2, 2), ("stage", "replica", "data", "tensor"))
    model = registry.build(ModelConfig("swin_tiny", width=32), (32, 32, 3), 10, jnp.float32, jnp.float32)

    def spec(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, P(*next((axes for rule, axes in model.tensor_rules if re.search(rule, name)), ())))

    images = NamedSharding(mesh, P(("replica", "data")))
    places = jax.tree_util.tree_map_with_path(spec, params)
    shardings = (places, images, images)
    program = jax.jit(kernel, in_shardings=shardings, out_shardings=(images, (places, images)))
    arguments = jax.device_put((params, x, g), shardings)
    assert_near(program(*arguments), wanted, 1e-5)
    text = program.lower(*arguments).compile().as_text()
    assert not re.findall(r"all-gather|all-to-all|collective-permute", text)


REFUSED = {
    "window": ({"window": 9}, 64, jnp.bfloat16, "takes windows of at most 8 x 8, and config.model.window is 9"),
    "heads": (
        {"width": 48},
        64,
        jnp.bfloat16,
        "takes heads of a power of two of channels, .*width makes heads of 48",
    ),
    "f64": ({}, 64, "float64", "computes in at most f32, and config.train.precision is 'f64'"),
}


@pytest.mark.parametrize(("fields", "side", "dtype", "said"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_cannot_do_is_said(fields, side, dtype, said):
    config = ModelConfig("swin_tiny", attention="pallas", **fields)
    with pytest.raises(ConfigError, match=rf"config\.model\.attention='pallas': {said}.*attention=plain"):
        registry.build(config, (side, side, 3), 10, dtype, jnp.float32)


def test_the_kernel_needs_an_nvidia_gpu():
    with pytest.raises(ConfigError, match=r"attention='pallas': needs NVIDIA GPUs .* is on cpu; .*attention=plain"):
        settings.require_hardware(ModelConfig("swin_tiny", attention="pallas"), jax.devices())
    settings.require_hardware(ModelConfig("swin_tiny"), jax.devices())
    with pytest.raises(ConfigError, match="resnet18 has no such setting"):
        registry.build(ModelConfig("resnet18", attention="pallas"), (32, 32, 3), 10, jnp.float32, jnp.float32)
