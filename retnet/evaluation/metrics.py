"""The formulas of what is reported. Sums of negative log-likelihoods are in nats."""

import math

LARGEST = 1e300  # perplexity that is told apart from an infinite one


def nats_per_token(nll: float, targets: int) -> float:
    """The loss: the mean over all targets."""
    return nll / targets


def perplexity(nll: float, targets: int) -> float:
    """exp of the loss; infinite where that is beyond all sense, or the loss is no number."""
    loss = nats_per_token(nll, targets)
    return math.exp(loss) if loss < math.log(LARGEST) else math.inf


def growth(nats: float) -> float:
    """By which share a perplexity changes when its loss does by ``nats``; infinite beyond sense."""
    return math.expm1(nats) if nats < math.log(LARGEST) else math.inf


def bits_per_byte(nll: float, num_bytes: int) -> float:
    """What does not depend on the tokenizer: all nats, in bits, over the bytes of the text."""
    return to_bits(nll) / num_bytes


def words_of(text: str) -> int:
    """Words between blanks, and one for the end of each line: WikiText's count of its tokens."""
    lines = text.count("\n") + (bool(text) and not text.endswith("\n"))
    return len(text.split()) + lines


def word_perplexity(nll: float, words: int) -> float:
    """All nats over ``words_of`` the text, whatever its tokens: what is published for WikiText."""
    return perplexity(nll, words)


def to_bits(nats: float) -> float:
    """The same amount of information in bits."""
    return nats / math.log(2)
