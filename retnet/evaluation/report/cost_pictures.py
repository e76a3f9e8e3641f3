"""The report's pictures of what models cost, and of how far their heads look back."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from retnet.evaluation.report.canvas import Picture, side_by_side, to_png, two_in_a_row
from retnet.evaluation.report.curves import (
    Curve,
    doubling,
    draw,
    legend,
    plain,
    styles,
    times_upwards,
)
from retnet.evaluation.report.findings import Findings
from retnet.evaluation.report.table import labels

# curves, and what the axes show
Panel = tuple[Sequence[Curve | None], str, str]


def _costs(
    findings: Findings,
    part: str,
    x: Callable[[Any], float],
    y: Callable[[Any], float | None],
    only: Callable[[Any], bool] = lambda one: True,
) -> list[Curve | None]:
    curves: list[Curve | None] = []
    for costs in findings.costs:
        entries = [one for one in getattr(costs, part) if only(one)]
        found = [(x(one), value) for one in entries if (value := y(one)) is not None]
        end = "stopped" if any(one.stopped for one in entries) else ""
        curves.append(Curve([a for a, _ in found], [b for _, b in found], end))
    return curves


def _mb(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def decoding(findings: Findings) -> Iterator[Picture]:
    def by_context(y: Callable[[Any], float | None], shown: str) -> Panel:
        curves = _costs(findings, "by_context", lambda one: one.context, y)
        return curves, "tokens of context", shown

    png = _panels(
        findings,
        by_context(lambda one: one.ms_per_token, "ms per token"),
        by_context(lambda one: _mb(one.cache_bytes), "MB of state or cache"),
        by_context(lambda one: _mb(one.peak_bytes), "MB at the peak, beyond the weights"),
        upwards=times_upwards,
    )
    caption = "One row; greedy. A cross: the next length would take too long, or not fit."
    yield Picture("decoding", "Generating: time and memory", caption, png)


def throughput(findings: Findings) -> Iterator[Picture]:
    reading = _costs(findings, "by_context", lambda one: one.context,
                     lambda one: one.prefill_tokens_per_second)  # fmt: skip
    png = _panels(
        findings,
        (reading, "tokens of the prompt", "prompt tokens per second"),
        *(_rows_after(findings, context) for context in _telling(findings)),
        upwards=_from_zero,
    )
    caption = (
        "Reading a prompt, and generating several texts at once; all contexts are in the table."
    )
    yield Picture("throughput", "Prompts and batches", caption, png)


def _rows_after(findings: Findings, context: int) -> Panel:
    rows = _costs(
        findings, "by_batch", lambda one: one.rows, lambda one: one.tokens_per_second,
        lambda one: one.context == context,
    )  # fmt: skip
    shown = f"rows side by side, {context:,} tokens in each"
    return rows, shown, "new tokens per second, all rows"


def _telling(findings: Findings) -> list[int]:
    """The first context of batches, and the longest of those at which most was measured."""
    entries = [one for costs in findings.costs for one in costs.by_batch]
    known = Counter(one.context for one in entries if one.ms_per_token is not None)
    contexts = sorted({one.context for one in entries})
    others = sorted(contexts[1:], key=lambda context: (known[context], context))
    return [*contexts[:1], *others[-1:]]


def training(findings: Findings) -> Iterator[Picture]:
    speed = _costs(findings, "training", lambda one: one.length, lambda one: one.tokens_per_second)
    peaks = _costs(findings, "training", lambda one: one.length, lambda one: _mb(one.row_bytes))
    png = _panels(
        findings,
        (speed, "tokens of a row", "tokens per second"),
        (peaks, "tokens of the one row", "MB at the peak of a step"),
        upwards=_from_zero,
    )
    caption = "Forward and backward pass, without the optimizer."
    yield Picture("training", "Training by the length of rows", caption, png)


def _from_zero(axis: Any) -> None:
    axis.set_ylim(bottom=0)


def _panels(findings: Findings, *panels: Panel, upwards: Callable[[Any], None]) -> bytes:
    """Panels, two in a row, none without a point; a place that is left is the legend's."""
    drawn = [panel for panel in panels if any(curve and curve.x for curve in panel[0])]
    drawn = drawn or [panels[0]]
    figure, axes = two_in_a_row(len(drawn))
    for axis, panel in zip(axes, drawn, strict=False):
        draw(findings, axis, *panel)
        doubling(axis)
        upwards(axis)
    legend(axes[0], axes[-1] if len(axes) > len(drawn) else None)
    return to_png(figure)


def windows(findings: Findings) -> Iterator[Picture]:
    if not any(findings.windows):
        return
    figure, (axis,) = side_by_side(1)
    for number, (own, style) in enumerate(zip(findings.windows, styles(findings), strict=True)):
        finite = [window for window in own if window < float("inf")]
        axis.plot(finite, [number] * len(finite), **{**style, "linestyle": "none", "markersize": 8})
    names = [plain(label) for label in labels(findings.comparison)]
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    doubling(axis)
    axis.set_xlabel("tokens that a head looks back, 1 / (1 - decay)")
    caption = (
        "A marker for each head whose decay is fixed; attention, learned decays and heads without "
        "decay have none."
    )
    yield Picture("windows", "How far heads look back", caption, to_png(figure))
