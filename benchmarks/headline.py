"""The paper's headline for inference: memory, throughput and latency by context and batch.

    python -m benchmarks.headline [OPTION ...]

A RetNet and a Transformer with key-value cache, of the same size and with random weights, decode
greedily after contexts of so many tokens, in batches of so many rows. A cell is the median time of
a token, and the most memory that was held meanwhile, weights included; where it does not fit, it
says so. The paper's figures (arXiv 2307.08621, figure 6: 8.4 times the throughput, 3.4 times less
memory, 15.6 times less latency after 8k tokens) are of 6.7 billion parameters on one A100-80GB:
take --size 6.7b on such a card.

On a GPU the RetNet's step is a CUDA graph; the Transformer's, whose cache grows, is not, and costs
the launches of its kernels. The limit is the time to read the weights, and to read and write the
state (to read the cache), once, at the speed at which a large block of memory is read here.
"""

import copy
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.contenders import Size, make_retnet, make_transformer
from benchmarks.limits import decode_bytes, reading
from benchmarks.measure import Plan, Results, random_ids
from benchmarks.report import environment, heading
from retnet.cli import ArgumentParser, file_path, positive_int, run
from retnet.errors import UserError
from retnet.evaluation import check_writable, interleaved, write_json
from retnet.evaluation.report import format_table
from retnet.generation import device_of, make_step, prefill
from retnet.generation.decode import synchronize
from retnet.model.cache import DecoderCache
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.fast_decode.weights import lay_out_for_decoding
from retnet.model.quantised import FORMATS, replace_linears

PROGRAM = "benchmarks.headline"
RETNET, TRANSFORMER = "RetNet", "Transformer"
MAKERS = {RETNET: make_retnet, TRANSFORMER: make_transformer}
SIZES = {
    "tiny": Size(64, 2, 2, 320),  # only to see that it works
    "155m": Size(1024, 12, 4, 4096),
    "1.3b": Size(2048, 24, 8, 50304),  # configs/retnet-1.3b.yaml
    "6.7b": Size(4096, 32, 16, 50304),  # configs/retnet-6.7b.yaml
}
CONTEXTS = [1024, 2048, 4096, 8192, 16384, 32768]
BATCHES = [1, 2, 4, 8, 16, 32]
PAPER = {"throughput": 8.4, "memory": 3.4, "latency": 15.6}
PAPER_CONTEXT = 8192
DOES_NOT_FIT = "does not fit"
WARM_UPS = 2  # tokens of a cell that are not counted
BLOCK = 2**32  # bytes that are read to know the memory's speed, on a GPU; less on a CPU


@dataclass(frozen=True)
class Cell:
    """A contender after ``context`` tokens in each of ``rows`` rows.

    Attributes:
        seconds: Of a token of all rows, the median; None where it does not fit.
        num_bytes: Held at most while it decodes; None where it does not fit, or on a CPU.
        moved: Bytes that a step has to move.
    """

    contender: str
    context: int
    rows: int
    seconds: float | None = None
    num_bytes: int | None = None
    moved: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        return self.rows / self.seconds if self.seconds else None


def make_model(name: str, size: Size, plan: Plan, weights: str | None) -> DecoderForCausalLM:
    """With random weights, made where it is measured."""
    with torch.device(plan.device):
        model = MAKERS[name](size).to(plan.dtype).eval()
    replace_linears(model, weights)
    lay_out_for_decoding(model)  # as load_checkpoint does
    return model


def remembered(model: DecoderForCausalLM, ids: torch.Tensor, room: int) -> DecoderCache:
    """The memory of tokens [1, T], with room for more."""
    cache = model.new_cache(max_length=ids.shape[1] + room)
    prefill(model, ids, cache)
    return cache


