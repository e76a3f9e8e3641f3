"""What pictures are drawn on: the same on every machine, whatever matplotlib is set to there."""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WIDE, HIGH, DPI = 8.0, 3.6, 120


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows for those who do not see it."""

    name: str
    title: str
    caption: str
    png: bytes


@contextmanager
def own_settings() -> Iterator[None]:
    """Without a screen, and without what a notebook or a matplotlibrc asks for, as LaTeX."""
    named = os.environ.pop("MPLBACKEND", None)  # its import fails where that is not there
    try:
        import matplotlib
        import matplotlib.style
    finally:
        os.environ.update({} if named is None else {"MPLBACKEND": named})
    matplotlib.use("Agg")
    with matplotlib.style.context("default"), warnings.catch_warnings():
        # of names in scripts that the font does not have: models have numbers too
        warnings.filterwarnings("ignore", r"Glyph \d+ ", UserWarning)
        yield


def side_by_side(number: int) -> tuple[Any, Sequence[Any]]:
    """A figure, and so many places side by side to draw in."""
    figure, grid = grid_of(1, number, (WIDE, HIGH))
    return figure, grid[0]


def two_in_a_row(number: int) -> tuple[Any, Sequence[Any]]:
    """A figure, and that many places to draw in; where the last row has only one, one more."""
    if number <= 2:
        return side_by_side(number)
    rows = (number + 1) // 2
    figure, grid = grid_of(rows, 2, (WIDE, HIGH * rows))
    return figure, list(grid.flat)


def grid_of(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of that size, and places in rows and columns to draw in."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for one in grid.flat:
        one.grid(True, linewidth=0.4, alpha=0.6)
        one.spines[["top", "right"]].set_visible(False)
    return figure, grid


def to_png(figure: Any) -> bytes:
    """A figure as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
