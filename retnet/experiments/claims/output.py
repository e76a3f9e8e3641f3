"""What was found about claims: as text, as Markdown (docs/claims.md), as JSON."""

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from retnet.evaluation.report import format_table
from retnet.experiments.claims.claim import Claim
from retnet.experiments.claims.verdict import Figure, Finding, Outcome, readable, verdict

WIDTH = 100
BUSY = 0.5  # of the load average, above which times are doubtful
NOT_MEASURED = "not measured"
RULE = (
    "A limit is kept where the whole interval lies on its side, missed where all of it lies on the "
    "other, else not decided. A claim held where every limit is kept, did not hold where every "
    "limit is missed, is not decided where none is, and held in part otherwise. Figures without a "
    "limit stand beside."
)
INTERVALS = (
    "Intervals are of 95 %. Those of times are of the median over the rounds, by ranks; "
    "everything runs in turn in each round, and ratios are taken within it. A range is "
    "from the smallest to the largest."
)
WORDS = {Outcome.HELD: "kept", Outcome.OPEN: "not decided", Outcome.NOT: "missed", None: ""}


@dataclass(frozen=True)
class Result:
    """A claim that was measured, and the seconds that took."""

    claim: Claim
    findings: list[Finding]
    seconds: float

    @property
    def verdict(self) -> Outcome:
        return verdict(self.findings)


@dataclass(frozen=True)
class About:
    """What the figures depend on."""

    command: str
    size: str  # in words; "" where no claim was measured without training
    rounds: int
    training: str  # in words; "" where nothing was trained
    environment: Mapping[str, Any]
    load: float | None = None  # processes that wanted to run before it began; None if nobody knows

    def lines(self) -> list[str]:
        of = self.environment
        found = [
            f"{date.today().isoformat()}, {of['processor']}, {of['device']}, {of['threads']} "
            f"thread{'s' * (of['threads'] != 1)}, Python {of['python']}, torch {of['torch']}",
        ]
        found += [f"{self.size}; {self.rounds} rounds"] if self.size else []
        if self.load is not None and self.load > BUSY:
            found.append(
                f"the machine had other work (load average {self.load:.1f} at the start), so its "
                "times, and what follows from them, are not those of a quiet one"
            )
        return found + ([self.training] if self.training else [])


def load_average() -> float | None:
    """Of the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return "none"
    if figure.low == figure.high:
        return "exact" if figure.over == "exact" else f"{readable(figure.low)}, always"
    return f"{readable(figure.low)} to {readable(figure.high)}"


def cells(finding: Finding) -> list[str]:
    """What, figure, interval, what that is over, limit, whether it is kept."""
    figure, limit = finding.figure, finding.limit
    over = "" if figure.over == "exact" else figure.over
    value = f"{readable(figure.value)} {finding.unit}".strip()
    limited = "" if limit is None else str(limit)
    return [finding.what, value, interval(figure), over, limited, WORDS[finding.outcome]]


HEAD = ["", "figure", "interval", "over", "limit", ""]


def to_text(result: Result) -> str:
    """One claim, for people."""
    claim = result.claim
    said = textwrap.wrap(claim.says, WIDTH - 2)
    here = textwrap.wrap(f"here: {claim.here}{_of(claim)}", WIDTH - 2)
    lines = [*said, f"({claim.source})", *here, ""]
    lines += format_table([HEAD, *map(cells, result.findings)])
    return "\n".join([f"{claim.name}: {result.verdict}", *(f"  {x}".rstrip() for x in lines)])


def _of(claim: Claim) -> str:
    """What a measurement here says nothing of."""
    elsewhere = "this tests it at another size (larger ones: benchmarks/RESULTS.md)"
    return f" The claim is of {claim.of}: {elsewhere}." if claim.of else ""


def to_markdown(
    claims: Sequence[Claim], results: Mapping[str, Result], about: About, title: str = "Claims"
) -> str:
    """A table of all claims, then a section for each that was measured."""
    return "\n".join(_markdown(claims, results, about, title)) + "\n"


def _markdown(
    claims: Sequence[Claim], results: Mapping[str, Result], about: About, title: str
) -> Iterator[str]:
    yield f"# {title}\n"
    yield "Every claim with what was measured of it, written by\n"
    yield f"    {about.command}\n"
    yield from (f"- {line}" for line in about.lines())
    yield f"\n{RULE} {INTERVALS}\n"
    yield from _rows([["claim", "source", "verdict", "first figure"]])
    for claim in claims:
        result = results.get(claim.name)
        outcome = f"**{result.verdict}**" if result else NOT_MEASURED
        outcome += f" at this size; said of {claim.of}" if result and claim.of else ""
        if result is None and claim.trains:
            outcome += ": needs --train"
        first = _first(result.findings) if result else ""
        yield _row([f"`{claim.name}`: {claim.says}", claim.source, outcome, first])
    for claim in claims:
        if result := results.get(claim.name):
            yield f"\n## {claim.name}: {result.verdict}\n"
            yield f"{claim.says} ({claim.source})\n"
            yield f"{claim.here}{_of(claim)} Took {result.seconds:.0f} s.\n"
            yield from _rows([HEAD, *map(cells, result.findings)])


def _first(findings: Sequence[Finding]) -> str:
    """The first figure with a limit."""
    what, value, ends, _, limit, _ = cells(next(x for x in findings if x.limit))
    return f"{what}: {value} ({ends}; {limit})"


def _row(row: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"


def _rows(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *others = rows
    yield _row(head)
    yield "|" + "---|" * len(head)
    yield from map(_row, others)


def to_json(results: Mapping[str, Result], about: About) -> dict[str, Any]:
    """For programs."""
    return {
        "command": about.command,
        "date": date.today().isoformat(),
        "size": about.size,
        "rounds": about.rounds,
        "training": about.training,
        "load_average": about.load,
        "environment": dict(about.environment),
        "rule": RULE,
        "claims": [_claim(result) for result in results.values()],
    }


def _claim(result: Result) -> dict[str, Any]:
    claim = result.claim
    findings = [
        {
            "what": finding.what,
            "unit": finding.unit,
            **asdict(finding.figure),
            "limit": None if finding.limit is None else str(finding.limit),
            "outcome": finding.outcome,
        }
        for finding in result.findings
    ]
    about = {key: getattr(claim, key) for key in ("name", "says", "source", "here", "of")}
    return {**about, "verdict": result.verdict, "seconds": result.seconds, "findings": findings}
