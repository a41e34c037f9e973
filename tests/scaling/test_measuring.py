"""How the parts of a step come out of what the processes say, with processes that say what they are told to."""

from __future__ import annotations

import contextlib

import pytest

from jaxtrain.config import Config
from jaxtrain.recipes import change
from jaxtrain.scaling import measuring
from jaxtrain.scaling.measuring import MEASURED, SIMULATED, Machine, measure
from jaxtrain.scaling.protocol import COLLECTIVES, Block, LinkFit, Ready
from jaxtrain.scaling.study import STRONG, WEAK, Study

CONFIG = change(Config(), **{"data.global_batch": 64, "model.name": "mlp"})
LINK = LinkFit(1e-3, 1e9, 0.0, ())
PINNED = Machine(MEASURED, ((0,), (1,), (2,), (3,)))


class Told:
    """Processes whose steps take what `seconds` says for (run, process): of a run on its own core, or of the whole."""

    def __init__(self, jobs, seconds, ready):
        self.name = jobs[0].workdir.rpartition("/")[2].partition("_")[0]
        if self.name == "whole" and len(jobs) * jobs[0].devices == 1:
            self.name = "base"
        self.jobs, self.ready, self.seconds = jobs, [ready], seconds
        self.commands = []

    def wait(self):
        pass

    def tell(self, command):
        self.commands.append(command)
        if command == COLLECTIVES:
            return [0.004] * len(self.jobs)
        if not isinstance(command, int):
            return [LINK] * len(self.jobs)
        return [Block(tuple(self.seconds[self.name][i]), 0.001, 0.002) for i in range(len(self.jobs))]


@pytest.fixture
def told(monkeypatch):
    """Makes `measure` talk to `Told`; returns what it makes of them."""

    def of(seconds, *, config=CONFIG, counts=(1, 2), machine=PINNED, mode=STRONG, **ready):
        facts = {"collectives": 1, "messages": 2, "sent_bytes": 10.0, "imbalance": 1.0, "microbatches": 1}
        known = Ready(train_examples=640, **{**facts, **ready}, devices="cpu", jax="0")
        crews = []

        @contextlib.contextmanager
        def started(jobs):
            crews.append(Told(jobs, seconds, known))
            yield crews[-1]

        monkeypatch.setattr(measuring, "started", started)
        points, link = measure(Study(config, counts, (mode,)), mode, machine, 3, 2, lambda _: None)
        return points, link, crews

    return of


SECONDS = {
    "base": [(0.050, 0.050)],
    "whole": [(0.040, 0.040), (0.040, 0.040)],
    "alone": [(0.020, 0.034), (0.030, 0.024)],  # in each step another one is the slower: 30 and 34 ms
}


def test_each_part_is_what_was_measured_of_it(told):
    (base, two), link, _ = told(SECONDS)
    assert two.parts == pytest.approx(
        {"compute": 0.032 - 0.003, "communication": 0.004, "input": 0.001, "bubble": 0.0, "host": 0.002}
    )
    assert two.unexplained == pytest.approx(0.040 - 0.036)
    assert two.speedup == pytest.approx(50 / 40)
    assert (base.devices, base.batch, base.speedup) == (1, 64, 1.0)
    assert base.parts["compute"] == pytest.approx(0.047)
    assert link is LINK


def test_weak_scaling_counts_the_work_that_grows(told):
    (base, two), _, _ = told(SECONDS, mode=WEAK)
    assert (base.batch, two.batch) == (64, 128)
    assert two.speedup == pytest.approx(2 * 50 / 40)


def test_runs_make_their_blocks_in_turns(told):
    _, _, crews = told(SECONDS)
    assert {crew.name: crew.commands for crew in crews} == {
        "whole": [2, *[2, COLLECTIVES] * 3, "link"],  # first to warm up
        "base": [2, 2, 2, 2],
        "alone": [2, 2, 2, 2],
    }
    alone = next(crew for crew in crews if crew.name == "alone")
    assert [job.config.data.global_batch for job in alone.jobs] == [32, 32]
    assert [job.cores for job in alone.jobs] == [(0,), (1,)]


def test_stages_idle_by_the_schedule_and_the_slowest_one_counts(told):
    config = change(CONFIG, **{"layout.stages": 2, "layout.schedule": "gpipe"})
    seconds = SECONDS | {"whole": [(0.040, 0.040)] * 2, "alone": [(0.043, 0.043)] * 2}
    (two,), _, _ = told(
        seconds,
        config=config,
        counts=(2,),
        collectives=None,
        messages=None,
        sent_bytes=None,
        imbalance=1.1,
        microbatches=4,
    )
    compute = 0.040 * 1.1 / 2
    assert two.parts["compute"] == pytest.approx(compute)
    assert two.parts["bubble"] == pytest.approx(compute / 4)  # (S - 1) / M of the busy time
    assert two.parts["communication"] is two.unexplained is None


def test_simulated_devices_do_all_work_on_the_same_cores(told):
    (_, two), link, crews = told(
        SECONDS | {"whole": [(0.060, 0.060)], "alone": [(0.043, 0.043)]}, machine=Machine(SIMULATED)
    )
    (alone,) = (job for crew in crews if crew.name == "alone" for job in crew.jobs)
    assert (alone.config.data.global_batch, alone.devices) == (64, 1)
    assert two.parts["compute"] == pytest.approx(0.040)
    assert link is None


def test_a_base_of_several_devices_is_measured_like_the_others(told):
    (two, four), _, _ = told(SECONDS | {"whole": [(0.040, 0.040)] * 4, "alone": [(0.020, 0.020)] * 4}, counts=(2, 4))
    assert (two.devices, four.devices) == (2, 4)
    assert two.parts["communication"] == pytest.approx(0.004)
