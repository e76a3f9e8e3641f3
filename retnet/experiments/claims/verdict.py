"""When a claim holds: figures with intervals, limits, and the outcome that follows from them.

A limit is kept where the whole interval lies on its side, and missed where the whole interval lies
on the other; where the interval contains it, or there is none, the measurement does not decide. A
claim held where all of its limits are kept, did not hold where all are missed, is not decided where
none is, and held in part otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

CONFIDENCE = 0.95


class Outcome(StrEnum):
    """Of a limit, and of a claim."""

    HELD = "held"
    PART = "held in part"
    NOT = "did not hold"
    OPEN = "not decided"


@dataclass(frozen=True)
class Figure:
    """A measured number, the ends of its interval, and what that is over; None without one."""

    value: float
    low: float | None
    high: float | None
    over: str


def exact(value: float) -> Figure:
    """A number that is counted, not timed, and the same each time."""
    return Figure(value, value, value, "exact")


def median(values: Sequence[float], unit: str = "rounds") -> Figure:
    """The median with its 95 % interval by ranks, whatever the distribution.

    Of n values the k-th smallest and largest hold the median unless fewer than k lie on one side of
    it, which has the chance 2 P(Binomial(n, 1/2) < k). With fewer than six values there is no such
    interval, and their range stands in its place.
    """
    ordered, n = sorted(values), len(values)
    skipped, chance = 0, 2 * 0.5**n  # that all values lie on one side
    while skipped < n // 2:
        more = 2 * math.comb(n, skipped + 1) * 0.5**n
        if chance + more > 1 - CONFIDENCE:
            break
        skipped, chance = skipped + 1, chance + more
    few = chance > 1 - CONFIDENCE
    over = f"{n} {unit}" + (", range" if few else "")
    return Figure(float(np.median(ordered)), ordered[skipped], ordered[-1 - skipped], over)


def worst(values: Sequence[float], unit: str) -> Figure:
    """The largest of several differences, and their range."""
    low, high = float(np.min(values)), float(np.max(values))  # which keep what is not a number
    return Figure(high, low, high, f"{len(values)} {unit}, range")


@dataclass(frozen=True)
class Limit:
    """At most, or at least, a number."""

    number: float
    at_most: bool

    def __str__(self) -> str:
        return f"at {'most' if self.at_most else 'least'} {readable(self.number)}"

    def outcome(self, figure: Figure) -> Outcome:
        """What a figure's interval says; one with ends that are no numbers misses it."""
        if math.isnan(figure.value) or math.nan in (figure.low, figure.high):
            return Outcome.NOT
        if figure.low is None or figure.high is None:
            return Outcome.OPEN
        sign = 1 if self.at_most else -1
        best, last = sorted((sign * figure.low, sign * figure.high))
        if last <= sign * self.number:
            return Outcome.HELD
        return Outcome.NOT if best > sign * self.number else Outcome.OPEN


def at_most(number: float) -> Limit:
    return Limit(number, at_most=True)


def at_least(number: float) -> Limit:
    return Limit(number, at_most=False)


@dataclass(frozen=True)
class Finding:
    """One figure of a claim; without a limit it only stands beside the others."""

    what: str
    figure: Figure
    unit: str = ""
    limit: Limit | None = None

    @property
    def outcome(self) -> Outcome | None:
        return None if self.limit is None else self.limit.outcome(self.figure)


def verdict(findings: Sequence[Finding]) -> Outcome:
    """A claim's, of findings of which at least one has a limit."""
    outcomes = {finding.outcome for finding in findings if finding.outcome is not None}
    if not outcomes:
        raise ValueError("no finding has a limit")
    return outcomes.pop() if len(outcomes) == 1 else Outcome.PART


def readable(number: float) -> str:
    """Three digits, thousands with commas, small ones as powers of ten."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
