"""The training and prefill benchmarks."""

from collections.abc import Sequence

from benchmarks.contenders import Contender, Field, Llama, Size, add_ours, make_llama, with_compiled
from benchmarks.decoding import decoding_field
from benchmarks.limits import linear_flops, linear_products, matmul_products
from benchmarks.measure import (
    LIMIT,
    MATMULS,
    PREFILL,
    TRAIN,
    Piece,
    Plan,
    Results,
    measure,
    random_ids,
)
from benchmarks.others import add_others


def training_case(rows: int, length: int) -> str:
    return f"training step, {rows} x {length} tokens"


def prefill_case(length: int) -> str:
    return f"prefill of {length} tokens"


def passes(
    contenders: Sequence[Contender],
    rows: int,
    length: int,
    plan: Plan,
    case: str,
    size: Size | None = None,
) -> list[Piece]:
    """A forward and backward pass of each that can train rows of this length."""
    ids = random_ids(rows, length + 1, plan, size or plan.size)
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return [
        Piece(case, one.name, rows * length, one.training_step(ids, targets))
        for one in contenders
        if one.longest is None or length <= one.longest
    ]


def training_pieces(
    contenders: list[Contender], length: int, plan: Plan, case: str | None = None
) -> list[Piece]:
    """One step of each that can train rows of this length, and the limit."""
    rows = max(1, plan.step_tokens // length)
    case = case or training_case(rows, length)
    pieces, tokens = passes(contenders, rows, length, plan, case), rows * length
    model = contenders[0].model
    return [
        *pieces,
        Piece(case, MATMULS, tokens, matmul_products(model, tokens)),
        Piece(case, LIMIT, tokens, linear_products(model, tokens)),
    ]


def train(plan: Plan, results: Results) -> None:
    """Forward and backward pass without the optimizer."""
    field = Field(plan.device, plan.dtype)
    add_ours(field, plan.size)
    field.add(Llama("Llama", make_llama(plan.size)))
    add_others(field, plan.size, forms=True)
    results.note_field(plan.size, field)
    retnet = field.contenders[0]
    flops = linear_flops(retnet.model, plan.step_tokens)
    results.facts["linear layers, floating-point operations of a training step"] = flops
    for length in plan.train_lengths:
        compiled = plan.compiled and length == plan.train_short
        contenders = with_compiled(field.contenders, compiled)
        measure(TRAIN, training_pieces(contenders, length, plan), plan, results)
    pieces = [
        piece
        for length in (plan.train_short, plan.train_long)
        for piece in training_pieces([retnet], length, plan, long_case(length))
    ]
    measure(TRAIN, pieces, plan, results)


def long_case(length: int) -> str:
    """The case of the two steps that only the RetNet makes, to compare their costs per token."""
    return f"one row of {length} tokens"


def prefill(plan: Plan, results: Results) -> None:
    """Reading a prompt in one row; the whole memory is made, the logits of the last token only."""
    field = decoding_field(plan.size, plan, results)
    for length in plan.prefill_lengths:
        pieces = reading_pieces(field.contenders, length, plan, prefill_case(length))
        measure(PREFILL, pieces, plan, results)
    pieces = [
        piece
        for length in (plan.prefill_short, plan.prefill_long)
        for piece in reading_pieces(field.contenders[:1], length, plan, long_case(length))
    ]
    measure(PREFILL, pieces, plan, results)


def reading_pieces(contenders: list[Contender], length: int, plan: Plan, case: str) -> list[Piece]:
    ids = random_ids(1, length, plan, plan.size)
    return [Piece(case, one.name, length, one.reading(ids)) for one in contenders]
