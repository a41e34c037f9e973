"""How the parts of a step come out of what the processes say, with processes that say what they are told to."""

from __future__ import annotations

import contextlib

import pytest

from jaxtrain.config import Config
from jaxtrain.recipes import change
from jaxtrain.scaling import measuring
from jaxtrain.scaling.measuring import MEASURED, SIMULATED, Machine, measure
from jaxtrain.scaling.protocol import Block, LinkFit, Profile, Ready
from jaxtrain.scaling.study import STRONG, WEAK, Study
from jaxtrain.training.profile_summary import Breakdown

CONFIG = change(Config(), **{"data.global_batch": 64, "model.name": "mlp"})
LINK = LinkFit(1e-3, 1e9, 0.0, ())
PINNED = Machine(MEASURED, ((0,), (1,), (2,), (3,)))


class Told:
    """Processes whose steps, and their profiles, are what is said for (run, process)."""

    def __init__(self, jobs, seconds, profiles, ready):
        self.name = jobs[0].workdir.rpartition("/")[2].partition("_")[0]
        if self.name == "whole" and len(jobs) * jobs[0].devices == 1:
            self.name = "base"
        self.jobs, self.ready, self.seconds, self.profiles = jobs, [ready], seconds, profiles
        self.commands = []

    def wait(self):
        pass

    def tell(self, command):
        self.commands.append(command)
        if isinstance(command, Profile):
            return self.profiles[self.name][: len(self.jobs)]
        if not isinstance(command, int):
            return [LINK] * len(self.jobs)
        return [Block(tuple(self.seconds[self.name][i]), 0.001, 0.002) for i in range(len(self.jobs))]


SECONDS = {"base": [(0.050, 0.050)], "whole": [(0.040, 0.040), (0.039, 0.039), *[(0.038, 0.038)] * 2]}
PROFILES = {
    "base": [Breakdown(0.051, 0.048, 0.0, 0.0, 0.003)],
    "whole": [
        Breakdown(0.041, 0.020, 0.006, 0.008, 0.007),
        Breakdown(0.041, 0.022, 0.006, 0.008, 0.005),
        Breakdown(0.041, 0.021, 0.006, 0.008, 0.006),
        Breakdown(0.041, 0.021, 0.006, 0.008, 0.006),
    ],
}


@pytest.fixture
def told(monkeypatch):
    """Makes `measure` talk to `Told`; returns what it makes of them."""

    def of(
        seconds=SECONDS,
        profiles=PROFILES,
        *,
        config=CONFIG,
        counts=(1, 2),
        machine=PINNED,
        mode=STRONG,
        steps=2,
        **ready,
    ):
        facts = {"collectives": 1, "messages": 2, "sent_bytes": 10.0, "microbatches": 1}
        known = Ready(train_examples=640, **{**facts, **ready}, devices="cpu", jax="0")
        crews = []

        @contextlib.contextmanager
        def started(jobs):
            crews.append(Told(jobs, seconds, profiles, known))
            yield crews[-1]

        monkeypatch.setattr(measuring, "started", started)
        points, link = measure(Study(config, counts, (mode,)), mode, machine, 3, steps, lambda _: None)
        return points, link, crews

    return of


def test_the_parts_are_those_of_the_profiles(told):
    (base, two), link, _ = told()
    assert two.profile_off == pytest.approx(41 / 40 - 1)
    shares = {"compute": 21, "overlap": 6, "communication": 8, "bubble": 0}  # of 41, means of both processes
    wanted = {name: 0.040 * share / 41 for name, share in shares.items()}
    wanted |= {"input": 0.001, "host": 0.040 * 6 / 41 - 0.001}
    assert two.parts == pytest.approx(wanted)
    assert sum(two.parts.values()) == pytest.approx(two.step.median)
    assert two.speedup == pytest.approx(50 / 40)
    assert (base.devices, base.batch, base.speedup) == (1, 64, 1.0)
    assert base.parts["compute"] == pytest.approx(0.050 * 48 / 51)
    assert link is LINK


def test_a_wait_for_input_counts_where_the_devices_did_nothing_meanwhile(told):
    hidden = {name: [Breakdown(0.04, 0.0396, 0.0, 0.0, 0.0004)] * 2 for name in PROFILES}
    (_, two), _, _ = told(profiles=hidden)
    assert (two.parts["input"], two.parts["host"]) == pytest.approx((0.0004, 0.0))


def test_the_profile_counts_that_is_most_like_the_steps(told):
    rounds = iter([*[Breakdown(0.09, 0.09, 0, 0, 0)] * 2, *[Breakdown(0.041, 0.03, 0, 0.01, 0.001)] * 2] * 4)

    class InTurns(list):
        def __getitem__(self, _):
            return [next(rounds), next(rounds)]

    (_, two), _, _ = told(profiles=PROFILES | {"whole": InTurns()})
    assert (two.parts["compute"], two.parts["communication"]) == pytest.approx((0.040 * 30 / 41, 0.040 * 10 / 41))


def test_without_a_profile_the_parts_are_not_known(told):
    (_, two), _, _ = told(profiles=PROFILES | {"whole": [None, None]})
    assert (two.parts, two.profile_off, two.speedup) == ({}, None, pytest.approx(50 / 40))


def test_weak_scaling_counts_the_work_that_grows(told):
    (base, two), _, _ = told(mode=WEAK)
    assert (base.batch, two.batch) == (64, 128)
    assert two.speedup == pytest.approx(2 * 50 / 40)


def test_runs_make_their_blocks_in_turns(told):
    _, _, crews = told()
    turns = [2, Profile(2), *[2, Profile(2)] * 3]  # the first pair to warm up
    assert {crew.name: crew.commands for crew in crews} == {"whole": [*turns, "link"], "base": turns}


def test_each_run_chooses_the_length_of_its_blocks(told):
    fast, slow = [(0.050, 0.050)], [(0.5, 0.5), (0.4, 0.4)]
    points, _, crews = told({"base": fast, "whole": slow}, steps=0)
    assert [point.steps for point in points] == [30, 4]  # of about 1.5 s, and at least four
    commands = {crew.name: [each for each in crew.commands if isinstance(each, int)] for crew in crews}
    assert commands == {"base": [2, 30, 30, 30], "whole": [2, 4, 4, 4]}


def test_a_stage_that_does_nothing_waits_for_the_others(told):
    config = change(CONFIG, **{"layout.stages": 2, "layout.schedule": "gpipe"})
    facts = {
        "config": config,
        "counts": (2,),
        "collectives": None,
        "messages": None,
        "sent_bytes": None,
        "microbatches": 4,
    }
    (two,), _, _ = told(**facts)
    idle = 0.040 * 6 / 41
    assert (two.parts["input"], two.parts["host"], two.parts["bubble"]) == pytest.approx((0.001, 0.002, idle - 0.003))
    (shared,), link, _ = told(**facts, machine=Machine(SIMULATED))
    assert shared.parts["bubble"] is None, "the idle stage's cores compute another one"
    assert shared.parts["host"] == pytest.approx(0.040 * 7 / 41 - 0.001)
    assert shared.parts["compute"] == pytest.approx(0.040 * 26 / 41), "one that computes keeps others waiting"
    assert shared.parts["overlap"] == 0
    assert link is None


def test_a_base_of_several_devices_is_measured_like_the_others(told):
    (two, four), _, _ = told(counts=(2, 4))
    assert (two.devices, four.devices) == (2, 4)
    assert two.parts["communication"] == pytest.approx(0.040 * 8 / 41)
