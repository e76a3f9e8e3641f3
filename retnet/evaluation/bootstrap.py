"""Is one model better than another on such text, or only on these documents?"""

from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from retnet.evaluation import metrics

RESAMPLES = 2000
CONFIDENCE = 0.95
COUNTS_PER_BLOCK = 1 << 22  # bounds the memory of many documents


@dataclass(frozen=True)
class Difference:
    """A difference of two ratios and the interval that holds it with 95 % confidence."""

    value: float  # second minus first, on all documents
    low: float | None  # None when there are fewer than two documents to resample
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def paired_bootstrap(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    weights: NDArray[np.int64],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Difference of sum(second) / sum(weights) and sum(first) / sum(weights).

    Documents are drawn with replacement, the same ones for both models, so that what makes a
    document hard for both cancels out. The interval is the percentile interval.

    Args:
        first: The first model's total of each document, [D].
        second: The second model's, [D].
        weights: What each document's total is spread over (targets, or bytes), [D].
    """
    excess = second - first
    value = float(excess.sum() / weights.sum())
    documents = len(excess)
    if documents < 2:
        return Difference(value, None, None)
    generator = np.random.default_rng(seed)
    chances = np.full(documents, 1 / documents)
    block = max(1, COUNTS_PER_BLOCK // documents)
    ratios = []
    for done in range(0, resamples, block):
        counts = generator.multinomial(documents, chances, size=min(block, resamples - done))
        totals = counts @ weights
        kept = totals > 0  # documents may be empty
        ratios.append((counts @ excess)[kept] / totals[kept])
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(ratios), [tail, 100 - tail])
    return Difference(value, float(low), float(high))


def to_bits(difference: Difference) -> Difference:
    """The same difference, from nats to bits."""
    value, *ends = astuple(difference)
    low, high = (None if end is None else metrics.to_bits(end) for end in ends)
    return Difference(metrics.to_bits(value), low, high)
