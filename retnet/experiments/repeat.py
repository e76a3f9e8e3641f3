"""Train one recipe with both mixers and several seeds, and print the mean with its spread.

    python -m retnet.experiments.repeat configs/shakespeare-char.yaml --seeds 0 1 2 \
        --vary train.learning_rate=2e-3,4e-3 data.source=PATH

Each run has its own folder, so what was interrupted goes on and what is finished is only read.
"""

import argparse
import itertools
import json
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retnet.cli import ArgumentParser, file_path, run
from retnet.errors import UserError
from retnet.model.mixers import MIXERS
from retnet.training import key_of, load_config, train
from retnet.training.tracking import METRICS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One setting's validation losses at the end of training, nats per token, one per seed."""

    setting: str
    losses: list[float]

    def __str__(self) -> str:
        mean = statistics.mean(self.losses)
        spread = statistics.stdev(self.losses) if len(self.losses) > 1 else float("nan")
        each = " ".join(f"{loss:.4f}" for loss in self.losses)
        return f"{self.setting:<44} {mean:8.4f} {spread:8.4f}   {each}"


def final_loss(run_folder: Path) -> float:
    """The validation loss of a finished run's last step."""
    last = json.loads((run_folder / METRICS).read_text().splitlines()[-1])
    return float(last["val/loss"])


def repeat(
    recipe: str,
    *,
    seeds: Sequence[int],
    mixers: Sequence[str],
    variations: Sequence[str],
    overrides: Sequence[str],
    out: Path,
) -> list[Row]:
    """Train every combination of mixer, variation and seed.

    Each value of a variation, "key=a,b,c", is a setting of its own; several multiply.

    Raises:
        UserError: A run did not finish, or an argument is wrong.
    """
    choices = []
    for variation in variations:
        key, equals, values = variation.partition("=")
        if not equals or not values:
            raise UserError(f"--vary ({variation}) must be key=value,value")
        choices.append([f"{key}={value}" for value in values.split(",")])
    rows = []
    for mixer, *chosen in itertools.product(mixers, *choices):
        setting = [f"model.mixer={mixer}", *chosen]
        losses = []
        for seed in seeds:
            name = "-".join([Path(recipe).stem, *(s.split("=")[1] for s in setting), str(seed)])
            folder = out / name
            arguments = [*overrides, *setting, f"train.seed={seed}", f"train.out_dir={folder}"]
            logger.info("== %s", name)
            if train(load_config(recipe, arguments), [*map(key_of, arguments)]) != 0:
                raise UserError(f"run ({folder}) did not finish: see its messages above")
            losses.append(final_loss(folder))
        rows.append(Row(", ".join(s.split(".")[-1] for s in setting), losses))
    return rows


def main(argv: Sequence[str]) -> None:
    """Parse, train, print the table to stdout."""
    parser = ArgumentParser(prog="python -m retnet.experiments.repeat", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--vary", action="append", default=[], metavar="key=a,b", help="settings")
    add = parser.add_argument
    add("--out", type=file_path, default=Path("runs"), help="folder of the run folders")
    arguments = parser.parse_intermixed_args(argv)
    rows = repeat(
        arguments.recipe,
        seeds=arguments.seeds,
        mixers=arguments.mixers,
        variations=arguments.vary,
        overrides=arguments.overrides,
        out=arguments.out,
    )
    print(f"{'validation loss, nats/token':<44} {'mean':>8} {'sd':>8}   seeds {arguments.seeds}")
    for row in rows:
        print(row)


if __name__ == "__main__":
    sys.exit(run(main))
