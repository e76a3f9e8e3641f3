"""What the measured figures say: exponents of T beside the laws, crossovers, what is left of 60."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.layer.measuring import PROJECTED, Cell
from benchmarks.layer.mixing import ALL, CHUNKWISE, CONTENDERS, LINEAR, NAIVE, SDPA

LONG_END = 4  # the longest lengths that were measured, through which the power of T goes
NEAR = 0.1  # exponents nearer than this, or than two standard errors, are called alike
CLAIM = 60.0  # "up to 60 times" at 6,000 tokens on a T4, linear attention over naive softmax


@dataclass(frozen=True)
class Power:
    """cost = c T^exponent, by least squares of the logarithms.

    Attributes:
        exponent: Of T.
        error: Its standard error; None of fewer than three points, which leave none.
        lengths: The points.
    """

    exponent: float
    error: float | None
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """A law of one contender beside what was measured.

    Attributes:
        label: Who, with projections or without.
        law: In words.
        predicted: The law's own power at the same lengths.
        measured: None where fewer than two lengths were measured.
    """

    label: str
    law: str
    predicted: float | None
    measured: Power | None

    @property
    def alike(self) -> bool | None:
        """Whether the exponents are; None where there is no measured one."""
        if self.measured is None or self.predicted is None:
            return None
        near = max(NEAR, 2 * (self.measured.error or 0.0))
        return abs(self.measured.exponent - self.predicted) <= near


@dataclass(frozen=True)
class Crossover:
    """From where on one contender is faster than another.

    Attributes:
        fast, slow: Who.
        since: The shortest measured length from which it is faster at all that both have; None
            where it is slower at the longest of these.
        crossing: Where their lines cross between that length and the one before, on logarithmic
            axes; None where it is faster from the shortest length on, or never.
        longest: That both have.
    """

    fast: str
    slow: str
    since: int | None
    crossing: float | None
    longest: int


def power(lengths: Sequence[int], values: Sequence[float]) -> Power | None:
    """The power of T through the long end, values above 0 alone; None of fewer than two."""
    points = [(t, y) for t, y in zip(lengths, values, strict=True) if y > 0][-LONG_END:]
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points)).T
    spread = x - x.mean()
    slope = float(spread @ y / (spread @ spread))
    error = None
    if len(points) > 2:
        rest = y - y.mean() - slope * spread
        error = math.sqrt(float(rest @ rest) / (len(points) - 2) / float(spread @ spread))
    return Power(slope, error, tuple(t for t, _ in points))


def times_beside_laws(cells: Sequence[Cell], width: int) -> list[Comparison]:
    """Of the median seconds, contender by contender."""
    return [
        _beside(
            own,
            CONTENDERS[own[0].contender].time.text,
            lambda one: CONTENDERS[one.contender].operations(one.length, width, one.projected),
            lambda one: None if one.timing is None else one.timing.median,
        )
        for own in _by_label(cells).values()
    ]


def memory_beside_laws(cells: Sequence[Cell], width: int) -> list[Comparison]:
    """Of the peaks, contender by contender."""
    return [
        _beside(
            own,
            CONTENDERS[own[0].contender].space.text,
            lambda one: CONTENDERS[one.contender].numbers(one.length, width, one.projected),
            lambda one: one.num_bytes,
        )
        for own in _by_label(cells).values()
    ]


def _beside(
    cells: Sequence[Cell],
    law: str,
    count: Callable[[Cell], float],
    value: Callable[[Cell], float | None],
) -> Comparison:
    found = [(one, y) for one in cells if (y := value(one)) is not None]
    measured = power([one.length for one, _ in found], [y for _, y in found])
    predicted = None
    if measured is not None:
        own = [one for one, _ in found if one.length in measured.lengths]
        predicted = power([one.length for one in own], [count(one) for one in own])
    return Comparison(
        cells[0].label, law, None if predicted is None else predicted.exponent, measured
    )


def _by_label(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for one in cells:
        found.setdefault(one.label, []).append(one)
    return found


def crossovers(cells: Sequence[Cell]) -> list[Crossover]:
    """Everybody against naive softmax, SDPA and retention by chunks, alike in causality.

    With projections against with projections. Where the two have no length in common, nothing.
    """
    by_label, found = _by_label(cells), []
    for label, own in by_label.items():
        contender = CONTENDERS[own[0].contender]
        for rival in (NAIVE, SDPA, CHUNKWISE):
            name = rival if contender.causal or rival == CHUNKWISE else rival + ALL
            if CONTENDERS[name].causal != contender.causal or name == contender.name:
                continue
            other = by_label.get(name + (PROJECTED if own[0].projected else ""), [])
            one = _crossover(label, own, other)
            found += [one] if one else []
    return found


def _crossover(label: str, own: Sequence[Cell], other: Sequence[Cell]) -> Crossover | None:
    theirs = {one.length: one.timing.median for one in other if one.timing}
    # below 0: faster
    gaps = [
        (one.length, math.log(one.timing.median / theirs[one.length]))
        for one in own
        if one.timing and one.length in theirs
    ]
    if not gaps:
        return None
    first = len(gaps)
    while first and gaps[first - 1][1] < 0:
        first -= 1
    since = gaps[first][0] if first < len(gaps) else None
    crossing = None
    if since is not None and first:
        (t0, y0), (t1, y1) = gaps[first - 1 : first + 1]
        crossing = math.exp(math.log(t0) + math.log(t1 / t0) * y0 / (y0 - y1))
    return Crossover(label, other[0].label, since, crossing, gaps[-1][0])


@dataclass(frozen=True)
class Ratio:
    """How much faster linear attention is than a softmax, at the longest length that both have."""

    fast: str
    slow: str
    length: int
    times: float


def ratios(cells: Sequence[Cell]) -> list[Ratio]:
    """Linear attention over naive softmax and SDPA: not causal, as the claim has it, and causal."""
    by_label, found = _by_label(cells), []
    for ending in (PROJECTED, ""):
        for kind in (ALL, ""):
            for rival in (NAIVE, SDPA):
                fast = by_label.get(LINEAR + kind + ending, [])
                slow = by_label.get(rival + kind + ending, [])
                found += [one for one in (_ratio(fast, slow),) if one]
    return found


def _ratio(fast: Sequence[Cell], slow: Sequence[Cell]) -> Ratio | None:
    theirs = {one.length: one for one in slow if one.timing}
    both = [one for one in fast if one.timing and one.length in theirs]
    if not both:
        return None
    own = both[-1]
    other = theirs[own.length]
    assert own.timing is not None and other.timing is not None
    return Ratio(own.label, other.label, own.length, other.timing.ratio(own.timing))
