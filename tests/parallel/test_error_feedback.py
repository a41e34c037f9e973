"""Compression with error feedback: what is sent and what is held back are the gradients; it survives a change of devices."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

import jaxtrain.step.exchange
from jaxtrain.config import LayoutConfig, OptimConfig
from jaxtrain.errors import ConfigError
from jaxtrain.parallel import error_feedback
from jaxtrain.parallel.bench.programs import sent_by
from jaxtrain.parallel.error_feedback import chosen_count, largest
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.step.exchange import exchange, initial_exchange
from jaxtrain.step.gradients import GradientSums
from jaxtrain.training.session import train

# A kernel of a convolution, one of a dense layer, a wide one, a bias, and a leaf that nothing would shrink.
SHAPES = {"conv": (3, 3, 5, 8), "dense": (40, 10), "wide": (3, 50), "bias": (40,), "scale": (1,)}
WAYS = ["topk", "randomk", "powersgd"]


class Exchange:
    """The exchange of `n` devices, compiled, without a model around it."""

    def __init__(self, n: int, reduce: str = "auto", *, replica: int = 1, dtype: Any = jnp.float32, **optim: Any):
        config = LayoutConfig(data=n // replica, replica=replica, reduce=reduce, reduce_bucket=0.001)
        mesh = make_mesh(config, jax.devices()[:n])
        self.optim = OptimConfig(**{"compress_ratio": 0.1, "compress_rank": 2, "compress_min_rate": 1.2} | optim)
        self.layout, self.n, self.dtype = Layout(mesh, config, compress=self.optim.compress), n, dtype
        task: Any = types.SimpleNamespace(optim=self.optim)

        def step(gradients: Any, held: Any, step: jax.Array) -> tuple[Any, Any]:
            state: Any = types.SimpleNamespace(communication=held, loss_scale=(), step=step)
            sums = exchange(task, self.layout, state, GradientSums(gradients, {}, 0, 0), jnp.int32(0))
            return sums.gradients, sums.communication

        leaves = {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}
        self.held = initial_exchange(self.layout, self.optim, leaves, 0)
        self.program = jax.jit(step).lower(self.gradients(0), self.held, jnp.int32(0)).compile()

    def gradients(self, seed: int) -> dict[str, jax.Array]:
        """Of each device [n, ...]."""
        rng = np.random.default_rng(seed)
        return {k: jnp.asarray(rng.standard_normal((self.n, *shape)), self.dtype) for k, shape in SHAPES.items()}

    def __call__(self, gradients: Any, step: int) -> dict[str, np.ndarray]:
        sums, self.held = self.program(gradients, self.held, jnp.int32(step))
        return {name: np.asarray(leaf, np.float64) for name, leaf in sums.items()}


def follow(exchange: Exchange, steps: int) -> None:
    """What was sent in all steps and what is held at the end are the sum of all gradients; something is held."""
    total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    sent = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(steps):
        gradients = exchange.gradients(step)
        found = exchange(gradients, step)
        for name in SHAPES:
            total[name] += np.asarray(gradients[name], np.float64).sum(0)
            sent[name] += found[name]
    held = {name: np.asarray(leaf, np.float64).sum(0) for name, leaf in exchange.held["residual"].items()}
    assert any(np.abs(leaf).max() > 1 for leaf in held.values())
    for name in SHAPES:
        np.testing.assert_allclose(sent[name] + held.get(name, 0), total[name], atol=2e-4 * exchange.n, err_msg=name)


@pytest.mark.parametrize("compress", WAYS)
@pytest.mark.parametrize(("n", "replica", "reduce"), [(2, 1, "auto"), (3, 1, "auto"), (8, 2, "auto")])
def test_sent_and_held_are_the_gradients_over_100_steps(compress, n, replica, reduce):
    follow(Exchange(n, reduce, replica=replica, compress=compress), 100)


@pytest.mark.parametrize("compress", ["randomk", "powersgd"])
@pytest.mark.parametrize("reduce", ["ring", "tree", "hierarchical"])
def test_what_can_be_added_up_goes_with_every_reduction(compress, reduce):
    follow(Exchange(4, reduce, replica=2, compress=compress), 5)


def no_feedback(monkeypatch):
    """The residual is thrown away."""
    compress = jaxtrain.step.exchange._Exchanger._compress

    def forgetful(self, mine, residual, basis, key):
        return compress(self, mine, jax.tree.map(jnp.zeros_like, residual), basis, key)

    monkeypatch.setattr(jaxtrain.step.exchange._Exchanger, "_compress", forgetful)


def drop_a_bucket(monkeypatch):
    """The first bucket is thought to be sent, and never arrives."""
    real = jaxtrain.step.exchange.randomk

    def dropping(*arguments):
        sums, sent = real(*arguments)
        return sums | {"conv": jnp.zeros_like(sums["conv"])}, sent

    monkeypatch.setattr(jaxtrain.step.exchange, "randomk", dropping)


def average(monkeypatch):
    """The mean instead of the sum."""
    real = jaxtrain.step.exchange._Exchanger._add_up
    monkeypatch.setattr(
        jaxtrain.step.exchange._Exchanger,
        "_add_up",
        lambda self, leaves: jax.tree.map(lambda x: x / 3, real(self, leaves)),
    )


@pytest.mark.parametrize(
    ("fault", "compress"),
    [(no_feedback, "topk"), (drop_a_bucket, "randomk"), (average, "powersgd")],
    ids=["no feedback", "a bucket", "the mean"],
)
def test_planted_faults_show(monkeypatch, fault, compress):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        follow(Exchange(3, compress=compress), 5)


def test_topk_sends_the_largest_of_each_device():
    exchange = Exchange(2, compress="topk")
    gradients = exchange.gradients(0)
    found = exchange(gradients, 0)
    for name in ("conv", "dense", "wide"):
        wanted = np.zeros(SHAPES[name]).reshape(-1)
        for mine in np.asarray(gradients[name], np.float64):
            flat = mine.reshape(-1)
            places = np.argsort(-np.abs(flat))[: chosen_count(flat.size, 0.1)]
            wanted[places] += flat[places]
        np.testing.assert_allclose(found[name].reshape(-1), wanted, rtol=1e-6)


@pytest.mark.parametrize("ratio", [1e-9, 0.1, 0.5, 1.0])
def test_the_largest_of_each_part(ratio):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 2**32, 1000, np.uint32), np.zeros(7, np.uint32), np.full(5, 2**32 - 1, np.uint32),
             rng.integers(0, 4, 100, np.uint32), np.array([3], np.uint32)]  # fmt: skip
    places = np.asarray(jax.jit(lambda x: largest(x, [len(p) for p in parts], ratio))(np.concatenate(parts)))
    begin, found = 0, []
    for part in parts:
        count = chosen_count(len(part), ratio)
        found.extend(begin + np.sort(np.argsort(-part.astype(np.int64), kind="stable")[:count]))
        begin += len(part)
    assert np.array_equal(places, found)


def test_powersgd_of_full_rank_is_no_compression():
    """The bound of the rate would send such leaves whole: it is bypassed."""
    values = {k: np.random.default_rng(1).standard_normal((3, *SHAPES[k])) for k in ("conv", "dense", "wide")}
    with jax.enable_x64(True):
        mesh = make_mesh(LayoutConfig(data=3), jax.devices()[:3])

        def of_device(values: Any) -> Any:
            mine = {k: leaf[0] for k, leaf in values.items()}
            ranks = {k: error_feedback.rank_of(leaf.shape, 100) for k, leaf in mine.items()}
            basis = {
                k: jax.random.normal(jax.random.key(0), (leaf.shape[-1], ranks[k]), jnp.float64)
                for k, leaf in mine.items()
            }
            return error_feedback.powersgd(mine, basis, lambda leaves: jax.lax.psum(leaves, "data"))[0]

        P = jax.sharding.PartitionSpec
        mapped = jax.shard_map(of_device, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
        found = jax.jit(mapped)(values)
        for name, leaf in values.items():
            np.testing.assert_allclose(np.asarray(found[name]), leaf.sum(0), atol=1e-12)


def test_powersgd_finds_a_sum_of_its_rank():
    """Two steps of the power iteration find the one matrix of rank 2 that is sent again and again."""
    exchange = Exchange(2, compress="powersgd", compress_rank=2)
    rng = np.random.default_rng(0)
    low = {k: (rng.standard_normal((int(np.prod(s[:-1])), 2)) @ rng.standard_normal((2, s[-1]))).reshape(s)
           for k, s in SHAPES.items() if len(s) > 1}  # fmt: skip
    gradients = {k: jnp.stack([jnp.asarray(low.get(k, np.zeros(s)), jnp.float32)] * 2) for k, s in SHAPES.items()}
    found = exchange(gradients, 0)
    for name, leaf in low.items():
        np.testing.assert_allclose(found[name], 2 * leaf, atol=1e-4)


@pytest.mark.parametrize("compress", WAYS)
def test_the_warm_up_sends_all_and_holds_nothing(compress):
    exchange = Exchange(2, compress=compress, compress_warmup=3)
    for step in range(4):
        gradients = exchange.gradients(step)
        found = exchange(gradients, step)
        exact = {name: np.asarray(leaf, np.float64).sum(0) for name, leaf in gradients.items()}
        near = [np.allclose(found[name], exact[name], atol=1e-5) for name in SHAPES]
        held = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(exchange.held["residual"]))
        assert (all(near), held == 0) == (step < 3, step < 3)


@pytest.mark.parametrize("compress", WAYS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_though_it_is_not_chosen(compress, bad):
    exchange = Exchange(2, compress=compress)
    gradients = exchange.gradients(0)
    gradients["dense"] = gradients["dense"].at[1, 7, 3].set(bad)
    assert not np.isfinite(exchange(gradients, 0)["dense"]).any()


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("compress", WAYS)
def test_the_compiled_program_sends_the_bytes_of_the_formula(compress, n):
    exchange = Exchange(n, compress=compress)
    sent = sent_by(exchange.program.as_text(), exchange.layout.mesh)[0]
    sizes = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    chosen = sum(chosen_count(sizes[k], 0.1) for k in ("conv", "dense", "wide", "bias"))
    ring = 2 * (n - 1) / n * 4
    low = sum(2 * (sizes[k] // SHAPES[k][-1] + SHAPES[k][-1]) for k in ("conv", "dense", "wide"))
    wanted = {
        "topk": (n - 1) * 8 * chosen + ring * 1,
        "randomk": ring * (chosen + 1),
        "powersgd": ring * (low + 40 + 1),
    }[compress]
    assert sent == pytest.approx(wanted + ring, rel=1e-6)  # and a flag whether all is finite


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parity
@pytest.mark.parametrize("compress", WAYS)
@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(data=2, tensor=2, zero=3, microbatches=2),
        LayoutConfig(data=2, stages=2, replica=2, zero=1, microbatches=2),
    ],
    ids=["tensor", "stages"],
)
def test_it_goes_with_other_layouts(compress, layout):
    """The audit runs in each, and so does the comparison of all copies of the weights."""
    fields = {"train.precision": "f32", "train.check_replicas_every": 2}
    exact = parity.numbers(parity.run("mlp", layout, **fields))["loss"]
    found = parity.numbers(parity.run("mlp", layout, **fields, **{"optim.compress": compress}))["loss"]
    assert not np.array_equal(found, exact)
    np.testing.assert_allclose(found, exact, rtol=0.1)


def test_microbatches_are_compressed_once():
    """So another number of them changes nothing but rounding."""
    fields = {"optim.compress": "powersgd"}
    one, two = (parity.numbers(parity.run("mlp", LayoutConfig(data=2, microbatches=m), **fields)) for m in (1, 2))
    parity.assert_equal(two, one, 1e-9)


@pytest.mark.parametrize("compress", ["topk", "powersgd"])
def test_a_resumed_run_is_the_same_and_other_devices_get_what_was_held(tmp_path, compress):
    fields = {"optim.compress": compress, "checkpoint.every": "3 steps", "train.precision": "f32"}

    def run(steps: int, n: int, resume: str = "auto") -> Any:
        config = parity.config("mlp", LayoutConfig(data=n), **fields, **{"train.steps": steps})
        config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, resume=resume))
        return train(config, tmp_path / f"{steps}-{n}", num_devices=n, quiet=True)

    whole, first = run(6, 4), run(3, 4)
    here, there = (run(steps, n, resume=str(first.workdir.path / "checkpoints" / "3")) for steps, n in ((6, 4), (3, 2)))
    for one, two in zip(jax.tree.leaves(whole.state), jax.tree.leaves(here.state), strict=True):
        assert np.array_equal(one, two)
    held, shared = (result.state.communication["residual"] for result in (first, there))
    for one, two in zip(jax.tree.leaves(held), jax.tree.leaves(shared), strict=True):
        assert (one.shape[0], two.shape[0]) == (4, 2)
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(np.asarray(two).sum(0), np.asarray(one).sum(0), atol=1e-5)
        assert np.array_equal(two[0], two[1])


@pytest.mark.parametrize("compress", ["bf16", "int8", "topk"])
def test_what_cannot_be_added_up_on_the_way_takes_the_place_of_a_reduction(compress):
    with pytest.raises(ConfigError, match=rf"optim\.compress='{compress}' has an exchange of its own in place of"):
        parity.run("mlp", LayoutConfig(data=4, reduce="ring"), **{"optim.compress": compress})
