"""Our RetNet beside llama.cpp's Llama of the same size: tokens by context, rows, size and format.

All run in one process with the same number of threads, in float32 but for products with weights
of fewer bits, which are made of the same random ones. Every context is read, on either side by the
float32 model for all: llama.cpp's caches hold it, and so do our states.
"""

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import COMPILED, Ours, Prepare, Size, make_llama, make_retnet
from benchmarks.llamacpp import BLOCK, KINDS, LlamaCpp, Texts, absence, token_ids, write_gguf
from benchmarks.measure import LLAMA, Piece, Plan, Results, measure, random_ids
from retnet.machine import memory_of
from retnet.model.fast_decode.step import make_decode_step
from retnet.model.fast_decode.weights import lay_out_for_decoding
from retnet.model.quantised import FORMATS, replace_linears

NAME, PLAIN = "llama.cpp", "RetNet"
PAIRS = {  # format of ours -> the two that are compared
    "float32": (PLAIN, f"{NAME} f32"),
    "int8": (f"{PLAIN} int8", f"{NAME} q8_0"),
    "int4": (f"{PLAIN} int4", f"{NAME} q4_0"),
}
PAUSE = 0.02  # seconds until the idle threads of whoever ran before have stopped spinning
CPU = torch.device("cpu")
MS, TOKENS = "ms a token", "tokens/s"
Place = tuple[int, int]  # rows, context


def llama_case(size: Size, rows: int, context: int, results: Results) -> str:
    parameters = results.parameters.get(str(size), {}).get(PLAIN, 0)
    texts = "1 row" if rows == 1 else f"{rows} rows"
    return f"{parameters / 1e6:.3g}M parameters, {texts} after {context} tokens"


def places(plan: Plan) -> Iterator[Place]:
    """Rows and contexts that are measured, in the order of the tables."""
    for context in plan.llama_contexts:
        yield 1, context
    for i, rows in enumerate(plan.llama_batches):
        for context in plan.llama_contexts[: 1 if i else 2]:
            yield rows, context


class Reading(Ours):
    """One of ours whose contexts another has read."""

    def __init__(
        self, name: str, model: Any, read: Callable[[int], Any], *, compiled: bool = False
    ) -> None:
        super().__init__(name, model, compiled=compiled)
        self.read_one = read

    def remember(self, ids: Tensor, room: int) -> object:
        memory = copy.deepcopy(self.read_one(ids.shape[1]))
        memory.batch_repeat_interleave(len(ids))
        return memory


def our_contenders(plan: Plan, size: Size, results: Results) -> list[Reading]:
    """Our RetNet plain and in each format that torch has, each as it is and compiled."""
    model = make_retnet(size).eval()
    lay_out_for_decoding(model)
    reader = Ours(PLAIN, model)

    @functools.cache
    @torch.inference_mode()
    def read(context: int) -> Any:
        return reader.read(random_ids(1, context, plan, size))

    torch._dynamo.reset()
    models = {PLAIN: model}
    for weights in FORMATS:
        narrow = copy.deepcopy(model)
        replace_linears(narrow, weights)
        lay_out_for_decoding(narrow)
        step, problem = make_decode_step(narrow)
        if problem := problem or (step.problem if step else ""):
            results.absent[f"{PLAIN} {weights}"] = problem
        else:
            models[f"{PLAIN} {weights}"] = narrow
    contenders = [Reading(name, one, read) for name, one in models.items()]
    if plan.compiled:
        made = (Reading(name + COMPILED, one, read, compiled=True) for name, one in models.items())
        contenders += made
    return contenders


@contextmanager
def their_contenders(size: Size) -> Iterator[list[LlamaCpp]]:
    """llama.cpp in each format."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = make_llama(size, multiple=BLOCK)
        contenders = []
        for kind in KINDS:
            write_gguf(model, kind, folder / kind)
            one = LlamaCpp(f"{NAME} {kind}", folder / kind, torch.get_num_threads())
            stack.callback(one.close)
            contenders.append(one)
        yield contenders


def against_llama(plan: Plan, results: Results) -> None:
    """Each size by itself, whatever the plan's device and type on the CPU and in float32."""
    plan = replace(plan, device=CPU, dtype=torch.float32)
    problem = absence()
    if problem:
        results.absent[NAME] = problem
    for size in plan.llama_sizes:
        ours = our_contenders(plan, size, results)
        with ExitStack() as stack:
            theirs = [] if problem else stack.enter_context(their_contenders(size))
            counts = {one.name: one.num_parameters for one in theirs}
            counts[PLAIN] = ours[0].num_parameters
            results.parameters.setdefault(str(size), {}).update(counts)
            for rows, context in places(plan):
                _measure(size, ours, theirs, rows, context, plan, results)


