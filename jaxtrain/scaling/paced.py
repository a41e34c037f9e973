"""A callback that lets a run make as many steps as it is told to, and says how long they took."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

import jax

from jaxtrain.host.links import Link
from jaxtrain.observability.clock import Span
from jaxtrain.parallel.bench.fit import fit_methods
from jaxtrain.parallel.bench.measure import measure
from jaxtrain.parallel.bench.methods import METHODS, numbers
from jaxtrain.parallel.bench.programs import Case
from jaxtrain.scaling.protocol import COLLECTIVES, LINK, Block, LinkFit, Ready
from jaxtrain.scaling.replay import Replay, Traffic, traffic_of
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.callbacks import Callback, RunHandle
from jaxtrain.training.loop import READ_BEHIND

SETTLE = READ_BEHIND + 2
"""Steps of a block that are not counted: those that were under way during the wait before it, and two."""

_SIZES = tuple(
    1 << power for power in range(12, 25, 2)
)  # bytes of the sums that the link is fitted to: 4 KiB to 16 MiB
_REPEATS = 5


class Paced(Callback):
    """Waits for commands at the other end of a pipe (`protocol`) wherever a block has ended."""

    name = "scaling"
    every_process = True

    def __init__(self, pipe: Connection):
        self._pipe = pipe
        self._count = 0
        self._times: list[float] = []  # when the numbers of each step of the block were known
        self._spent: Span | None = None  # at the first step that counts
        self._replay: Replay | None = None
        self._traffic: list[Traffic] = []

    def on_start(self, run: RunHandle, state: TrainState) -> None:
        """Says that all is compiled."""
        layout, partition = run.compiled.run.layout, run.compiled.run.partition
        if jax.process_count() == 1 and layout.stages == 1:
            run.compiled.evaluate.wait(state)  # it is compiled beside the first steps
        known = layout.stages == 1
        self._traffic = traffic_of(run.compiled) if known else []
        weights = partition.weights if partition else (1.0,)
        ready = Ready(
            train_examples=len(run.compiled.run.dataset.train),
            collectives=sum(each.times for each in self._traffic) if known else None,
            messages=sum(each.messages(layout.mesh) for each in self._traffic) if known else None,
            sent_bytes=sum(each.sent(layout.mesh) for each in self._traffic) if known else None,
            imbalance=max(weights) / statistics.mean(weights),
            microbatches=layout.config.microbatches,
            devices=jax.local_devices()[0].device_kind,
            jax=jax.__version__,
        )
        self._answer(run, ready)

    def on_step(self, run: RunHandle, step: int, metrics: Mapping[str, float]) -> None:
        """Ends the block after its last step."""
        self._times.append(time.perf_counter())
        made = len(self._times) - SETTLE
        if made == 0:
            self._spent = run.spent()
        if made == self._count:
            assert self._spent is not None
            steps = [b - a for a, b in zip(self._times[SETTLE - 1 :], self._times[SETTLE:], strict=False)]
            spent = run.spent() - self._spent
            host = spent.wall - spent.seconds["step"] - spent.seconds["input"]
            self._answer(run, Block(tuple(steps), spent.seconds["input"] / made, host / made))

    def _answer(self, run: RunHandle, message: object) -> None:
        """Sends a message, and does what it is told until that is to make steps."""
        try:
            self._pipe.send(message)
            while not isinstance(command := self._pipe.recv(), int):
                with jax.transfer_guard("allow"):  # the run's own steps may transfer nothing that they do not name
                    self._pipe.send(self._collectives(run) if command == COLLECTIVES else _link(command))
        except (EOFError, OSError):  # `scale` is gone
            os._exit(0)
        self._count, self._times = command, []

    def _collectives(self, run: RunHandle) -> float:
        """Seconds of a step's collectives alone; the median of some."""
        if self._replay is None:
            self._replay = Replay(self._traffic, run.compiled.run.layout.mesh)
        return statistics.median(self._replay.seconds() for _ in range(_REPEATS))


def _link(command: str) -> LinkFit | None:
    """The link of XLA's own sums over all devices; None where the times do not grow with the bytes."""
    assert command == LINK
    devices = jax.devices()
    cases = [Case(METHODS["auto"], 1, len(devices), numbers(size, 1, len(devices))) for size in _SIZES]
    results = list(measure(cases, devices, _REPEATS))
    fit = fit_methods(results).get("auto")
    if fit is None:
        return None
    link: Link = fit.link
    points = tuple((result.program.case.bytes, result.median) for result in results)
    return LinkFit(link.latency, link.bandwidth, fit.median_error, points)
