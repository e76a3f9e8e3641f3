"""What a report says: title, sentences, tables and pictures of the findings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from retnet.evaluation import metrics
from retnet.evaluation.comparison import ModelResult
from retnet.evaluation.metrics import word_perplexity
from retnet.evaluation.profile import MeanLoss
from retnet.evaluation.report.findings import Findings
from retnet.evaluation.report.pages import Page, Table
from retnet.evaluation.report.pictures import pictures
from retnet.evaluation.report.summary import megabytes, percent, summary
from retnet.evaluation.report.table import count, targets_of

NONE = "-"
READABLE = 1e6


def page_of(findings: Findings, command: Sequence[str]) -> Page:
    """The page of a comparison that a command line asked for."""
    comparison = findings.comparison
    text, environment = comparison.text, comparison.environment
    about = [
        f"{date.today().isoformat()}. Text: {text.description}, "
        f"{count(len(text.documents), 'document')}, {text.num_bytes:,} bytes, in windows of "
        f"{comparison.context:,} tokens. {targets_of(comparison)}",
        f"Machine: {environment['processor']}, {environment['device']}, "
        f"{count(environment['threads'], 'thread')}; Python {environment['python']}, torch "
        f"{environment['torch']}, transformers {environment['transformers']}.",
        f"Command: {' '.join(command)}",
    ]
    title = " and ".join(model.name for model in comparison.models)
    costs = [table for table in _costs(findings) if len(table.rows) > 1]  # perhaps not measured
    tables = [*_quality(findings), *_profiles(findings), *costs]
    return Page(f"Comparison of {title}", about, summary(findings), tables, pictures(findings))


def _quality(findings: Findings) -> Iterator[Table]:
    head = ["", "mixer", "parameters", "trained in", "perplexity", "by words", "bits/byte",
            "with the state carried", "perplexity against the first"]  # fmt: skip
    rows = [head]
    for model, carried in zip(findings.comparison.models, findings.carried, strict=True):
        scores = model.scores
        rows.append([
            model.name, model.mixer, f"{model.parameters:,}", model.trained_in or NONE,
            f"{scores.perplexity:,.2f}", _by_words(findings, model), f"{scores.bits_per_byte:.4f}",
            NONE if carried is None else f"{carried:.4f}", _against(model),
        ])  # fmt: skip
    note = (
        f"By words: perplexity over {findings.comparison.text.words:,} words and ends of lines, "
        "as published for WikiText. "
        "Carried: bits per byte with the state handed through each whole document, no windows."
    )
    if not findings.comparison.same_tokenizers:
        note += " The tokenizers differ: only bits per byte can be compared."
    yield Table("Quality", rows, note)


def _by_words(findings: Findings, model: ModelResult) -> str:
    figure = word_perplexity(model.scores.nll.sum().item(), findings.comparison.text.words)
    return f"{figure:,.2f}" if figure < READABLE else f"{figure:.1e}"


def _against(model: ModelResult) -> str:
    if model.nats_difference is None:
        return NONE
    value, low, high = percent(model.nats_difference)
    return f"{value:+.1f} %" + ("" if low is None else f" [{low:+.1f}, {high:+.1f}]")


def _profiles(findings: Findings) -> Iterator[Table]:
    if findings.profiles is None:
        return
    names = [model.name for model in findings.comparison.models]

    def table(title: str, first: str, losses: Sequence[Mapping[Any, MeanLoss | None]]) -> Table:
        rows = [[first, "targets", *names]]
        for key in losses[0]:
            own = [one[key] for one in losses]
            targets = next((one.targets for one in own if one is not None), 0)
            if targets:
                label = f"{key:,}" if isinstance(key, int) else key
                rows.append([label, f"{targets:,}", *map(_perplexity, own)])
        return Table(title, rows, "Perplexity.")

    profiles = findings.profiles
    if profiles[0].by_context:
        title = "By context: the same targets, within and beyond the trained length"
        yield table(title, "tokens", [one.by_context for one in profiles])
    yield table("By kind of target", "", [one.by_kind for one in profiles])


def _perplexity(loss: MeanLoss | None) -> str:
    if loss is None:
        return "not defined"
    return NONE if loss.nats is None else f"{metrics.perplexity(loss.nats, 1):,.2f}"


def _costs(findings: Findings) -> Iterator[Table]:
    names = [model.name for model in findings.comparison.models]

    def table(
        title: str,
        part: str,
        keys: Mapping[str, Callable[[Any], int]],
        cells: Mapping[str, Callable[[Any], str | None]],
        note: str = "",
    ) -> Table:
        measured = [one for costs in findings.costs for one in getattr(costs, part)]
        known = {head: cell for head, cell in cells.items() if any(map(cell, measured))}
        cells = known or cells  # all of them were stopped
        rows = [[*keys, "", *cells]]
        for entries in zip(*(getattr(costs, part) for costs in findings.costs), strict=True):
            for name, entry in zip(names, entries, strict=True):
                empty = "stopped" if entry.stopped else "not defined"
                found = [cell(entry) for cell in cells.values()]
                shown = [cell or (NONE if any(found) else empty) for cell in found]
                rows.append([*(f"{key(entry):,}" for key in keys.values()), name, *shown])
        return Table(title, rows, note)

    def figure(value: float | None, digits: int = 0) -> str | None:
        return None if value is None else f"{value:,.{digits}f}"

    def size(value: int | None) -> str | None:
        return None if value is None else megabytes(value)

    yield table(
        "Generating, by context", "by_context", {"tokens": lambda one: one.context},
        {
            "prompt tokens/s": lambda one: figure(one.prefill_tokens_per_second),
            "ms/token": lambda one: figure(one.ms_per_token, 2),
            "state or cache": lambda one: size(one.cache_bytes),
            "peak memory beyond weights": lambda one: size(one.peak_bytes),
        },
        "One row. Stopped: reading would have taken too long, or the memory would not fit.",
    )  # fmt: skip
    yield table(
        "Generating, by rows side by side", "by_batch",
        {"tokens": lambda one: one.context, "rows": lambda one: one.rows},
        {
            "tokens/s, all rows": lambda one: figure(one.tokens_per_second),
            "ms for each": lambda one: figure(one.ms_per_token, 2),
        },
        "After so many tokens of context in each row.",
    )  # fmt: skip
    yield table(
        "Training, by the length of rows", "training", {"tokens": lambda one: one.length},
        {
            "tokens/s": lambda one: figure(one.tokens_per_second),
            "peak of one row": lambda one: size(one.row_bytes),
        },
        "Forward and backward pass without the optimizer, about 2,048 tokens a step.",
    )  # fmt: skip
