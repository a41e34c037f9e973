"""The reductions of `layout.reduce`: each is `psum`, and sends the bytes that its formula says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxtrain.parallel.reduce
from jaxtrain.parallel.gpu_program import permuted_bytes
from jaxtrain.parallel.reduce import ALGORITHMS, buckets, messages, reduce_leaves, sent_bytes

AXES = ("replica", "data")
IN_DEFAULT = [(1, 2), (1, 3), (2, 2), (2, 3), (2, 4)]
SIZES = [*IN_DEFAULT, (1, 1), (3, 2), (1, 8), (4, 2)]  # replicas, and devices in each
SHAPES = [(), (1,), (5, 7), (0, 3), (3, 3, 2, 4), (64,)]


def mesh_of(replica: int, data: int) -> Mesh:
    devices = np.array(jax.devices()[: replica * data]).reshape(replica, data)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


def reducing(mesh: Mesh, algorithm: str, bucket: int) -> Any:
    """A program of leaves [n, ...], one row a device: the sum, on each device."""

    def of_device(leaves: list[jax.Array]) -> list[jax.Array]:
        return [leaf[None] for leaf in reduce_leaves([leaf[0] for leaf in leaves], algorithm, AXES, bucket)]

    return jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False))


def leaves_of(n: int) -> list[np.ndarray]:
    """Of every shape and dtype: whole numbers, whose sums are exact in each of them, and noise."""
    chance, found = np.random.default_rng(n), []
    for i, shape in enumerate(SHAPES):
        whole = chance.integers(-7, 8, (n, *shape))
        dtypes = (np.float32, ml_dtypes.bfloat16, np.int32, np.int8)
        found += [whole.astype(dtypes[(i + k) % 4]) for k in range(2)]
        found.append(chance.standard_normal((n, *shape)).astype(np.float32))
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [parity.case(size, default=size in IN_DEFAULT) for size in SIZES], ids=str)
def test_a_reduction_is_psum(size, algorithm):
    n = size[0] * size[1]
    leaves = leaves_of(n)
    for found, leaf in zip(reducing(mesh_of(*size), algorithm, 100)(leaves), leaves, strict=True):
        rows = np.asarray(found)
        assert (rows.dtype, rows.shape) == (leaf.dtype, leaf.shape)
        assert all(np.array_equal(row, rows[0]) for row in rows)  # every device has the same bits
        wanted = leaf.astype(np.float64).sum(0)
        error = np.abs(rows[0].astype(np.float64) - wanted)
        whole = np.array_equal(leaf, np.round(leaf.astype(np.float64)))
        assert np.all(error <= (0 if whole else 1e-6 * np.abs(leaf).sum(0)))


def test_in_bf16_it_differs_from_the_sum_by_rounding():
    leaf = np.random.default_rng(0).standard_normal((6, 999)).astype(ml_dtypes.bfloat16)
    wanted, size = leaf.astype(np.float64).sum(0), np.abs(leaf.astype(np.float64)).sum(0)
    for algorithm in ALGORITHMS:
        found = np.asarray(reducing(mesh_of(2, 3), algorithm, 1 << 20)([leaf])[0])[0].astype(np.float64)
        assert np.all(np.abs(found - wanted) <= 6 * 2.0**-8 * size)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [(1, 2), (1, 3), (2, 3), (2, 4)], ids=str)
def test_the_compiled_program_sends_the_bytes_of_the_formula(size, algorithm):
    replica, data = size
    n = replica * data
    shape = jax.ShapeDtypeStruct((n, 4 * 3 * 8), jnp.float32)  # divides by every number of devices: no padding
    text = reducing(mesh_of(*size), algorithm, 1 << 20).lower([shape]).compile().as_text()
    crosses = lambda sender, receiver: sender // data != receiver // data  # noqa: E731
    wanted = sent_bytes(algorithm, 4 * shape.size / n, data, replica)
    assert max(permuted_bytes(text).values()) == wanted[0]
    if algorithm == "hierarchical" and replica > 1:  # the slow axis carries 1 / data
        assert set(permuted_bytes(text, crosses).values()) == {wanted[1]}
        assert wanted[1] == 2 * (replica - 1) / replica * 4 * shape.size / n / data
    assert text.count(" collective-permute(") == messages(algorithm, data, replica)
    assert not any(kind in text for kind in ("all-reduce", "reduce-scatter", "all-gather"))


def test_leaves_are_packed_into_buckets():
    leaves = [jnp.zeros(k, dtype) for k, dtype in [(3, "f4"), (2, "i4"), (4, "f4"), (90, "f4"), (0, "f4"), (1, "f4")]]
    assert buckets(leaves, 28) == [[0, 2], [3], [5], [1]]
    assert buckets(leaves, 1 << 20) == [[0, 2, 3, 5], [1]]
    assert buckets([], 28) == []


def drop_a_bucket(monkeypatch):
    monkeypatch.setattr(jaxtrain.parallel.reduce, "buckets", lambda leaves, size: buckets(leaves, size)[1:])


def send_the_wrong_way(monkeypatch):
    monkeypatch.setattr(jaxtrain.parallel.reduce, "_ring", lambda n: [(d, (d - 1) % n) for d in range(n)])


@pytest.mark.parametrize("fault", [drop_a_bucket, send_the_wrong_way])
def test_a_planted_fault_shows(fault, monkeypatch):
    leaves = [np.arange(4 * k, dtype=np.float32).reshape(4, k) for k in (8, 40)]
    fault(monkeypatch)
    found = reducing(mesh_of(1, 4), "ring", 64)(leaves)
    assert not all(np.array_equal(np.asarray(f)[0], leaf.sum(0)) for f, leaf in zip(found, leaves, strict=True))
