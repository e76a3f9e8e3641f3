"""Each filter does what it says, draws follow the distribution, rows do not touch each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from retnet.errors import UserError
from retnet.generation import Sampler, Sampling, sampling
from retnet.generation.sampling import ATTEMPTS, DRAWN_AT_ONCE, draw, keep_top_p

LOGITS = torch.tensor([[0.0, 3.0, 2.0, 1.0, -1.0]], dtype=torch.float64)
NEUTRAL = {"temperature": 1.0, "top_p": 1.0}
HISTORY = torch.tensor([[1, 1, 0]])


def draws(sampling: Sampling, number: int = 400) -> torch.Tensor:
    """How often each token is drawn, as shares."""
    sampler = Sampler(sampling, HISTORY)
    tokens = torch.cat([sampler(LOGITS) for _ in range(number)])
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
    probabilities = scores.softmax(-1)
    kept = keep_top_p(probabilities, top_p)
    expected = TopPLogitsWarper(top_p)(None, scores).isfinite()
    if spread:
        assert (kept > 0).equal(expected & (probabilities > 0))
        assert kept.equal(probabilities.where(kept > 0, 0))
    else:  # all are equally likely: none may go
        assert kept.equal(probabilities)


@given(
    vocab=st.integers(1, 1000),
    share=st.floats(0, 1, exclude_max=True) | st.just(1 - 2**-53),
    cut=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_draws_invert_the_distribution_function(vocab: int, share: float, cut: int, dtype) -> None:
    """Up to rounding; and a token without weight is never drawn."""
    generator = torch.Generator().manual_seed(cut)
    weights = torch.rand(1, vocab, dtype=dtype, generator=generator)
    weights[:, cut + 1 :] = 0
    weights[torch.rand(1, vocab, generator=generator) < 0.3] = 0
    weights[:, min(cut, vocab - 1)] = 0.5
    probabilities = weights / weights.sum()
    uniform = torch.full((1, ATTEMPTS + 1), share, dtype=torch.float64)
    token = draw(probabilities, 1.0, uniform).item()
    running = probabilities[0].double().cumsum(0)
    assert probabilities[0, token] > 0
    assert running[token] > share - 1e-6
    assert token == 0 or running[token - 1] <= share + 1e-6


@given(
    rows=st.integers(1, 3),
    vocab=st.integers(1, 300),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 1000),
)
def test_every_device_draws_the_same(rows: int, vocab: int, top_p: float, seed: int) -> None:
    """Row by row with a sort where it is needed, and all at once; both among what is kept."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(rows, vocab, dtype=torch.float64, generator=generator)
    probabilities = scores.softmax(-1)
    uniform = torch.rand(rows, ATTEMPTS + 1, dtype=torch.float64, generator=generator)
    tokens = draw(probabilities, top_p, uniform)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_drawn_in_turn", sampling._drawn_at_once)
        assert tokens.equal(draw(probabilities, top_p, uniform))
    if top_p < 1:
        assert (keep_top_p(probabilities, top_p).gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_draws_of_the_top_p_follow_their_distribution(top_p: float) -> None:
    """Also where the first attempts are seldom among them."""
    logits = torch.linspace(0, 1, 8, dtype=torch.float64)[None]
    sampler = Sampler(Sampling(temperature=1.0, top_p=top_p), HISTORY)
    tokens = torch.cat([sampler(logits) for _ in range(4000)])
    kept = keep_top_p(logits.softmax(-1), top_p)[0]
    shares = torch.bincount(tokens, minlength=8) / 4000
    assert (shares - kept / kept.sum()).abs().max() < 0.03


@given(st.integers(2, 40), st.integers(1, 6), st.sampled_from([0.5, 1.3, 2.0]))
def test_repetition_penalty_is_that_of_transformers(vocab: int, length: int, penalty) -> None:
    """Of the prompt and of what was chosen since."""
    generator = torch.Generator().manual_seed(vocab)
    ids = torch.randint(vocab, (2, length), generator=generator)
    sampler = Sampler(Sampling(greedy=True, repetition_penalty=penalty), ids)
    for _ in range(6):
        logits = torch.randn(2, vocab, generator=generator, dtype=torch.float64)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()).argmax(-1)
        chosen = sampler(logits)
        assert chosen.equal(expected)
        ids = torch.cat((ids, chosen[:, None]), dim=1)


def test_tiny_temperature_in_float32() -> None:
    sampler = Sampler(Sampling(temperature=1e-300, top_p=1.0), HISTORY)
    assert sampler(LOGITS.float()).item() == 1


def test_a_long_series_of_draws_follows_the_distribution() -> None:
    """Past the numbers that are drawn at once."""
    sampler = Sampler(Sampling(**NEUTRAL), HISTORY)
    even = torch.zeros(1, 2)
    drawn = [sampler(even).item() for _ in range(3 * DRAWN_AT_ONCE)]
    thirds = [drawn[i : i + DRAWN_AT_ONCE] for i in range(0, len(drawn), DRAWN_AT_ONCE)]
    assert thirds[0] != thirds[1] != thirds[2]
    assert all(0.4 < sum(third) / DRAWN_AT_ONCE < 0.6 for third in thirds)


def test_the_seed_decides_and_row_i_draws_with_seed_plus_i() -> None:
    def tokens(seed: int, rows: int) -> list[list[int]]:
        sampler = Sampler(Sampling(**NEUTRAL, seed=seed), HISTORY.expand(rows, -1))
        logits = LOGITS.expand(rows, -1)
        return torch.stack([sampler(logits) for _ in range(30)], dim=1).tolist()

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


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_what_is_no_number_gives_an_id_that_no_token_has(monkeypatch, top_p: float) -> None:
    """By both ways; other rows are drawn as they would be."""
    logits = LOGITS.repeat(5, 1)
    rows = Sampler(Sampling(top_p=top_p), HISTORY.expand(5, 3))(logits)
    logits[0, 2], logits[1] = torch.nan, torch.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    for options in ({"greedy": True}, {"top_p": top_p, "repetition_penalty": 2.0}):
        tokens = Sampler(Sampling(**options), HISTORY.expand(5, 3))(logits)
        assert tokens[:4].tolist() == [5] * 4
        assert 0 <= tokens[4] < 5
    monkeypatch.setattr(sampling, "_drawn_in_turn", sampling._drawn_at_once)
    tokens = Sampler(Sampling(top_p=top_p), HISTORY.expand(5, 3))(logits)
    assert tokens.tolist() == [5] * 4 + [rows[4]]
