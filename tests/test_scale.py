"""The model of a step's cost against devices: its known limits. (`benchmarks.cpu.scale` compares it with measured steps.)"""

import math

import pytest

from benchmarks.cpu import collectives
from benchmarks.cpu import scale_model as model
from jaxtrain.host.links import Link
from jaxtrain.parallel.collective_cost import collective_seconds

FREE, SLOW = model.Link(0.0, math.inf), model.Link(1e-3, 1e6)
MACHINE = model.Machine(8, model.Link(5e-6, 4e11), model.Link(1e-5, 4e10))


def test_one_device_sends_nothing():
    assert model.ring(1e8, 1, SLOW) == model.tree(1e8, 1, SLOW) == model.all_reduce(1e8, 1, MACHINE) == 0
    assert model.traffic(1e6, 1, 3) == 0
    alone = model.step(model.Work(0.1, 1e8, statistics=100), MACHINE, 1)
    assert (alone.seconds, alone.efficiency) == (0.1, 1.0)


@pytest.mark.parametrize("devices", [2, 8, 1024])
def test_a_ring_moves_twice_all_but_its_own_part(devices):
    link = model.Link(0.0, 1e9)
    assert model.ring(1e9, devices, link) == pytest.approx(2 * (devices - 1) / devices)
    assert model.traffic(1e9, devices, 1) / 1e9 == pytest.approx(model.ring(1e9, devices, link))
    assert model.traffic(1e9, devices, 3) == pytest.approx(1.5 * model.traffic(1e9, devices, 0))


@pytest.mark.parametrize("kind", collectives.KINDS)
def test_a_link_is_found_again_in_its_own_times(kind):
    link = Link("fitted", 1e9, 1e-3)
    times = {size: collective_seconds(kind, size, 4, 1, link, link) for size in collectives.FITTED}
    found = collectives.fit(kind, 4, times)
    assert (found.bandwidth, found.latency) == pytest.approx((link.bandwidth, link.latency))


def test_small_messages_take_a_tree_and_large_ones_a_ring():
    one = model.Machine(1, SLOW, SLOW)
    assert model.all_reduce(1.0, 1024, one) == pytest.approx(2 * 10 * 1e-3, rel=0.01)
    assert model.all_reduce(1e12, 1024, one) == pytest.approx(2 * 1e6, rel=0.01)


def test_nodes_share_their_links():
    """Across nodes each device carries an eighth; without any latency more nodes cost at most twice two of them."""
    far = model.Machine(8, FREE, model.Link(0.0, 1e9))
    assert model.all_reduce(8e9, 16, far) == pytest.approx(1.0)
    assert model.all_reduce(8e9, 1 << 20, far) == pytest.approx(2.0, rel=1e-3)


def test_amdahls_limit():
    """A free network scales perfectly; a cost that does not shrink bounds what more devices give at a fixed batch."""
    assert model.step(model.Work(0.1, 1e8, 100), model.Machine(8, FREE, FREE), 4096).efficiency == 1
    times = [model.step(model.Work(1.0 / n, 1e8), MACHINE, n).seconds for n in (1, 8, 64, 512, 4096)]
    floor = model.step(model.Work(0.0, 1e8), MACHINE, 4096).seconds
    assert times == sorted(times, reverse=True)
    assert floor < times[-1] < floor + 1e-3
    assert times[0] / times[-1] < 1.0 / floor


def test_a_pipeline_idles_by_the_formula():
    machine = model.Machine(8, FREE, FREE)
    found = model.step(model.Work(1.0, 1e8), machine, 4, stages=4, microbatches=8)
    assert found.bubble / found.seconds == pytest.approx(model.bubble(4, 8)) == 3 / 11
    assert model.bubble(4, 8, chunks=2) == pytest.approx(3 / 19)
    assert model.bubble(1, 8) == 0


def test_the_best_interval_is_the_best():
    save, recovery, between = 2.0, 60.0, 3600.0
    best = model.best_interval(save, between)
    assert best == pytest.approx(120.0)
    found = [model.goodput(best * factor, save, recovery, between) for factor in (0.5, 1.0, 2.0)]
    assert max(found) == found[1]
    assert model.goodput(10.0, 2.0, 60.0, 30.0) == 0
