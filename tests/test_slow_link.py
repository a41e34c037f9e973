"""What benchmarks.cpu.slow_link makes of its rows. (The link itself needs root; its figures are measured, not tested.)"""

import pytest

from benchmarks.cpu import slow_link


def rows(way: str, seconds: dict[int, float], sent: float) -> list[dict]:
    return [{"way": way, "mbit": rate, "seconds": {"median": median}, "sent": sent} for rate, median in seconds.items()]


# 1 MB at 8 Mbit/s takes a second. B computes 0.5 s longer and sends half: it is faster below 8 Mbit/s.
A = rows("a", {0: 1.0, 80: 1.1, 4: 3.0}, 1e6)
B = rows("b", {0: 1.5, 80: 1.55, 4: 2.6}, 0.5e6)


def test_the_model_is_the_free_step_and_the_bytes():
    table = slow_link.table(A + B).splitlines()
    assert table[0] == "| ms a step | KB sent | no limit | 80 Mbit/s | 4 Mbit/s |"
    assert table[2:] == [
        "| `a` | 1,000 | 1000 | 1100 (1100) | 3000 (3000) |",
        "| `b` | 500 | 1500 | 1550 (1550) | 2600 (2500) |",
    ]


def test_where_the_ways_cross():
    (line,) = slow_link.crossovers(A + B)
    assert line == "b is faster than a at 4 of [4, 80] Mbit/s; modelled: below 8 Mbit/s"
    (line,) = slow_link.crossovers(B + A)
    assert line == "a is faster than b at 80 of [4, 80] Mbit/s; modelled: it sends no less"


def test_without_ip_and_tc_nothing_is_made(monkeypatch):
    """As for who is no root."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="needs root, and ip and tc"), slow_link.throttled():
        pass
