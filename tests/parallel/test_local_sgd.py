"""Local SGD: the shards of the batch train by themselves, and meet at the syncs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import parity
import pytest

import jaxtrain.step.local_sgd
from jaxtrain.config import Config, LayoutConfig
from jaxtrain.data.augment import train_inputs
from jaxtrain.errors import ConfigError
from jaxtrain.models.layers import Context
from jaxtrain.optim.losses import loss_fn
from jaxtrain.parallel.bench.programs import sent_by
from jaxtrain.recipes import change
from jaxtrain.step.train_state import state_shapes
from jaxtrain.training.compiled import compile_train_step
from jaxtrain.training.input_pipeline import make_input_pipeline
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.session import train
from jaxtrain.training.setup import load_data, make_run_spec

# Nothing that is random, and nothing that a shard keeps beside its weights.
PLAIN = {
    "data.mixup": 0.0, "data.augmentation": "none", "data.residency": "stream", "model.dropout": 0.0, "optim.ema": 0.0,
    "optim.class_weights": "", "optim.momentum": 0.0, "optim.weight_decay": 0.0, "optim.clip_norm": 0.0,
    "optim.label_smoothing": 0.0,
}  # fmt: skip
DILOCO = {"optim.outer_rate": 0.7, "optim.outer_momentum": 0.9}


def config(n: int, sync_every: int, model: str = "mlp", layout: LayoutConfig | None = None, **fields: Any) -> Config:
    return parity.config(model, layout or LayoutConfig(data=n), **{"optim.sync_every": sync_every, **fields})


def run(directory: Path, wanted: Config, resume: str = "auto") -> Any:
    wanted = dataclasses.replace(wanted, checkpoint=dataclasses.replace(wanted.checkpoint, resume=resume))
    return train(wanted, directory, num_devices=parity.devices_of(wanted.layout), quiet=True)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def reference(wanted: Config, n: int) -> dict[str, np.ndarray]:
    """The weights' average after the run: a loop over steps and shards, with `jax.grad`, that knows nothing of the step."""
    optim, size = wanted.optim, wanted.data.global_batch // n
    with settings(wanted):
        spec = make_run_spec(wanted, load_data(wanted.data), jax.devices()[:n])
        begin = jax.jit(spec.init)(wanted.seed).params
        shards, anchor, momentum = [begin] * n, begin, jax.tree.map(np.zeros_like, begin)

        def loss(params: Any, x: jax.Array, targets: jax.Array) -> jax.Array:
            context = Context(example=np.arange(size, dtype=np.int32), train=True)
            logits, _ = spec.task.model.apply(params, {}, x, context, jax.random.key(0))
            return loss_fn("cross_entropy")(logits, targets).mean()

        gradient = jax.jit(jax.grad(loss))
        inputs = make_input_pipeline(spec.dataset, spec.layout, "stream", 0)
        batches = inputs.train(
            seed=wanted.seed, schedule=spec.task.schedule, weight_decay=0.0, global_batch=wanted.data.global_batch,
            first_step=0, first_example=0, steps=wanted.train.steps,
        )  # fmt: skip
        for number, batch in enumerate(batches, 1):
            images, labels = np.asarray(batch.images)[0], np.asarray(batch.labels)[0]
            examples = np.arange(len(labels), dtype=np.int32)
            x, targets = train_inputs(spec.task.preprocess, images, labels, examples, jax.random.key(0))
            for i in range(n):
                part = slice(i * size, (i + 1) * size)
                change = gradient(shards[i], x[part], targets[part])
                shards[i] = jax.tree.map(lambda p, g: p - optim.learning_rate * g, shards[i], change)
            if number % optim.sync_every == 0:
                mean = jax.tree.map(lambda *each: sum(each) / n, *shards)
                delta = jax.tree.map(lambda a, b: a - b, mean, anchor)
                momentum = jax.tree.map(lambda m, d: optim.outer_momentum * m + d, momentum, delta)
                step = jax.tree.map(lambda m, d: optim.outer_rate * (optim.outer_momentum * m + d), momentum, delta)
                anchor = jax.tree.map(lambda a, s: a + s, anchor, step)
                shards = [anchor] * n
        return leaves(jax.tree.map(lambda *each: sum(each) / n, *shards))


def check_against_the_reference(directory: Path, n: int, sync_every: int, outer: dict[str, float]) -> None:
    wanted = config(n, sync_every, **PLAIN, **outer, **{"train.steps": 5})
    found, exact = leaves(run(directory, wanted).state.params), reference(wanted, n)
    assert found.keys() == exact.keys()
    for name, leaf in exact.items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("n", "sync_every", "outer"), [(2, 2, {}), (4, 3, DILOCO)], ids=["mean", "DiLoCo"])
def test_it_is_the_loop_over_shards(tmp_path, n, sync_every, outer):
    """Five steps: the last ones come after the last sync, so that the average of what has drifted apart is compared too."""
    check_against_the_reference(tmp_path, n, sync_every, outer)


def test_a_sync_that_is_left_out_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtrain.step.local_sgd, "_sync", lambda task, layout, tree: tree)
    with pytest.raises(AssertionError):
        check_against_the_reference(tmp_path, 2, 2, {})


