"""How fast, in how much memory, against whom, and how near the machine's limit.

    python -m benchmarks.speed [BENCHMARK] [OPTION ...]

The contenders run in turn in one process (A B A B ...) after a round that is not counted; times are
medians with quartiles, ratios are medians over the rounds in which two ran side by side. The last
table says which of this repository's targets are reached. Torchscale and yet-another-retnet take
part when they are installed (benchmarks/requirements.txt), llama.cpp likewise
(benchmarks/requirements-llama.txt): ``llama`` is the part of ``decode`` in which it does.

The process's float32 products go to the fastest library that torch has on this CPU
(``retnet.machine.use_fast_products``), as in train.py and generate.py. The setting is the
process's, so everybody has it: the others are faster here than they are by themselves. Only the
row "products by torch.mm" is measured without it.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.against_llama import against_llama
from benchmarks.contenders import compile_problem
from benchmarks.decoding import decode
from benchmarks.family import family
from benchmarks.kernels import forms, kernels
from benchmarks.measure import (
    DECODE,
    FAMILY,
    FORMS,
    LLAMA,
    MEMORY,
    PREFILL,
    STEPS,
    TRAIN,
    Plan,
    Results,
)
from benchmarks.memory import memory
from benchmarks.report import environment, format_report, to_json
from benchmarks.steps import steps
from benchmarks.training import prefill, train
from retnet.cli import ArgumentParser, file_path, positive_int, run
from retnet.evaluation import check_writable, write_json
from retnet.generation import device_of
from retnet.machine import keep_freed_memory

BENCHMARKS: dict[str, Callable[[Plan, Results], None]] = {
    TRAIN: train,
    PREFILL: prefill,
    DECODE: decode,
    LLAMA: against_llama,
    MEMORY: memory,
    FORMS: forms,
    FAMILY: family,
    STEPS: steps,
}


def build_parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("benchmarks.speed", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("benchmark", nargs="?", default="all", choices=[*BENCHMARKS, "all"], help="(all)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 (auto)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="(float32)")
    add("--threads", type=positive_int, help="of the CPU (as torch chooses)")
    add("--rounds", type=positive_int, default=5, help="counted rounds (5)")
    add(
        "--allocator",
        default="keep",
        choices=["keep", "default"],
        help="freed memory: keep, as train.py does, or as the C library does by default (keep)",
    )
    add("--no-compile", action="store_true", help="leave out what torch.compile makes")
    add("--quick", action="store_true", help="tiny sizes, one round: only to see that it works")
    add("--json", type=file_path, metavar="FILE", help="also write everything to this file")
    return parser


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.json:
        check_writable(arguments.json)
    device = device_of(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.allocator == "keep":
        keep_freed_memory()
    results = Results()
    names = list(BENCHMARKS) if arguments.benchmark == "all" else [arguments.benchmark]
    names += [LLAMA] if names == [DECODE] else []
    problem = compile_problem(not arguments.no_compile)
    if problem:
        results.absent["compiled steps"] = problem
    plan = Plan(
        device,
        getattr(torch, arguments.dtype),
        arguments.rounds,
        compiled=problem is None,
        keep_memory=arguments.allocator == "keep",
    )
    if arguments.quick:
        plan = plan.quick()
    torch.manual_seed(0)
    about = environment(plan, argv)
    before = os.getloadavg()[0]
    for name in names:
        BENCHMARKS[name](plan, results)
    if TRAIN in names:
        kernels(plan, results)
    about["load_average"] = [round(load, 2) for load in (before, os.getloadavg()[0])]
    if arguments.json:
        write_json(arguments.json, to_json(plan, results, about))
    print(format_report(plan, results, about))


if __name__ == "__main__":
    sys.exit(run(main))
