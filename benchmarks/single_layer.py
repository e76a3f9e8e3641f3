"""One layer of every mixer beside softmax attention: time and memory by length, and what follows.

    python -m benchmarks.single_layer [OPTION ...]

The forward pass of one head of width 64, batch 32, 128 to 6,000 tokens, without and with the four
projections around it: naive softmax (all scores made), torch's SDPA, linear attention (elu + 1),
Performer, AFT, RWKV and retention in its three forms. First each runs once in a process of its own,
which gives its peak memory; then those of a length run in turn, after a round to warm up. What
would take longer than --limit or more than --memory, if costs were quadratic, is stopped.

Printed are mean, standard deviation and number of runs; from which length on one is faster than
another; exponents of T beside those of the surveys; and what is left of "up to 60 times". With
everything at its default this takes about ten minutes on two cores: --seconds bounds the timed
part, where what takes long is run less often than --runs, but three times.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.layer.laws import config_of
from benchmarks.layer.measuring import PROGRAM, Setup, first_passes, timed
from benchmarks.layer.mixing import CONTENDERS
from benchmarks.layer.report import format_layers, picture, to_json
from benchmarks.measure import Plan
from benchmarks.report import environment
from retnet.cli import ArgumentParser, file_path, number, positive_int, run
from retnet.errors import UserError
from retnet.evaluation import check_writable, write_json
from retnet.evaluation.output import write_bytes
from retnet.generation import device_of
from retnet.machine import keep_freed_memory, memory_of

LENGTHS = [128, 256, 512, 1024, 2048, 4096, 6000]
SHARE = 0.8  # of the machine's memory, which --memory is by default
WITHOUT, WITH, BOTH = "without", "with", "both"


def build_parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(PROGRAM, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add(
        "--lengths", nargs="+", type=positive_int, default=LENGTHS, metavar="T",
        help="tokens of a row (128 256 512 1024 2048 4096 6000)",
    )  # fmt: skip
    add("--batch", type=positive_int, default=32, help="rows (32)")
    add("--width", type=positive_int, default=64, help="of the head: queries, keys, values (64)")
    add("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", default=[*CONTENDERS],
        help=f"of {', '.join(f'{name!r}' for name in CONTENDERS)} (all)")  # fmt: skip
    add("--projections", choices=[WITHOUT, WITH, BOTH], default=BOTH,
        help="the four linear layers around the mixing (both)")  # fmt: skip
    add("--runs", type=positive_int, default=100, help="counted passes, fewer of long ones (100)")
    add("--limit", type=number, default=20.0, metavar="SECONDS",
        help="stop what would take longer for one pass (20)")  # fmt: skip
    add("--memory", type=number, metavar="GB",
        help=f"stop what would take more at its peak ({SHARE:g} of the machine's)")  # fmt: skip
    add("--seconds", type=number, default=420.0,
        help="of all timed passes together, if three of each take no longer (420)")  # fmt: skip
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 (auto)")
    add("--threads", type=positive_int, help="of the CPU (as torch chooses)")
    add("--allocator", choices=["default", "keep"], default="default",
        help="freed memory in the timed part: as the C library does by default, or kept, as "
        "train.py does, which may take twice the largest peak (default)")  # fmt: skip
    add("--json", type=file_path, metavar="FILE", help="also write everything to this file")
    add("--plot", type=file_path, metavar="FILE", help="draw time and memory by length (.png)")
    return parser


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    setup = _check(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = environment(Plan(setup.device, torch.float32, setup.runs), argv, PROGRAM)
    before = os.getloadavg()[0]
    cells = list(first_passes(setup))
    if all(cell.stopped for cell in cells):
        raise UserError(
            f"--limit ({arguments.limit:g}) seconds, --memory ({_gb(setup.limit_bytes)}) GB: all "
            "contenders are stopped at all --lengths: allow more, or take shorter ones"
        )
    if arguments.allocator == "keep":
        keep_freed_memory()
    cells = timed(cells, setup)
    about["keep_memory"] = arguments.allocator == "keep"
    about["load_average"] = [round(load, 2) for load in (before, os.getloadavg()[0])]
    if arguments.json:
        write_json(arguments.json, to_json(cells, setup, about))
    if arguments.plot:
        write_bytes(arguments.plot, picture(cells, setup), "--plot")
    print(format_layers(cells, setup, about))


def _check(arguments: argparse.Namespace) -> Setup:
    """What is to be measured; a ``UserError`` for what cannot be."""
    if len({*arguments.lengths}) < len(arguments.lengths):
        raise UserError(f"--lengths {_spaced(arguments.lengths)}: name each length once")
    if len({*arguments.contenders}) < len(arguments.contenders):
        raise UserError(f"--contenders {_spaced(arguments.contenders)}: name each once")
    for name in ("limit", "seconds", "memory"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} ({value:g}) must be a number above 0")
    try:
        for mixer in {CONTENDERS[name].mixer for name in arguments.contenders}:
            config_of(mixer, arguments.width)
    except ValueError as error:
        raise UserError(f"--width ({arguments.width}) is none of a head: {error}") from error
    _check_files(arguments)
    device = device_of(arguments.device)
    memory = memory_of(device)
    limit = None if memory is None else int(SHARE * memory)
    if arguments.memory is not None:
        limit = int(1e9 * arguments.memory)
    for length in arguments.lengths:
        least = _least_bytes(arguments.batch, length, arguments.width)
        if limit is not None and least > limit:
            raise UserError(
                f"--lengths ({length}): inputs and outputs alone take {_gb(least)} GB of "
                f"{_gb(limit)} (--memory): take a shorter one, or a smaller --batch"
            )
    projected = {WITHOUT: (False,), WITH: (True,), BOTH: (False, True)}
    return Setup(
        device,
        arguments.batch,
        arguments.width,
        tuple(sorted(arguments.lengths)),
        tuple(arguments.contenders),
        projected[arguments.projections],
        arguments.runs,
        arguments.limit,
        limit,
        arguments.seconds,
    )


def _least_bytes(rows: int, length: int, width: int) -> int:
    """Of q, k, v and the result, float32."""
    return 16 * rows * length * width


def _check_files(arguments: argparse.Namespace) -> None:
    json, plot = arguments.json, arguments.plot
    if json:
        check_writable(json)
    if plot is None:
        return
    if plot.suffix.lower() != ".png":
        raise UserError(f"--plot ({plot}) must end with .png: it is a picture of that kind")
    check_writable(plot, "--plot")
    if json and Path(os.path.realpath(json)) == Path(os.path.realpath(plot)):
        raise UserError(f"--plot ({plot}) is --json's file too: name another one")


def _gb(num_bytes: int | None) -> str:
    return "any" if num_bytes is None else f"{num_bytes / 1e9:,.1f}"


def _spaced(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


if __name__ == "__main__":
    sys.exit(run(main))
