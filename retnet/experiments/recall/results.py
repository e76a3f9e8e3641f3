"""What the runs of a task come to: who was trained how, a table, a picture, JSON."""

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from retnet.evaluation.report import format_table
from retnet.evaluation.report.curves import Curve, shares
from retnet.experiments.contenders import Contender
from retnet.experiments.recall.tasks import Task
from retnet.experiments.recall.training import LAST, SOLVED, TEST_ROWS, Outcome, share


@dataclass(frozen=True)
class Trial:
    """One learning rate of a contender, as it was written, and what came of it."""

    rate: str
    outcome: Outcome


@dataclass(frozen=True)
class Standing:
    """A contender in a task.

    Attributes:
        trials: What the rate was chosen by; none where there was only one.
        outcomes: One for each seed, at that rate.
    """

    contender: Contender
    rate: str
    trials: list[Trial]
    outcomes: list[Outcome]

    @property
    def accuracy(self) -> float:
        return statistics.mean(outcome.accuracy for outcome in self.outcomes)

    def share(self, **only: int) -> float:
        """Right answers of those asked, the mean of the seeds."""
        return statistics.mean(share(outcome.cells, **only) for outcome in self.outcomes)

    @property
    def at_edge(self) -> bool:
        """Whether the rate is the smallest or largest of several that were tried."""
        tried = sorted(float(trial.rate) for trial in self.trials)
        return len(tried) > 1 and float(self.rate) in (tried[0], tried[-1])


def best(trials: Sequence[Trial]) -> str:
    """The rate that answers most, of equal ones that which took fewer steps.

    Those that have solved the task are equal: what the rest of a percent says is chance, and a
    higher rate that came there later does not come there with every seed.
    """

    def key(trial: Trial) -> tuple[float, int]:
        return min(trial.outcome.accuracy, SOLVED), -trial.outcome.steps

    return max(trials, key=key).rate


def columns(task: Task, standings: Sequence[Standing]) -> tuple[list[int], list[int]]:
    """The counts, and the distances up to which there were questions."""
    cells = standings[0].outcomes[0].cells
    return [*task.counts], sorted({cell.distance for cell in cells})


def table(task: Task, standings: Sequence[Standing], seeds: Sequence[int], tuning: int) -> str:
    """Accuracies in percent: over all, by distance, and by count where there are several."""
    counts, distances = columns(task, standings)
    counts = counts if len(counts) > 1 else []
    head = ["contender", "rate", "steps", "all", "sd"]
    rows = [[*head, *(f"<={d}" for d in distances), *(f"{c} {task.counted}" for c in counts)]]
    for own in standings:
        whole = [outcome.accuracy for outcome in own.outcomes]
        steps = statistics.mean(outcome.steps for outcome in own.outcomes)
        spread = f"{100 * statistics.stdev(whole):.1f}" if len(whole) > 1 else "-"
        shown = [own.contender.name, own.rate + "*" * own.at_edge, f"{steps:,.0f}"]
        shown += [f"{100 * own.accuracy:.1f}", spread]
        shown += [f"{100 * own.share(distance=d):.0f}" for d in distances]
        shown += [f"{100 * own.share(count=c):.0f}" for c in counts]
        rows.append(shown)
    return "\n".join([*_about(task, seeds, standings, tuning), *format_table(rows)])


def _about(
    task: Task, seeds: Sequence[int], standings: Sequence[Standing], tuning: int
) -> list[str]:
    sizes = ", ".join(map(str, task.counts))
    named = ", ".join(map(str, seeds))
    rates = [trial.rate for trial in standings[0].trials]
    chosen = "one learning rate for all, not tuned"
    if rates:
        chosen = (
            f"learning rate of {', '.join(rates)} by accuracy on other rows, from seed {tuning}"
        )
        chosen += "; *: at an end of these" * any(own.at_edge for own in standings)
    models = sorted(own.outcomes[0].parameters for own in standings)
    pair = "a token" if task.pair_tokens == 1 else "two tokens"
    lines = [
        f"{task.name}: right answers in percent, by tokens from what is asked for to the question",
        f"rows of {task.length} tokens, {sizes} {task.counted}, each {pair}; {task.values} values, "
        f"so that chance gives {100 / task.values:.1f}",
        f"models of {models[0]:,} to {models[-1]:,} parameters; at most {task.steps:,} steps of "
        f"{task.rows} rows, fewer where {100 * SOLVED:g} % of {LAST} steps' answers are right",
        f"{chosen}; reported on {TEST_ROWS} rows of each number, from seeds {named}",
    ]
    return [part for line in lines for part in textwrap.wrap(line, 100, subsequent_indent="  ")]


def picture(task: Task, standings: Sequence[Standing]) -> bytes:
    """A PNG of the accuracy by distance, beside it that by count where there are several."""
    counts, distances = columns(task, standings)
    names = [own.contender.name for own in standings]
    mixers = [own.contender.mixer for own in standings]

    def curves(values: Sequence[int], key: str) -> list[Curve]:
        x = [float(value) for value in values]
        return [Curve(x, [own.share(**{key: v}) for v in values]) for own in standings]

    by_distance = (curves(distances, "distance"), f"{task.name}: tokens back to the answer, up to")
    panels = [by_distance]
    if len(counts) > 1:
        panels.append((curves(counts, "count"), f"{task.counted} in a row"))
    return shares(names, mixers, panels, "share of right answers", 1 / task.values)


def to_json(
    task: Task, standings: Sequence[Standing], seeds: Sequence[int], tuning: int
) -> dict[str, Any]:
    """All of it for programs."""
    return {
        "task": task.name,
        **asdict(task),
        "seeds": [*seeds],
        "tuning_seed": tuning if standings[0].trials else None,
        "contenders": [
            {
                "contender": own.contender.name,
                "mixer": own.contender.mixer,
                "keys": [*own.contender.keys],
                "learning_rate": own.rate,
                "accuracy": own.accuracy,
                "trials": [{"learning_rate": t.rate, **_outcome(t.outcome)} for t in own.trials],
                "runs": [_outcome(outcome) for outcome in own.outcomes],
            }
            for own in standings
        ],
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {**asdict(outcome), "accuracy": outcome.accuracy}
