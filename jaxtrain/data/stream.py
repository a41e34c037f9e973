"""Batches that are read while training runs. This is the one module that knows Grain.

A step's local batch is one element of a Grain data set, so Grain's overhead occurs once a batch and not once an example
(measured 5-8 times faster). `order` decides which examples a batch has, and a run resumes from one number. Grain reads
ahead, in threads of this process or in worker processes, and returns the batches in order.

Workers are spawned: a script that streams with workers needs `if __name__ == "__main__":`, and a user's source must
pickle. Workers end with the stream, or by themselves when this process is killed. A worker that raises or dies ends the
stream within about a second. A worker that hangs in a system call (a dead network disk) blocks the stream, as any read does.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import re
import signal
import threading
import time
import weakref
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from jaxtrain.data import order
from jaxtrain.data.base import Source
from jaxtrain.errors import DataError, JaxtrainError
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.plugins import place_in_own_code

_READ_AHEAD = 2  # batches ready beside the one in use, in this process or in each worker
_MOST_WORKERS = 16  # of one training process; each has a copy of the program (about 0.2 GB) and two batches
_MOST_THREADS = 4  # more threads would delay the one that feeds the devices; workers do not


def default_workers(*, cheap: bool = False, local_processes: int = 1) -> int:
    """The number of reading processes, from the CPUs that this process may use; 0 with two CPUs or fewer.

    0 means to read in threads of this process.

    Args:
      cheap: whether examples need no decoding (`base.is_cheap`). Then workers would only add copies.
      local_processes: training processes that share this host's CPUs.
    """
    return 0 if cheap else max(0, min(_MOST_WORKERS, usable_cpus() // local_processes - 2))


def default_threads(*, local_processes: int = 1) -> int:
    """The number of reading threads without workers, for a source that decodes outside Python's lock."""
    return max(1, min(_MOST_THREADS, usable_cpus() // local_processes))


class _Plan(Protocol):
    """Which examples the local batch of a step has. The workers get a pickled copy."""

    def __call__(self, step: int) -> np.ndarray:
        """int64 [b]: indices into the source."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class _TrainPlan:
    examples: int
    seed: int
    global_batch: int
    positions: np.ndarray
    first_example: int

    def __call__(self, step: int) -> np.ndarray:
        numbers = self.first_example + step * self.global_batch + self.positions
        return order.example_indices(self.examples, self.seed, numbers)


@dataclasses.dataclass(frozen=True, eq=False)
class _EvalPlan:
    examples: int
    global_batch: int
    positions: np.ndarray

    def __call__(self, step: int) -> np.ndarray:
        return order.eval_batch(self.examples, self.global_batch, step)[0][self.positions]


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
    """A Grain data source: element t is the local batch of step t."""

    source: Source
    plan: _Plan
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: Any) -> tuple[np.ndarray, np.ndarray]:
        indices = self.plan(int(index))
        try:
            return self.source.read(indices)
        except JaxtrainError:
            raise
        except Exception as error:  # a user's source may raise anything, also what a worker could not pickle
            shown = ", ".join(str(index) for index in indices[:8])
            reason = re.sub(r"<_io\.\w+ object at \w+>", "that has no name", str(error))  # Pillow's, of bytes in memory
            what = f"{type(error).__name__}: {reason}{place_in_own_code(error)}"
            raise DataError(f"{type(self.source).__name__} failed to read examples {shown}, ... ({what}).") from error


class Stream:
    """Iterates over (images uint8 [b, H, W, C], labels int32 [b]). It reads ahead from the moment it is made.

    Close it, or use it in a `with`. `next` raises `DataError` for an example that cannot be read, and `JaxtrainError`
    if a worker has died. Then the stream is closed.
    """

    def __init__(self, steps: _Steps, workers: int, threads: int):
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its flags; from a Python program nobody has parsed any
        self._workers = workers
        self._left = len(steps)
        ahead = grain.ReadOptions(
            num_threads=0 if workers else threads, prefetch_buffer_size=0 if workers else max(threads, _READ_AHEAD)
        )
        batches = grain.MapDataset.source(steps).to_iter_dataset(ahead)
        if workers:
            processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_READ_AHEAD)
            batches = batches.mp_prefetch(processes, worker_init_fn=_start_worker)
        if workers:
            _SAFE_PATH.hold()
        self._batches: Any = iter(batches)
        self.close = weakref.finalize(self, _close, self._batches, workers)
        """Ends the workers and frees what was read ahead. Runs once; at the latest when the program exits."""
        self._batches.get_state()  # makes the workers' iterators, without which there is nothing to start
        self._batches.start_prefetch()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._left:
            self.close()
            raise StopIteration
        try:
            images, labels = next(self._batches)
        except JaxtrainError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise JaxtrainError(
                f"Reading with config.data.workers={self._workers} failed ({error}); a worker that was killed is "
                "often short of memory or of /dev/shm, and one that cannot start needs `if __name__ == '__main__':` "
                "in the script."
            ) from error
        self._left -= 1
        return _unlinked(images), _unlinked(labels)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _unlinked(array: np.ndarray) -> np.ndarray:
    """A plain view of what may be an array in shared memory, which is freed with its last view.

    Grain removes the memory's name when the array is deleted. That comes too late where the program ends before, and Python
    then warns of leaked memory.
    """
    if isinstance(array, SharedMemoryArray) and array._unlink_on_del:
        array._unlink_on_del = False
        array.shm.unlink()  # type: ignore[union-attr]
    return np.asarray(array)


class _SafePath:
    """While a stream with workers is open, a new Python process imports no module from the current directory by itself.

    A worker gets this process's search path only after it has imported what `multiprocessing` needs. Grain starts workers
    from another thread, some time after it was asked to.
    """

    def __init__(self) -> None:
        self._lock, self._held, self._before = threading.Lock(), 0, None

    def hold(self) -> None:
        """Call `release` as often as this."""
        with self._lock:
            if not self._held:
                self._before = os.environ.get("PYTHONSAFEPATH")
                os.environ["PYTHONSAFEPATH"] = "1"
            self._held += 1

    def release(self) -> None:
        """The last call restores the environment."""
        with self._lock:
            self._held -= 1
            if not self._held and self._before is None:
                os.environ.pop("PYTHONSAFEPATH", None)


_SAFE_PATH = _SafePath()


def _close(batches: Any, workers: int) -> None:
    try:
        batches.close()
    finally:
        if workers:
            _SAFE_PATH.release()
    if workers:
        gc.collect()  # Grain's exceptions between threads are reference cycles, which hold the last shared memory


def _start_worker(index: int, count: int) -> None:
    """Runs first in every worker: the parent alone handles Ctrl-C, and the worker ends when the parent is gone."""
    del index, count
    os.environ.pop("PYTHONSAFEPATH", None)  # it must not reach processes that a user's source starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(2)  # then the worker waits for room in its queue, and no shared memory is half made
        os._exit(1)


def train_stream(
    source: Source,
    *,
    seed: int,
    global_batch: int,
    positions: np.ndarray,
    first_example: int,
    workers: int,
    steps: int,
    threads: int = 1,
) -> Stream:
    """The local batches of training.

    Args:
      source: the training examples.
      seed: the run's seed.
      global_batch: examples a step, over all processes.
      positions: int64 [b]: which positions of the global batch (0 <= p < global_batch) this process reads, in order.
      first_example: how many examples were consumed before; a checkpoint stores it.
      workers: reading processes; 0 reads in this one. The batches depend neither on this nor on `threads`.
      steps: how many batches.
      threads: threads that read if there are no workers. Use more than one only for a source that decodes images
        (`base.decodes_images`). For others Python runs one thread at a time, and threads slow each other (measured).

    Returns:
      A stream of images uint8 [b, H, W, C] and labels int32 [b].
    """
    plan = _TrainPlan(len(source), seed, global_batch, np.asarray(positions, np.int64), first_example)
    return Stream(_Steps(source, plan, steps), workers, threads)


def eval_stream(source: Source, *, global_batch: int, positions: np.ndarray, workers: int, threads: int = 1) -> Stream:
    """The local batches of one pass in order, padded as `order.eval_batches` says (it gives the masks too).

    Arguments and result are those of `train_stream`.
    """
    plan = _EvalPlan(len(source), global_batch, np.asarray(positions, np.int64))
    return Stream(_Steps(source, plan, -(-len(source) // global_batch)), workers, threads)
