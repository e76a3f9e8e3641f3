"""Who takes part in an experiment: mixers by name, and variants of them with keys of their own."""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet.cli import ArgumentParser, file_path
from retnet.errors import UserError
from retnet.model.mixers import MIXERS
from retnet.training import key_of, load_config, train
from retnet.training.tracking import METRICS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contender:
    """A name, and the ``section.key=value`` that make it."""

    name: str
    keys: tuple[str, ...]


def add_options(parser: ArgumentParser) -> None:
    """The recipe, its overrides, who takes part, and where the runs go."""
    add = parser.add_argument
    add("recipe", help="YAML file")
    add("overrides", nargs="*", metavar="key=value", help="for all runs")
    add("--mixers", nargs="+", choices=MIXERS, help="(all, or none where there are variants)")
    text = "a contender of that name: a mixer with some keys; may be repeated"
    metavar: Any = ("NAME MIXER", "KEY=VALUE")
    add("--variant", action="append", nargs="+", default=[], metavar=metavar, help=text)
    add("--out", type=file_path, default=Path("runs"), help="folder of the run folders (runs)")


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


def run_once(recipe: str, folder: Path, keys: Sequence[str]) -> float:
    """Train into a folder, or find it trained; returns the last step's validation loss.

    Raises:
        UserError: The run did not finish.
    """
    arguments = [*keys, f"train.out_dir={folder}"]
    logger.info("== %s", folder.name)
    if train(load_config(recipe, arguments), [*map(key_of, arguments)]) != 0:
        raise UserError(f"run ({folder}) did not finish: see its messages above")
    last = json.loads((folder / METRICS).read_text().splitlines()[-1])
    return float(last["val/loss"])


def choices(option: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of each "key=a,b,c".

    Raises:
        UserError: One is not of that form; names ``option``.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not all(values.split(",")) or key in found:
            raise UserError(f"{option} ({text}) must be key=value,value, each key once")
        found[key] = values.split(",")
    return found
