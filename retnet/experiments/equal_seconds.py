"""Train several contenders for the same number of seconds, and print their losses side by side.

    python -m retnet.experiments.equal_seconds configs/tiny.yaml --seconds 30 60 120 \
        --mixers retention attention \
        --variant retention-adamw retention train.optimizer=adamw train.learning_rate=4e-3

A few steps of each contender say how many fit into a budget; every budget then has a run of its
own, whose warm-up and schedule end with it, and the contenders take turns. What is counted is the
time of training steps: not preparation, evaluation and saving. The machine should have nothing else
to do; the seconds that a run took are printed beside its loss.
"""

import argparse
import json
import logging
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path

from retnet import cli
from retnet.checkpoints.format import METRICS
from retnet.errors import UserError
from retnet.evaluation import write_json
from retnet.experiments.contenders import (
    Contender,
    Run,
    add_options,
    check_runs,
    check_seeds,
    check_settings,
    contenders,
    planned,
)
from retnet.experiments.tune import add_tuned, check_output, tuned_for
from retnet.terminal import deliver, write_out
from retnet.training import load_config

logger = logging.getLogger("retnet.experiments.equal_seconds")  # __name__ is __main__ in a command

PACE_STEPS = 24  # of which the first third is left out: a model's first steps are its slowest
OWN_KEYS = ("train.max_steps", "train.eval_every", "train.save_every")


@dataclass(frozen=True)
class Outcome:
    """One run: whose, its budget in seconds, how far it came in how many, nats per token."""

    contender: str
    budget: float
    seed: int
    steps: int
    seconds: float
    loss: float


def _seconds(folder: Path) -> list[float]:
    """The seconds of training after each step of a run."""
    lines = (folder / METRICS).read_text().splitlines()
    try:
        return [float(json.loads(line)["perf/seconds"]) for line in lines]
    except KeyError as error:
        raise UserError(f"run ({folder}) is of an older version: give another --out") from error


def _own(steps: int, warmup: int, seed: int) -> list[str]:
    """The settings of a run of so many steps."""
    few = [f"{key}={steps}" for key in OWN_KEYS]
    return [*few, f"train.warmup_steps={warmup}", f"train.seed={seed}"]


def _step_seconds(run: Run) -> float:
    """How long a step takes: the median of a short run of ``PACE_STEPS``."""
    run()
    ends = _seconds(run.folder)[PACE_STEPS // 3 :]
    found = statistics.median(after - before for before, after in pairwise(ends))
    logger.info(f"{found:.3f} s a step")
    return found


def equal_seconds(
    recipe: str,
    who: Sequence[Contender],
    *,
    budgets: Sequence[float],
    seeds: Sequence[int],
    overrides: Sequence[str],
    tuned: Mapping[str, Sequence[str]],
    out: Path,
) -> list[Outcome]:
    """Run all contenders for all budgets; ``tuned``: more keys of each contender.

    Raises:
        UserError: A run did not finish, or an argument is wrong.
    """
    stem = Path(recipe).stem
    keys = {c.name: [*overrides, *c.keys, *tuned.get(c.name, ())] for c in who}
    short = _own(PACE_STEPS, 0, seeds[0])
    paces = [planned(recipe, out / f"{stem}-pace-{name}", [*keys[name], *short]) for name in keys]
    check_runs(paces)
    pace = dict(zip(keys, map(_step_seconds, paces), strict=True))
    plan = []
    for budget, seed, name in product(budgets, seeds, keys):
        train, steps = load_config(recipe, keys[name]).train, max(1, round(budget / pace[name]))
        settings = _own(steps, train.warmup_steps * steps // train.max_steps, seed)
        folder = out / f"{stem}-{name}-{budget:g}s-{steps}-{seed}"
        run = planned(recipe, folder, [*keys[name], *settings])
        plan.append((name, budget, seed, steps, run))
    check_runs([run for *_, run in plan])
    found = []
    for name, budget, seed, steps, run in plan:
        loss = run()
        found.append(Outcome(name, budget, seed, steps, _seconds(run.folder)[-1], loss))
    return found


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each contender and budget, with the mean over the seeds."""
    titles = ("budget", "took", "steps", "loss", "sd")
    lines = [f"{'contender':<24} " + " ".join(f"{title:>8}" for title in titles) + "  nats/token"]
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.contender, outcome.budget), []).append(outcome)
    for (name, budget), group in sorted(groups.items(), key=lambda item: item[0][::-1]):
        losses = [outcome.loss for outcome in group]
        spread = f"{statistics.stdev(losses):8.4f}" if len(losses) > 1 else f"{'-':>8}"
        took = statistics.mean(outcome.seconds for outcome in group)
        lines.append(f"{name:<24} {budget:6.4g} s {took:6.4g} s {group[0].steps:8} "
                     f"{statistics.mean(losses):8.4f} {spread}")  # fmt: skip
    return lines


def seconds(text: str) -> float:
    """Argparse type: a number of seconds above 0, and no infinite one."""
    value = cli.number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"({text}) must be above 0, and finite")
    return value


def main(argv: Sequence[str]) -> None:
    """Parse, train, print the table to stdout."""
    name, raw = "python -m retnet.experiments.equal_seconds", argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog=name, description=__doc__, formatter_class=raw)
    add_options(parser)
    add_tuned(parser)
    add = parser.add_argument
    add("--seconds", type=seconds, nargs="+", default=[60.0], metavar="S", help="budgets (60)")
    add("--seeds", type=cli.whole_number, nargs="+", default=[0], help="of the runs (0)")
    add("--json", type=cli.file_path, metavar="FILE", help="also write all runs to this file")
    arguments = parser.parse_intermixed_args(argv)
    who = contenders(arguments)
    taken = {"train.seed": "--seeds", **dict.fromkeys(OWN_KEYS, "--seconds")}
    check_settings(arguments, "--seconds", {}, taken)
    check_seeds(arguments.seeds)
    check_output(arguments.json, arguments.recipe, arguments.overrides, who, arguments.tuned)
    outcomes = equal_seconds(
        arguments.recipe,
        who,
        budgets=list(dict.fromkeys(arguments.seconds)),
        seeds=arguments.seeds,
        overrides=arguments.overrides,
        tuned=tuned_for(who, arguments, taken),
        out=arguments.out,
    )
    outputs = [lambda: write_out("\n".join(table(outcomes)))]
    if arguments.json:
        runs = [asdict(outcome) for outcome in outcomes]
        outputs.append(lambda: write_json(arguments.json, {"runs": runs}))
    deliver(*outputs)


if __name__ == "__main__":
    sys.exit(cli.run(main))
