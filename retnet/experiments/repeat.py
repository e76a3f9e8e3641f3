"""Train one recipe with several contenders and seeds, and print the mean with its spread.

    python -m retnet.experiments.repeat configs/shakespeare-char.yaml --seeds 0 1 2 \
        --mixers retention attention --vary train.learning_rate=1e-2,2e-2 data.source=PATH

Each run has its own folder, so what was interrupted goes on and what is finished is only read.
The differences to the first line are of the final checkpoints on the validation documents, in
windows of the trained length; the seeds are paired.
``--tuned FILE`` gives each contender the settings that ``retnet.experiments.tune`` chose for it.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retnet.cli import ArgumentParser, run, whole_number
from retnet.experiments.contenders import (
    Contender,
    add_options,
    check_seeds,
    check_settings,
    choices,
    contenders,
    planned,
    run_all,
)
from retnet.experiments.intervals import differences
from retnet.experiments.tune import add_tuned, tuned_for
from retnet.terminal import write_out


@dataclass(frozen=True)
class Row:
    """One setting's validation losses at the end of training, nats per token, one per seed."""

    setting: str
    losses: list[float]
    runs: list[Path]  # their folders, one per seed

    def __str__(self) -> str:
        mean = statistics.mean(self.losses)
        spread = f"{statistics.stdev(self.losses):8.4f}" if len(self.losses) > 1 else f"{'-':>8}"
        each = " ".join(f"{loss:.4f}" for loss in self.losses)
        return f"{self.setting:<44} {mean:8.4f} {spread}   {each}"


def repeat(
    recipe: str,
    who: Sequence[Contender],
    *,
    seeds: Sequence[int],
    variations: Mapping[str, Sequence[str]],
    overrides: Sequence[str],
    tuned: Mapping[str, Sequence[str]],
    out: Path,
) -> list[Row]:
    """Train every combination of contender, variation and seed.

    Each value of a variation is a setting of its own; several multiply. ``tuned``: more keys of
    each contender.

    Raises:
        UserError: A run did not finish, or an argument is wrong.
    """
    plan = []
    options = [[f"{key}={value}" for value in values] for key, values in variations.items()]
    for contender, varied in itertools.product(who, itertools.product(*options)):
        setting = [*contender.keys, *tuned.get(contender.name, ()), *varied]
        own = [value for key, _, value in (s.partition("=") for s in setting[1:])]
        runs = []
        for seed in seeds:
            name = "-".join([Path(recipe).stem, contender.name, *own, str(seed)])
            keys = [*overrides, *setting, f"train.seed={seed}"]
            runs.append(planned(recipe, out / name.replace("/", "_"), keys))
        shown = [contender.name, *(s.partition(".")[2] for s in setting[1:])]
        plan.append((", ".join(shown), runs))
    losses = iter(run_all([run for _, runs in plan for run in runs]))
    return [
        Row(setting, [next(losses) for _ in runs], [run.folder for run in runs])
        for setting, runs in plan
    ]


def main(argv: Sequence[str]) -> None:
    """Parse, train, print the table to stdout."""
    parser = ArgumentParser(prog="python -m retnet.experiments.repeat", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_options(parser)
    add = parser.add_argument
    add("--seeds", type=whole_number, nargs="+", default=[0, 1, 2])
    add("--vary", action="append", default=[], metavar="key=a,b", help="settings")
    add_tuned(parser)
    arguments = parser.parse_intermixed_args(argv)
    who, variations = contenders(arguments), choices("--vary", arguments.vary)
    check_settings(arguments, "--vary", variations, {"train.seed": "--seeds"})
    check_seeds(arguments.seeds)
    tuned = tuned_for(who, arguments, dict.fromkeys(variations, "--vary"))
    rows = repeat(
        arguments.recipe,
        who,
        seeds=arguments.seeds,
        variations=variations,
        overrides=arguments.overrides,
        tuned=tuned,
        out=arguments.out,
    )
    title = f"{'validation loss, nats/token':<44} {'mean':>8} {'sd':>8}   seeds {arguments.seeds}"
    write_out("\n".join([title, *map(str, rows)]))
    if len(rows) > 1:
        write_out("\n".join(["", *differences([(row.setting, row.runs) for row in rows])]))


if __name__ == "__main__":
    sys.exit(run(main))
