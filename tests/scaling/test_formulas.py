"""The laws of scaling at fixed points, and fits that find the numbers which points were made of."""

import math

import pytest

from benchmarks.cpu import collectives, failures
from jaxtrain.host.links import Link
from jaxtrain.parallel.collective_cost import collective_seconds
from jaxtrain.scaling.formulas import amdahl, fit_amdahl, fit_gustafson, gustafson

COUNTS = (1, 2, 4, 8, 64)


def test_the_laws_at_fixed_points():
    assert amdahl(4, 0.1) == pytest.approx(40 / 13)
    assert amdahl(1, 0.7) == gustafson(1, 0.7) == 1
    assert amdahl(1e12, 0.05) == pytest.approx(20)
    assert gustafson(64, 0.1) == pytest.approx(57.7)
    assert amdahl(8, 0) == gustafson(8, 0) == 8
    assert amdahl(8, 1) == gustafson(8, 1) == 1


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize(("law", "fit"), [(amdahl, fit_amdahl), (gustafson, fit_gustafson)])
def test_a_fit_finds_the_share_that_points_were_made_of(law, fit, share):
    found = fit([(n, law(n, share)) for n in COUNTS])
    assert found.share == pytest.approx(share, abs=1e-12)
    assert found.error < 1e-9
    assert found.points == len(COUNTS) - 1
    assert found.limit == (pytest.approx(1 / share) if share else math.inf)


@pytest.mark.parametrize("fit", [fit_amdahl, fit_gustafson])
def test_a_fit_of_points_that_no_share_explains_says_so(fit):
    assert fit([]) is fit([(1, 1.0)]) is fit([(1, 1.0), (2, 0.0)]) is None
    more = fit([(1, 1.0), (2, 2.5)])  # more than twice as fast
    assert (more.share, more.limit) == (0.0, math.inf)
    assert more.fitted < 0
    slower = fit([(1, 1.0), (2, 0.5)])  # half as fast
    assert slower.share == 1.0
    assert slower.fitted > 1
    assert slower.error == pytest.approx(1.0)


@pytest.mark.parametrize("kind", collectives.KINDS)
def test_a_link_is_found_again_in_its_own_times(kind):
    link = Link("fitted", 1e9, 1e-3)
    times = {size: collective_seconds(kind, size, 4, 1, link, link) for size in collectives.FITTED}
    found = collectives.fit(kind, 4, times)
    assert (found.bandwidth, found.latency) == pytest.approx((link.bandwidth, link.latency))


def test_the_best_interval_between_saves_is_the_best():
    save, recovery, between = 2.0, 60.0, 3600.0
    best = failures.best_interval(save, between)
    assert best == pytest.approx(120.0)
    found = [failures.goodput(best * factor, save, recovery, between) for factor in (0.5, 1.0, 2.0)]
    assert max(found) == found[1]
    assert failures.goodput(10.0, 2.0, 60.0, 30.0) == 0
