"""The report's pictures: readable in print, by the colour-blind, and on a telephone."""

from collections.abc import Iterator
from typing import Any

from retnet.evaluation.report.canvas import DPI, WIDE, Picture, own_settings, side_by_side, to_png
from retnet.evaluation.report.cost_pictures import decoding, throughput, training, windows
from retnet.evaluation.report.curves import Curve, doubling, draw, legend, plain, styles
from retnet.evaluation.report.findings import Findings, History
from retnet.evaluation.report.table import labels

PANELS = 4  # at most, of models whose weights are drawn


def pictures(findings: Findings) -> list[Picture]:
    """All that there are figures for, the same whatever matplotlib is set to on this machine."""
    makers = [_losses, _positions, _contexts, _kinds, _recall]
    if findings.costs[0].by_context:  # measured
        makers += [decoding, throughput, training]
    makers += [windows, _weights]
    with own_settings():
        return [picture for make in makers for picture in make(findings)]


def _losses(findings: Findings) -> Iterator[Picture]:
    histories = findings.histories
    if not any(histories):
        return
    figure, axes = side_by_side(2)

    def curves(seconds: bool) -> list[Curve | None]:
        return [None if one is None else _smooth(one, seconds) for one in histories]

    for axis, timed, x in zip(axes, (False, True), ("step", "seconds of training"), strict=True):
        draw(findings, axis, curves(timed), x, "training loss, nats per token")
        for line in axis.get_lines():
            line.set_marker("")
        for one, style in zip(histories, styles(findings), strict=True):
            if one is not None and not (timed and one.seconds is None):
                _validation(axis, one, timed, style)
    legend(axes[0])
    caption = "Mean training loss of the steps around (line), and validation loss (markers)."
    yield Picture("losses", "While training", caption, to_png(figure))


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
    png = _by_count(findings, "by_position", "tokens before the target in its window, up to")
    if png is not None:
        caption = f"Loss by position in windows of {findings.comparison.context:,} tokens."
        yield Picture("positions", "What context is worth", caption, png)


def _recall(findings: Findings) -> Iterator[Picture]:
    png = _by_count(findings, "by_distance", "tokens since the same pair was there, up to")
    if png is not None:
        caption = "Loss of targets that have followed the same token before in their window."
        yield Picture("recall", "Recall by distance", caption, png)


def _by_count(findings: Findings, part: str, x: str) -> bytes | None:
    """Losses in groups that double; None where there are none."""
    curves = []
    for one in findings.profiles or ():
        groups = getattr(one, part).items()
        found = {end: loss.nats for end, loss in groups if loss.nats is not None}
        curves.append(Curve([float(end) for end in found], list(found.values())))
    if not any(curve.x for curve in curves):
        return None
    figure, (axis,) = side_by_side(1)
    draw(findings, axis, curves, x, "nats per token")
    doubling(axis)
    legend(axis)
    return to_png(figure)


def _contexts(findings: Findings) -> Iterator[Picture]:
    if findings.profiles is None or not findings.profiles[0].by_context:
        return
    figure, (axis,) = side_by_side(1)
    curves = []
    for one in findings.profiles:
        found = {
            c: loss.nats for c, loss in one.by_context.items() if loss and loss.nats is not None
        }
        end = "" if len(found) == len(one.by_context) else "not defined"
        curves.append(Curve([float(c) for c in found], list(found.values()), end))
    draw(findings, axis, curves, "tokens of context", "nats per token")
    doubling(axis)
    for trained in set(findings.trained) - {None}:
        axis.axvline(trained, color="#7F7F7F", linewidth=1)
        axis.annotate("trained", (trained, 1), (3, -9), fontsize=9,
                  xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip
    legend(axis)
    targets = next(loss.targets for loss in findings.profiles[0].by_context.values() if loss)
    caption = f"The same {targets:,} targets at the ends of windows of several lengths."
    yield Picture("contexts", "Within and beyond the trained length", caption, to_png(figure))


def _kinds(findings: Findings) -> Iterator[Picture]:
    if findings.profiles is None:
        return
    figure, (axis,) = side_by_side(1)
    kinds = [kind for kind, loss in findings.profiles[0].by_kind.items() if loss.targets]
    height = 0.8 / len(findings.profiles)
    rows = zip(labels(findings.comparison), styles(findings), findings.profiles, strict=True)
    for number, (label, style, one) in enumerate(rows):
        places = [i + number * height for i in range(len(kinds))]
        values = [one.by_kind[kind].nats or 0 for kind in kinds]
        hatch = "" if style["linestyle"] == "-" else "//"
        axis.barh(places, values, height, label=plain(label), color=style["color"], hatch=hatch)
    axis.set_yticks([i + 0.4 - height / 2 for i in range(len(kinds))], kinds, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("nats per token")
    legend(axis)
    caption = "Loss by kind of target: whether its pair has been there, and how frequent it is."
    yield Picture("kinds", "What is predicted well", caption, to_png(figure))


def _weights(findings: Findings) -> Iterator[Picture]:
    every = zip(labels(findings.comparison), findings.weights, strict=True)
    known = [(label, one) for label, one in every if one is not None][:PANELS]
    if not known:
        return
    from matplotlib.figure import Figure

    across = min(2, len(known))
    down = -(-len(known) // across)
    figure = Figure(figsize=(WIDE, WIDE / across * down), dpi=1.5 * DPI, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(known) :]:
        panel.set_axis_off()
    for panel, (label, one) in zip(panels, known, strict=False):
        # no colour where a token takes nothing; the two ends differ for the colour-blind too
        image = panel.imshow(one.matrix, cmap="PuOr", vmin=-1, vmax=1)
        words = [plain(repr(token)[1:-1]) for token in one.tokens]
        panel.set_xticks(range(len(words)), words, fontsize=6, rotation=90)
        panel.set_yticks(range(len(words)), words, fontsize=6)
        panel.set_title(f"{plain(label)}: layer {one.layer}, head {one.head}", fontsize=9)
        panel.set_xlabel("token that is taken", fontsize=8)
        panel.set_ylabel("token that takes", fontsize=8)
    bar = figure.colorbar(image, ax=panels.tolist(), location="bottom", shrink=0.4, aspect=30)
    bar.set_label("weight, divided by the largest of its row", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    caption = "What one head takes of each token's values; nothing comes from a later token."
    yield Picture("weights", "One head, token by token", caption, to_png(figure))
