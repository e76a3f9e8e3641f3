"""A comparison as a table for people and as JSON for programs."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from retnet.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Difference
from retnet.evaluation.comparison import Comparison, ModelResult
from retnet.evaluation.metrics import word_perplexity
from retnet.evaluation.speed import ROUNDS, TOKENS_PER_ROUND
from retnet.evaluation.text import EvaluationText
from retnet.terminal import in_one_line

WIDTH = 100
NAME_WIDTH = 22
FEW_DOCUMENTS = 20


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, the others to the right; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def format_comparison(comparison: Comparison) -> str:
    """The comparison as plain text, at most 100 columns wide."""
    parts = [_heading(comparison), _quality(comparison), _differences(comparison)]
    if comparison.models[0].speed:
        parts.append(_speed(comparison))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _heading(comparison: Comparison) -> list[str]:
    text, environment = comparison.text, comparison.environment
    if comparison.stride is None:
        windows = "state carried through each document"
    else:
        windows = f"context {comparison.context}, stride {comparison.stride} tokens"
    dtypes = " and ".join(sorted({model.dtype for model in comparison.models}))
    lines = [
        *textwrap.wrap(f"text     {text.description}", WIDTH, subsequent_indent=" " * 9),
        f"         {count(len(text.documents), noun_of(text))}, {text.num_bytes:,} bytes",
        f"windows  {windows}",
        *textwrap.wrap(f"targets  {targets_of(comparison)}", WIDTH, subsequent_indent=" " * 9),
        f"machine  {environment['device']}, {count(environment['threads'], 'thread')}, {dtypes}, "
        f"Python {environment['python']}, torch {environment['torch']}",
    ]
    if not comparison.same_tokenizers:
        lines += _note(
            "the tokenizers differ: compare bits/byte; tokens, windows and perplexities are not "
            "alike"
        )
    if len({model.trained_in for model in comparison.models} - {None}) > 1:
        pairs = zip(labels(comparison), comparison.models, strict=True)
        each = ", ".join(f"{label} in {model.trained_in}" for label, model in pairs)
        lines += _note(f"trained in different precisions: {each}")
    for label, model in zip(labels(comparison), comparison.models, strict=True):
        if model.base is not None:
            lines += _note(in_one_line(f"{label} is an adapter, merged into {model.base}"))
    return lines


def _note(said: str) -> list[str]:
    return textwrap.wrap(f"note     {said}", WIDTH, subsequent_indent=" " * 9)


def targets_of(comparison: Comparison) -> str:
    """What counts as a target, and where a document begins in another way than ours do."""
    if comparison.text.are_conversations:
        return (
            "What the assistant says, and the marker that ends each answer; by each model's own "
            "chat template. Bytes are those of the answers."
        )
    said = "All tokens after <bos>, <eos> at the end of a document included."
    if not comparison.eos:
        said = "All tokens after <bos>, without <eos> at the end of a document (--no-eos)."
    for label, model in zip(labels(comparison), comparison.models, strict=True):
        if model.begins is None:
            said += (
                f" {label} has no <bos> or <eos>: of a document's first token all of the "
                "vocabulary is equally likely."
            )
        elif model.begins_with_eos:
            said += f" {label} has its <eos>, {model.begins}, in place of <bos>."
    return said


def noun_of(text: EvaluationText) -> str:
    """What a document of a text is called."""
    return "conversation" if text.are_conversations else "document"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def labels(comparison: Comparison) -> list[str]:
    """Numbered names, shortened at the front, where paths say least."""
    return [
        f"{number} {name if len(name) <= NAME_WIDTH else '...' + name[3 - NAME_WIDTH :]}"
        for number, name in enumerate((model.name for model in comparison.models), start=1)
    ]


def _quality(comparison: Comparison) -> list[str]:
    rows = [["model", "mixer", "parameters", "tokens", "nats/token", "perplexity", "bits/byte"]]
    for label, model in zip(labels(comparison), comparison.models, strict=True):
        scores, perplexity = model.scores, model.scores.perplexity
        sizes = [f"{model.parameters:,}", f"{scores.targets.sum():,}"]
        readable = f"{perplexity:,.3f}" if perplexity < 1e5 else f"{perplexity:.3e}"
        losses = [f"{scores.nats_per_token:.4f}", readable, f"{scores.bits_per_byte:.4f}"]
        rows.append([label, model.mixer, *sizes, *losses])
    return format_table(rows)


def _differences(comparison: Comparison) -> list[str]:
    documents = len(comparison.text.documents)
    rows = [["minus model 1", "nats/token", "bits/byte", "verdict"]]
    for label, model in list(zip(labels(comparison), comparison.models, strict=True))[1:]:
        nats, bits = model.nats_difference, model.bits_difference
        assert bits is not None
        in_nats = "other tokens" if nats is None else _format_difference(nats)
        rows.append([label, in_nats, _format_difference(bits), _verdict(bits)])
    over = f"a paired bootstrap over documents, {RESAMPLES:,} resamples"
    method = f"[{CONFIDENCE:.0%} interval of {over}]"
    if documents < 2:
        method = "no interval: it takes at least 2 documents to resample"
    elif documents < FEW_DOCUMENTS:
        method += f"; rough, of only {documents} documents"
    return [*format_table(rows), method]


def _format_difference(difference: Difference) -> str:
    return f"{difference.value:+.4f} {format_interval(difference)}".rstrip()


def format_interval(difference: Difference) -> str:
    """ "[low, high]"; empty where there is none."""
    return "" if difference.low is None else f"[{difference.low:+.4f}, {difference.high:+.4f}]"


def _verdict(difference: Difference) -> str:
    """In one word what a difference of bits per byte, which count for all tokenizers, means."""
    if difference.low is None:
        return ""
    if not difference.is_clear:
        return "unclear"
    return "worse" if difference.value > 0 else "better"


def _speed(comparison: Comparison) -> list[str]:
    rows = [["decoding", "after tokens", "ms/token", "quartiles", "bytes of state or cache"]]
    for entries in zip(*(model.speed for model in comparison.models), strict=True):
        for label, entry in zip(labels(comparison), entries, strict=True):
            figures = ["stopped" if entry.stopped else "not defined", "", ""]
            if entry.ms_per_token is not None:
                quartiles = f"{entry.ms_low:.2f}-{entry.ms_high:.2f}"
                figures = [f"{entry.ms_per_token:.2f}", quartiles, f"{entry.cache_bytes:,}"]
            rows.append([label, f"{entry.context:,}", *figures])
    rounds = f"{ROUNDS} interleaved rounds of {TOKENS_PER_ROUND} tokens"
    return [*format_table(rows), f"[batch 1, median of {rounds}, after one to warm up]"]


def to_json(comparison: Comparison, command: Sequence[str]) -> dict[str, Any]:
    """The comparison that a command line made, with all that it takes to check or repeat it."""
    return {
        "command": list(command),
        "text": {
            "description": comparison.text.description,
            "documents": len(comparison.text.documents),
            "bytes": comparison.text.num_bytes,
            "words": comparison.text.words,
            "targets": "answers" if comparison.text.are_conversations else "all",
        },
        "context": comparison.context,
        "stride": comparison.stride,
        "carry_state": comparison.stride is None,
        "eos_scored": comparison.eos,
        "same_tokenizers": comparison.same_tokenizers,
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "over": "documents"},
        "speed": {"batch": 1, "rounds": ROUNDS, "tokens_per_round": TOKENS_PER_ROUND},
        "environment": comparison.environment,
        "models": [_model_json(model, comparison.text.words) for model in comparison.models],
    }


def _model_json(model: ModelResult, words: int) -> dict[str, Any]:
    """``words`` of the text."""
    scores, nats, bits = model.scores, model.nats_difference, model.bits_difference
    return {
        "name": model.name,
        "path": str(model.path),
        "base": None if model.base is None else str(model.base),
        "mixer": model.mixer,
        "dtype": model.dtype,
        "parameters": model.parameters,
        "tokens": int(scores.targets.sum()),
        "nats_per_token": scores.nats_per_token,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
        "word_perplexity": word_perplexity(scores.nll.sum().item(), words),
        "same_tokenizer": model.same_tokenizer,
        "begins_with": model.begins,
        "nats_per_token_difference": None if nats is None else asdict(nats),
        "bits_per_byte_difference": None if bits is None else asdict(bits),
        "decoding": [asdict(entry) for entry in model.speed],
        "documents": {
            "nll": scores.nll.tolist(),
            "targets": scores.targets.tolist(),
            "bytes": scores.bytes.tolist(),
        },
    }
