"""What was found out, in plain sentences with figures."""

from collections.abc import Iterator

from retnet.evaluation import metrics
from retnet.evaluation.bootstrap import Difference
from retnet.evaluation.comparison import ModelResult
from retnet.evaluation.report.findings import Findings
from retnet.evaluation.speed import DecodeSpeed

SAME = 0.05  # percent of perplexity, which would be shown as 0.0


def summary(findings: Findings) -> list[str]:
    """Sentences about each model beside the first, and about each by itself."""
    models = findings.comparison.models
    found = []
    for i, model in enumerate(models[1:], start=1):
        found += [*_quality(models[0], model), *_costs(findings, i)]
    for i, model in enumerate(models):
        found += _beyond(findings, i, model.name)
    return found


def percent(difference: Difference) -> tuple[float, float | None, float | None]:
    """A difference of losses as one of perplexities, in percent, with the interval's ends."""
    value, low, high = (
        None if x is None else 100 * metrics.growth(x)
        for x in (difference.value, difference.low, difference.high)
    )
    assert value is not None
    return value, low, high


def _quality(first: ModelResult, model: ModelResult) -> Iterator[str]:
    bits = model.bits_difference
    assert bits is not None
    if model.nats_difference is None:  # other tokens
        better = "fewer" if bits.value < 0 else "more"
        value = f"{abs(bits.value):.3f} bits per byte {better} than {first.name}"
        low, high, unit = bits.low, bits.high, ""
        yield f"{model.name} needs {value}{_interval(low, high, unit, 3)}."
        return
    value_, low, high = percent(model.nats_difference)
    sides = "worse" if value_ > 0 else "better"
    unclear = model.nats_difference.low is not None and not model.nats_difference.is_clear
    clear = ", so that it may be neither" if unclear else ""
    yield (
        f"{model.name} is {abs(value_):.1f} % {sides} in perplexity than {first.name}"
        f"{_interval(low, high, ' %', 1)}{clear}."
    )


def _interval(low: float | None, high: float | None, unit: str, digits: int) -> str:
    if low is None or high is None:
        return ""
    return f" (95 % interval over documents {low:+.{digits}f}{unit} to {high:+.{digits}f}{unit})"


def _costs(findings: Findings, other: int) -> Iterator[str]:
    """Of the first model beside another, after the longest context that both were measured at."""
    names = [model.name for model in findings.comparison.models]
    pairs = zip(findings.costs[0].by_context, findings.costs[other].by_context, strict=True)
    both = [(a, b) for a, b in pairs if a.ms_per_token and b.ms_per_token]
    if not both:
        return
    a, b = both[-1]
    assert a.ms_per_token and b.ms_per_token and a.cache_bytes and b.cache_bytes
    slower = b.ms_per_token / a.ms_per_token
    larger = b.cache_bytes / a.cache_bytes
    yield (
        f"After {a.context:,} tokens {names[0]} makes a token in {a.ms_per_token:.2f} ms and keeps "
        f"{megabytes(a.cache_bytes)}, {names[other]} in {b.ms_per_token:.2f} ms with "
        f"{megabytes(b.cache_bytes)}: {times(slower)} the time and {times(larger)} the memory."
    )
    length = crossing(findings.costs[0].by_context, findings.costs[other].by_context)
    if length is not None:
        yield (f"The memory of {names[0]} is the smaller one from about {length:,} tokens on.")


def times(ratio: float) -> str:
    """ "3.4 times", and what is below 1 with two digits."""
    return f"{ratio:.1f} times" if ratio >= 1 else f"{ratio:.2f} times"


def megabytes(size: float) -> str:
    """A number of bytes in MB."""
    return f"{size / 1e6:,.2f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def crossing(constant: list[DecodeSpeed], growing: list[DecodeSpeed]) -> int | None:
    """The context at which a state becomes smaller than a cache that grows evenly with it.

    None where it always is or never gets to be, or the first grows too.
    """
    known = [
        (a.context, a.cache_bytes, b.cache_bytes)
        for a, b in zip(constant, growing, strict=True)
        if a.cache_bytes is not None and b.cache_bytes is not None
    ]
    if len(known) < 2 or known[0][1] != known[-1][1] or known[0][2] >= known[-1][2]:
        return None
    (near, state, low), (far, _, high) = known[0], known[-1]
    per_token = (high - low) / (far - near)
    length = near + (state - low) / per_token
    return round(length) if length >= 1 else None


def _beyond(findings: Findings, i: int, name: str) -> Iterator[str]:
    """Whether perplexity stays when texts get longer than those of training."""
    if findings.profiles is None:
        return
    trained = findings.trained[i]
    if trained is None:
        return
    known = {
        context: loss.nats
        for context, loss in findings.profiles[i].by_context.items()
        if loss is not None and loss.nats is not None
    }
    longer = [context for context in known if context > trained]
    if trained not in known or not longer:
        return
    change = 100 * metrics.growth(known[longer[-1]] - known[trained])
    more = f"{abs(change):.1f} % {'higher' if change > 0 else 'lower'}"
    if abs(change) < SAME:
        more = "the same"
    yield (
        f"With {longer[-1]:,} tokens of context instead of the {trained:,} it was trained with, "
        f"the perplexity of {name} is {more}."
    )
