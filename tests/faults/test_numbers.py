"""Numbers that are not finite, spikes, and copies of a weight that differ: passed over, rolled back, or the run stops."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import SMALL, here

from jaxtrain.errors import NumericError
from jaxtrain.observability.anomaly import AnomalyDetector
from jaxtrain.parallel.replicas import ReplicaCheck

# One example has a class of its own, and its loss is not a number.
POISON = """
import dataclasses

import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.data import registry

BAD = 17  # an index in the training set

class Poisoned:
    def __init__(self, base):
        self.base, self.shape = base, base.shape

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        images, labels = self.base.read(indices)
        return images, np.where(np.asarray(indices) == BAD, 10, labels)

def digits(config, image_size):
    found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
    return dataclasses.replace(found, train=Poisoned(found.train))

def loss(logits, targets):
    return jnp.where(targets[:, 10] > 0, jnp.nan, optax.softmax_cross_entropy(logits, targets))
"""

FIELDS = SMALL | {
    "data.name": "poison:digits", "optim.loss": "poison:loss", "model.num_classes": 11, "data.examples": 128,
    "train.epochs": 3, "checkpoint.every": "1", "checkpoint.keep": 100, "train.eval_every": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def poison(tmp_path, monkeypatch):
    (tmp_path / "poison.py").write_text(POISON)
    monkeypatch.syspath_prepend(tmp_path)


def finite(result) -> bool:
    return all(np.isfinite(leaf).all() for leaf in runs.leaves(result).values())


def notes(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "bad_batches.jsonl").read_text().splitlines()]


CALLS = {"train.steps_per_call": 4, "checkpoint.every": "0"}


@pytest.mark.parametrize(
    "layout",
    [
        {},
        pytest.param({"layout.stages": 2, "layout.microbatches": 2}, marks=pytest.mark.faults),
        pytest.param(CALLS, marks=pytest.mark.faults),
    ],
    ids=["one", "stages", "calls"],
)
def test_a_bad_batch_is_passed_over(tmp_path, layout):
    result = here(tmp_path / "run", FIELDS | layout | {"train.nonfinite_skips": 1}, devices=2 if layout else 1)
    losses = [row["loss"] for row in result.history if row["phase"] == "train"]
    bad = [step for step, loss in enumerate(losses, 1) if not loss or not np.isfinite(loss)]
    assert len(losses) == 12
    assert len(bad) == 3, "once an epoch"
    assert [note["step"] for note in notes(tmp_path / "run")] == bad
    assert all(17 in note["examples"] and len(note["examples"]) == 32 for note in notes(tmp_path / "run"))
    assert finite(result)
    # Nothing of that batch is left: the next update starts from where the one before ended.
    norms = [row["param_norm"] for row in result.history if row["phase"] == "train"]
    for step in bad:
        if step < 12:
            assert norms[step] == norms[step - 1]


@pytest.mark.parametrize("calls", [{}, pytest.param(CALLS, marks=pytest.mark.faults)], ids=["one", "calls"])
def test_without_leave_to_pass_over_the_run_stops_with_its_state(tmp_path, calls):
    with pytest.raises(NumericError, match="is not finite"):
        here(tmp_path / "run", FIELDS | calls, seed=1)  # the bad example comes in step 3
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == [1, 2]
    assert runs.checkpoints(tmp_path / "run")[-1] == 2


@pytest.mark.parametrize("per_call", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_rollback_goes_past_the_examples_that_spoiled_the_run(tmp_path, per_call):
    fields = FIELDS | {"train.rollbacks": 3, "checkpoint.every": "2", "train.steps_per_call": per_call}
    result = here(tmp_path / "run", fields)
    rows = [row for row in result.history if row["phase"] == "train"]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert finite(result)
    assert len(notes(tmp_path / "run")) == 3
    log = (tmp_path / "run" / "logs" / "process_0.log").read_text()
    assert log.count("rolled back to step") == 3
    steps = [row["step"] for row in runs.rows(tmp_path / "run")]
    assert steps == list(range(1, steps[-1] + 1)), "each step is there once"
    assert steps[-1] < 12, "the examples passed over are not made up for"
    with pytest.raises(NumericError, match="is not finite"):
        here(tmp_path / "again", fields | {"train.rollbacks": 2})


# ------------------------------------------------------------------------------------------------------------- spikes


def loss_curve(seed: int, steps: int = 400) -> list[float]:
    noise = random.Random(seed)
    return [0.3 + 2 * 0.99**step + noise.gauss(0, 0.1) for step in range(steps)]


def test_ten_clean_runs_have_no_spike():
    for seed in range(10):
        guard = AnomalyDetector(0, 10.0)
        for step, loss in enumerate(loss_curve(seed), 1):
            assert not guard.observe(step, loss, 1 + loss, 0.1, skipped=False).text, (seed, step)


@pytest.mark.parametrize(("loss", "norm", "what"), [(9.0, 1.0, "loss"), (1.0, 80.0, "gradient norm")])
def test_a_spike_is_found_at_its_step(loss, norm, what):
    guard = AnomalyDetector(0, 10.0)
    for step, value in enumerate(loss_curve(0, 60), 1):
        assert not guard.observe(step, value, 1.0 + value, 0.1, skipped=False).text
    found = guard.observe(61, loss, norm, 0.1, skipped=False)
    assert f"the {what} of step 61 is a spike" in found.text
    assert (found.action, found.first) == ("roll back", 61)


def test_an_update_that_is_not_finite_is_found():
    guard = AnomalyDetector(3, 0.0)
    assert guard.observe(5, 1.0, 1.0, float("inf"), skipped=False).action == "stop"
    assert guard.observe(6, 1.0, 1.0, 0.1, skipped=False).action == "go on"


def test_a_state_whose_update_was_not_finite_is_never_saved(tmp_path):
    fields = SMALL | {"optim.learning_rate": 1e25, "optim.lr_scaling": "none", "checkpoint.every": "1"}
    with pytest.raises(NumericError, match="the last checkpoint is as it was"):
        here(tmp_path / "run", fields)
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


# ----------------------------------------------------------------------------------------------------------- replicas


def altered(array: jax.Array, device: int) -> jax.Array:
    """`array` with one bit flipped in the copy on one device."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            data.view(np.uint8).ravel()[5] ^= 1
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.faults), 3])
def test_one_flipped_bit_names_its_device(tmp_path, zero):
    fields = SMALL | {"layout.zero": zero, "layout.replica": 2, "train.steps": 2, "train.check_replicas_every": 1}
    state = here(tmp_path, fields, devices=4).state
    check = ReplicaCheck()
    assert check(state.params) == []
    path, leaf = max(jax.tree_util.tree_leaves_with_path(state.params), key=lambda pair: pair[1].size)
    damaged = jax.tree_util.tree_map_with_path(lambda p, x: altered(x, 3) if p == path else x, state.params)
    (said,) = check(damaged)
    assert said.startswith("1 parameters on ")
    assert "kernel" in said
    assert leaf.size > 5


def test_copies_that_differ_stop_the_run(tmp_path, monkeypatch):
    seen = []

    def compare(self, tree):
        seen.append(tree)
        return ["2 parameters on cpu:1 of process 0 differ"] if len(seen) == 3 else []

    monkeypatch.setattr(ReplicaCheck, "__call__", compare)
    with pytest.raises(NumericError, match=r"after step 3 2 parameters on cpu:1"):
        here(tmp_path / "run", SMALL | {"train.check_replicas_every": 1}, devices=2)
