"""Choose settings for several contenders with equal effort, on text that is not reported.

    python -m retnet.experiments.tune configs/shakespeare-char.yaml data.source=PATH \
        --mixers retention attention --grid train.learning_rate=1e-2,2e-2,4e-2 --json tuned.json

Every contender gets the same grid. A trial trains on the training side less a tuning split
(data.tuning_fraction) and is judged on that split; the validation text is never looked at. Where a
contender's best value is at an end of the grid, the grid is continued there once, for all of them.
All trials are printed and written down; ``python -m retnet.experiments.repeat --tuned FILE`` takes
the chosen values, with the whole training side.
"""

import argparse
import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retnet.cli import ArgumentParser, file_path, number, positive_int, run
from retnet.data.sources import is_local, open_location
from retnet.errors import UserError
from retnet.evaluation import check_not_read, check_writable, write_json
from retnet.evaluation.text import files_of
from retnet.experiments.contenders import (
    Contender,
    Run,
    add_options,
    check_not_taken,
    check_settings,
    choices,
    contenders,
    planned,
    run_all,
)
from retnet.files import read_json
from retnet.paths import expand
from retnet.terminal import deliver, write_out
from retnet.training import key_of, load_config

logger = logging.getLogger("retnet.experiments.tune")  # __name__ is __main__ in a command

FRACTION = 0.1  # of the training side that trials are judged on
SEED = 1  # of all trials

Grid = Mapping[str, Sequence[str]]
Setting = dict[str, str]


@dataclass(frozen=True)
class Trial:
    """One run: whose, the grid's values by key, nats per token on the tuning split."""

    contender: str
    values: Setting
    loss: float


@dataclass(frozen=True)
class Chosen:
    """A contender's best trial, and the keys whose value is still at an end of the grid."""

    contender: str
    values: Setting
    loss: float
    at_edge: list[str]


def tune(
    recipe: str,
    who: Sequence[Contender],
    grid: Grid,
    *,
    overrides: Sequence[str],
    fraction: float,
    seed: int,
    out: Path,
) -> tuple[list[Trial], list[Chosen]]:
    """All trials, and what is best for each; each run folder says whose it is and of which values.

    Raises:
        UserError: A run did not finish, or an argument is wrong.
    """
    common = [*overrides, f"data.tuning_fraction={fraction}", f"train.seed={seed}"]

    def tried(waiting: Sequence[tuple[str, Setting, Run]]) -> list[Trial]:
        losses = run_all([run for _, _, run in waiting])
        return [
            Trial(name, setting, loss)
            for (name, setting, _), loss in zip(waiting, losses, strict=True)
        ]

    def plan(setting: Setting) -> list[tuple[str, Setting, Run]]:
        found = []
        for contender in who:
            name = [Path(recipe).stem, "tune", contender.name, *setting.values(), str(seed)]
            keys = [*common, *contender.keys, *(f"{key}={value}" for key, value in setting.items())]
            run = planned(recipe, out / "-".join(name).replace("/", "_"), keys)
            found.append((contender.name, setting, run))
        return found

    trials = tried([run for setting in _settings(grid) for run in plan(setting)])
    wider = widened(grid, [best_of(trials, c.name, grid) for c in who])
    waiting: list[tuple[str, Setting, Run]] = []
    if wider != grid:
        logger.info("the best value is at an end of the grid: it is continued there, for all")
    for setting in _settings(wider):
        if setting in _settings(grid):
            continue
        try:
            waiting += plan(setting)
        except UserError as error:  # of a value that nobody asked for
            logger.info("the grid is not continued there: %s", error)
    trials += tried(waiting)
    all_of = {key: list(dict.fromkeys(trial.values[key] for trial in trials)) for key in grid}
    return trials, [best_of(trials, contender.name, all_of) for contender in who]


def _settings(grid: Grid) -> list[Setting]:
    """All combinations of a grid's values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def best_of(trials: Sequence[Trial], name: str, grid: Grid) -> Chosen:
    """The best of a contender's trials."""
    best = min((t for t in trials if t.contender == name), key=lambda trial: trial.loss)
    edges = [key for key, end in _ends(best.values, grid)]
    return Chosen(name, best.values, best.loss, edges)


def _ends(values: Mapping[str, str], grid: Grid) -> list[tuple[str, int]]:
    """Keys with numbers whose value is the smallest (0) or largest (-1) of several."""
    found = []
    for key, options in grid.items():
        ordered = _numbers(options)
        if len(ordered) > 1:
            found += [(key, end) for end in (0, -1) if float(values[key]) == ordered[end]]
    return found


def _numbers(options: Sequence[str]) -> list[float]:
    """The values in order; nothing where they are no numbers above 0."""
    try:
        found = sorted(map(float, options))
    except ValueError:
        return []
    return found if found[0] > 0 else []


def widened(grid: Grid, chosen: Sequence[Chosen]) -> dict[str, list[str]]:
    """The grid, continued by its own ratio at each end where somebody's best value is."""
    wider = {key: list(options) for key, options in grid.items()}
    for key, end in sorted({found for best in chosen for found in _ends(best.values, grid)}):
        ordered = _numbers(grid[key])
        next_one = ordered[1] if end == 0 else ordered[-2]
        wider[key].append(f"{ordered[end] ** 2 / next_one:.6g}")
    return wider


