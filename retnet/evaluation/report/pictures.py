"""The report's pictures: readable in print, by the colour-blind, and on a telephone.

A mixer has the same colour in all of them; models of one mixer differ by line and marker.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from retnet.evaluation.report.findings import Findings, History
from retnet.evaluation.report.table import labels
from retnet.model.mixers import MIXERS
from retnet.terminal import harmless

# Okabe and Ito's, which the colour-blind tell apart; no yellow, which paper does not show
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS, LINES = "osD^vPX*", ("-", "--", ":", "-.")
WIDE, HIGH, DPI = 8.0, 3.6, 120


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows for those who do not see it."""

    name: str
    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Curve:
    """A model's values; ``end``, if any, says why there are no more."""

    x: list[float]
    y: list[float]
    end: str = ""


def pictures(findings: Findings) -> list[Picture]:
    """All that there are figures for."""
    import matplotlib

    matplotlib.use("Agg")  # no screen
    makers = [_losses, _positions, _contexts, _kinds, _decoding, _throughput, _training, _windows]
    if not findings.costs[0].by_context:  # not measured
        makers = [make for make in makers if make not in (_decoding, _throughput, _training)]
    return [picture for make in makers for picture in make(findings)]


def styles(findings: Findings) -> list[dict[str, Any]]:
    """Colour, line and marker of each model."""
    return styles_of([model.mixer for model in findings.comparison.models])


def styles_of(mixers: Sequence[str]) -> list[dict[str, Any]]:
    """Colour, line and marker of each curve, by the name of its mixer."""
    names, seen, found = list(MIXERS), list[str](), []
    for number, own in enumerate(mixers):
        mixer = names.index(own) if own in names else len(names)
        line = LINES[seen.count(own) % len(LINES)]
        seen.append(own)
        marker = MARKERS[number % len(MARKERS)]
        colour = COLOURS[mixer % len(COLOURS)]
        found.append({"color": colour, "linestyle": line, "marker": marker, "markersize": 5})
    return found