def _measure(
    size: Size,
    ours: Sequence[Reading],
    theirs: Sequence[LlamaCpp],
    rows: int,
    context: int,
    plan: Plan,
    results: Results,
) -> None:
    """All of one size; the smaller, the more tokens in a round."""
    tokens = plan.tokens * plan.llama_sizes[-1].hidden_size // size.hidden_size
    case = llama_case(size, rows, context, results)
    ids = random_ids(1, context, plan, size)
    works = {
        one.name: one.decoding(ids.expand(rows, -1), tokens)
        for one in ours
        if rows == 1 or not one.compiled
    }
    with ExitStack() as stack:
        if theirs and not caches_fit(len(theirs), size, rows, context + tokens):
            results.absent[f"{NAME}, {case}"] = "its caches would take half of the memory or more"
            theirs = []
        texts: list[Texts] = []
        for one in theirs:
            text = stack.enter_context(one.texts(rows, context + tokens))
            text.take(texts[0]) if texts else text.read(token_ids(ids))
            texts.append(text)
            works[one.name] = text.decoding(context, tokens)
        pieces = [Piece(case, name, rows * tokens, _rested(work)) for name, work in works.items()]
        measure(LLAMA, pieces, plan, results)


def caches_fit(contenders: int, size: Size, rows: int, tokens: int) -> bool:
    """Whether half of the memory holds llama.cpp's caches: keys and values of f16 a layer."""
    token = 4 * size.hidden_size * size.num_hidden_layers
    have = memory_of(CPU)
    return have is None or 2 * contenders * rows * tokens * token <= have


def _rested(prepare: Prepare) -> Prepare:
    """The same with a pause before the work, in which the other library's threads fall asleep."""

    def prepare_and_rest() -> Callable[[], object]:
        work = prepare()
        time.sleep(PAUSE)
        return work

    return prepare_and_rest


def summary(plan: Plan, results: Results) -> list[list[str]]:
    """All cases in two tables of Markdown: of one row ms a token, of more tokens a second."""
    one = [place for place in places(plan) if place[0] == 1]
    more = [place for place in places(plan) if place[0] > 1]
    return [_table(MS, one, plan, results), _table(TOKENS, more, plan, results)]


def _table(
    unit: str, rows_and_contexts: Sequence[Place], plan: Plan, results: Results
) -> list[str]:
    sizes = plan.llama_sizes
    titles = [llama_case(size, *x, results) for size in sizes for x in rows_and_contexts]
    own = [x for x in results.measurements if x.benchmark == LLAMA and x.case in titles]
    names = dict.fromkeys(one.contender for one in own)
    pairs = {}
    for weights, (ours, theirs) in PAIRS.items():
        for title, name in ((weights, ours), (f"{weights}{COMPILED}", ours + COMPILED)):
            if names.keys() >= {name, theirs}:
                pairs[title] = name, theirs
    rows = [[unit, *names, *(f"{title}: x faster" for title in pairs)]]
    rows.append(["---"] * len(rows[0]))
    for case in titles:
        found = {name: results.find(LLAMA, case, name) for name in names}
        speeds = [None if x is None else x.tokens_per_second for x in found.values()]
        ratios = [results.speedup(found[a], found[b]) for a, b in pairs.values()]
        if unit == TOKENS:
            cells = ["" if x is None else f"{x:,.0f}" for x in speeds]
        else:
            cells = ["" if x is None else f"{1000 / x:.2f}" for x in speeds]
        rows.append([case, *cells, *("" if x is None else f"{x:.2f}" for x in ratios)])
    return [f"| {' | '.join(row)} |" for row in rows]