@torch.inference_mode()
def decode(name: str, model: Any, memory: DecoderCache, rows: int, tokens: int) -> Cell:
    """Measure one cell, of rows that remember the same; ``WARM_UPS`` tokens are not counted."""
    device = model.device
    cell, seconds = Cell(name, memory.length, rows), []
    try:
        cache = copy.deepcopy(memory)
        cache.batch_repeat_interleave(rows)
        token = torch.zeros(rows, dtype=torch.int64, device=device)
        step = make_step(model)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARM_UPS + tokens):
            synchronize(device)
            started = time.perf_counter()
            token = step(token, cache).argmax(dim=-1)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    except torch.cuda.OutOfMemoryError:
        return cell
    states = cache.num_bytes() if model.grows else 2 * cache.num_bytes()
    held = None
    if device.type == "cuda":  # less what only this program holds, for the next cell
        held = torch.cuda.max_memory_allocated(device)
        held -= sum(x.nbytes for x in memory.tensors().values())
    return Cell(
        name, memory.length, rows, statistics.median(seconds[WARM_UPS:]),
        held,
        decode_bytes(model, 0) + states,
    )  # fmt: skip


def cells(
    size: Size, contexts: Sequence[int], batches: Sequence[int], plan: Plan, weights: str | None
) -> Iterator[Cell]:
    """All of them, one model after the other; after a batch that does not fit none is tried."""
    bar = tqdm(total=len(MAKERS) * len(contexts) * len(batches), disable=None, leave=False)
    with bar:
        for name in MAKERS:
            model = make_model(name, size, plan, weights)
            for context in contexts:
                memory = None  # the one before makes room
                ids = random_ids(1, context, plan, size)
                with suppress(torch.cuda.OutOfMemoryError):
                    memory = remembered(model, ids, WARM_UPS + plan.tokens)
                fits = memory is not None
                for rows in batches:
                    cell = Cell(name, context, rows)
                    if fits and memory is not None:
                        cell = decode(name, model, memory, rows, plan.tokens)
                    fits = fits and cell.seconds is not None
                    if plan.device.type == "cuda":
                        torch.cuda.empty_cache()
                    bar.update()
                    told = f"{1000 * cell.seconds:.2f} ms" if cell.seconds else DOES_NOT_FIT
                    print(f"{name}, {rows} rows after {context:,} tokens: {told}", file=sys.stderr)
                    yield cell
            del model, memory


def memory_speed(device: torch.device) -> float:
    """Bytes a second at which a large block of memory is read, the median of five times."""
    num_bytes = BLOCK if device.type == "cuda" else BLOCK // 16
    (timing,) = interleaved([reading(num_bytes, device, 1)], device, rounds=5)
    return num_bytes / timing.median


def table(found: Sequence[Cell], context: int, speed: float) -> list[str]:
    """One context: both models side by side, by batch."""
    rows = [["rows"]]
    for name in MAKERS:
        rows[0] += [f"{name}: ms", "tokens/s", "GB", "of the limit"]
    for batch in dict.fromkeys(one.rows for one in found):
        line = [f"{batch}"]
        for name in MAKERS:
            one = find(found, name, context, batch)
            line += _shown(one, speed)
        rows.append(line)
    return format_table(rows)


def _shown(one: Cell, speed: float) -> list[str]:
    if one.seconds is None:
        return ["", DOES_NOT_FIT, "", ""]
    held = f"{one.num_bytes / 1e9:.1f}" if one.num_bytes else ""
    limit = one.moved / speed / one.seconds
    return [f"{1000 * one.seconds:.2f}", f"{one.tokens_per_second:,.0f}", held, f"{limit:.2f}"]


def find(found: Sequence[Cell], name: str, context: int, rows: int) -> Cell:
    return next(x for x in found if (x.contender, x.context, x.rows) == (name, context, rows))


