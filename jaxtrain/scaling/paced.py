"""A callback that lets a run make as many steps as it is told to, and says how long they took."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

import jax

from jaxtrain.host.backend import on_cpu
from jaxtrain.host.links import Link
from jaxtrain.observability.clock import Span
from jaxtrain.observability.op_times import Trace, read_trace
from jaxtrain.parallel.bench.fit import fit_methods
from jaxtrain.parallel.bench.measure import measure
from jaxtrain.parallel.bench.methods import METHODS, numbers
from jaxtrain.parallel.bench.programs import Case
from jaxtrain.scaling.protocol import LINK, Block, LinkFit, Profile, Ready
from jaxtrain.scaling.traffic import traffic_of
from jaxtrain.step.pipeline.transfer import TRANSFER_MODULE
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.cadence import READ_BEHIND
from jaxtrain.training.callbacks import Callback, RunHandle
from jaxtrain.training.profile_summary import SETTLE, Breakdown, Origins, breakdown, origins_of

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
        self._profiled = False  # whether the block is one
        self._origins: Origins = {}

    def on_start(self, run: RunHandle, state: TrainState) -> None:
        """Says that all is compiled."""
        layout = run.compiled.run.layout
        if jax.process_count() == 1 and layout.stages == 1:
            run.compiled.evaluate.wait(state)  # it is compiled beside the first steps
        known = layout.stages == 1
        traffic = traffic_of(run.compiled) if known else []
        ready = Ready(
            train_examples=len(run.compiled.run.dataset.train),
            collectives=sum(each.times for each in traffic) if known else None,
            messages=sum(each.messages(layout.mesh) for each in traffic) if known else None,
            sent_bytes=sum(each.sent(layout.mesh) for each in traffic) if known else None,
            microbatches=layout.config.microbatches,
            devices=jax.local_devices()[0].device_kind,
            jax=jax.__version__,
        )
        step = run.compiled.step_for_profile
        self._origins = origins_of(program.as_text() or "" for program in step.programs.values())
        self._answer(run, ready)

    def on_step(self, run: RunHandle, step: int, metrics: Mapping[str, float]) -> None:
        """Ends the block after its last step."""
        self._times.append(time.perf_counter())
        made = len(self._times) - SETTLE
        if self._profiled:  # it began after the steps that were under way, and is written by the step after its last
            if made > self._count + 2 * READ_BEHIND:
                self._answer(run, _breakdown(run, self._origins))
            return
        if made == 0:
            self._spent = run.spent()
        if made == self._count:
            assert self._spent is not None
            steps = [b - a for a, b in zip(self._times[SETTLE - 1 :], self._times[SETTLE:], strict=False)]
            spent = run.spent() - self._spent
            host = spent.wall - spent.seconds["step"] - spent.seconds["input"]
            self._answer(run, Block(tuple(steps), spent.seconds["input"] / made, host / made))

    def _answer(self, run: RunHandle, message: object) -> None:
        """Sends a message once nothing is under way, and does what it is told until that is to make steps."""
        jax.block_until_ready([each for each in jax.live_arrays() if not each.is_deleted()])
        try:
            self._pipe.send(message)
            while (command := self._pipe.recv()) == LINK:
                with jax.transfer_guard("allow"):  # the run's own steps may transfer nothing that they do not name
                    self._pipe.send(_link())
        except (EOFError, OSError):  # `scale` is gone
            os._exit(0)
        self._profiled = isinstance(command, Profile)
        self._count, self._times = command.steps if self._profiled else command, []
        if self._profiled:
            run.profile(SETTLE + self._count + READ_BEHIND)


def _breakdown(run: RunHandle, origins: Origins) -> Breakdown | None:
    """Of the profile, which is deleted; None where it failed, or has nothing of the devices.

    A transfer between stages is no communication here: in it a stage waits for another one, as where nothing runs.
    """
    found, one_device = None, on_cpu(run.compiled.run.layout.mesh.devices.flat)
    for folder in (run.workdir / "profile").glob(f"*/process_{jax.process_index()}"):
        for path in folder.rglob("*.xplane.pb"):
            trace = read_trace(path)
            runs = [each for each in trace.runs if each.module != TRANSFER_MODULE]
            found = breakdown(Trace(runs, trace.known), len(trace.known), origins, one_device=one_device)
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _link() -> LinkFit | None:
    """The link of XLA's own sums over all devices; None where the times do not grow with the bytes."""
    devices = jax.devices()
    cases = [Case(METHODS["auto"], 1, len(devices), numbers(size, 1, len(devices))) for size in _SIZES]
    results = list(measure(cases, devices, _REPEATS))
    fit = fit_methods(results).get("auto")
    if fit is None:
        return None
    link: Link = fit.link
    points = tuple((result.program.case.bytes, result.median) for result in results)
    return LinkFit(link.latency, link.bandwidth, fit.median_error, points)
