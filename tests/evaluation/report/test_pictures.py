"""What a report draws, and its tables of costs: of what was measured, the same everywhere."""

import os
import subprocess
import sys
from dataclasses import replace

import matplotlib
import pytest

from retnet.evaluation.costs import Costs, TrainingCost
from retnet.evaluation.report import canvas, contents, cost_pictures
from retnet.evaluation.report.contents import page_of
from retnet.evaluation.report.curves import styles
from retnet.evaluation.report.pictures import pictures


def test_a_mixer_has_one_colour_and_its_models_differ(findings) -> None:
    first, other, again = styles(findings)
    assert first["color"] == again["color"] != other["color"]
    assert first["linestyle"] != again["linestyle"] and first["marker"] != again["marker"]


def test_only_what_there_are_figures_for_is_drawn(findings) -> None:
    nothing = {"windows": [[], [], []], "weights": [None] * 3}
    bare = replace(findings, histories=[None] * 3, profiles=None, **nothing)
    assert [one.name for one in pictures(bare)] == ["decoding", "throughput", "training"]
    unmeasured = replace(bare, costs=[Costs([], [], [])] * 3)
    page = page_of(unmeasured, ["compare.py"])
    assert not page.pictures and [table.title for table in page.tables] == ["Quality"]


def test_what_was_not_measured_has_no_axes(findings, monkeypatch) -> None:
    """As memory, and batches after longer contexts, in a quick report."""
    panels: list[int] = []
    places: list[bool] = []  # whether the legend has one of its own
    monkeypatch.setattr(
        cost_pictures, "two_in_a_row", lambda n: panels.append(n) or canvas.two_in_a_row(n)
    )
    monkeypatch.setattr(cost_pictures, "legend", lambda _, place: places.append(place is not None))
    quick = [quickly(one) for one in findings.costs]
    stopped = [replace(one, training=[TrainingCost(128, 16, stopped=True)]) for one in quick]
    monkeypatch.setattr(cost_pictures, "to_png", lambda figure: b"")  # which takes a while
    for costs in (findings.costs, quick, stopped):
        found = replace(findings, costs=costs)
        for name in ("decoding", "throughput", "training"):
            assert list(getattr(cost_pictures, name)(found))
    assert panels == [3, 3, 2] + [2, 2, 1] * 2
    assert places == [number == 3 for number in panels]


def quickly(costs: Costs) -> Costs:
    by_context = [replace(one, peak_bytes=None) for one in costs.by_context]
    return Costs(by_context, costs.by_batch[:2], [TrainingCost(128, 16, 9e3)])


def test_tables_of_costs_have_the_columns_that_were_measured(findings) -> None:
    def heads_and_rows(costs: list[Costs]) -> list[tuple[list[str], list[list[str]]]]:
        tables = contents._costs(replace(findings, costs=costs))
        return [(table.rows[0], table.rows[1:]) for table in tables]

    (context, alone), (batch, rows), (training, _) = heads_and_rows(findings.costs)
    assert context[-2:] == ["state or cache", "peak memory beyond weights"]
    assert [row[-1] for row in alone if row[1] == "b"] == ["1.26 MB", "2.02 MB", "5.10 MB"]
    assert batch == ["tokens", "rows", "", "tokens/s, all rows", "ms for each"]
    assert [row[:2] for row in rows[::3]] == [[c, r] for c in ("128", "512", "2,048") for r in "14"]
    assert rows[-2][2:] == ["b", "stopped", "stopped"] and rows[0][3] == "1,250"
    assert training[-1] == "peak of one row"
    quick = [quickly(one) for one in findings.costs]
    (context, _), (batch, rows), (training, _) = heads_and_rows(quick)
    assert context[-1] == "state or cache" and training[-1] == "tokens/s"
    assert batch[:2] == ["tokens", "rows"] and len(rows) == 6


def test_batches_are_drawn_after_the_longest_context_that_most_were_measured_at(findings) -> None:
    assert cost_pictures._telling(findings) == [128, 512]
    first = replace(findings, costs=findings.costs[:1])
    assert cost_pictures._telling(first) == [128, 512], "both numbers of rows"
    whole = [one for one in findings.costs[0].by_batch if one.rows == 1]
    alone = replace(findings, costs=[replace(findings.costs[0], by_batch=whole)])
    assert cost_pictures._telling(alone) == [128, 2048]
    curves, shown, _ = cost_pictures._rows_after(findings, 2048)
    assert shown == "rows side by side, 2,048 tokens in each"
    assert [(curve.x, curve.end) for curve in curves][:2] == [([1], "stopped"), ([], "stopped")]


def test_pictures_are_the_same_on_every_machine(findings, recwarn) -> None:
    """With LaTeX asked for, and a name that the font has no signs of."""
    comparison = findings.comparison
    models = [replace(comparison.models[0], name="运行"), *comparison.models[1:]]
    named = replace(comparison, models=models)
    few = replace(findings, comparison=named, profiles=None, costs=[Costs([], [], [])] * 3)
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "black"}):
        drawn = pictures(few)
        assert matplotlib.rcParams["text.usetex"]
    assert drawn == pictures(few) and len(drawn) > 1
    assert not recwarn.list


@pytest.mark.slow
def test_pictures_in_a_notebooks_shell() -> None:
    """Which names a backend that may not be there."""
    code = "from retnet.evaluation.report.canvas import *\n"
    code += "with own_settings(): print(os.environ['MPLBACKEND'], len(to_png(side_by_side(1)[0])))"
    env = os.environ | {"MPLBACKEND": "module://no_such_notebook"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("module://no_such_notebook ")
