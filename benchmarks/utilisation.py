"""How much of a GPU's arithmetic training uses: tokens per second and model FLOP utilisation.

    python -m benchmarks.utilisation [OPTION ...]

Forward and backward pass with float32 weights under bfloat16 autocast, as ``train.precision=bf16``
trains: our RetNet and Transformer, plain and compiled, transformers' Llama, and the RetNet of
flash-linear-attention with its Triton kernels, all of the same size; on a GPU also retention alone,
by our chunkwise form and by flash-linear-attention's kernel.

Utilisation is the model's own operations over the time, as a share of what products of two large
square bfloat16 matrices reach in the same rounds. A model's own operations are three times those
of its forward pass: its linear layers, and q k^T and the weighted sum of v of causal attention
(half of all pairs), or the update and the reading of the state of retention (whatever form computes
it). What is computed twice, or by a form that does more, does not count.

A table is printed as soon as it is there. What is used for the first time takes longest: minutes,
in which flash-linear-attention's kernels choose among their variants for each size, and in which a
model of many layers is compiled. Calls that took over ten seconds are named, and --contenders and
--no-kernels leave out what there is no time for.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import (
    COMPILED,
    Contender,
    Field,
    Llama,
    Size,
    compile_problem,
    make_llama,
    make_retnet,
    make_transformer,
)
from benchmarks.kernels import FLA, kernels
from benchmarks.limits import linear_flops
from benchmarks.measure import (
    LIMIT,
    TRAIN,
    UTILISATION,
    Measurement,
    Piece,
    Plan,
    Results,
    measure,
)
from benchmarks.report import environment, heading, times, to_json
from benchmarks.steps import Autocast, Narrow
from benchmarks.training import passes
from retnet.cli import ArgumentParser, file_path, positive_int, run
from retnet.errors import UserError
from retnet.evaluation import check_writable, write_json
from retnet.evaluation.report import format_table
from retnet.generation import device_of

PROGRAM = "benchmarks.utilisation"
SIZES = {
    "125m": Size(768, 14, 6, 32000),  # configs/base.yaml
    "350m": Size(1024, 24, 8, 32000),
    "tiny": Size(32, 2, 2, 320),  # only to see that it works
}
OURS = {"RetNet": make_retnet, "Transformer": make_transformer}
LLAMA = "Llama"
ALL = [*OURS, LLAMA, FLA]
SQUARE = {"cuda": 8192}  # the matrices whose product is the measure; smaller on a CPU


class NarrowLlama(Autocast, Llama):
    """transformers' Llama."""


class Fla(Contender):
    """flash-linear-attention's RetNetForCausalLM, which shifts the labels itself."""

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss


class NarrowFla(Autocast, Fla):
    """The same in bfloat16."""


def make_fla(size: Size) -> torch.nn.Module:
    """The RetNet of flash-linear-attention; an ``ImportError`` where it cannot be had."""
    fla = importlib.import_module("fla.models.retnet")
    model: torch.nn.Module = fla.RetNetForCausalLM(
        fla.RetNetConfig(**vars(size), tie_word_embeddings=True)
    )
    return model


def contenders(size: Size, wanted: Sequence[str], plan: Plan, results: Results) -> Field:
    """Those of ``ALL`` that are wanted and can train at this size."""
    field = Field(plan.device, torch.float32)
    for name, make in OURS.items():
        if name not in wanted:
            continue
        model = make(size)
        field.add(Narrow(name, model))
        if plan.compiled:
            field.add(Narrow(name + COMPILED, model, compiled=True))
    if LLAMA in wanted:
        field.add(NarrowLlama(LLAMA, make_llama(size)))
    if FLA in wanted and plan.device.type == "cuda":
        try:
            field.add(NarrowFla(FLA, make_fla(size)))
        except ImportError as error:
            field.absent[FLA] = str(error)
    results.note_field(size, field)
    return field


def model_flops(one: Contender, size: Size, rows: int, length: int) -> float:
    """Operations of a model's forward and backward pass, as the module says."""
    tokens, width = rows * length, size.hidden_size
    if one.name.startswith(("Transformer", "Llama")):
        mixing = 2 * length * width
    else:  # k v^T and q S: K = d / H, V = 2 K
        mixing = 8 * width**2 // size.num_heads
    return linear_flops(one.model, tokens) + 3 * tokens * size.num_hidden_layers * mixing


