"""Is one model better than another on such text, or only on these documents and with this seed?"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from retnet.evaluation import metrics

RESAMPLES = 2000
FEW_SEEDS = 5  # with fewer, resampling them says too little: see t_interval
T_QUANTILES = {2: 12.7062, 3: 4.3027, 4: 3.1824}  # Student's, 97.5 %, by the number of seeds
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
    document hard for both cancels out. Of models that were trained with several seeds these are
    drawn too, independently of the documents (a crossed bootstrap: Owen, "The pigeonhole
    bootstrap", 2007). The interval is the percentile interval.

    Args:
        first: The first model's total of each document, [D] or [seeds, D].
        second: The second model's, of the same seeds.
        weights: What each document's total is spread over (targets, or bytes), [D].
    """
    excess = np.atleast_2d(second - first)
    seeds, documents = excess.shape
    value = float(excess.mean(axis=0).sum() / weights.sum())
    if documents < 2 and seeds < 2:
        return Difference(value, None, None)
    generator, of_seeds = np.random.default_rng(seed), np.random.default_rng((seed, seeds))
    chances, alike = np.full(documents, 1 / documents), np.full(seeds, 1 / seeds)
    block = max(1, COUNTS_PER_BLOCK // documents)
    ratios = []
    for done in range(0, resamples, block):
        drawn = min(block, resamples - done)
        counts = generator.multinomial(documents, chances, size=drawn)
        shares = of_seeds.multinomial(seeds, alike, size=drawn) / seeds
        totals = counts @ weights
        kept = totals > 0  # documents may be empty
        ratios.append((counts * (shares @ excess)).sum(axis=1)[kept] / totals[kept])
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(ratios), [tail, 100 - tail])
    return Difference(value, float(low), float(high))


def t_interval(values: Sequence[float]) -> Difference:
    """The mean of few paired differences, one per seed, with Student's interval for it.

    Args:
        values: Fewer than ``FEW_SEEDS``; one has no interval.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Difference(mean, None, None)
    half = T_QUANTILES[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Difference(mean, mean - half, mean + half)


def to_bits(difference: Difference) -> Difference:
    """The same difference, from nats to bits."""
    value, *ends = astuple(difference)
    low, high = (None if end is None else metrics.to_bits(end) for end in ends)
    return Difference(metrics.to_bits(value), low, high)
