"""The order of the examples: a pure function of (seed, number of the example).

Training is one endless stream of epochs. Its *number* e is example `permutation(n, seed, e // n)[e % n]` of the training
set. A batch is a range of numbers, so the remainder of an epoch goes into the next one, and every batch is whole. The only
state is one integer: how many examples were consumed. Any number of processes resumes from it.

The permutation sorts raw words of the Philox bit generator, whose stream NumPy guarantees across versions and platforms
(`np.random.Generator.permutation` has no such guarantee, NEP 19).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

# Splits use keys that no epoch reaches, so training never repeats their order when `seed` equals `split_seed`.
_SPLIT_ROLE = 1 << 63
_EVAL_ROLE = 1 << 62


@functools.lru_cache(maxsize=3)  # a batch spans two epochs at most, unless it is larger than the data set
def _epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    permutation = np.argsort(words, kind="stable")
    permutation.flags.writeable = False  # it is shared by all callers
    return permutation


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch.

    Args:
      n: how many examples there are.
      seed: the run's.
      epoch: 0 is the first.

    Returns:
      int64 [n], read-only.
    """
    return _epoch_permutation(n, seed, epoch)


def split_permutation(n: int, split_seed: int, role: int = 0) -> np.ndarray:
    """The fixed order from which splits are cut.

    Args:
      n: how many examples there are.
      split_seed: `data.split_seed`.
      role: another one gives an independent order.

    Returns:
      int64 [n], read-only.
    """
    return _epoch_permutation(n, split_seed, _SPLIT_ROLE + role)


def example_indices(n: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """The examples at some numbers of the endless stream.

    Args:
      n: size of the training set.
      seed: the run's seed.
      numbers: int64 [...].

    Returns:
      int64 [...], like `numbers`: indices into the training set, 0 <= index < n.
    """
    epochs, offsets = np.divmod(np.asarray(numbers, np.int64), n)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permutation(n, seed, int(epoch))[offsets[here]]
    return indices


def batch_indices(n: int, seed: int, start_example: int, count: int) -> np.ndarray:
    """The examples of a range of the endless stream.

    Args:
      n: size of the training set.
      seed: the run's.
      start_example: the first number of the range.
      count: how many.

    Returns:
      int64 [count]: indices into the training set.
    """
    return example_indices(n, seed, np.arange(start_example, start_example + count, dtype=np.int64))


def index_stream(
    n: int, *, seed: int, global_batch: int, positions: np.ndarray, first_example: int, steps: int
) -> Iterator[np.ndarray]:
    """The local batches of training, for a data set that is held on the device.

    Args:
      n: size of the training set.
      seed: the run's seed.
      global_batch: examples a step, over all processes.
      positions: int64 [b]: which positions of the global batch (0 <= p < global_batch) this process reads, in order.
      first_example: how many examples were consumed before the first step.
      steps: how many batches.

    Yields:
      int32 [b] a step: the rows of the data set that form this process's batch.
    """
    for step in range(steps):
        numbers = first_example + step * global_batch + np.asarray(positions, np.int64)
        yield example_indices(n, seed, numbers).astype(np.int32)


def eval_subset(n: int, count: int) -> np.ndarray:
    """The examples of a split that an evaluation takes: a fixed random part, since a split may be sorted by class.

    A smaller part is contained in a larger one. It depends on nothing else, neither on a seed nor on the devices.

    Args:
      n: size of the split.
      count: how many to take; 0, or more than there are, is all.

    Returns:
      int64 [min(count, n)], rising.
    """
    return np.arange(n, dtype=np.int64) if not 0 < count < n else np.sort(_epoch_permutation(n, 0, _EVAL_ROLE)[:count])


def eval_batch(n: int, batch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Batch `step` of one pass over n examples in order: (indices int64 [batch], mask bool [batch]).

    The last batch is filled up with the last example, whose mask is False. It is a real row, so padding is no special case.
    """
    numbers = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    return np.minimum(numbers, n - 1), numbers < n


def eval_batches(n: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields every `eval_batch` of one pass over n examples. Every example has mask True exactly once."""
    for step in range(-(-n // batch)):
        yield eval_batch(n, batch, step)
