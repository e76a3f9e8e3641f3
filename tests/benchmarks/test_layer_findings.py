"""What follows from the times and peaks of one layer, by made-up ones."""

import math

import pytest

from benchmarks.layer import report
from benchmarks.layer.findings import (
    CLAIM,
    crossovers,
    memory_beside_laws,
    power,
    ratios,
    times_beside_laws,
)
from benchmarks.layer.measuring import (
    PROJECTED,
    Cell,
)
from benchmarks.layer.mixing import ALL, CHUNKWISE, LINEAR, NAIVE, SDPA
from retnet.evaluation import Timing

RECURRENT = "retention, recurrent"


def timing(*seconds: float) -> Timing:
    return Timing(sorted(seconds)[len(seconds) // 2], 0, 0, len(seconds), seconds)


def cells(name: str, seconds: dict[int, float], projected: bool = False, **values) -> list[Cell]:
    return [
        Cell(name, projected, length, own, 1000 * length, timing=timing(own), **values)
        for length, own in seconds.items()
    ]


def test_powers_of_the_length() -> None:
    lengths = [10, 100, 1000, 2000, 4000, 8000]
    exact = power(lengths, [9.0, 1.0, *(3e-6 * t**1.5 for t in lengths[2:])])
    assert exact is not None
    assert exact.lengths == (1000, 2000, 4000, 8000)  # the short ones have no say
    assert exact.exponent == pytest.approx(1.5)
    assert exact.error == pytest.approx(0, abs=1e-9)
    # by hand: logs to base 2 of 0, 1, 3 at 0, 1, 2: slope 1.5, residuals 1/6, -1/3, 1/6
    bent = power([1, 2, 4], [1, 2, 8])
    assert bent is not None
    assert bent.exponent == pytest.approx(1.5)
    assert bent.error == pytest.approx(math.sqrt((1 / 36 + 1 / 9 + 1 / 36) / 1 / 2))
    two = power([1, 2, 4], [0, 2, 4])  # a peak of nothing has no logarithm
    assert two is not None
    assert (two.error, two.lengths) == (None, (2, 4))
    assert power([1, 2], [0, 3]) is None


def test_laws_beside_what_was_measured() -> None:
    seconds = {t: 1e-9 * t**2 for t in (256, 512, 1024, 2048, 4096)}
    found = cells(NAIVE, seconds) + cells(RECURRENT, seconds) + cells(NAIVE, {8: 1.0}, True)
    naive, recurrent, one = times_beside_laws(found, 64)
    assert (naive.law, naive.predicted, naive.alike) == ("T^2 d", pytest.approx(2), True)
    assert (recurrent.predicted, recurrent.alike) == (pytest.approx(1), False)
    assert (one.label, one.measured, one.alike) == (NAIVE + PROJECTED, None, None)
    naive, recurrent, _ = memory_beside_laws(found, 64)  # the peaks are 1000 T bytes
    assert naive.law == "T^2"
    assert naive.predicted == pytest.approx(1.95, abs=0.02)  # T^2 + T d
    assert not naive.alike
    assert recurrent.alike


def test_crossovers() -> None:
    lengths = (8, 16, 32, 64)
    found = [
        *cells(NAIVE, dict(zip(lengths, (1, 4, 16, 64), strict=True))),
        *cells(SDPA, dict(zip(lengths, (2, 4.5, 8, 32), strict=True))),
        *cells(CHUNKWISE, dict(zip(lengths, (8, 16, 4, 8), strict=True))),
        *cells(CHUNKWISE, {8: 1.0, 16: 2.0}, True),
        *cells(NAIVE, {8: 3.0, 16: 4.0, 32: 5.0}, True),
        *cells(LINEAR + ALL, dict.fromkeys(lengths, 0.5)),
    ]
    by_name = {(one.fast, one.slow): one for one in crossovers(found)}
    one = by_name[CHUNKWISE, NAIVE]
    # 4 times slower at 16 tokens, 4 times faster at 32: half way, on logarithmic axes
    assert (one.since, one.longest) == (32, 64)
    assert one.crossing == pytest.approx(16 * 2**0.5)
    assert by_name[NAIVE, CHUNKWISE].since is None
    assert by_name[NAIVE, SDPA].since is None
    always = by_name[CHUNKWISE + PROJECTED, NAIVE + PROJECTED]
    assert (always.since, always.crossing, always.longest) == (8, None, 16)
    assert not any(LINEAR + ALL in pair for pair in by_name)  # nobody else sees all tokens
    assert (CHUNKWISE, NAIVE + PROJECTED) not in by_name


def test_what_is_left_of_the_claim() -> None:
    long = Cell(LINEAR + ALL, False, 64, 1, 1, timing=timing(1, 2, 1))
    found = [
        *cells(LINEAR + ALL, {8: 1.0}), long,
        Cell(NAIVE + ALL, False, 64, 1, 1, timing=timing(30, 40)),  # ran twice only
        *cells(SDPA + ALL, {8: 3.0}),
        *cells(LINEAR, {64: 1.0}), *cells(NAIVE, {64: 6.0}),
    ]  # fmt: skip
    values = {(one.fast, one.slow): (one.length, one.times) for one in ratios(found)}
    assert values == {
        (LINEAR + ALL, NAIVE + ALL): (64, 25),  # the median of 30 / 1 and 40 / 2
        (LINEAR + ALL, SDPA + ALL): (8, 3),  # stopped afterwards
        (LINEAR, NAIVE): (64, 6),
    }
    lines = "\n".join(report._claim(found))
    assert CLAIM == 60
    for figure in ("25.0", "42%", "3.00", "5%", "6.00", "10%"):
        assert figure in lines
    assert "Not measured" in "\n".join(report._claim(cells(NAIVE, {8: 1.0})))
