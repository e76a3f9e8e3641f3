"""What each part of the RetNet is worth: the paper's tables 5 and 6, for your own corpus.

    python -m retnet.experiments.ablations configs/shakespeare-char.yaml data.source=PATH \\
        --grid train.learning_rate=1e-2,2e-2,4e-2 --seeds 3 --json ablations.json

Trains the recipe's RetNet, the same without its gate, head norm, decay, with one decay for all
heads and with small heads, and the other mixers, all on the same tokens. A layer without gate has
fewer matrix parameters, so that one is trained twice: at equal parameters, with a feed-forward
network wider by what the gate had, and at equal width, smaller; the other parts have no matrices,
so both are the same model. Losses are of the final checkpoints on the validation text, in windows
of the trained length; seeds are paired. What was interrupted goes on, finished runs are only read.

``--grid`` first tunes every contender alike, on a part of the training text, as
``retnet.experiments.tune`` does; ``--tuned FILE`` takes what that chose, or what an earlier call
with ``--grid`` wrote to ``--json FILE``; without either all take the recipe's settings, as the
last lines say. For the ablations alone: ``--mixers retention``.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retnet.cli import ArgumentParser, file_path, positive_int, run
from retnet.errors import UserError
from retnet.evaluation import write_json
from retnet.experiments import tune
from retnet.experiments.ablation_table import FULL, PAPER, Row, conclusions, table, to_json
from retnet.experiments.contenders import (
    Contender,
    add_options,
    check_names,
    check_settings,
    choices,
    contenders,
)
from retnet.experiments.intervals import intervals, score_all, titles
from retnet.experiments.repeat import repeat
from retnet.terminal import deliver, write_out
from retnet.training import Config, key_of, load_config
from retnet.training.build import model_config

SMALLER = 4  # small heads are narrower by this: the paper has 64 instead of 256
ONE_DECAY = 127 / 128  # the paper's

# What a contender is equal to the full RetNet in; a plain mixer in its parameters.
EQUAL = {
    **dict.fromkeys(("no-gate", "rwkv-time-mix"), "parameters"),
    "no-gate-equal-width": "width",
    **dict.fromkeys((FULL, "no-head-norm", "no-decay", "one-decay", "small-heads"),
                    "parameters, width"),
}  # fmt: skip

# All would differ in the tokens that they see.
SAME_FOR_ALL = ("data.", "train.max_steps", "train.batch_size", "train.gradient_accumulation_steps")


def ablated(recipe: str, overrides: Sequence[str]) -> list[Contender]:
    """The full RetNet of a recipe, and its ablations.

    Raises:
        UserError: The recipe's is no full RetNet, or has sizes that leave no room.
    """
    mixer = f"model.mixer={FULL}"
    full = _full(load_config(recipe, [*overrides, mixer]))
    parts = {
        FULL: (),
        "no-gate": ("model.gate=false",),
        "no-gate-equal-width": (
            "model.gate=false",
            f"model.intermediate_size={full.intermediate_size}",
        ),
        "no-head-norm": ("model.head_norm=none",),
        "no-decay": ("model.decay=1",),
        "one-decay": (f"model.decay={ONE_DECAY}",),
        "small-heads": (f"model.num_heads={SMALLER * full.num_heads}",),
    }
    return [Contender(name, (mixer, *keys)) for name, keys in parts.items()]


def _full(config: Config) -> Any:
    """The configuration of a full RetNet; a ``UserError`` where it is none to take parts from."""
    for key in ("intermediate_size", "attention_layers"):
        if (value := getattr(config.model, key)) is not None:
            raise UserError(
                f"model.{key} ({value}) must be null, so that all contenders have equal "
                "parameters and one mixer: leave it out"
            )
    full: Any = model_config(config, vocab_size=2)  # that changes no layer
    for key, off in {"gate": False, "head_norm": "none"}.items():
        if getattr(full, key) == off:
            raise UserError(f"model.{key} ({off}) is an ablation itself: leave it out")
    if not isinstance(full.decay, str):
        raise UserError(f"model.decay ({full.decay}) must be a schedule, of a decay for each head")
    if full.head_dim % (2 * SMALLER):
        raise UserError(
            f"model.hidden_size ({full.hidden_size}) / model.num_heads ({full.num_heads}) is "
            f"{full.head_dim}: make it a multiple of {2 * SMALLER}, so that small heads can be "
            f"{SMALLER} times narrower and rotate"
        )
    return full


def time_mix(recipe: str, overrides: Sequence[str]) -> Contender:
    """RWKV's time mix alone, as the paper has it: with the RetNet's feed-forward network."""
    ffn = _feed_forward(recipe, overrides, FULL)
    return Contender("rwkv-time-mix", ("model.mixer=rwkv", f"model.ffn={ffn}"))


def _feed_forward(recipe: str, overrides: Sequence[str], mixer: str) -> str:
    found: str = load_config(recipe, [*overrides, f"model.mixer={mixer}"]).model.ffn
    return found


def family(arguments: argparse.Namespace) -> list[Contender]:
    """The others that take part, with RWKV also its time mix where that is another model."""
    recipe, overrides = arguments.recipe, arguments.overrides
    found = contenders(arguments)
    if any(one.name == "rwkv" for one in found):
        own, full = (_feed_forward(recipe, overrides, mixer) for mixer in ("rwkv", FULL))
        found += [] if own == full else [time_mix(recipe, overrides)]
    return [one for one in found if one != Contender(FULL, (f"model.mixer={FULL}",))]


def check_same_tokens(what: str, settings: Sequence[str]) -> None:
    """Raise a ``UserError`` for a ``key=value`` of some contenders that changes what they see."""
    for text in settings:
        if key_of(text).startswith(SAME_FOR_ALL):
            raise UserError(f"{what} ({text}) changes the tokens, which are the same for all: "
                            "give it as an argument, for all runs")  # fmt: skip


def ablations(
    recipe: str,
    who: Sequence[Contender],
    *,
    seeds: int,
    overrides: Sequence[str],
    tuned: Mapping[str, Sequence[str]],
    out: Path,
) -> tuple[list[Row], list[str]]:
    """Train all and compare with the first; the rows, and the titles of their intervals.

    ``tuned``: more keys of each contender.

    Raises:
        UserError: A run did not finish, or an argument is wrong.
    """
    runs = repeat(
        recipe,
        who,
        seeds=range(seeds),
        variations={},
        overrides=overrides,
        tuned=tuned,
        out=out,
    )
    scores = score_all([row.runs for row in runs])
    rows: list[Row] = []
    for contender, scored in zip(who, scores, strict=True):
        name = contender.name
        plain = "parameters" if contender.keys == (f"model.mixer={name}",) else None
        rows.append(
            Row(
                name,
                EQUAL.get(name, plain),
                [*contender.keys, *tuned.get(name, ())],
                scored.parameters,
                scored.losses,
                intervals(scores[0], scored) if rows else [],
                PAPER.get(name),
            )
        )
    return rows, titles(scores[0])


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m retnet.experiments.ablations", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_options(parser)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=3, metavar="N", help="how many: 0 ... N - 1 (3)")
    add("--grid", action="append", default=[], metavar="key=a,b", help="tune all by these first")
    tune.add_tuned(parser)
    add("--json", type=file_path, metavar="FILE", help="also write all results to this file")
    return parser


def _check(arguments: argparse.Namespace, grid: Mapping[str, Sequence[str]]) -> None:
    """Raise a ``UserError`` for options that go against each other."""
    if grid and arguments.tuned:
        raise UserError(f"--tuned ({arguments.tuned}) has no effect with --grid, which tunes anew: "
                        "leave one of them out")  # fmt: skip
    check_settings(arguments, "--grid", grid, _taken(grid))
    check_same_tokens("--grid", [*grid])
    for words in arguments.variant:
        check_same_tokens(f"--variant {words[0]}", words[2:])


def _taken(grid: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Keys that this experiment sets itself, and by which option."""
    return {"train.seed": "--seeds"} | ({"data.tuning_fraction": "--grid"} if grid else {})


