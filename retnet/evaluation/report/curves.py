"""Curves by mixer, readable in print and by the colour-blind.

A mixer has the same colour in all pictures; curves of one mixer differ by line and marker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retnet.evaluation.report.canvas import HIGH, WIDE, grid_of, own_settings, side_by_side, to_png
from retnet.evaluation.report.findings import Findings
from retnet.evaluation.report.table import labels
from retnet.model.mixers import MIXERS
from retnet.terminal import harmless

# Okabe and Ito's, which the colour-blind tell apart; no yellow, which paper does not show
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS, LINES = "osD^vPX*", ("-", "--", ":", "-.")


MOST_LENGTHS = 8  # named on an axis
NEAREST = 1.7  # times one is the next


@dataclass(frozen=True)
class Curve:
    """A model's values; ``end``, if any, says why there are no more."""

    x: list[float]
    y: list[float]
    end: str = ""


def styles_of(mixers: Sequence[str]) -> list[dict[str, Any]]:
    """Colour, line and marker of each curve, by the name of its mixer."""
    names, seen, found = list(MIXERS), list[int](), []
    for number, own in enumerate(mixers):
        mixer = names.index(own) if own in names else len(names)
        line = LINES[seen.count(mixer) % len(LINES)]  # also of others' models, which share one
        seen.append(mixer)
        marker = MARKERS[number % len(MARKERS)]
        colour = COLOURS[mixer % len(COLOURS)]
        found.append({"color": colour, "linestyle": line, "marker": marker, "markersize": 5})
    return found


def draw_curves(
    axis: Any,
    names: Sequence[str],
    looks: Sequence[dict[str, Any]],
    curves: Sequence[Curve | None],
    x: str,
    y: str,
) -> None:
    """A line for each name; a cross where it ends before the others."""
    for label, style, curve in zip(names, looks, curves, strict=True):
        if curve is None or not curve.x:
            continue
        axis.plot(curve.x, curve.y, label=plain(label), linewidth=1.8, **style)
        if curve.end:
            colour = style["color"]
            axis.plot(curve.x[-1:], curve.y[-1:], "x", color=colour, markersize=12, mew=2)
            where = (curve.x[-1], curve.y[-1])
            axis.annotate(curve.end, where, (6, 6), textcoords="offset points", color=colour,
                          fontsize=9)  # fmt: skip
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def styles(findings: Findings) -> list[dict[str, Any]]:
    """Colour, line and marker of each model."""
    return styles_of([model.mixer for model in findings.comparison.models])


def draw(findings: Findings, axis: Any, curves: Sequence[Curve | None], x: str, y: str) -> None:
    """A line for each model; a cross where it ends before the others."""
    draw_curves(axis, labels(findings.comparison), styles(findings), curves, x, y)


def doubling(axis: Any) -> None:
    """A logarithmic axis with the lengths themselves on it, those that have room."""
    lengths = sorted({float(x) for line in axis.get_lines() for x in line.get_xdata()})
    axis.set_xscale("log", base=2)
    room = max(NEAREST, (lengths[-1] / lengths[0]) ** (1 / MOST_LENGTHS)) if lengths else 1
    shown: list[float] = []
    for length in reversed(lengths):
        if not shown or shown[-1] >= room * length:
            shown.append(length)
    axis.set_xticks(shown, [f"{length:,.0f}" for length in shown], fontsize=9)
    axis.minorticks_off()


def times_upwards(axis: Any) -> None:
    """A logarithmic axis upwards, with plain numbers on it."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axis.get_ylim()
    if high < 30 * low:  # else they stand in each other's way
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    else:
        axis.yaxis.set_minor_formatter("")
    axis.tick_params(axis="y", which="both", labelsize=8)


def plain(text: str) -> str:
    """A name that matplotlib takes for no formula."""
    return harmless(text).replace("$", r"\$")


def legend(axis: Any, place: Any = None) -> None:
    """Where there is something to name, in it or in a place of its own."""
    handles, shown = axis.get_legend_handles_labels()
    if place is not None:
        place.axis("off")
    if handles:
        where = {} if place is None else {"loc": "center"}
        (place or axis).legend(handles, shown, fontsize=9, frameon=False, **where)


@own_settings()
def panels(
    names: Sequence[str],
    mixers: Sequence[str],
    rows: Sequence[Sequence[tuple[Sequence[Curve], str, str]]],
) -> bytes:
    """A PNG of rows of panels with logarithmic axes, one legend below: curves, labels of the axes.

    The names of the curves and of their mixers are the same in all panels.
    """
    inches = (1.25 * WIDE, 1.2 * HIGH * len(rows) + 0.07 * len(names))
    figure, grid = grid_of(len(rows), len(rows[0]), inches)
    shown_in: dict[str, Any] = {}
    for axes, own in zip(grid, rows, strict=True):
        for axis, (curves, x, y) in zip(axes, own, strict=True):
            draw_curves(axis, names, styles_of(mixers), curves, x, y)
            doubling(axis)
            times_upwards(axis)
            handles, shown = axis.get_legend_handles_labels()
            shown_in |= dict(zip(shown, handles, strict=True))
    place = {"loc": "outside lower center", "ncols": 4}
    figure.legend(shown_in.values(), shown_in.keys(), fontsize=9, frameon=False, **place)
    return to_png(figure)


@own_settings()
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
    figure, axes = side_by_side(len(panels))
    for axis, (curves, x) in zip(axes, panels, strict=True):
        for name, style, curve in zip(names, styles_of(mixers), curves, strict=True):
            axis.plot(curve.x, curve.y, label=plain(name), linewidth=1.8, **style)
        doubling(axis)
        axis.axhline(chance, color="#7F7F7F", linewidth=1, linestyle=":", label="by chance")
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel(x)
    axes[0].set_ylabel(y)
    handles, shown = axes[0].get_legend_handles_labels()
    figure.legend(handles, shown, loc="outside right center", fontsize=9, frameon=False)
    return to_png(figure)
