"""Train every mixer on synthetic tasks of memory, and print what it recalls at which distance.

    python -m retnet.experiments.recall
    python -m retnet.experiments.recall mqar --mixers retention attention --seeds 0 1 2 \
        --variant no-decay retention model.decay=1

mqar    keys and values first, then each key is asked for its value (Zoology's associative recall)
copy    a string, noise of any length, the string again
needle  one token in noise, asked for again and again

Rows are made as they are needed. Each contender tries the same learning rates, judged on rows of
a seed that is not reported; then the best one is trained for each seed. A finished run is reused
where nothing that determines it has changed. Each task's picture, TASK.png, lies in --out.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retnet import cli
from retnet.checkpoints.format import check_outside_of_runs
from retnet.errors import UserError, os_errors
from retnet.evaluation import check_writable, write_json
from retnet.experiments.contenders import (
    Contender,
    add_contenders,
    check_not_taken,
    check_seeds,
    contenders,
    in_options,
)
from retnet.experiments.recall.results import Standing, Trial, best, picture, table, to_json
from retnet.experiments.recall.tasks import TASKS, Task
from retnet.experiments.recall.training import TRAIN_KEYS, Outcome, Run, planned
from retnet.files import write_bytes
from retnet.paths import check_folder
from retnet.terminal import write_out
from retnet.training import key_of
from retnet.training.tracking import format_seconds

logger = logging.getLogger("retnet.experiments.recall")  # __name__ is that of a script

RATES = ("1e-3", "3e-3", "1e-2")
TUNING_SEED = 1000
HYBRID = Contender(
    "hybrid", ("model.mixer=retention", "model.attention_layers=[1]", "model.attention_window=64")
)
TAKEN = {
    "model.mixer": "--mixers or --variant", "train.learning_rate": "--rates",
    "train.max_steps": "--steps", "train.batch_size": "--rows", "train.seed": "--seeds",
    "data.seq_len": "--length", "train.out_dir": "--out",
}  # fmt: skip


@dataclass
class Progress:
    """How many runs there are, how many are done, and how long those took that were made here."""

    total: int
    done: int = 0
    took: list[float] = field(default_factory=list)

    def begin(self, name: str, finished: bool) -> None:
        """Say what comes next."""
        self.done += 1
        about = f"run {self.done} of {self.total}"
        if self.took and not finished:
            left = statistics.mean(self.took) * (self.total - self.done + 1)
            about += f", at most {format_seconds(left)} left at this pace"
        logger.info(f"{name} ({about}){' is finished' if finished else ''}")


def outcome_of(run: Run, progress: Progress) -> Outcome:
    """That of a finished run, or of one that is made now."""
    found = run.finished()
    progress.begin(run.folder.name, found is not None)
    if found is None:
        found = run()
        progress.took.append(found.seconds)
    return found


def standing(
    task: Task, contender: Contender, arguments: argparse.Namespace, progress: Progress
) -> Standing:
    """Choose a contender's rate on rows of the tuning seed, then train it with each seed."""

    def run(rate: str, seed: int) -> Outcome:
        keys = (task, contender, arguments.overrides, rate, seed, arguments.out)
        return outcome_of(planned(*keys), progress)

    rates: list[str] = arguments.rates
    trials = [Trial(rate, run(rate, TUNING_SEED)) for rate in rates if len(rates) > 1]
    rate = best(trials) if trials else rates[0]
    return Standing(contender, rate, trials, [run(rate, seed) for seed in arguments.seeds])


