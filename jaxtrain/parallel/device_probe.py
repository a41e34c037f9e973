"""Times a short program without collectives on each device of this process: in collectives all are as slow as the slowest."""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxtrain.host.backend import on_cpu
from jaxtrain.parallel.mesh import Device

_REPEATS = 3  # of which the quickest counts


class DeviceProbe:
    """Matrix products that take about a millisecond on a GPU. Compiled in a thread, so that no step waits for that."""

    def __init__(self, devices: Sequence[Device], timer: Callable[[], float] = time.perf_counter):
        """Begins to compile.

        Args:
          devices: of this process, at least one.
          timer: the clock, in seconds.
        """
        self._devices, self._timer = devices, timer
        self._compiler = concurrent.futures.ThreadPoolExecutor(1, "device probe")
        self._compiled = self._compiler.submit(self._compile)

    def ready(self) -> bool:
        """Whether the programs are compiled."""
        return self._compiled.done()

    def __call__(self) -> list[float]:
        """Seconds that each device needs, in their order: one after the other, the quickest of three each.

        Waits for the programs, and for what was dispatched to the devices before.
        """
        return [self._time(program, inputs) for program, inputs in self._compiled.result()]

    def close(self) -> None:
        """Ends the thread."""
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _time(self, program: Callable[[jax.Array], jax.Array], inputs: jax.Array) -> float:
        jax.block_until_ready(program(inputs))  # what was dispatched before comes first
        seconds = []
        for _ in range(_REPEATS):
            began = self._timer()
            jax.block_until_ready(program(inputs))
            seconds.append(self._timer() - began)
        return min(seconds)

    def _compile(self) -> list[tuple[Callable[[jax.Array], jax.Array], jax.Array]]:
        # 17 GFLOP a product; a core of a CPU needs about a millisecond for what it gets
        side, products, dtype = (256, 2, jnp.float32) if on_cpu(self._devices) else (2048, 32, jnp.bfloat16)

        def compute(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, products, lambda _, y: x @ y, x)

        compiled = []
        for device in self._devices:
            placed = jax.sharding.SingleDeviceSharding(device)
            made = jax.jit(functools.partial(jnp.full, (side, side), 1 / side, dtype), out_shardings=placed)
            inputs = made()
            compiled.append((jax.jit(compute).lower(inputs).compile(), inputs))
        return compiled
