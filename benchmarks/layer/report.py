"""The measured layers as tables and sentences for people, as JSON for programs, as a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.layer.findings import (
    CLAIM,
    Comparison,
    Ratio,
    crossovers,
    memory_beside_laws,
    ratios,
    times_beside_laws,
)
from benchmarks.layer.measuring import PROJECTED, Cell, Setup, case_of
from benchmarks.layer.mixing import ALL, CHUNKWISE, CONTENDERS, NAIVE, SDPA
from retnet.evaluation.report import format_table
from retnet.evaluation.report.curves import Curve, panels

STOPPED = {"time": "stopped: time", "memory": "stopped: memory"}
WITH = {False: "", True: "with projections: "}


def format_layers(cells: Sequence[Cell], setup: Setup, about: dict[str, Any]) -> str:
    """Heading, a table for each length, crossovers, exponents, and what is left of the claim."""
    parts = [_heading(setup, about)]
    for length in setup.lengths:
        own = [one for one in cells if one.length == length]
        parts.append([f"== {case_of(length)}", "", *_lengths(own, setup)])
    parts.append(["== faster from which length on", *CROSSING_NOTE, "", *_crossings(cells)])
    parts.append(["== exponents of T", *LAW_NOTE, "", *_laws(cells, setup)])
    parts.append(["== what is left of 60 times", *CLAIM_NOTE, "", *_claim(cells)])
    return "\n\n".join("\n".join(lines) for lines in parts)


CROSSING_NOTE = [
    "By medians, against those alike in causality: the shortest measured length from which it is",
    "faster at all longer ones too, and where the lines cross on logarithmic axes.",
]
LAW_NOTE = [
    "Of medians, and of peaks, through the four longest lengths measured, on logarithmic axes: the",
    "law's exponent, and the measured one with its standard error (*: apart by more than 0.1 and",
    "two errors). With projections 4 T d^2 operations more, and the numbers that they make. Laws",
    "of space are of training, where all is kept. Bytes: at the longest length, in those of the",
    "law.",
]
CLAIM_NOTE = [
    'The claim is "up to 60 times" at 6,000 tokens on a T4: linear attention that is not causal',
    "over naive softmax. Here how many times as fast it is, the median over rounds side by side,",
    "at the longest length that both have; and how much of 60 that is.",
]


def _heading(setup: Setup, about: dict[str, Any]) -> list[str]:
    limit = setup.limit_bytes
    fits = "" if limit is None else f" or {limit / 1e9:.1f} GB"
    versions = about["versions"]
    loads = about["load_average"]
    return [
        f"command   {about['command']}",
        f"date      {about['date']}",
        f"machine   {about['processor']}, {about['cores']} cores, {about['system']}, "
        f"{about['vector_instructions']}; device {about['device']}",
        f"run       {about['threads']} threads, float32, torch {versions['torch']}; load average "
        f"{loads[0]} before, {loads[1]} after; freed memory "
        f"{'kept' if about['keep_memory'] else 'as the C library does by default'}",
        f"layer     batch {setup.rows}, one head of width {setup.width}, forward pass without "
        "gradients;",
        "          no rotations, no gate of retention and no wider values, so that all mix as much",
        f"runs      in turn after one to warm up, at most {setup.runs}; fewer where one takes over "
        f"a second,",
        f"          and where all would take more than {setup.total_s:g} s",
        f"stopped   above {setup.limit_s:g} s{fits}, expected as if costs were quadratic",
        "memory    at the peak, above inputs and weights, in a process of its own; the first",
        "          2 MB may fit into what the process has already",
    ]


def _lengths(cells: Sequence[Cell], setup: Setup) -> list[str]:
    """A line for each contender: without projections, then with."""
    head = [""]
    for own in setup.projected:
        head += [f"{'projected' if own else 'mixing'}: ms", "std", "runs", "MB"]
    rows = [head]
    for name in setup.contenders:
        row = [name]
        for own in setup.projected:
            row += _figures(next(x for x in cells if (x.contender, x.projected) == (name, own)))
        rows.append(row)
    return format_table(rows)


def _figures(cell: Cell) -> list[str]:
    if cell.timing is None or cell.num_bytes is None:
        return [STOPPED[cell.stopped], "", "", ""]
    deviation = cell.deviation
    return [
        _digits(1000 * cell.mean),
        "" if deviation is None else _digits(1000 * deviation),
        str(cell.timing.rounds),
        _digits(cell.num_bytes / 1e6),
    ]


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _short(label: str) -> str:
    """The line of a contender with projections stands below that without."""
    return "  with projections" if label.endswith(PROJECTED) else label


def _shown(labels: Sequence[str]) -> list[str]:
    """Names as they stand in a table, where the same without projections is the line above."""
    return [_short(own) if own.removesuffix(PROJECTED) in labels else own for own in labels]


def _crossings(cells: Sequence[Cell]) -> list[str]:
    rivals = (NAIVE, SDPA, CHUNKWISE)
    found = {(one.fast, one.slow.replace(ALL, "")): one for one in crossovers(cells)}
    rows = [["", *rivals]]
    labels = list(dict.fromkeys(one.label for one in cells))
    for label, shown in zip(labels, _shown(labels), strict=True):
        row = [shown]
        for rival in rivals:
            one = found.get((label, rival + (PROJECTED if label.endswith(PROJECTED) else "")))
            if one is None:
                row.append("")
            elif one.since is None:
                row.append(f"not up to {one.longest:,}")
            elif one.crossing is None:
                row.append(f"from {one.since:,}, the first")
            else:
                row.append(f"from {one.since:,} (at {one.crossing:,.0f})")
        rows.append(row)
    return format_table(rows)


def _laws(cells: Sequence[Cell], setup: Setup) -> list[str]:
    rows = [["", "time", "law", "measured", "space", "law", "measured", "bytes"]]
    longest = {one.label: one for one in cells if one.num_bytes is not None}
    times = times_beside_laws(cells, setup.width)
    spaces = memory_beside_laws(cells, setup.width)
    shown = _shown([one.label for one in times])
    for name, time, space in zip(shown, times, spaces, strict=True):
        laws = ("", "") if name == _short(PROJECTED) else (time.law, space.law)
        row = [name, laws[0], *_exponents(time), laws[1], *_exponents(space)]
        cell = longest.get(time.label)
        rows.append([*row, "" if cell is None else f"{_of_law(cell, setup):.1f}"])
    return format_table(rows)


def _of_law(cell: Cell, setup: Setup) -> float:
    """Peak bytes at the longest length over those of the law's numbers, 4 each."""
    assert cell.num_bytes is not None
    law = CONTENDERS[cell.contender].numbers(cell.length, setup.width, cell.projected)
    return cell.num_bytes / (4 * setup.rows * law)


