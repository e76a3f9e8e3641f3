"""Who takes part in an experiment: mixers by name, and variants of them with keys of their own."""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retnet.checkpoints.format import DATA_RECORD, FINAL, METRICS
from retnet.cli import ArgumentParser, file_path
from retnet.data import DataSpec, prepare_data
from retnet.errors import UserError, memory_errors
from retnet.files import read_json
from retnet.model.mixers import MIXERS
from retnet.training import Config, check_run, key_of, load_config, train
from retnet.training.limits import MAX_SEED
from retnet.training.precision import settled_precision
from retnet.training.resume import TEXT_HASHES
from retnet.training.run_folder import CONFIG
from retnet.training.spec import flatten
from retnet.training.tracking import format_seconds

logger = logging.getLogger(__name__)

SAME = ("train.max_steps", "train.eval_max_tokens")  # which a run may be gone on with alone
ANEW = "give another --out, or remove that run's folder"


@dataclass(frozen=True)
class Contender:
    """A name, and the ``section.key=value`` that make it."""

    name: str
    keys: tuple[str, ...]

    @property
    def mixer(self) -> str:
        """The name of its mixer, which its first key sets."""
        return self.keys[0].removeprefix("model.mixer=")


def add_options(parser: ArgumentParser) -> None:
    """The recipe, its overrides, who takes part, and where the runs go."""
    add = parser.add_argument
    add("recipe", help="YAML file")
    add("overrides", nargs="*", metavar="key=value", help="for all runs")
    add_contenders(parser)


def add_contenders(parser: ArgumentParser, out: str = "runs") -> None:
    """Who takes part, and where the runs go."""
    add = parser.add_argument
    add("--mixers", nargs="+", choices=MIXERS, help="(all, or none where there are variants)")
    text = "a contender of that name: a mixer with some keys; may be repeated"
    metavar: Any = ("NAME MIXER", "KEY=VALUE")
    add("--variant", action="append", nargs="+", default=[], metavar=metavar, help=text)
    add("--out", type=file_path, default=Path(out), help=f"folder of the run folders ({out})")


def contenders(arguments: argparse.Namespace) -> list[Contender]:
    """Those of the options; a ``UserError`` for a variant that is none, or two of one name."""
    mixers = arguments.mixers or ([] if arguments.variant else list(MIXERS))
    found = [Contender(mixer, (f"model.mixer={mixer}",)) for mixer in mixers]
    for words in arguments.variant:
        name, mixer, *keys = words if len(words) > 1 else (*words, "")
        if mixer not in MIXERS:
            raise UserError(
                f"--variant ({' '.join(words)}) must be NAME MIXER KEY=VALUE ..., with a mixer of "
                f"{', '.join(MIXERS)}"
            )
        found.append(Contender(name, (f"model.mixer={mixer}", *keys)))
    for mixer in mixers:
        if mixers.count(mixer) > 1:
            raise UserError(f"--mixers ({mixer}) is there twice: leave one of them out")
    check_names(found)
    return found


def check_names(who: Sequence[Contender]) -> None:
    """Raise a ``UserError`` where two have one name, or one that no folder can have."""
    names = [contender.name for contender in who]
    for name in names:
        if names.count(name) > 1 or Path(name).name != name:
            raise UserError(f"--variant ({name}) must be a folder's name that no other one has")


@dataclass(frozen=True)
class Run:
    """A run of an experiment that can be begun."""

    folder: Path
    config: Config
    by_hand: tuple[str, ...]  # the keys that are not the recipe's

    @property
    def text(self) -> dict[str, Any] | None:
        """The record of its data; None where the run is not finished, or has to write it again."""
        try:
            return read_json(self.folder / FINAL / DATA_RECORD, "")
        except UserError:
            return None

    def __call__(self) -> float:
        """Train into the folder, or find it trained; returns the last step's validation loss.

        A ``UserError`` where the run did not finish.
        """
        logger.info("== %s", self.folder.name)
        if train(self.config, self.by_hand) != 0:
            raise UserError(f"run ({self.folder}) did not finish: see its messages above")
        try:
            with memory_errors(self.folder / METRICS):
                text = (self.folder / METRICS).read_text(encoding="utf-8")
            return float(json.loads(text.splitlines()[-1])["val/loss"])
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.folder / METRICS} does not tell the last step's validation loss: restore "
                f"it, or remove {self.folder} to train that run again"
            ) from error


def planned(recipe: str, folder: Path, keys: Sequence[str]) -> Run:
    """A run with these ``section.key=value``; a ``UserError`` where they make none.

    All runs of an experiment are planned before the first of them begins.
    """
    arguments = [*keys, f"train.out_dir={folder}"]
    config = settled_precision(load_config(recipe, arguments), for_all=True)
    check_run(config)
    _check_same_length(config)
    return Run(folder, config, tuple(map(key_of, arguments)))


