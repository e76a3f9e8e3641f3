"""The formulas of what is reported."""

import math

import pytest

from retnet.evaluation import metrics


def test_the_formulas() -> None:
    assert metrics.nats_per_token(6.0, 4) == 1.5
    assert metrics.perplexity(6.0, 4) == math.exp(1.5)
    assert metrics.bits_per_byte(6.0, 3) == pytest.approx(2 / math.log(2))
    assert metrics.bits_per_byte(8 * math.log(256), 8) == pytest.approx(8)  # bytes by chance
    assert metrics.to_bits(math.log(2)) == 1


@pytest.mark.parametrize(
    ("text", "words"), [("", 0), ("a", 2), ("a b\n", 3), ("a b\n\n c", 6), (" \n = A = \n", 5)]
)
def test_words_and_ends_of_lines(text: str, words: int) -> None:
    """As WikiText counts: <eos> stands at the end of every line, an empty one too."""
    assert metrics.words_of(text) == words
    assert metrics.word_perplexity(6.0, 4) == math.exp(1.5)


@pytest.mark.parametrize("loss", [691.0, 1e4, math.inf, math.nan])
def test_a_perplexity_beyond_all_sense_is_infinite(loss: float) -> None:
    assert metrics.perplexity(loss, 1) == math.inf
    assert metrics.perplexity(690.0, 1) == math.exp(690)


def test_growth_of_a_perplexity() -> None:
    assert metrics.growth(math.log(2)) == pytest.approx(1)
    assert metrics.growth(-1e4) == -1 and metrics.growth(1e4) == math.inf
