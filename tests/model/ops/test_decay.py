"""Decays against their formulas, where low precision would lose them."""

import math

import pytest
import torch

from retnet.model.ops.decay import head_log_decay, head_windows


def test_paper_formula_is_exact_for_many_heads() -> None:
    """log(1 - 2^-25) computed as log(1 - x) in float32 would be 0."""
    log_decay = head_log_decay("paper", 40)
    assert log_decay.dtype == torch.float64
    for head, value in enumerate(log_decay.tolist()):
        assert value == pytest.approx(math.log1p(-(2.0 ** (-5 - head))), rel=1e-14)
        assert value < 0


def test_log_linear_runs_from_one_32nd_to_one_512th() -> None:
    assert head_windows("log_linear", 3) == pytest.approx([32, 128, 512])


def test_one_value_for_all_heads() -> None:
    assert head_log_decay(0.5, 3).tolist() == pytest.approx([math.log(0.5)] * 3)
    assert head_log_decay(1.0, 2).tolist() == [0, 0]
    assert head_windows(1.0, 1) == [math.inf]


def test_windows_of_the_paper() -> None:
    assert head_windows("paper", 4) == pytest.approx([32, 64, 128, 256])


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="decay \\('papr'\\)"):
        head_log_decay("papr", 2)