def ratios(found: Sequence[Cell], context: int) -> dict[str, tuple[float, int]]:
    """How much better the RetNet is after a context, each with the rows of which it is true.

    Throughput: the best of each over the batches that fit. Memory and latency: of the largest batch
    that fits for both.
    """
    own = {
        name: [x for x in found if (x.contender, x.context) == (name, context)] for name in MAKERS
    }
    fitting = {name: [x for x in group if x.seconds is not None] for name, group in own.items()}
    both = {x.rows for x in fitting[RETNET]} & {x.rows for x in fitting[TRANSFORMER]}
    if not both:
        return {}
    best = {
        name: max(group, key=lambda x: x.tokens_per_second or 0) for name, group in fitting.items()
    }
    rows = max(both)
    ours, theirs = (find(found, name, context, rows) for name in (RETNET, TRANSFORMER))
    assert ours.seconds and theirs.seconds
    fast, slow = (best[name].tokens_per_second or 0 for name in (RETNET, TRANSFORMER))
    result = {
        "throughput": (fast / slow, best[RETNET].rows),
        "latency": (theirs.seconds / ours.seconds, rows),
    }
    if ours.num_bytes and theirs.num_bytes:
        result["memory"] = (theirs.num_bytes / ours.num_bytes, rows)
    return result


def beside_the_paper(found: Sequence[Cell], contexts: Sequence[int]) -> list[str]:
    """The ratios by context, and the paper's."""
    lines = [["after", *(f"{what}, x" for what in PAPER)]]
    for context in contexts:
        own = ratios(found, context)
        shown = [f"{own[x][0]:.2f} ({own[x][1]} rows)" if x in own else "" for x in PAPER]
        lines.append([f"{context:,} tokens", *shown])
    lines.append([f"the paper, {PAPER_CONTEXT:,}", *(f"{x:g}" for x in PAPER.values())])
    return format_table(lines)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, default="155m", help="parameters of each model (155m)")
    add("--contexts", nargs="+", type=positive_int, default=CONTEXTS, metavar="T",
        help="tokens before the first that is decoded (1024 to 32768, doubled)")  # fmt: skip
    add("--batches", nargs="+", type=positive_int, default=BATCHES, metavar="B",
        help="rows (1 2 4 8 16 32)")  # fmt: skip
    add("--tokens", type=positive_int, default=16, help="counted tokens of a cell (16)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 (auto)")
    add("--dtype", choices=["float32", "bfloat16"],
        help="(bfloat16; float32 with --weights, whose models compute in it)")  # fmt: skip
    add("--weights", choices=FORMATS, help="quantised ones")
    add("--json", type=file_path, metavar="FILE", help="also write everything to this file")
    return parser


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.json:
        check_writable(arguments.json)
    dtype = arguments.dtype or ("float32" if arguments.weights else "bfloat16")
    if arguments.weights and dtype != "float32":
        raise UserError(
            f"--dtype ({dtype}) does not go with --weights ({arguments.weights}), whose model "
            "computes in float32: leave one of them out"
        )
    plan = Plan(device_of(arguments.device), getattr(torch, dtype), 1, tokens=arguments.tokens)
    contexts, batches = sorted({*arguments.contexts}), sorted({*arguments.batches})
    torch.manual_seed(0)
    about, before = environment(plan, argv, PROGRAM), os.getloadavg()[0]
    results, speed = Results(), memory_speed(plan.device)
    results.facts["bytes a second at which memory is read"] = speed
    found = list(cells(SIZES[arguments.size], contexts, batches, plan, arguments.weights))
    about["load_average"] = [round(load, 2) for load in (before, os.getloadavg()[0])]
    if arguments.json:
        body = {"environment": about, "facts": results.facts, "cells": [asdict(x) for x in found]}
        write_json(arguments.json, body)
    parts = [heading(results, about)]
    parts += [[f"== after {x:,} tokens", "", *table(found, x, speed)] for x in contexts]
    parts.append(["== how much better the RetNet is", "", *beside_the_paper(found, contexts)])
    print("\n\n".join("\n".join(lines) for lines in parts))


if __name__ == "__main__":
    sys.exit(run(main))