def square_products(device: torch.device) -> tuple[int, Callable[[], Callable[[], object]]]:
    """The operations of a product of two large bfloat16 matrices, and the product."""
    n = SQUARE.get(device.type, 1024)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3, lambda: lambda: a @ b


def case_of(name: str, rows: int, length: int) -> str:
    return f"{name}: {rows} x {length} tokens"


def utilisation(
    name: str, wanted: Sequence[str], rows: int, length: int, plan: Plan, results: Results
) -> list[list[str]]:
    """Measure one size; the rows of its table."""
    size = SIZES[name]
    field = contenders(size, wanted, plan, results)
    case = case_of(name, rows, length)
    torch._dynamo.reset()
    pieces = passes(field.contenders, rows, length, plan, case, size)
    flops, product = square_products(plan.device)
    measure(UTILISATION, [*pieces, Piece(case, LIMIT, 0, product)], plan, results)
    limit = results.find(UTILISATION, case, LIMIT)
    assert limit is not None
    rate = flops / limit.timing.median
    lines = [["", "ms", "tokens/s", "TFLOP/s", "utilisation"]]
    for one in field.contenders:
        found = results.find(UTILISATION, case, one.name)
        assert found is not None
        own = model_flops(one, size, rows, length)
        lines.append(_line(found, own, own / flops * limit.timing.ratio(found.timing)))
    lines.append([f"{LIMIT}: square products", *_line(limit, flops, 1.0)[1:]])
    results.facts[f"{case}: operations a second of square products"] = rate
    return lines


def _line(one: Measurement, flops: float, share: float) -> list[str]:
    seconds = one.timing.median
    pace = f"{one.tokens / seconds:,.0f}" if one.tokens else ""
    rate = flops / seconds / 1e12
    return [one.contender, f"{1000 * seconds:.2f}", pace, f"{rate:.2f}", f"{share:.3f}"]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=["125m", "350m"], help="(125m 350m)")
    add("--contenders", nargs="+", choices=ALL, default=ALL, metavar="NAME",
        help=f"of {', '.join(ALL)} (all)")  # fmt: skip
    add("--length", type=positive_int, default=2048, help="tokens of a row (2048)")
    add("--tokens", type=positive_int, default=16384, help="of a step (16384)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 (auto)")
    add("--rounds", type=positive_int, default=5, help="counted rounds (5)")
    add("--no-compile", action="store_true", help="leave out what torch.compile makes")
    add("--no-kernels", action="store_true", help="leave out retention alone")
    add("--json", type=file_path, metavar="FILE", help="also write everything to this file")
    return parser


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.tokens < arguments.length:
        raise UserError(
            f"--tokens ({arguments.tokens}) is less than a row has: take at least --length "
            f"({arguments.length})"
        )
    if arguments.json:
        check_writable(arguments.json)
    results = Results()
    problem = compile_problem(not arguments.no_compile)
    if problem:
        results.absent["compiled steps"] = problem
    device = device_of(arguments.device)
    plan = Plan(device, torch.bfloat16, arguments.rounds, compiled=problem is None)
    torch.manual_seed(0)
    about, before = environment(plan, argv, PROGRAM), os.getloadavg()[0]
    tables: dict[str, Any] = {}
    rows = arguments.tokens // arguments.length
    for name in arguments.sizes:
        case = case_of(name, rows, arguments.length)
        tables[case] = utilisation(
            name, arguments.contenders, rows, arguments.length, plan, results
        )
        print("\n".join([f"== {case}", "", *format_table(tables[case]), ""]), flush=True)
    if not arguments.no_kernels:
        kernels(plan, results)
    about["load_average"] = [round(load, 2) for load in (before, os.getloadavg()[0])]
    if arguments.json:
        write_json(arguments.json, to_json(plan, results, about) | {"tables": tables})
    parts = [[f"== {case}", *times(group)] for case, group in results.groups(TRAIN)]
    print("\n\n".join("\n".join(lines) for lines in (*parts, heading(results, about))))


if __name__ == "__main__":
    sys.exit(run(main))