def test_shards_differ_between_syncs_and_agree_after_one(tmp_path):
    def apart(steps: int) -> tuple[float, float, float]:
        local = run(tmp_path / str(steps), config(2, 3, "resnet", **{"train.steps": steps})).state.communication[
            "local"
        ]
        trees = (local[name] for name in ("params", "batch_stats", "opt_state"))
        return tuple(max(float(np.abs(x[0] - x[1]).max()) for x in leaves(tree).values()) for tree in trees)

    assert min(apart(2)) > 0
    params, stats, moments = apart(3)
    assert (params, stats) == (0, 0)
    assert moments > 0  # each keeps its own


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("mlp", LayoutConfig(data=2, tensor=2, zero=3)),
        pytest.param("resnet", LayoutConfig(data=2, replica=2, reduce="ring"), marks=pytest.mark.parity),
        pytest.param("swin", LayoutConfig(data=2, zero=1), marks=pytest.mark.parity),
    ],
    ids=["mlp", "resnet", "swin"],
)
def test_layouts_with_as_many_shards_of_the_batch_agree(tmp_path, model, layout):
    n = layout.data * layout.replica
    fields = DILOCO | {"optim.ema": 0.9}
    one = parity.numbers(run(tmp_path / "one", config(n, 2, model, **fields)))
    two = parity.numbers(run(tmp_path / "two", config(n, 2, model, layout, **fields)))
    parity.assert_equal(two, one, 1e-9)


@pytest.mark.parametrize("outer", [{}, DILOCO], ids=["mean", "DiLoCo"])
def test_a_save_between_syncs_goes_on_bit_for_bit_and_as_the_average_elsewhere(tmp_path, outer):
    def go(steps: int, n: int, resume: str = "auto") -> Any:
        fields = {"train.steps": steps, "checkpoint.every": "3 steps", "train.precision": "f32", **outer}
        return run(tmp_path / f"{steps}-{n}-{resume[:1]}", config(n, 2, **fields), resume)

    whole, first = go(6, 4), go(3, 4)
    saved = str(first.workdir.path / "checkpoints" / "3")
    here, there = go(6, 4, saved), go(3, 2, saved)
    for one, two in zip(jax.tree.leaves(whole.state), jax.tree.leaves(here.state), strict=True):
        assert np.array_equal(one, two)
    average, local = leaves(first.state.params), leaves(there.state.communication["local"]["params"])
    apart = leaves(first.state.communication["local"]["params"])
    for name, leaf in average.items():
        assert local[name].shape == (2, *leaf.shape)
        assert all(np.array_equal(shard, leaf) for shard in local[name])
        np.testing.assert_allclose(apart[name].mean(0), leaf, atol=1e-6)
    if outer:
        for tree in ("params", "momentum"):  # of the last sync, which both runs have had
            old, new = (leaves(each.state.communication["outer"][tree]) for each in (first, there))
            assert all(np.array_equal(old[name], new[name]) for name in old)


def test_frozen_leaves_keep_their_bits(tmp_path):
    """The mean of three equal numbers is not always that number."""
    fields = {"optim.freeze_layers": 1, "data.global_batch": 48, "train.precision": "f32", **DILOCO}
    begin, end = (run(tmp_path / str(n), config(3, 2, **fields, **{"train.steps": n})).state for n in (1, 5))
    for tree in (end.params, end.ema["params"]):
        before, after = leaves(begin.params), leaves(tree)
        assert {name for name in before if np.array_equal(before[name], after[name])} == {
            name for name in before if "layers_00" in name
        }
    local = leaves(end.communication["local"]["params"])
    frozen = {name: leaf for name, leaf in leaves(begin.params).items() if "layers_00" in name}
    assert all(np.array_equal(shard, leaf) for name, leaf in frozen.items() for shard in local[name])


def test_only_a_sync_sends_weights():
    """The step's program sends the weights once in `sync_every` steps, in a branch, and a few scalars always."""
    wanted = config(4, 8, **PLAIN, **{"train.precision": "f32"})
    with settings(wanted):
        spec = make_run_spec(wanted, load_data(wanted.data), jax.devices()[:4])
        inputs = make_input_pipeline(spec.dataset, spec.layout, "stream", 0)
        step = compile_train_step(spec, inputs, state_shapes(spec.init, spec.layout), Path("trace.json"))
        params = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(spec.init, 0).params))
    text = step.programs["step"].as_text()
    sent = sent_by(text, spec.layout.mesh)[0]
    assert 1.5 * 4 * params <= sent <= 1.5 * 4 * params + 200
    entry = text[text.index("\nENTRY") :]
    outside = sum(line.count(" all-reduce(") for line in entry.splitlines())
    assert outside <= 6


@pytest.mark.parametrize(
    ("model", "layout", "fields", "says"),
    [
        ("mlp", LayoutConfig(data=2), {"optim.compress": "topk"}, r"sync_every=2: no gradients are sent"),
        ("mlp", LayoutConfig(data=2, stages=2, microbatches=2), {}, r"sync_every=2 trains whole models by themselves"),
        ("resnet", LayoutConfig(data=4), {"model.bn_groups": 6, "data.global_batch": 48}, r"bn_groups=6 does not divide"),
    ],
    ids=["compress", "stages", "groups"],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, model, layout, fields, says):
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, config(2, 2, model, layout, **fields))


def test_an_update_that_is_not_finite_is_refused_by_all_shards(tmp_path):
    """None of the five steps is made, and no weight changes."""
    fields = PLAIN | {"optim.loss": "tiny:bad_at_first", "train.nonfinite_skips": 100, "train.steps": 5}
    wanted = config(2, 3, **fields)
    found, begin = run(tmp_path / "5", wanted).state, run(tmp_path / "1", change(wanted, **{"train.steps": 1})).state
    local = leaves(found.communication["local"]["params"])
    for name, leaf in leaves(begin.params).items():
        assert all(np.array_equal(shard, leaf) for shard in local[name])