def _check_same_length(config: Config) -> None:
    """Raise a ``UserError`` where a run of before can't be compared with those to be made.

    train.py goes on with it to other steps, along another course of the learning rate than that of
    a run that is made now, and leaves a finished one's losses on other text as they are.
    """
    run = config.train.run_folder
    if not (run / CONFIG).is_file():
        return
    try:
        before, now = flatten(load_config(run / CONFIG, recorded=True)), flatten(config)
    except UserError:  # train.py has more to say of it
        return
    if keys := [key for key in SAME if before[key] != now[key]]:
        changes = ", ".join(f"{key} ({before[key]} -> {now[key]})" for key in keys)
        raise UserError(f"run ({run}) is of another experiment, it differs in {changes}: {ANEW}")


def check_runs(runs: Sequence[Run]) -> None:
    """Raise a ``UserError`` where two runs share a folder, or some have read a text that others,
    still to be made, will not find any more.
    """
    folders = [run.folder for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(
                f"--variant: two contenders would have one run folder ({folder}): give them other "
                "names"
            )
    first: dict[DataSpec, tuple[Path, list[Any]]] = {}
    for run in sorted(runs, key=lambda run: run.text is None):  # the finished ones first
        data = replace(run.config.data, cache_dir="")
        if run.text is None and data not in first:
            continue
        record = run.text or prepare_data(run.config.data).record
        folder, text = first.setdefault(
            data, (run.folder, [record.get(key) for key in TEXT_HASHES])
        )
        if text != [record.get(key) for key in TEXT_HASHES]:
            raise UserError(
                f"data.source ({data.source}) is not the text that run ({folder}) was trained on: "
                f"restore it; or {ANEW}"
            )


def run_all(runs: Sequence[Run]) -> list[float]:
    """The last validation loss of each; says before each how many there are, and the time left.

    That is the mean of what took part in training here, for all that is not finished yet.

    Raises:
        UserError: As ``check_runs``, before the first begins; or a run did not finish.
    """
    check_runs(runs)
    losses: list[float] = []
    took: list[float] = []
    for done, run in enumerate(runs):
        waiting = [other for other in runs[done:] if not (other.folder / FINAL).is_dir()]
        left = statistics.mean(took) * len(waiting) if took else 0.0
        about = f", about {format_seconds(left)} left" if left else ""
        logger.info(f"run {done + 1} of {len(runs)}{about}")
        begun = time.monotonic()
        losses.append(run())
        if run in waiting:
            took.append(time.monotonic() - begun)
    return losses


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise a ``UserError`` where one is there twice, or none that a run can have."""
    for seed in seeds:
        if not 0 <= seed < MAX_SEED:
            raise UserError(f"--seeds ({seed}) must be at least 0, and below 2^32 ({MAX_SEED})")
        if seeds.count(seed) > 1:
            raise UserError(f"--seeds ({seed}) is there twice: the same run, and no spread")


def in_options(message: str, taken: Mapping[str, str]) -> str:
    """An error's message with the options that keys were given by (by key) in their place."""
    for key, option in taken.items():
        message = message.replace(f"{key} (", f"{option} (")
    return message


def check_not_taken(what: str, settings: Sequence[str], taken: Mapping[str, str]) -> None:
    """Raise a ``UserError`` for a ``key=value`` that would have no effect.

    ``taken``: the keys that are set after it, and which option does that.
    """
    for text in settings:
        if by := taken.get(key_of(text)):
            raise UserError(
                f"{what} ({text}) has no effect, since {by} sets that key: leave it out"
            )


def check_settings(
    arguments: argparse.Namespace, option: str, values: Mapping[str, object], own: Mapping[str, str]
) -> None:
    """Raise a ``UserError`` for a key that is given where something else decides about it.

    ``values`` are those of ``option`` by key; ``own`` are keys of the experiment itself, each with
    the option for it.
    """
    own = {"model.mixer": "--mixers or --variant", "train.out_dir": "--out", **own}
    check_not_taken(option, [*values], own)
    taken = {**own, **dict.fromkeys(values, option)}
    check_not_taken("argument", arguments.overrides, taken)
    for words in arguments.variant:
        check_not_taken(f"--variant {words[0]}", words[2:], taken)


def _meant(value: str) -> float | str:
    """A number, however it is written, or else the text."""
    try:
        return float(value)
    except ValueError:
        return value


def choices(option: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of each "key=a,b,c".

    Raises:
        UserError: One is not of that form; names ``option``.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        several = values.split(",")
        different = {*map(_meant, several)}
        if not equals or not all(several) or key in found or len(different) < len(several):
            raise UserError(f"{option} ({text}) must be key=value,value, each key and value once")
        found[key] = several
    return found