def rate(text: str) -> str:
    """Argparse type: a learning rate, as it is written."""
    cli.number(text)
    return text


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked; a ``UserError`` where they make no experiment."""
    raw = argparse.RawDescriptionHelpFormatter
    name = "python -m retnet.experiments.recall"
    parser = cli.ArgumentParser(prog=name, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    text = f"any of {', '.join(TASKS)} (all), and keys of the models and of train for all runs"
    add("words", nargs="*", metavar="TASK | key=value", help=text)
    add_contenders(parser, out="runs/recall")
    add("--seeds", type=cli.whole_number, nargs="+", default=[0], help="of rows and weights (0)")
    add("--rates", type=rate, nargs="+", default=[*RATES], help=f"to try ({' '.join(RATES)})")
    whole: dict[str, Any] = {"type": cli.positive_int, "metavar": "N"}
    add("--steps", **whole, help="of training, at most (each task's own)")
    add("--length", **whole, help="tokens in a row (each task's own)")
    add("--pairs", **whole, nargs="+", help=f"of mqar ({_shown('mqar')})")
    add("--copied", **whole, nargs="+", help=f"symbols in the strings of copy ({_shown('copy')})")
    add("--values", **whole, help="different answers (each task's own)")
    text = "of which a pair consists; 2: a key and its value, which a model first has to join (1)"
    add("--pair-tokens", type=int, choices=(1, 2), default=1, help=text)
    add("--rows", **whole, help="of a step (each task's own)")
    add("--json", type=cli.file_path, metavar="FILE", help="also write all results to this file")
    arguments = parser.parse_intermixed_args(argv)
    arguments.overrides = [word for word in arguments.words if "=" in word]
    arguments.tasks = _tasks(arguments)
    arguments.who = contenders(arguments)
    if not (arguments.mixers or arguments.variant):
        arguments.who.append(HYBRID)
    _check(arguments)
    return arguments


def _shown(name: str) -> str:
    return " ".join(map(str, TASKS[name].counts))


def _tasks(arguments: argparse.Namespace) -> list[Task]:
    """The tasks that were named, at the sizes of the options."""
    names = [word for word in arguments.words if "=" not in word] or [*TASKS]
    for name in names:
        if name not in TASKS or names.count(name) > 1:
            raise UserError(f"task ({name}) must be one of {', '.join(TASKS)}, each once")
    sizes = {
        key: getattr(arguments, key) for key in ("steps", "length", "values", "rows", "pair_tokens")
    }
    given = {key: value for key, value in sizes.items() if value is not None}
    found = [replace(TASKS[name], **given) for name in names]
    for option, name in (("pairs", "mqar"), ("copied", "copy")):
        if (counts := getattr(arguments, option)) is None:
            continue
        if name not in names or len(set(counts)) < len(counts):
            raise UserError(
                f"--{option} ({' '.join(map(str, counts))}) must be different numbers, for {name}, "
                "which is to be among the tasks"
            )
        found = [replace(t, counts=tuple(sorted(counts))) if t.name == name else t for t in found]
    return found


def _check(arguments: argparse.Namespace) -> None:
    """Raise a ``UserError`` for what would have no effect, or could not be written."""
    check_seeds(arguments.seeds)
    if TUNING_SEED in arguments.seeds or min(arguments.seeds) < 0:
        raise UserError(
            f"--seeds ({' '.join(map(str, arguments.seeds))}) must be at least 0, and not "
            f"{TUNING_SEED}, by whose rows learning rates are chosen"
        )
    if len({float(rate) for rate in arguments.rates}) < len(arguments.rates):
        raise UserError(f"--rates ({' '.join(arguments.rates)}): one is there twice")
    given = [("argument", arguments.overrides)]
    given += [(f"--variant {words[0]}", words[2:]) for words in arguments.variant]
    for what, settings in given:
        check_not_taken(what, settings, TAKEN)
        for text in settings:
            section, _, key = key_of(text).partition(".")
            if section != "model" and key_of(text) not in {f"train.{k}" for k in TRAIN_KEYS}:
                raise UserError(
                    f"{what} ({text}) has no effect here: give keys of model, and of train "
                    f"{', '.join(TRAIN_KEYS)}"
                )
            if key == "init_from":
                raise UserError(f"{what} ({text}) has no effect: models begin anew, leave it out")
    check_folder(arguments.out, "--out")
    check_outside_of_runs(arguments.out, "--out", "name another")
    if arguments.json:
        check_writable(arguments.json)


def recall(arguments: argparse.Namespace) -> Iterator[tuple[Task, list[Standing]]]:
    """The tasks, one after the other; all runs are checked before the first of them begins."""
    seeds, rates = arguments.seeds, arguments.rates
    for task in arguments.tasks:
        for contender in arguments.who:
            for rate in rates:
                try:
                    planned(task, contender, arguments.overrides, rate, max(seeds), arguments.out)
                except UserError as error:  # of a key that was given as an option
                    raise UserError(in_options(str(error), TAKEN)) from error
    each = len(seeds) + (len(rates) if len(rates) > 1 else 0)
    progress = Progress(len(arguments.tasks) * len(arguments.who) * each)
    for task in arguments.tasks:
        yield task, [standing(task, who, arguments, progress) for who in arguments.who]


def main(argv: Sequence[str]) -> None:
    """Parse, train, print a table for each task to stdout."""
    arguments = read_arguments(argv)
    results, problems = [], []
    for task, standings in recall(arguments):
        text = table(task, standings, arguments.seeds, TUNING_SEED)
        try:
            write_out(text, end="\n\n")
        except UserError as error:  # the other results are not lost
            problems.append(str(error))
        file = arguments.out / f"{task.name}.png"
        with os_errors(f"--out ({arguments.out}) cannot be written", "name another folder"):
            write_bytes(file, picture(task, standings))
        logger.info("picture in %s", file)
        results.append(to_json(task, standings, arguments.seeds, TUNING_SEED))
    if arguments.json:
        write_json(arguments.json, {"command": [*argv], "tasks": results})
    if problems:
        raise UserError("; ".join(problems))


if __name__ == "__main__":
    sys.exit(cli.run(main))
