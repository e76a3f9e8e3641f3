"""The report's pictures of what models cost, and of how far their heads look back."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from retnet.evaluation.report.canvas import Picture, side_by_side, to_png
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


def _costs(
    findings: Findings, part: str, x: Callable[[Any], float], y: Callable[[Any], float | None]
) -> list[Curve | None]:
    curves: list[Curve | None] = []
    for costs in findings.costs:
        entries = getattr(costs, part)
        found = [(x(one), value) for one in entries if (value := y(one)) is not None]
        end = "stopped" if any(one.stopped for one in entries) else ""
        curves.append(Curve([a for a, _ in found], [b for _, b in found], end))
    return curves


def _mb(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def decoding(findings: Findings) -> Iterator[Picture]:
    figure, axes = side_by_side(2)
    time = _costs(findings, "by_context", lambda one: one.context, lambda one: one.ms_per_token)
    size = _costs(findings, "by_context", lambda one: one.context, lambda one: _mb(one.cache_bytes))
    draw(findings, axes[0], time, "tokens of context", "ms per token")
    draw(findings, axes[1], size, "tokens of context", "MB of state or cache")
    for axis in axes:
        doubling(axis)
        times_upwards(axis)
    legend(axes[0])
    caption = "One row; greedy. A cross: the next length would take too long, or not fit."
    yield Picture("decoding", "Generating: time and memory", caption, to_png(figure))


def throughput(findings: Findings) -> Iterator[Picture]:
    reading = _costs(findings, "by_context", lambda one: one.context,
                     lambda one: one.prefill_tokens_per_second)  # fmt: skip
    rows = _costs(findings, "by_batch", lambda one: one.rows, lambda one: one.tokens_per_second)
    png = _two(
        findings,
        (reading, "tokens of the prompt", "prompt tokens per second"),
        (rows, "rows side by side", "new tokens per second, all rows"),
    )
    caption = "Reading a prompt, and generating several texts at once."
    yield Picture("throughput", "Prompts and batches", caption, png)


def training(findings: Findings) -> Iterator[Picture]:
    speed = _costs(findings, "training", lambda one: one.length, lambda one: one.tokens_per_second)
    peaks = _costs(findings, "training", lambda one: one.length, lambda one: _mb(one.row_bytes))
    png = _two(
        findings,
        (speed, "tokens of a row", "tokens per second"),
        (peaks, "tokens of the one row", "MB at the peak of a step"),
    )
    caption = "Forward and backward pass, without the optimizer."
    yield Picture("training", "Training by the length of rows", caption, png)


def _two(findings: Findings, *panels: tuple[Sequence[Curve | None], str, str]) -> bytes:
    """Panels side by side, upwards from 0: curves and what the axes show; none without a point."""
    drawn = [panel for panel in panels if any(curve and curve.x for curve in panel[0])]
    drawn = drawn or [panels[0]]
    figure, axes = side_by_side(len(drawn))
    for axis, panel in zip(axes, drawn, strict=True):
        draw(findings, axis, *panel)
        doubling(axis)
        axis.set_ylim(bottom=0)
    legend(axes[0])
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
