"""The cost model of collectives: points computed by hand, and what must hold at every size. And the links that it knows."""

import itertools

import pytest

from jaxtrain.errors import ConfigError
from jaxtrain.host.links import LINKS, Link, parse_link
from jaxtrain.parallel.collective_cost import collective_seconds, reduce_seconds, wire_bytes

NEAR, FAR = Link("near", 100e9, 2e-6), Link("far", 10e9, 10e-6)
FREE = Link("free", float("inf"), 0.0)
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-broadcast", "collective-permute")

# kind, bytes of the result, devices inside, hosts: microseconds by hand
POINTS = {
    ("all-reduce", 8e6, 8, 1): 14 * 2 + 140,  # 14 messages of 1 MB
    ("all-reduce", 8e6, 1, 4): 6 * 10 + 1200,  # 6 messages of 2 MB
    ("all-reduce", 8e6, 8, 4): (14 * 2 + 140) + (6 * 10 + 150),  # 7 + 7 of 1 MB inside; 1 MB across, 6 of 0.25 MB
    ("all-gather", 8e6, 8, 1): 7 * 2 + 70,
    ("all-gather", 8e6, 8, 4): (7 * 2 + 70) + (3 * 10 + 75),
    ("reduce-scatter", 1e6, 8, 1): 7 * 2 + 70,  # the whole has 8 MB
    ("reduce-scatter", 0.25e6, 8, 4): (7 * 2 + 70) + (3 * 10 + 75),  # the whole has 8 MB
    ("all-to-all", 8e6, 8, 4): (7 * 2 + 70) + (3 * 10 + 600),
    ("collective-broadcast", 8e6, 8, 4): (7 * 2 + 80) + (3 * 10 + 800),
    ("collective-permute", 8e6, 8, 1): 2 + 80,
    ("collective-permute", 8e6, 8, 4): 10 + 800,
}


def test_points_by_hand():
    found = {point: collective_seconds(*point, NEAR, FAR) * 1e6 for point in POINTS}
    assert found == pytest.approx(POINTS)
    assert {kind: wire_bytes(kind, 8e6, 8) for kind in KINDS} == pytest.approx(
        dict(zip(KINDS, (14e6, 7e6, 56e6, 7e6, 8e6, 8e6), strict=True))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_holds_at_every_size(kind):
    """One device costs nothing; more bytes, and slower links, never cost less; nothing is faster than its bytes."""
    assert collective_seconds(kind, 1e9, 1, 1, NEAR, FAR) == wire_bytes(kind, 1e9, 1) == 0
    for inside, across in itertools.product((1, 2, 3, 8), (1, 2, 5)):
        sizes = [collective_seconds(kind, size, inside, across, NEAR, FAR) for size in (0, 1, 4e3, 1e6, 1e9)]
        assert sizes == sorted(sizes)
        assert (sizes[0] > 0) == (sizes[-1] > sizes[0]) == (inside * across > 1)
        assert collective_seconds(kind, 1e6, inside, across, FAR, FAR) >= sizes[3]
        if across == 1:
            assert sizes[-1] >= wire_bytes(kind, 1e9, inside) / NEAR.bandwidth


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter"])
def test_devices_of_a_host_share_what_goes_between_hosts(kind):
    """With a free link inside, the slow one carries 1 / inside of what one device a host would send of the same whole."""
    across, slow = 4, Link("slow", 1e6, 0.0)
    for inside in (2, 8):
        size = 1e6 / inside if kind == "reduce-scatter" else 1e6
        together = collective_seconds(kind, size, inside, across, FREE, slow)
        assert together == pytest.approx(collective_seconds(kind, 1e6, 1, across, FREE, slow) / inside)


def test_reductions_of_our_own_by_hand():
    """8 MB among 8 devices, 4 on a host; microseconds."""

    def found(algorithm: str, data: int, replica: int) -> float:
        return reduce_seconds(algorithm, 8e6, data, replica, 4, NEAR, FAR) * 1e6

    assert found("ring", 4, 1) == pytest.approx(6 * (2 + 20))  # 6 messages of 2 MB
    assert found("ring", 4, 2) == pytest.approx(14 * (10 + 100))  # 14 of 1 MB, each as slow as that between hosts
    assert found("tree", 8, 1) == pytest.approx(
        2 * (10 + 400) + 2 * (2 + 20) + 2 * (2 + 10)
    )  # 4 MB across, 2 and 1 inside
    assert found("tree", 3, 1) == pytest.approx(2 * (2 + 40) + 2 * (2 + 80))  # 4 MB, and the third device's 8 MB
    assert found("hierarchical", 4, 2) == pytest.approx(6 * (2 + 20) + 2 * (10 + 100))  # across 1 MB: half of 2 MB
    for algorithm in ("ring", "tree", "hierarchical"):
        assert found(algorithm, 1, 1) == 0


def test_a_link_is_known_or_is_given_in_numbers():
    assert list(LINKS) == [link.name for link in LINKS.values()]
    assert parse_link("nvlink4") is LINKS["nvlink4"]
    assert parse_link("46:9.5") == Link("46:9.5", 46 * 1e9, 9.5 * 1e-6)


@pytest.mark.parametrize(
    "text",
    ["", "46", ":", "46:", ":9", "0:9", "46:0", "-1:9", "46:-9", "nan:9", "46:inf", "1e308:9", "46:1e-320", "a:b"],
)
def test_a_wrong_link_is_refused(text):
    with pytest.raises(ConfigError, match=r"must be one of nvlink3, .* for example 46:9\.5\.$"):
        parse_link(text)


@pytest.mark.parametrize(
    ("text", "near"), [("nvlnk4", "nvlink4"), ("Infiniband-NDR", "infiniband-ndr"), ("pcie", "pcie5")]
)
def test_a_misspelt_link_names_the_nearest(text, near):
    with pytest.raises(ConfigError, match=f"Did you mean '{near}'"):
        parse_link(text)
