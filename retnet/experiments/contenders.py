"""Who takes part in an experiment: mixers by name, and variants of them with keys of their own."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet.checkpoints.format import METRICS
from retnet.cli import ArgumentParser, file_path
from retnet.errors import UserError
from retnet.model.mixers import MIXERS
from retnet.training import Config, check_run, key_of, load_config, train
from retnet.training.precision import settled_precision

logger = logging.getLogger(__name__)


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
    names = [contender.name for contender in found]
    for name in names:
        if names.count(name) > 1 or Path(name).name != name:
            raise UserError(f"--variant ({name}) must be a folder's name that no other one has")
    return found


@dataclass(frozen=True)
class Run:
    """A run of an experiment that can be begun."""

    folder: Path
    config: Config
    by_hand: tuple[str, ...]  # the keys that are not the recipe's

    def __call__(self) -> float:
        """Train into the folder, or find it trained; returns the last step's validation loss.

        A ``UserError`` where the run did not finish.
        """
        logger.info("== %s", self.folder.name)
        if train(self.config, self.by_hand) != 0:
            raise UserError(f"run ({self.folder}) did not finish: see its messages above")
        try:
            last = json.loads((self.folder / METRICS).read_text(encoding="utf-8").splitlines()[-1])
            return float(last["val/loss"])
        except (OSError, ValueError, LookupError, TypeError) as error:
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
    return Run(folder, config, tuple(map(key_of, arguments)))


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise a ``UserError`` where one is there twice."""
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise UserError(f"--seeds ({seed}) is there twice: the same run, and no spread")


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


def choices(option: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of each "key=a,b,c".

    Raises:
        UserError: One is not of that form; names ``option``.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        several = values.split(",")
        if not equals or not all(several) or key in found or len(set(several)) < len(several):
            raise UserError(f"{option} ({text}) must be key=value,value, each key and value once")
        found[key] = several
    return found
