"""Measure what has been claimed of RetNet and its relatives, and say whether it held.

    python -m retnet.experiments.claims                      # all that need no training
    python -m retnet.experiments.claims inference-8k --size base --device cuda
    python -m retnet.experiments.claims --train --tuned tuned.json --markdown docs/claims.md
    python -m retnet.experiments.claims --list

Each claim is printed with its source, its figures with their intervals, and the limits that decide.
Trained models are of a recipe (--recipe, key=value) with several seeds: runs that are finished are
only read, and one that was interrupted goes on.
"""

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from retnet.cli import ArgumentParser, file_path, positive_int, run, whole_number
from retnet.errors import UserError
from retnet.evaluation import check_writable, write_json
from retnet.evaluation.comparison import describe_environment
from retnet.evaluation.output import write_bytes
from retnet.experiments.claims.claim import Claim
from retnet.experiments.claims.output import (
    About,
    Result,
    load_average,
    to_json,
    to_markdown,
    to_text,
)
from retnet.experiments.claims.registry import CLAIMS, chosen
from retnet.experiments.claims.rivals import OURS
from retnet.experiments.claims.setup import CONTEXT, LEAST_CONTEXT, ROUNDS, SIZE, Setup
from retnet.experiments.claims.trials import RECIPE, Trials
from retnet.experiments.tune import check_output
from retnet.generation import device_of
from retnet.generation.options import DTYPES
from retnet.terminal import deliver, write_out

logger = logging.getLogger("retnet.experiments.claims")  # __name__ is __main__

Output = Callable[[], object]
OF_SETUP = ("size", "dtype", "rounds", "context")  # no meaning where all claims need training
OF_TRIALS = ("recipe", "overrides", "tuned", "seeds", "out")  # no meaning without such claims


def build_parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("python -m retnet.experiments.claims", description=__doc__,
                            formatter_class=raw)  # fmt: skip
    add = parser.add_argument
    add("words", nargs="*", metavar="NAME|key=value", help="claims (all); keys of trained models")
    add("--list", action="store_true", help="name the claims, and about how long each takes")
    size = f"a recipe of configs/ by its name, or a YAML file, of which the model counts ({SIZE})"
    add("--size", help=size)
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 (auto)")
    add("--dtype", choices=DTYPES[1:], help="of the weights (float32)")
    add("--rounds", type=positive_int, help=f"of each measurement ({ROUNDS}); 6 for an interval")
    add("--context", type=positive_int, help=f"the longest that is read ({CONTEXT})")
    add("--train", action="store_true", help="also the claims that need trained models")
    add("--recipe", help=f"of the trained models ({RECIPE})")
    add("--tuned", type=file_path, metavar="FILE", help="what tune chose for each contender")
    add("--seeds", type=whole_number, nargs="+", help="of the trained models (0 1 2)")
    add("--out", type=file_path, help="folder of the run folders (runs)")
    add("--json", type=file_path, metavar="FILE", help="also write everything to this file")
    add("--markdown", type=file_path, metavar="FILE", help="also write a page, as docs/claims.md")
    return parser


def main(argv: Sequence[str]) -> None:
    """Parse, measure, print one claim after the other to stdout."""
    arguments = build_parser().parse_intermixed_args(argv)
    names = [word for word in arguments.words if "=" not in word]
    arguments.overrides = [word for word in arguments.words if "=" in word] or None
    if arguments.list:
        write_out("\n".join(map(_listed, chosen(names, train=True))))
        return
    claims = chosen(names, train=arguments.train)
    trials = _trials(arguments, claims)
    _check_outputs(arguments, trials)
    setup = _setup(arguments, claims)
    load, results = load_average(), dict[str, Result]()
    problems = []
    for number, claim in enumerate(claims):
        try:
            found = _measured(claims[number:], trials if claim.trains else setup, results)
        except UserError as error:  # of its training, say; the others are not lost
            problems.append(f"claim ({claim.name}) was not measured: {error}")
            continue
        results[claim.name] = found
        try:
            write_out(to_text(found), end="\n\n")
        except UserError as error:
            problems.append(str(error))
    command = shlex.join(["python", "-m", "retnet.experiments.claims", *argv])
    about = replace(_about(command, claims, setup, trials), load=load)
    if results:
        deliver(*_outputs(arguments, results, about))
    if problems:
        raise UserError("; ".join(problems))


def _listed(claim: Claim) -> str:
    training = ", --train" if claim.trains else ""
    return f"{claim.name:<24} about {claim.seconds:>4} s{training}: {claim.says} ({claim.source})"


