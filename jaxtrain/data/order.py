"""The order of the examples: a pure function of (seed, number of the example).

Training is one endless stream of epochs: *number* e of it is example `permutation(n, seed, e // n)[e % n]` of the
training set. A batch is a range of numbers, so an epoch's remainder is carried into the next and every batch is whole.
One integer, how many examples were consumed, is all the state there is, and any number of processes resumes from it.

The permutation sorts raw words of the Philox bit generator, whose stream NumPy guarantees across versions and platforms
(`np.random.Generator.permutation` has no such guarantee, NEP 19).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

# Splits draw from keys that no epoch reaches, so a split does not move when `seed` happens to equal `split_seed`.
_SPLIT_ROLE = 1 << 63


@functools.lru_cache(maxsize=3)  # a batch spans two epochs at most, unless it is larger than the data set
def _epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    permutation = np.argsort(words, kind="stable")
    permutation.flags.writeable = False  # it is shared by all callers
    return permutation


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n], read-only: the order of the n examples in `epoch`."""
    return _epoch_permutation(n, seed, epoch)


def split_permutation(n: int, split_seed: int, role: int = 0) -> np.ndarray:
    """int64 [n]: the fixed order that splits cut; `role` tells independent splits of one data set apart."""
    return _epoch_permutation(n, split_seed, _SPLIT_ROLE + role)


def example_indices(n: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """int64, shaped like `numbers`: the examples (0 <= index < n) that stand at these numbers of the endless stream."""
    epochs, places = np.divmod(np.asarray(numbers, np.int64), n)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permutation(n, seed, int(epoch))[places[here]]
    return indices


def batch_indices(n: int, seed: int, start_example: int, count: int) -> np.ndarray:
    """int64 [count]: examples number start_example ... start_example + count - 1 of the endless stream."""
    return example_indices(n, seed, np.arange(start_example, start_example + count, dtype=np.int64))


def index_stream(
    n: int, *, seed: int, global_batch: int, positions: np.ndarray, first_example: int, steps: int
) -> Iterator[np.ndarray]:
    """Yields int32 [len(positions)] a step: the rows of a data set held on the device that form this process's batch.

    positions: which places of the global batch (0 <= p < global_batch) this process takes, in its order.
    first_example: examples consumed before the first step.
    """
    for step in range(steps):
        numbers = first_example + step * global_batch + np.asarray(positions, np.int64)
        yield example_indices(n, seed, numbers).astype(np.int32)


def eval_batch(n: int, batch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Batch `step` of one pass over n examples in order: (indices int64 [batch], mask bool [batch]).

    The last batch is filled with the last example, masked out: a real row, so that padding needs no case of its own.
    """
    numbers = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    return np.minimum(numbers, n - 1), numbers < n


def eval_batches(n: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the `eval_batch`es of one pass: every example has mask True exactly once."""
    for step in range(-(-n // batch)):
        yield eval_batch(n, batch, step)
