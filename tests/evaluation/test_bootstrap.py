"""The interval holds the truth as often as it says, and pairing makes it narrow."""

import math

import numpy as np
import pytest

from retnet.evaluation import Difference, paired_bootstrap
from retnet.evaluation.bootstrap import to_bits


def documents(seed: int, number: int = 60, gap: float = 0.1):
    """Totals of two models; document difficulty varies ten times as much as their difference."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(50, 500, number)
    difficulty = generator.normal(3, 1, number)
    noise = generator.normal(gap, 0.1, number)
    return difficulty * weights, (difficulty + noise) * weights, weights


def test_value_is_the_difference_of_the_ratios() -> None:
    first, second, weights = documents(0)
    difference = paired_bootstrap(first, second, weights)
    assert difference.value == pytest.approx(
        second.sum() / weights.sum() - first.sum() / weights.sum()
    )
    assert difference.low < difference.value < difference.high
    assert difference.is_clear


def test_coverage_is_near_95_percent() -> None:
    hits = 0
    for seed in range(200):
        difference = paired_bootstrap(*documents(seed), resamples=300)
        hits += difference.low <= 0.1 <= difference.high
    assert 175 <= hits <= 199


def test_pairing_removes_what_both_models_find_hard() -> None:
    difference = paired_bootstrap(*documents(1))
    assert difference.high - difference.low < 0.1  # unpaired it would be about 0.7


def test_equal_models_do_not_differ() -> None:
    first, _, weights = documents(0)
    assert paired_bootstrap(first, first, weights) == Difference(0.0, 0.0, 0.0)
    assert not paired_bootstrap(first, first, weights).is_clear


def test_the_seed_decides_and_resamples_count() -> None:
    data = documents(0)
    assert paired_bootstrap(*data, seed=1) == paired_bootstrap(*data, seed=1)
    assert paired_bootstrap(*data, seed=1) != paired_bootstrap(*data, seed=2)
    assert paired_bootstrap(*data, resamples=50) != paired_bootstrap(*data, resamples=500)


def test_blocks_do_not_change_how_many_are_drawn(monkeypatch) -> None:
    data = documents(0)
    whole = paired_bootstrap(*data, resamples=200)
    monkeypatch.setattr("retnet.evaluation.bootstrap.COUNTS_PER_BLOCK", 60 * 7)
    assert paired_bootstrap(*data, resamples=200) == whole


def test_one_document_has_no_interval() -> None:
    difference = paired_bootstrap(np.array([3.0]), np.array([5.0]), np.array([4]))
    assert difference == Difference(0.5, None, None)
    assert not difference.is_clear
    assert to_bits(difference).low is None


def test_empty_documents_are_no_division_by_zero() -> None:
    weights = np.array([0, 0, 0, 1])
    difference = paired_bootstrap(np.ones(4), 2 * np.ones(4), weights)
    assert math.isfinite(difference.low)


def test_bits_are_nats_over_ln_2() -> None:
    assert to_bits(Difference(math.log(2), 0.0, math.log(4))) == Difference(1.0, 0.0, 2.0)
