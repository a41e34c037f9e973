"""The rounding of `optim.compress`: without bias, within a step of it, with the bytes that it promises."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxtrain.parallel.compressors
from jaxtrain.config import LayoutConfig
from jaxtrain.parallel.compressors import COMPRESSORS, compressed_leaves, compressed_sum
from jaxtrain.parallel.gpu_program import read_program


def mesh_of(n: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:n]), ("data",), axis_types=(AxisType.Auto,))


def summing(n: int, compressor: str) -> Any:
    """A program (rows [n, k], seeds [s]) -> the sums [n, s, k] of each device under each seed."""

    def of_device(row: jax.Array, seeds: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(seeds)
        return jax.lax.map(lambda key: compressed_sum(row[0], compressor, "data", key), keys)[None]

    mapped = jax.shard_map(of_device, mesh=mesh_of(n), in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
    return jax.jit(mapped)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_rounded_sum_has_no_bias_and_is_near(compressor):
    n, k, seeds = 3, 50, 4000
    rows = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    found = np.asarray(summing(n, compressor)(rows, np.arange(seeds)), np.float64)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    exact = rows.astype(np.float64).sum(0)
    # A value moves by less than one step where it is rounded: n times before the sum, once after it.
    largest = n * np.abs(rows).max() + np.abs(exact).max()
    step = {"bf16": 2.0**-7 * largest, "int8": 1.1 * largest / 127}[compressor]
    errors = found[0] - exact
    assert np.all(np.abs(errors) <= step)
    assert np.ptp(errors, 0).max() > step / 100  # it is random
    spread = errors.std(0) / np.sqrt(seeds)
    assert np.all(np.abs(errors.mean(0)) <= 5 * spread + 1e-7)


def round_down(monkeypatch):
    """Not at random: with a bias."""
    encode, decode = COMPRESSORS["int8"]

    def down(x, key):
        _, unit = encode(x, key)
        return jnp.floor(x / unit).astype(jnp.int8), unit

    monkeypatch.setitem(jaxtrain.parallel.compressors.COMPRESSORS, "int8", (down, decode))


def test_a_bias_shows(monkeypatch):
    round_down(monkeypatch)
    with pytest.raises(AssertionError):
        test_a_rounded_sum_has_no_bias_and_is_near("int8")


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(compressor, bad):
    """Or an update that must be refused would be made."""
    rows = np.ones((2, 8), np.float32)
    rows[1, 3] = bad
    found = np.asarray(summing(2, compressor)(rows, np.arange(1)))
    assert not np.isfinite(found[:, :, 3]).any()


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_zeros_and_shapes_and_dtypes(compressor):
    leaves = [np.zeros((2, 3, 5), np.float32), np.full((2, 0), 1, np.float32), np.full((2, 1), 2.0, np.float16)]

    def of_device(leaves: list[jax.Array]) -> list[jax.Array]:
        key = jax.random.key(0, impl="threefry2x32")
        return [leaf[None] for leaf in compressed_leaves([leaf[0] for leaf in leaves], compressor, "data", 8, key)]

    mapped = jax.shard_map(of_device, mesh=mesh_of(2), in_specs=P("data"), out_specs=P("data"), check_vma=False)
    for found, leaf in zip(jax.jit(mapped)(leaves), leaves, strict=True):
        assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_allclose(np.asarray(found), 2 * leaf, rtol=1e-3)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_the_compiled_program_sends_the_bits_of_the_name(compressor):
    n, k = 4, 4096
    text = summing(n, compressor).lower(jax.ShapeDtypeStruct((n, k), jnp.float32), np.arange(1)).compile().as_text()
    found = read_program(text, mesh_of(n)).collectives
    sent = {kind: sum(each.bytes for each in found if each.kind == kind) for kind in ("all-to-all", "all-gather")}
    wanted = {"bf16": 2 * k, "int8": k + 4 * n}[compressor]  # int8 has a unit for each part
    assert sent == {"all-to-all": wanted, "all-gather": wanted}  # of which a device keeps 1 / n
    assert {each.kind for each in found} == set(sent)


def losses(layout: LayoutConfig, compress: str) -> np.ndarray:
    return parity.numbers(parity.run("mlp", layout, **{"optim.compress": compress, "train.precision": "f32"}))["loss"]


def test_a_compressed_run_is_near_the_exact_one_and_repeats_bit_for_bit():
    exact, one, two = (losses(LayoutConfig(data=4), compress) for compress in ("none", "int8", "int8"))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, exact)
    np.testing.assert_allclose(one, exact, rtol=0.02)


@pytest.mark.parity
@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(data=2, tensor=2, zero=3, microbatches=2),
        LayoutConfig(data=2, stages=2, replica=2, zero=1, microbatches=2),
    ],
    ids=["tensor", "stages"],
)
def test_it_goes_with_other_layouts(layout):
    """The audit runs in each, and so does the comparison of all copies of the weights."""
    fields = {"train.precision": "f32", "train.check_replicas_every": 2}
    exact = parity.numbers(parity.run("mlp", layout, **fields))["loss"]
    found = parity.numbers(parity.run("mlp", layout, **fields, **{"optim.compress": "bf16"}))["loss"]
    np.testing.assert_allclose(found, exact, rtol=0.02)
