"""What ablations found, beside the paper: as a table, in sentences, as JSON."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from retnet.evaluation import Difference
from retnet.evaluation.report import format_interval, format_table

FULL = "retention"

# In-domain perplexity of models of 200 M parameters: arXiv 2307.08621, tables 5 and 6. Their RWKV
# is the time mix alone. (H3 29.97 and Hyena 32.08 are not in this repository.)
PAPER = {
    FULL: 26.05, "no-gate": 27.84, "no-gate-equal-width": 27.84, "no-head-norm": 27.54,
    "no-decay": 27.86, "one-decay": 27.02, "small-heads": 27.68, "rwkv-time-mix": 30.92,
    "linear": 40.24,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One contender's results; losses in nats per token, one per seed."""

    contender: str
    equal: str | None  # in what to the full RetNet; None where nobody says
    settings: list[str]  # key=value
    parameters: int
    losses: list[float]
    minus_full: list[Difference]  # with its interval, and with few seeds once more with Student's
    paper: float | None  # in-domain perplexity there

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def direction(self) -> int:
        """1 where all intervals say that it is worse than the full one, -1 better, else 0."""
        clear = bool(self.minus_full) and all(found.is_clear for found in self.minus_full)
        return int(math.copysign(1, self.minus_full[0].value)) if clear else 0


def table(rows: Sequence[Row], titles: Sequence[str]) -> list[str]:
    """A line for each contender."""
    head = ["contender", "equal in", "parameters", "nats/token", "sd", "perplexity"]
    lines = [[*head, f"minus {FULL}", *titles, "paper"]]
    for row in rows:
        spread = "-" if row.spread is None else f"{row.spread:.4f}"
        cells = [row.contender, row.equal or "-", f"{row.parameters:,}", f"{row.loss:.4f}", spread,
                 f"{row.perplexity:.3f}"]  # fmt: skip
        found = row.minus_full
        gaps = [f"{found[0].value:+.4f}", *map(format_interval, found)] if found else []
        gaps = gaps or ["-"] * (1 + len(titles))
        lines.append([*cells, *gaps, "-" if row.paper is None else f"{row.paper:.2f}"])
    return format_table(lines)


def pairs_in_order(rows: Sequence[Row]) -> tuple[int, int]:
    """How many pairs of contenders stand in the paper's order here, and how many it has."""
    pairs = [
        (first.loss - second.loss) * (first.paper - second.paper) > 0
        for first, second in itertools.combinations(rows, 2)
        if first.paper and second.paper and first.paper != second.paper
    ]
    return sum(pairs), len(pairs)


def conclusions(rows: Sequence[Row], how: str) -> list[str]:
    """What the table says, in sentences; ``how`` the settings were chosen."""
    lines = [how, "paper: perplexity at 200 M parameters, in domain (arXiv 2307.08621, tables 5 "
             "and 6); compare the order"]  # fmt: skip
    if any(gap.low is None for row in rows for gap in row.minus_full):
        lines.append("no intervals, since there are one seed and one document: take more --seeds")
    else:
        words = {1: "clearly worse than", -1: "clearly better than", 0: "not clearly other than"}
        for direction, text in words.items():
            names = [row.contender for row in rows[1:] if row.direction == direction]
            lines += [f"{text} {FULL}: {', '.join(names)}"] if names else []
    same, pairs = pairs_in_order(rows)
    ordered = sorted((row for row in rows if row.paper), key=lambda row: row.loss)
    lines.append(f"best first, of those in the paper: {', '.join(r.contender for r in ordered)}")
    return [*lines, f"{same} of {pairs} pairs stand in the paper's order"]


def to_json(rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """All rows with their sums, and the facts."""
    same, pairs = pairs_in_order(rows)
    sums = ("loss", "perplexity", "spread", "direction")
    found = [asdict(row) | {name: getattr(row, name) for name in sums} for row in rows]
    return {**facts, "rows": found, "pairs_in_the_papers_order": same, "pairs": pairs}
