"""Measures how long sums over devices take, the ways to add up in turns, and how exact they are.

Of several processes each must call `measure` with the same cases. Each returns what it saw itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.host.backend import on_cpu
from jaxtrain.parallel.bench.programs import Case, Program, compile_case
from jaxtrain.parallel.mesh import Device

_BLOCK_SECONDS = 0.05  # of calls that are timed together
_MOST_CALLS = 50


@dataclasses.dataclass(frozen=True)
class Result:
    """A measured case.

    Attributes:
      program: what was run.
      seconds: of a call: one entry for each repeat, the mean of the calls that were timed together.
      error: the 2-norm of the sum's error against an exact f64 sum, over the norm of that sum; of this process's device that
        is furthest off.
    """

    program: Program
    seconds: tuple[float, ...]
    error: float

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)

    def figures(self) -> dict[str, Any]:
        """As of `Program`, with `seconds` (the median), `least_seconds`, `most_seconds` and `error`."""
        times = {"seconds": self.median, "least_seconds": min(self.seconds), "most_seconds": max(self.seconds)}
        return self.program.figures() | times | {"error": self.error}


def measure(
    cases: Sequence[Case], devices: Sequence[Device], repeats: int, said: Callable[[str], None] = lambda _: None
) -> Iterator[Result]:
    """Measures the cases, those of one size and mesh in turns; yields them in the order that they have.

    Args:
      cases: those of one size and mesh are neighbours.
      devices: of which each case takes the first.
      repeats: how often each is timed.
      said: takes a line on what is done now.

    Raises:
      AuditError: a program does not send what its formula says.
    """
    for (replica, data, numbers), group in itertools.groupby(cases, lambda c: (c.replica, c.data, c.numbers)):
        where = f"{4 * numbers:,} bytes over {replica} x {data} devices"
        said(f"compiling for {where}")
        programs = [compile_case(case, devices) for case in group]
        said(f"measuring {where}")
        rows, exact = _rows(programs[0], replica * data, numbers)
        errors = [_error(program.compiled(rows), exact) for program in programs]
        calls = [_calls(program.compiled, rows) for program in programs]
        blocks: list[list[float]] = [[] for _ in programs]
        for _ in range(repeats):
            for program, count, seconds in zip(programs, calls, blocks, strict=True):
                seconds.append(_block(program.compiled, rows, count))
        for program, seconds, error in zip(programs, blocks, errors, strict=True):
            yield Result(program, tuple(seconds), error)


def _rows(program: Program, n: int, numbers: int) -> tuple[jax.Array, np.ndarray]:
    """Random f32 numbers [n, k], a row a device, and their sum, f64 [k]."""

    def row(index: Any) -> np.ndarray:
        device = index[0].start or 0
        return np.random.default_rng((numbers, device)).standard_normal((1, numbers), np.float32)

    exact = np.zeros(numbers)
    for device in range(n):
        exact += row((slice(device, None),))[0]
    return jax.make_array_from_callback((n, numbers), program.sharding, row), exact


def _error(sums: jax.Array, exact: np.ndarray) -> float:
    """The largest error of this process's rows of `sums` (`Result.error`)."""
    rows = (np.asarray(shard.data)[0].astype(np.float64) for shard in sums.addressable_shards)
    return max(float(np.linalg.norm(row - exact) / np.linalg.norm(exact)) for row in rows)


def _calls(compiled: Any, rows: jax.Array) -> int:
    """How many calls to time together; the same on every process, as process 0 finds it. The program has run before."""
    seconds = _block(compiled, rows, 2)
    count = int(np.clip(_BLOCK_SECONDS / seconds, 1, _MOST_CALLS))
    return int(multihost_utils.broadcast_one_to_all(np.int32(count))) if jax.process_count() > 1 else count


def _block(compiled: Any, rows: jax.Array, count: int) -> float:
    """Seconds of a call, of `count` calls one after the other.

    On a CPU each is waited for: calls that wait for one another's devices would share its cores.
    """
    each = on_cpu(rows.sharding.device_set)
    began = time.perf_counter()
    for _ in range(count):
        sums = compiled(rows)
        if each:
            sums.block_until_ready()
    jax.block_until_ready(sums)
    return (time.perf_counter() - began) / count
