"""The interval holds the truth as often as it says, and pairing makes it narrow."""

import math

import numpy as np
import pytest

from retnet.evaluation import Difference, paired_bootstrap, t_interval
from retnet.evaluation.bootstrap import FEW_SEEDS, to_bits


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


def seeds_and_documents(seed: int, seeds: int = 6, number: int = 40):
    """Totals [seeds, D] of two models, whose difference varies with seed and with document."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(50, 500, number)
    first = generator.normal(3, 1, number) + generator.normal(0, 0.01, (seeds, number))
    gap = 0.1 + generator.normal(0, 0.1, (seeds, 1)) + generator.normal(0, 0.2, number)
    return first * weights, (first + gap) * weights, weights


def test_seeds_are_resampled_beside_documents() -> None:
    """One seed is what it was; equal seeds add nothing; several differing ones widen."""
    first, second, weights = seeds_and_documents(0)
    alone = paired_bootstrap(first[0], second[0], weights)
    assert paired_bootstrap(first[:1], second[:1], weights) == alone
    same = paired_bootstrap(first[[0] * 4], second[[0] * 4], weights)
    assert (same.value, same.low, same.high) == pytest.approx((alone.value, alone.low, alone.high))
    mean = (second - first).mean(axis=0).sum() / weights.sum()
    crossed = paired_bootstrap(first, second, weights)
    assert crossed.value == pytest.approx(mean)
    averaged = paired_bootstrap(first.mean(axis=0), second.mean(axis=0), weights)
    assert crossed.high - crossed.low > 1.2 * (averaged.high - averaged.low)
    one = paired_bootstrap(first[:, :1], second[:, :1], weights[:1])  # of one document: seeds alone
    assert one.low < one.value < one.high


def test_coverage_over_seeds_and_documents() -> None:
    hits = 0
    for seed in range(100):
        difference = paired_bootstrap(*seeds_and_documents(seed, seeds=12), resamples=200)
        hits += difference.low <= 0.1 <= difference.high
    assert 85 <= hits <= 99


def test_few_seeds_have_students_interval() -> None:
    """As often as it says, where resampling three values would hold the truth far too seldom."""
    generator = np.random.default_rng(0)
    for seeds in range(2, FEW_SEEDS):
        found = [t_interval(generator.normal(1, 2, seeds)) for _ in range(2000)]
        hits = sum(one.low <= 1 <= one.high for one in found)
        assert 0.935 < hits / 2000 < 0.965, seeds
    assert t_interval([0.5]) == Difference(0.5, None, None)
