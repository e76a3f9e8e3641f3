"""The decode benchmarks: single steps by context, batch and size, and the loops around them."""

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.contenders import (
    Contender,
    Field,
    Llama,
    Ours,
    Prepare,
    Size,
    make_llama,
    make_retnet,
    make_transformer,
    with_compiled,
)
from benchmarks.limits import decode_bytes, reading
from benchmarks.measure import DECODE, LIMIT, Piece, Plan, Results, measure, random_ids
from benchmarks.others import add_others
from retnet.data import train_bpe
from retnet.generation import Sampling, Usage, print_samples, stream_text
from retnet.model.fast_decode.weights import lay_out_for_decoding

BARE, LOOP, GENERATE = "bare decode step", "generate.py loop", "model.generate"
LOOP_CASE = "the loops around the step"
PROMPT = "import "
BYTES_FACT = "decode at {}: bytes of weights and states a step"


def context_case(context: int) -> str:
    return f"batch 1 after {context} tokens"


def long_case(context: int) -> str:
    """The case in which only the RetNet takes part, to compare contexts."""
    return f"RetNet after {context} tokens"


def batch_case(rows: int) -> str:
    return f"{rows} rows at once"


def large_case(size: Size, parameters: int) -> str:
    return f"{parameters / 1e6:.0f}M parameters ({size})"


def decoding_field(size: Size, plan: Plan, results: Results) -> Field:
    """Everybody as they decode and read: one entry each."""
    field = Field(plan.device, plan.dtype)
    for name, model in (("RetNet", make_retnet(size)), ("Transformer", make_transformer(size))):
        lay_out_for_decoding(model)  # as load_checkpoint does
        field.add(Ours(name, model))
    field.add(Llama("Llama", make_llama(size)))
    add_others(field, size, forms=False)
    results.note_field(size, field)
    return field


def step_pieces(
    contenders: list[Contender], context: int, rows: int, case: str, plan: Plan, size: Size
) -> list[Piece]:
    """Decoding of ``plan.tokens`` tokens a row after a context."""
    ids = random_ids(rows, context, plan, size)
    return [
        Piece(case, one.name, rows * plan.tokens, one.decoding(ids, plan.tokens))
        for one in contenders
    ]


def limit_piece(retnet: Contender, case: str, plan: Plan, size: Size, results: Results) -> Piece:
    """The time to look at the RetNet's weights and states."""
    cache = retnet.model.new_cache()
    with torch.inference_mode():
        retnet.model(random_ids(1, 1, plan, size), past_key_values=cache)
    num_bytes = decode_bytes(retnet.model, cache.num_bytes())
    results.facts[BYTES_FACT.format(size)] = num_bytes
    return Piece(case, LIMIT, plan.tokens, reading(num_bytes, plan.device, plan.tokens))


def decode(plan: Plan, results: Results) -> None:
    """All decode benchmarks."""
    size = plan.size
    field = decoding_field(size, plan, results)
    near, far, farthest = plan.contexts
    retnet = field.contenders[0]

    case = context_case(near)
    pieces = step_pieces(with_compiled(field.contenders, plan.compiled), near, 1, case, plan, size)
    pieces.append(limit_piece(retnet, case, plan, size, results))
    measure(DECODE, pieces, plan, results)

    reads = [one for one in field.contenders if isinstance(one, Ours | Llama)]
    case = context_case(far)
    pieces = step_pieces(with_compiled(reads, plan.compiled), far, 1, case, plan, size)
    measure(DECODE, pieces, plan, results)

    both = with_compiled([retnet], plan.compiled)
    pieces = [
        piece
        for context in (near, farthest)
        for piece in step_pieces(both, context, 1, long_case(context), plan, size)
    ]
    measure(DECODE, pieces, plan, results)
    pieces = [
        piece
        for rows in (1, plan.batch)
        for piece in step_pieces(both, near, rows, batch_case(rows), plan, size)
    ]
    measure(DECODE, pieces, plan, results)
    loops(plan, results)
    large(plan, results)


def large(plan: Plan, results: Results) -> None:
    """A model whose weights no cache holds, against the memory's bandwidth."""
    field = decoding_field(plan.large, plan, results)
    retnet = field.contenders[0]
    case = large_case(plan.large, retnet.num_parameters)
    near = plan.contexts[0]
    contenders = with_compiled(field.contenders, plan.compiled)
    pieces = step_pieces(contenders, near, 1, case, plan, plan.large)
    pieces.append(limit_piece(retnet, case, plan, plan.large, results))
    measure(DECODE, pieces, plan, results)


@functools.cache
def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of this installation's standard library."""
    folder = Path(os.__file__).parent
    files = sorted(folder.glob("*.py"))[:40]
    return train_bpe([path.read_text(encoding="utf-8") for path in files], vocab_size)


def loops(plan: Plan, results: Results) -> None:
    """What generate.py and transformers' generate take beside the steps themselves."""
    tokenizer = _tokenizer(plan.size.vocab_size)
    size = replace(plan.size, vocab_size=len(tokenizer))
    model = make_retnet(size).to(plan.device, plan.dtype).eval()
    lay_out_for_decoding(model)
    retnet = Ours("RetNet", model)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids.to(plan.device)
    tokens = plan.loop_tokens
    works: dict[str, Prepare] = {
        BARE: retnet.decoding(prompt, tokens),
        LOOP: _streaming(retnet, tokenizer, tokens),
        GENERATE: _generating(retnet, prompt, tokens),
    }
    pieces = [Piece(LOOP_CASE, name, tokens, prepare) for name, prepare in works.items()]
    measure(DECODE, pieces, plan, results)


def _streaming(retnet: Contender, tokenizer: PreTrainedTokenizerFast, tokens: int) -> Prepare:
    """generate.py after loading: encode, read, sample, decode text, print (to nowhere)."""

    def stream(seed: int) -> int:
        usage = Usage()
        pieces = stream_text(
            retnet.model,
            tokenizer,
            PROMPT,
            max_new_tokens=tokens,
            sampling=Sampling(seed=seed),
            usage=usage,
        )
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        with nowhere, contextlib.redirect_stdout(nowhere):
            print_samples(PROMPT, pieces, 1)
        return usage.new_tokens

    # random weights may choose the end of the text: take a seed with which they do not
    seed = next(seed for seed in range(100) if stream(seed) == tokens)
    return lambda: lambda: stream(seed)


def _generating(retnet: Contender, prompt: torch.Tensor, tokens: int) -> Prepare:
    def work() -> Callable[[], object]:
        return lambda: retnet.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    return work