def _exponents(one: Comparison) -> list[str]:
    if one.measured is None or one.predicted is None:
        return ["", ""]
    error = "" if one.measured.error is None else f" ± {one.measured.error:.2f}"
    apart = "" if one.alike else " *"
    return [f"{one.predicted:.2f}", f"{one.measured.exponent:.2f}{error}{apart}"]


def _claim(cells: Sequence[Cell]) -> list[str]:
    """What is left of the claim: a line for each kind of linear attention."""
    found: dict[tuple[str, int], dict[str, Ratio]] = {}
    for one in ratios(cells):
        rival = one.slow.removesuffix(PROJECTED).removesuffix(ALL)
        found.setdefault((one.fast, one.length), {})[rival] = one
    if not found:
        return ["Not measured: linear attention, and a softmax like it beside it."]
    rows = [["", "tokens", f"times {NAIVE}", "of 60", f"times {SDPA}", "of 60"]]
    for (label, length), own in found.items():
        row = [label, f"{length:,}"]
        for rival in (NAIVE, SDPA):
            times = own[rival].times if rival in own else None
            row += ["", ""] if times is None else [_digits(times), f"{times / CLAIM:.0%}"]
        rows.append(row)
    return format_table(rows)


def to_json(cells: Sequence[Cell], setup: Setup, about: dict[str, Any]) -> dict[str, Any]:
    """Everything, the seconds of every run included."""
    return {
        "environment": about,
        "setup": {**asdict(setup), "device": str(setup.device)},
        "cells": [
            {**asdict(one), "runs": 0, "mean": None, "deviation": None}
            if one.timing is None
            else {
                **asdict(one),
                "runs": one.timing.rounds,
                "mean": one.mean,
                "deviation": one.deviation,
            }
            for one in cells
        ],
        "crossovers": [asdict(one) for one in crossovers(cells)],
        "time_laws": [_law(one) for one in times_beside_laws(cells, setup.width)],
        "memory_laws": [_law(one) for one in memory_beside_laws(cells, setup.width)],
        "claim": {"times": CLAIM, "ratios": [asdict(one) for one in ratios(cells)]},
    }


def _law(one: Comparison) -> dict[str, Any]:
    return {**asdict(one), "alike": one.alike}


def picture(cells: Sequence[Cell], setup: Setup) -> bytes:
    """PNG: time and memory by length, logarithmic axes; with and without projections a row each."""
    rows = []
    for own in setup.projected:
        times, peaks = [], []
        for name in setup.contenders:
            mine = [one for one in cells if (one.contender, one.projected) == (name, own)]
            done = [one for one in mine if one.timing is not None]
            end = "stopped" if len(done) < len(mine) else ""
            lengths = [float(one.length) for one in done]
            times.append(Curve(lengths, [1000 * one.mean for one in done], end))
            peaks.append(Curve(*_above_zero(done), end))
        row = (times, f"{WITH[own]}tokens", f"ms, batch {setup.rows}")
        rows.append([row, (peaks, f"{WITH[own]}tokens", "MB at the peak")])
    mixers = [CONTENDERS[name].mixer for name in setup.contenders]
    return panels(setup.contenders, mixers, rows)


def _above_zero(cells: Sequence[Cell]) -> tuple[list[float], list[float]]:
    """Lengths and MB, of peaks that logarithmic axes have."""
    found = [(float(one.length), one.num_bytes / 1e6) for one in cells if one.num_bytes]
    return [t for t, _ in found], [y for _, y in found]