def _check_free(who: Sequence[Contender], grid: Mapping[str, Sequence[str]]) -> None:
    """Raise a ``UserError`` where tuning would change what makes an ablation."""
    for contender in who:
        for key in map(key_of, contender.keys):
            if key in grid:
                raise UserError(f"--grid ({key}) is what {contender.name} changes: leave it out")


def main(argv: Sequence[str]) -> None:
    """Parse, perhaps tune, train, print the table to stdout."""
    arguments = _parser().parse_intermixed_args(argv)
    recipe, overrides = arguments.recipe, arguments.overrides
    grid = choices("--grid", arguments.grid)
    _check(arguments, grid)
    who = [*ablated(recipe, overrides), *family(arguments)]
    check_names(who)
    _check_free(who, grid)
    tune.check_output(arguments.json, recipe, overrides, who, arguments.tuned)
    tuned = tune.tuned_for(who, arguments, _taken(grid))
    for name, settings in tuned.items():
        check_same_tokens(f"--tuned {name}", settings)
    facts: dict[str, Any] = {"recipe": recipe, "overrides": overrides, "seeds": arguments.seeds}
    rate = load_config(recipe, overrides).train.learning_rate
    how = f"untuned: all have the recipe's train.learning_rate ({rate:g}); --grid tunes all alike"
    if tuned:
        how = f"every contender has its own settings, of {arguments.tuned}"
    if grid:
        how = f"every contender was tuned alike, on {tune.FRACTION:.0%} of the training text"
        common = {"overrides": overrides, "fraction": tune.FRACTION, "seed": tune.SEED}
        trials, chosen = tune.tune(recipe, who, grid, **common, out=arguments.out)
        tuned = {best.contender: tune.keys_of(best.values) for best in chosen}
        facts |= tune.to_json(trials, chosen)
        write_out("\n".join([*tune.table(trials, chosen), ""]))
    common = {"seeds": arguments.seeds, "overrides": overrides, "tuned": tuned}
    rows, columns = ablations(recipe, who, **common, out=arguments.out)
    outputs = [lambda: write_out("\n".join([*table(rows, columns), "", *conclusions(rows, how)]))]
    if arguments.json:
        outputs.append(lambda: write_json(arguments.json, to_json(rows, tuning=how, **facts)))
    deliver(*outputs)


if __name__ == "__main__":
    sys.exit(run(main))