def _axes(number: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDE, HIGH), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, number, squeeze=False)[0]
    for one in axes:
        one.grid(True, linewidth=0.4, alpha=0.6)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(findings: Findings, axis: Any, curves: Sequence[Curve | None], x: str, y: str) -> None:
    """A line for each model; a cross where it ends before the others."""
    for label, style, curve in zip(
        labels(findings.comparison), styles(findings), curves, strict=True
    ):
        if curve is None or not curve.x:
            continue
        axis.plot(curve.x, curve.y, label=_plain(label), linewidth=1.8, **style)
        if curve.end:
            colour = style["color"]
            axis.plot(curve.x[-1:], curve.y[-1:], "x", color=colour, markersize=12, mew=2)
            where = (curve.x[-1], curve.y[-1])
            axis.annotate(curve.end, where, (6, 6), textcoords="offset points", color=colour,
                          fontsize=9)  # fmt: skip
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def _doubling(axis: Any) -> None:
    """A logarithmic axis with the lengths themselves on it, at most eight."""
    lengths = sorted({float(x) for line in axis.get_lines() for x in line.get_xdata()})
    axis.set_xscale("log", base=2)
    shown = lengths[:: max(1, -(-len(lengths) // 8))]
    axis.set_xticks(shown, [f"{length:,.0f}" for length in shown], fontsize=9)
    axis.minorticks_off()


def _times(axis: Any) -> None:
    """A logarithmic axis upwards, with plain numbers on it."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axis.get_ylim()
    if high < 30 * low:  # else they stand in each other's way
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    else:
        axis.yaxis.set_minor_formatter("")
    axis.tick_params(axis="y", which="both", labelsize=8)


def _plain(text: str) -> str:
    """A name that matplotlib takes for no formula."""
    return harmless(text).replace("$", r"\$")


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9, frameon=False)


def _losses(findings: Findings) -> Iterator[Picture]:
    histories = findings.histories
    if not any(histories):
        return
    figure, axes = _axes(2)

    def curves(seconds: bool) -> list[Curve | None]:
        return [None if one is None else _smooth(one, seconds) for one in histories]

    for axis, timed, x in zip(axes, (False, True), ("step", "seconds of training"), strict=True):
        _draw(findings, axis, curves(timed), x, "training loss, nats per token")
        for line in axis.get_lines():
            line.set_marker("")
        for one, style in zip(histories, styles(findings), strict=True):
            if one is not None and not (timed and one.seconds is None):
                _validation(axis, one, timed, style)
    _legend(axes[0])
    caption = "Mean training loss of the steps around (line), and validation loss (markers)."
    yield Picture("losses", "While training", caption, _png(figure))


def _smooth(history: History, timed: bool) -> Curve | None:
    """At most 100 points, each the mean of its part of the run."""
    x = history.seconds if timed else [float(step) for step in history.steps]
    if x is None:
        return None
    size = -(-len(x) // 100)
    parts = range(0, len(x), size)
    means = [history.training[i : i + size] for i in parts]
    ends = [x[min(i + size, len(x)) - 1] for i in parts]
    return Curve(ends, [sum(part) / len(part) for part in means])


def _validation(axis: Any, history: History, timed: bool, style: dict[str, Any]) -> None:
    at = dict(zip(history.steps, history.seconds or (), strict=False)) if timed else {}
    x = [at[step] if timed else step for step in history.validation]
    axis.plot(x, list(history.validation.values()), **{**style, "linestyle": "none"})


def _positions(findings: Findings) -> Iterator[Picture]:
    if findings.profiles is None:
        return
    figure, (axis,) = _axes(1)
    curves = []
    for one in findings.profiles:
        found = {end: loss.nats for end, loss in one.by_position.items() if loss.nats is not None}
        curves.append(Curve([float(end) for end in found], list(found.values())))
    _draw(findings, axis, curves, "tokens before the target in its window, up to", "nats per token")
    _doubling(axis)
    _legend(axis)
    caption = f"Loss by position in windows of {findings.comparison.context:,} tokens."
    yield Picture("positions", "What context is worth", caption, _png(figure))


def _contexts(findings: Findings) -> Iterator[Picture]:
    if findings.profiles is None or not findings.profiles[0].by_context:
        return
    figure, (axis,) = _axes(1)
    curves = []
    for one in findings.profiles:
        found = {
            c: loss.nats for c, loss in one.by_context.items() if loss and loss.nats is not None
        }
        end = "" if len(found) == len(one.by_context) else "not defined"
        curves.append(Curve([float(c) for c in found], list(found.values()), end))
    _draw(findings, axis, curves, "tokens of context", "nats per token")
    _doubling(axis)
    for trained in set(findings.trained):
        axis.axvline(trained, color="#7F7F7F", linewidth=1)
        axis.annotate("trained", (trained, 1), (3, -9), fontsize=9,
                  xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip
    _legend(axis)
    targets = next(loss.targets for loss in findings.profiles[0].by_context.values() if loss)
    caption = f"The same {targets:,} targets at the ends of windows of several lengths."
    yield Picture("contexts", "Within and beyond the trained length", caption, _png(figure))


def _kinds(findings: Findings) -> Iterator[Picture]:
    if findings.profiles is None:
        return
    figure, (axis,) = _axes(1)
    kinds = [kind for kind, loss in findings.profiles[0].by_kind.items() if loss.targets]
    height = 0.8 / len(findings.profiles)
    rows = zip(labels(findings.comparison), styles(findings), findings.profiles, strict=True)
    for number, (label, style, one) in enumerate(rows):
        places = [i + number * height for i in range(len(kinds))]
        values = [one.by_kind[kind].nats or 0 for kind in kinds]
        hatch = "" if style["linestyle"] == "-" else "//"
        axis.barh(places, values, height, label=_plain(label), color=style["color"], hatch=hatch)
    axis.set_yticks([i + 0.4 - height / 2 for i in range(len(kinds))], kinds, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("nats per token")
    _legend(axis)
    caption = "Loss by kind of target: whether its pair has been there, and how frequent it is."
    yield Picture("kinds", "What is predicted well", caption, _png(figure))


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


def _decoding(findings: Findings) -> Iterator[Picture]:
    figure, axes = _axes(2)
    time = _costs(findings, "by_context", lambda one: one.context, lambda one: one.ms_per_token)
    size = _costs(findings, "by_context", lambda one: one.context, lambda one: _mb(one.cache_bytes))
    _draw(findings, axes[0], time, "tokens of context", "ms per token")
    _draw(findings, axes[1], size, "tokens of context", "MB of state or cache")
    for axis in axes:
        _doubling(axis)
        _times(axis)
    _legend(axes[0])
    caption = "One row; greedy. A cross: the next length would take too long, or not fit."
    yield Picture("decoding", "Generating: time and memory", caption, _png(figure))


def _throughput(findings: Findings) -> Iterator[Picture]:
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


def _training(findings: Findings) -> Iterator[Picture]:
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
    """Two panels side by side, upwards from 0: curves and what the axes show."""
    figure, axes = _axes(2)
    for axis, panel in zip(axes, panels, strict=True):
        _draw(findings, axis, *panel)
        _doubling(axis)
        axis.set_ylim(bottom=0)
    _legend(axes[0])
    return _png(figure)


def _windows(findings: Findings) -> Iterator[Picture]:
    if not any(findings.windows):
        return
    figure, (axis,) = _axes(1)
    for number, (own, style) in enumerate(zip(findings.windows, styles(findings), strict=True)):
        finite = [window for window in own if window < float("inf")]
        axis.plot(finite, [number] * len(finite), **{**style, "linestyle": "none", "markersize": 8})
    names = [_plain(label) for label in labels(findings.comparison)]
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    _doubling(axis)
    axis.set_xlabel("tokens that a head looks back, 1 / (1 - decay)")
    caption = "A marker for each head whose decay is fixed; attention and learned decays have none."
    yield Picture("windows", "How far heads look back", caption, _png(figure))


def shares(
    names: Sequence[str],
    mixers: Sequence[str],
    panels: Sequence[tuple[Sequence[Curve], str]],
    y: str,
    chance: float,
) -> bytes:
    """A PNG of panels side by side, from 0 to 1 upwards: the curves, and what x shows.

    The names of the curves, and of their mixers, are the same in all panels; a line shows what
    chance gives.
    """
    figure, axes = _axes(len(panels))
    for axis, (curves, x) in zip(axes, panels, strict=True):
        for name, style, curve in zip(names, styles_of(mixers), curves, strict=True):
            axis.plot(curve.x, curve.y, label=_plain(name), linewidth=1.8, **style)
        _doubling(axis)
        axis.axhline(chance, color="#7F7F7F", linewidth=1, linestyle=":", label="by chance")
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel(x)
    axes[0].set_ylabel(y)
    handles, shown = axes[0].get_legend_handles_labels()
    figure.legend(handles, shown, loc="outside right center", fontsize=9, frameon=False)
    return _png(figure)