def _check_used(arguments: argparse.Namespace, options: Sequence[str], why: str) -> None:
    """Raise a ``UserError`` for an option that is there and would have no effect."""
    for name in options:
        value = getattr(arguments, name)
        if value is not None:
            what = f"argument ({value[0]})" if name == "overrides" else f"--{name} ({value})"
            raise UserError(f"{what} has no effect, since {why}: leave it out")


def _given(arguments: argparse.Namespace, options: Sequence[str]) -> dict[str, object]:
    found = {name: getattr(arguments, name) for name in options}
    return {name: value for name, value in found.items() if value is not None}


def _setup(arguments: argparse.Namespace, claims: Sequence[Claim]) -> Setup:
    """Of the claims that need no training, checked."""
    device = device_of(arguments.device)
    if all(claim.trains for claim in claims):
        _check_used(arguments, OF_SETUP, "all of these claims are of trained models")
        return Setup(device=device)
    given = _given(arguments, OF_SETUP)
    given["dtype"] = getattr(torch, arguments.dtype or "float32")
    setup = Setup(device=device, **given)  # type: ignore[arg-type]
    if setup.context < LEAST_CONTEXT:
        raise UserError(f"--context ({setup.context}) must be at least {LEAST_CONTEXT}")
    setup.check()
    return setup


def _trials(arguments: argparse.Namespace, claims: Sequence[Claim]) -> Trials:
    """Of the claims that need training, checked."""
    training = [claim for claim in claims if claim.who]
    if not training:
        why = "these claims need no training" if arguments.train else "nothing is trained (--train)"
        _check_used(arguments, OF_TRIALS, why)
        if arguments.train:
            raise UserError(f"--train has no effect, since {why}: leave it out")
        return Trials()
    given = _given(arguments, OF_TRIALS)
    trials = Trials(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})  # type: ignore[arg-type]
    who = {one.name: one for claim in training if claim.who for one in claim.who(trials)}
    trials.check([*who.values()])
    return trials


def _check_outputs(arguments: argparse.Namespace, trials: Trials) -> None:
    for option in ("json", "markdown"):
        if file := getattr(arguments, option):
            check_writable(file, f"--{option}")
            if arguments.train:  # the contenders differ in nothing that is read
                check_output(file, trials.recipe, trials.overrides, [OURS.contender], trials.tuned)


def _measured(claims: Sequence[Claim], given: object, before: Mapping[str, Result]) -> Result:
    """Measure the first of the claims; say before and after how long it and the others take."""
    claim, *waiting = claims
    others = f"; then {len(waiting)} more" if waiting else ""
    logger.info(f"== {claim.name}, about {claim.seconds} s{others}")
    started = time.monotonic()
    findings = claim.measure(given)
    result = Result(claim, findings, time.monotonic() - started)
    done = [*before.values(), result]
    pace = sum(one.seconds for one in done) / sum(one.claim.seconds for one in done)
    left = f", about {pace * sum(one.seconds for one in waiting):.0f} s left" if waiting else ""
    logger.info(f"{claim.name}: {result.verdict}, {result.seconds:.1f} s{left}")
    return result


def _about(command: str, claims: Sequence[Claim], setup: Setup, trials: Trials) -> About:
    size, training = "", ""
    if not all(claim.trains for claim in claims):
        size = setup.describe()
    if any(claim.trains for claim in claims):
        seeds = ", ".join(map(str, trials.seeds))
        keys = " ".join((trials.recipe, *trials.overrides))
        tuned = f"tuned ({trials.tuned})" if trials.tuned else "not tuned: the recipe's settings"
        training = f"trained: {keys}; seeds {seeds}; {tuned}"
    return About(command, size, setup.rounds, training, describe_environment(setup.device))


def _outputs(
    arguments: argparse.Namespace, results: Mapping[str, Result], about: About
) -> list[Output]:
    outputs: list[Output] = []
    if file := arguments.json:
        outputs.append(lambda: write_json(file, to_json(results, about)))
    if page := arguments.markdown:
        outputs.append(lambda: _write_page(page, results, about))
    return outputs


def _write_page(path: Path, results: Mapping[str, Result], about: About) -> None:
    page = to_markdown([*CLAIMS.values()], results, about)
    write_bytes(path, page.encode("utf-8", errors="backslashreplace"), "--markdown")


if __name__ == "__main__":
    sys.exit(run(main))
