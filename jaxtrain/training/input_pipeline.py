"""Puts batches on the devices: the host's rows become one global array, each process giving the part that it holds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jaxtrain.data.base import Dataset, Source, Subset, decodes_images, is_cheap, materialize, nbytes
from jaxtrain.data.order import eval_batches, eval_subset, index_stream
from jaxtrain.data.stream import default_threads, default_workers, eval_stream, train_stream
from jaxtrain.distributed.coordination import on_this_host
from jaxtrain.parallel.layout import Layout, over_steps
from jaxtrain.step.batch import RATES, Batch, EvalBatch, Hyperparams, Resident

# `data.residency=auto` keeps a data set on the devices up to this share of their memory, or this size where it is unknown.
RESIDENT_SHARE = 0.1
RESIDENT_BYTES = 1 << 30


class BatchSharder:
    """Which examples of a batch [microbatches, size, ...] this process holds, and how it becomes one global array."""

    def __init__(self, layout: Layout, microbatches: int, size: int):
        self._shape, self._sharding, self._replicated = (microbatches, size), layout.batch, layout.sharding()
        self._images = layout.images
        indices: Any = self._sharding.addressable_devices_indices_map(self._shape).values()
        spans = {index[1].indices(size)[:2] for index in indices}
        self._columns = np.concatenate([np.arange(*span) for span in sorted(spans)])
        # Positions in the global batch, in the order in which `batch` wants the rows.
        self.positions = (np.arange(microbatches)[:, None] * size + self._columns).ravel()

    def images(self, *rows: np.ndarray) -> jax.Array:
        """The global array [microbatches, size, H, W, C] of images uint8 [positions, H, W, C], on the first pipeline stage."""
        return self._shard(rows, self._images)

    def batch(self, *rows: np.ndarray) -> jax.Array:
        """The global array [microbatches, size, ...] from this process's rows [positions, ...].

        From the rows of k steps, the array [k, microbatches, size, ...].
        """
        return self._shard(rows, self._sharding)

    def _shard(self, rows: Sequence[np.ndarray], sharding: NamedSharding) -> jax.Array:
        tail = rows[0].shape[1:]
        local = [each.reshape(self._shape[0], len(self._columns), *tail) for each in rows]

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[len(index) - len(tail) - 1].indices(self._shape[1])
            first = int(np.searchsorted(self._columns, start))
            shards = [each[:, first : first + stop - start] for each in local]
            return shards[0] if len(shards) == 1 else np.stack(shards)

        shape, dtype = (*self._shape, *tail), rows[0].dtype
        if len(rows) == 1:
            return _on_devices(shape, dtype, sharding, shard)
        return _on_devices((len(rows), *shape), dtype, over_steps(sharding), shard)

    def numbers(self, first: int, count: int = 1) -> jax.Array:
        """Step numbers, replicated: int32 [] for one step, int32 [count] for `first`, `first + 1`, ..."""
        return self.replicated(np.int32(first) if count == 1 else np.arange(first, first + count, dtype=np.int32))

    def replicated(self, value: np.ndarray | np.generic) -> jax.Array:
        """The same array on every device."""
        return _on_devices(value.shape, value.dtype, self._replicated, lambda _: value)


def _on_devices(
    shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding, part: Callable[..., Any]
) -> jax.Array:
    """A global array from its shards on the host: the one transfer to the devices that the loop is meant to make."""
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, sharding, part, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class InputPipeline:
    """Batches of a data set for one layout.

    Attributes:
      dataset: the splits.
      layout: where batches go.
      resident: every split, one after the other, on every device; `Resident()` when batches are streamed.
      offsets: the first row of each split in it; {} when batches are streamed.
      workers: reading processes when streaming.
      threads: threads that read where there are no such processes.
    """

    dataset: Dataset
    layout: Layout
    resident: Resident
    offsets: Mapping[str, int]
    workers: int
    threads: int = 1

    @property
    def where(self) -> str:
        """Where batches come from, for the log."""
        if self.offsets:
            return "resident on the devices"
        count, kind = (self.workers, "worker process") if self.workers else (self.threads, "thread")
        plural = "" if count == 1 else "es" if self.workers else "s"
        return f"streamed, read by {count} {kind}{plural}"

    def train(
        self,
        *,
        seed: int,
        schedule: optax.Schedule,
        weight_decay: float,
        global_batch: int,
        first_step: int,
        first_example: int,
        steps: int,
        calls: Iterable[int] | None = None,
    ) -> Generator[Batch]:
        """Batches for the updates `first_step`, `first_step + 1`, ...; the same ones whether resident or streamed.

        Args:
          seed: the run's; it decides the order of the examples.
          schedule: the learning rate of each step.
          weight_decay: of every step.
          global_batch: examples an update.
          first_step: the number of the first update.
          first_example: examples consumed before it.
          steps: how many updates.
          calls: how many batches come stacked as one, each time; without it every batch comes alone.

        Yields:
          Arrays [microbatches, examples, ...]; stacked, [k, microbatches, examples, ...].
        """
        microbatches, source = self.layout.config.microbatches, self.dataset.train
        sharder = BatchSharder(self.layout, microbatches, global_batch // microbatches)
        order: dict[str, Any] = {
            "seed": seed, "global_batch": global_batch, "positions": sharder.positions,
            "first_example": first_example, "steps": steps,
        }  # fmt: skip
        calls = itertools.repeat(1, steps) if calls is None else calls
        hyperparams = _hyperparams(sharder, schedule, weight_decay, seed)
        if self.offsets:
            for number, chunk in _chunks(index_stream(len(source), **order), calls, first_step):
                rows = sharder.batch(*(each + np.int32(self.offsets["train"]) for each in chunk))
                yield Batch(sharder.numbers(number, len(chunk)), hyperparams(number, len(chunk)), rows=rows)
            return
        with train_stream(source, workers=self.workers, threads=self.threads, **order) as stream:
            for number, chunk in _chunks(stream, calls, first_step):
                images, labels = zip(*chunk, strict=True)
                yield Batch(
                    sharder.numbers(number, len(chunk)),
                    hyperparams(number, len(chunk)),
                    images=sharder.images(*images),
                    labels=sharder.batch(*labels),
                )

    def train_shapes(self, global_batch: int) -> Batch:
        """The shapes, types and shardings of what `train` yields."""
        shapes = self._shapes(global_batch, self.layout.config.microbatches)
        number = functools.partial(jax.ShapeDtypeStruct, (), sharding=self.layout.sharding())
        dtype, whole = jnp.result_type(float), number(np.int32)
        rates: Any = jax.ShapeDtypeStruct((RATES,), dtype, sharding=self.layout.sharding())
        numbers: Any = (whole, number(dtype), whole)
        return dataclasses.replace(shapes, hyperparams=Hyperparams(rates, *numbers))

    def evaluation_shapes(self, batch: int) -> EvalBatch:
        """The same for `evaluation`."""
        mask = jax.ShapeDtypeStruct((1, batch), np.bool_, sharding=self.layout.batch)
        return EvalBatch(self._shapes(batch, 1), mask)  # type: ignore[arg-type]

    def _shapes(self, global_batch: int, microbatches: int) -> Batch:
        shape, layout = (
            functools.partial(jax.ShapeDtypeStruct, (microbatches, global_batch // microbatches)),
            self.layout,
        )
        step: Any = jax.ShapeDtypeStruct((), np.int32, sharding=layout.sharding())
        numbers = shape(np.int32, sharding=layout.batch)
        if self.offsets:
            return Batch(step, rows=numbers)
        images = (microbatches, global_batch // microbatches, *self.dataset.train.shape)
        return Batch(step, images=jax.ShapeDtypeStruct(images, np.uint8, sharding=layout.images), labels=numbers)

    def evaluation(self, split: str, batch: int, examples: int = 0) -> Generator[EvalBatch]:
        """Examples of a split, each once and in order; the last batch is padded and masked.

        Args:
          split: `train`, `validation` or `test`.
          batch: examples of a batch.
          examples: how many of the split (`data.order.eval_subset`); 0 is all.

        Yields:
          Batches, the same whether resident or streamed.
        """
        sharder = BatchSharder(self.layout, 1, batch)
        step, source = sharder.numbers(0), getattr(self.dataset, split)
        if not len(source):
            return
        chosen = eval_subset(len(source), examples)
        masks = ((rows[sharder.positions], mask[sharder.positions]) for rows, mask in eval_batches(len(chosen), batch))
        if self.offsets:
            for rows, mask in masks:
                local = (chosen[rows] + self.offsets[split]).astype(np.int32)
                yield EvalBatch(Batch(step, rows=sharder.batch(local)), sharder.batch(mask))
            return
        reading: dict[str, Any] = {"workers": self.workers, "threads": self.threads}
        with eval_stream(Subset(source, chosen), global_batch=batch, positions=sharder.positions, **reading) as stream:
            for (images, labels), (_, mask) in zip(stream, masks, strict=True):
                yield EvalBatch(
                    Batch(step, images=sharder.images(images), labels=sharder.batch(labels)), sharder.batch(mask)
                )


def _hyperparams(
    sharder: BatchSharder, schedule: optax.Schedule, weight_decay: float, seed: int
) -> Callable[[int, int], Hyperparams]:
    """The hyperparameters on the devices as a function of (first step, number of steps).

    The rates are computed by the host, in float64, and go to the devices once for `RATES` steps.
    """
    dtype = jnp.result_type(float)
    constants = sharder.replicated(np.asarray(weight_decay, dtype)), sharder.replicated(np.int32(seed))
    steps, there = range(0), None

    def of(first: int, count: int) -> Hyperparams:
        nonlocal steps, there
        if there is None or first not in steps or first + count > steps.stop:
            steps = range(first, first + RATES)
            rates = np.broadcast_to(schedule(np.arange(first, first + RATES)), RATES).astype(dtype)
            there = Hyperparams(sharder.replicated(rates), sharder.replicated(np.int32(first)), *constants)
        return there

    return of


def _chunks(stream: Iterable[Any], sizes: Iterable[int], number: int) -> Iterator[tuple[int, list[Any]]]:
    """So many elements of `stream` at once, and the number of the first of them."""
    elements = iter(stream)
    for size in sizes:
        yield number, list(itertools.islice(elements, size))
        number += size


def make_input_pipeline(dataset: Dataset, layout: Layout, residency: str, workers: int) -> InputPipeline:
    """Decides where the data set lives, and puts it on the devices if it is there."""
    splits: dict[str, Source] = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    sharing = on_this_host()
    typical = next((source for source in splits.values() if len(source)), dataset.train)
    threads = default_threads(local_processes=sharing) if decodes_images(typical) else 1
    if not is_resident(dataset, residency, _resident_limit(layout)):
        if workers < 0:
            workers = default_workers(cheap=is_cheap(typical), local_processes=sharing)
        return InputPipeline(dataset, layout, Resident(), {}, workers, threads)
    images, labels = zip(*(materialize(source, threads) for source in splits.values()), strict=True)

    def place(array: np.ndarray, stage: int | None = None) -> jax.Array:
        return _on_devices(array.shape, array.dtype, layout.sharding(stage=stage), lambda _: array)

    offsets = np.cumsum([0, *(len(source) for source in splits.values())])
    resident = Resident(place(np.concatenate(images), 0), place(np.concatenate(labels)))
    return InputPipeline(dataset, layout, resident, dict(zip(splits, offsets.tolist(), strict=False)), workers)


def is_resident(dataset: Dataset, residency: str, limit: float) -> bool:
    """Whether a data set lives on the devices.

    Args:
      dataset: all its splits.
      residency: `data.residency`.
      limit: bytes that it may take where that is `auto`.
    """
    size = sum(nbytes(source) for source in (dataset.train, dataset.validation, dataset.test))
    return residency == "device" or (residency == "auto" and size <= limit)


def _resident_limit(layout: Layout) -> float:
    stats = layout.mesh.local_devices[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return limit * RESIDENT_SHARE if limit else RESIDENT_BYTES
