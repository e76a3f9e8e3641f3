"""Limits and what follows from them."""

import math
import random

import numpy as np
import pytest

from retnet.experiments.claims.verdict import (
    Figure,
    Finding,
    Limit,
    Outcome,
    at_least,
    at_most,
    exact,
    median,
    readable,
    verdict,
    worst,
)


def between(low: float, high: float) -> Figure:
    return Figure((low + high) / 2, low, high, "made up")


@pytest.mark.parametrize(
    ("limit", "figure", "outcome"),
    [
        (at_most(1.1), between(0.9, 1.1), Outcome.HELD),
        (at_most(1.1), between(1.0, 1.2), Outcome.OPEN),
        (at_most(1.1), between(1.11, 1.2), Outcome.NOT),
        (at_least(8.4), between(8.4, 9.0), Outcome.HELD),
        (at_least(8.4), between(8.0, 9.0), Outcome.OPEN),
        (at_least(8.4), between(1.0, 8.3), Outcome.NOT),
        (at_most(0), between(-2.0, -1.0), Outcome.HELD),
        (at_most(0), exact(0), Outcome.HELD),
        (at_most(1.0), exact(1.01), Outcome.NOT),
        (at_most(1.0), Figure(0.5, None, None, "one seed"), Outcome.OPEN),
        (at_most(1.0), Figure(math.nan, math.nan, math.nan, "made up"), Outcome.NOT),
        (at_least(1.0), Figure(2.0, 1.5, math.nan, "made up"), Outcome.NOT),
    ],
)
def test_a_limit_is_kept_missed_or_not_decided(limit: Limit, figure: Figure, outcome) -> None:
    assert limit.outcome(figure) is outcome


def test_a_claim_held_where_all_limits_are_kept() -> None:
    kept, missed = (Finding("", exact(x), limit=at_most(1)) for x in (1, 2))
    unsure, beside = Finding("", between(0, 2), limit=at_most(1)), Finding("", exact(9))
    assert verdict([kept, kept, beside]) is Outcome.HELD
    assert verdict([missed, beside, missed]) is Outcome.NOT
    for findings in ([kept, missed], [kept, unsure], [missed, unsure]):
        assert verdict(findings) is Outcome.PART
    assert verdict([unsure, beside]) is Outcome.OPEN
    with pytest.raises(ValueError, match="no finding has a limit"):
        verdict([beside])


def test_the_interval_of_a_median_holds_it_so_often() -> None:
    """Of many samples from a skewed distribution, at least 95 % and not many more."""
    draw, true = random.Random(0), math.log(2)
    for n, most in ((6, 0.985), (9, 0.98), (15, 0.98), (40, 0.98)):
        found = [median([draw.expovariate(1) for _ in range(n)]) for _ in range(1500)]
        held = np.mean([one.low <= true <= one.high for one in found])
        assert 0.94 <= held <= most, n


def test_few_values_have_a_range() -> None:
    assert median([3.0, 1.0, 2.0]) == Figure(2.0, 1.0, 3.0, "3 rounds, range")
    assert median([4.0]) == Figure(4.0, 4.0, 4.0, "1 rounds, range")
    assert median([float(x) for x in range(6)], "draws") == Figure(2.5, 0.0, 5.0, "6 draws")
    assert median([float(x) for x in range(9)]) == Figure(4.0, 1.0, 7.0, "9 rounds")


def test_the_worst_difference_keeps_what_is_no_number() -> None:
    assert worst([1.0, 3.0, 2.0], "models") == Figure(3.0, 1.0, 3.0, "3 models, range")
    assert math.isnan(worst([1.0, math.nan], "models").value)


def test_numbers_are_readable() -> None:
    assert [*map(readable, (12345.6, 8.4, 1e-10, 0))] == ["12,346", "8.4", "1e-10", "0"]