def to_json(trials: Sequence[Trial], chosen: Sequence[Chosen], **facts: Any) -> dict[str, Any]:
    """What ``read_tuned`` and people read."""
    return {
        **facts,
        "chosen": [asdict(best) for best in chosen],
        "trials": [asdict(trial) for trial in trials],
    }


def keys_of(values: Mapping[str, str]) -> list[str]:
    """Chosen values as ``key=value``."""
    return [f"{key}={value}" for key, value in values.items()]


def read_tuned(path: Path) -> dict[str, list[str]]:
    """The chosen ``key=value`` of each contender in a file of this experiment.

    Raises:
        UserError: It can't be read, or is none.
    """
    fix = "name the file that python -m retnet.experiments.tune --json wrote"
    content, found = read_json(path, fix), dict[str, list[str]]()
    try:
        for best in content["chosen"]:
            name = best["contender"]
            if name in found:
                raise UserError(f"{path}: chosen has {name} twice: leave one of them out")
            found[name] = keys_of(best["values"])
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no chosen settings: {fix}") from error


def add_tuned(parser: ArgumentParser) -> None:
    """The option that takes what was chosen."""
    text = "what tune chose for each contender"
    parser.add_argument("--tuned", type=file_path, metavar="FILE", help=text)


def tuned_for(
    who: Sequence[Contender], arguments: argparse.Namespace, taken: Mapping[str, str]
) -> dict[str, list[str]]:
    """The ``key=value`` that --tuned gives each contender.

    Raises:
        UserError: It says nothing of one, or a key is set elsewhere too: ``taken`` says by which
            option.
    """
    file = arguments.tuned
    tuned = read_tuned(file) if file else {}
    for contender in who:
        if file and contender.name not in tuned:
            raise UserError(f"--tuned ({file}) says nothing of {contender.name}")
        what, found = f"--tuned {contender.name}", tuned.get(contender.name, [])
        check_not_taken(what, found, taken)
        by_file = {text.partition("=")[0]: f"--tuned ({file})" for text in found}
        check_not_taken("argument", [*arguments.overrides, *contender.keys], by_file)
    return tuned


def table(trials: Sequence[Trial], chosen: Sequence[Chosen]) -> list[str]:
    """All trials by contender, the chosen ones marked."""
    lines = [f"{'contender':<24} {'setting':<44} {'loss':>8}  nats/token on the tuning split"]
    for best in chosen:
        for trial in sorted(
            (t for t in trials if t.contender == best.contender), key=lambda trial: trial.loss
        ):
            mark = ""
            if trial.values == best.values:
                mark = "  chosen" + ", at an end of the grid" * bool(best.at_edge)
            setting = ", ".join(f"{key}={value}" for key, value in trial.values.items())
            lines.append(f"{trial.contender:<24} {setting:<44} {trial.loss:8.4f}{mark}")
    return lines


def check_output(
    file: Path | None,
    recipe: str,
    overrides: Sequence[str],
    who: Sequence[Contender],
    tuned: Path | None = None,
) -> None:
    """Raise a ``UserError`` where the results could not be written, or would replace an input."""
    if file is None:
        return
    check_writable(file)
    if not file.exists():
        return
    check_not_read(file, [expand(recipe, "configuration")], "recipe")
    if tuned:
        check_not_read(file, [tuned], "choice of settings")
    names = ("data.source", "data.validation")
    texts = {
        (name, getattr(load_config(recipe, keys).data, name.partition(".")[2]))
        for contender in who
        for keys in [[x for x in (*overrides, *contender.keys) if key_of(x) in names]]
        for name in names
    }
    for name, place in texts:
        if place is not None and is_local(place, name):
            check_not_read(file, files_of(open_location(place, name, "text", None, "train")))


def main(argv: Sequence[str]) -> None:
    """Parse, run all trials, print the table to stdout."""
    parser = ArgumentParser(prog="python -m retnet.experiments.tune", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_options(parser)
    add = parser.add_argument
    add("--grid", action="append", required=True, metavar="key=a,b", help="values to try")
    add("--tuning-fraction", type=number, default=FRACTION, help="of the training side (0.1)")
    add("--seed", type=positive_int, default=SEED, help="of all trials (1)")
    add("--json", type=file_path, metavar="FILE", help="also write all trials to this file")
    arguments = parser.parse_intermixed_args(argv)
    who, grid = contenders(arguments), choices("--grid", arguments.grid)
    own = {"train.seed": "--seed", "data.tuning_fraction": "--tuning-fraction"}
    check_settings(arguments, "--grid", grid, own)
    if not 0 < arguments.tuning_fraction < 1:
        raise UserError(f"--tuning-fraction ({arguments.tuning_fraction}) must be between 0 and 1")
    check_output(arguments.json, arguments.recipe, arguments.overrides, who)
    trials, chosen = tune(
        arguments.recipe,
        who,
        grid,
        overrides=arguments.overrides,
        fraction=arguments.tuning_fraction,
        seed=arguments.seed,
        out=arguments.out,
    )
    outputs = [lambda: write_out("\n".join(table(trials, chosen)))]
    if arguments.json:
        facts = {"recipe": arguments.recipe, "overrides": arguments.overrides}
        facts |= {"tuning_fraction": arguments.tuning_fraction, "seed": arguments.seed}
        outputs.append(lambda: write_json(arguments.json, to_json(trials, chosen, **facts)))
    deliver(*outputs)


if __name__ == "__main__":
    sys.exit(run(main))
