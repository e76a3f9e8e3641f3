"""Each filter does what it says, draws follow the distribution, rows do not touch each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

from retnet.errors import UserError
from retnet.generation import Sampler, Sampling
from retnet.generation.sampling import keep_top_p

LOGITS = torch.tensor([[0.0, 3.0, 2.0, 1.0, -1.0]], dtype=torch.float64)
NEUTRAL = {"temperature": 1.0, "top_p": 1.0}
HISTORY = torch.tensor([[1, 1, 0]])


def draws(sampling: Sampling, number: int = 400) -> torch.Tensor:
    """How often each token is drawn, as shares."""
    sampler = Sampler(sampling, 1)
    tokens = torch.cat([sampler(HISTORY, LOGITS) for _ in range(number)])
    return torch.bincount(tokens, minlength=LOGITS.shape[1]) / number


def test_draws_follow_the_distribution() -> None:
    shares = draws(Sampling(**NEUTRAL), 4000)
    assert (shares - LOGITS.softmax(-1)[0]).abs().max() < 0.03


def test_greedy_takes_the_most_likely() -> None:
    assert draws(Sampling(greedy=True), 20)[1] == 1


def test_temperature_sharpens_and_a_tiny_one_does_not_overflow() -> None:
    assert draws(Sampling(temperature=0.3, top_p=1.0))[1] > 0.9
    assert draws(Sampling(temperature=4.0, top_p=1.0))[1] < 0.5
    assert draws(Sampling(temperature=1e-300, top_p=1.0), 20)[1] == 1


def test_top_k_keeps_k_tokens() -> None:
    assert (draws(Sampling(**NEUTRAL, top_k=2)) > 0).tolist() == [False, True, True, False, False]


def test_top_p_keeps_the_smallest_set_of_that_mass() -> None:
    kept = draws(Sampling(temperature=1.0, top_p=0.8)) > 0
    assert kept.tolist() == [False, True, True, False, False]


@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 300),
    top_p=st.floats(1e-6, 1, exclude_max=True),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    cut=st.booleans(),
)
def test_top_p_keeps_what_transformers_keeps(rows, vocab, top_p, spread, cut) -> None:
    generator = torch.Generator().manual_seed(vocab)
    scores = spread * torch.randn(rows, vocab, dtype=torch.float64, generator=generator)
    if cut and vocab > 3:  # as top_k leaves them
        scores[:, 3:] = -torch.inf
    kept = keep_top_p(scores, top_p)
    expected = TopPLogitsWarper(top_p)(None, scores)
    if spread:
        assert kept.equal(expected)
    else:  # all are equally likely: none may go
        assert kept.equal(scores)


def test_repetition_penalty_punishes_tokens_of_the_history() -> None:
    assert draws(Sampling(greedy=True, repetition_penalty=2.0), 5)[2] == 1


def test_the_seed_decides_and_row_i_draws_with_seed_plus_i() -> None:
    def tokens(seed: int, rows: int) -> list[list[int]]:
        sampler = Sampler(Sampling(**NEUTRAL, seed=seed), rows)
        many = LOGITS.expand(rows, -1), HISTORY.expand(rows, -1)
        return torch.stack([sampler(many[1], many[0]) for _ in range(30)], dim=1).tolist()

    assert tokens(5, 1) == tokens(5, 1) != tokens(6, 1)
    assert tokens(5, 3) == tokens(5, 1) + tokens(6, 1) + tokens(7, 1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_values_out_of_range_name_option_and_value(option: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{option} \({value}\)"):
        Sampling(**{option: value})


def test_temperature_zero_points_to_greedy() -> None:
    with pytest.raises(UserError, match="--greedy"):
        Sampling(temperature=0.0)
