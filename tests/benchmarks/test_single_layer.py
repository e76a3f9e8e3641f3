"""What is measured of one layer, when it is stopped, and every option."""

import gc
import json
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from benchmarks import single_layer
from benchmarks.layer import measuring, report
from benchmarks.layer.measuring import (
    Cell,
    Setup,
    first_pass,
    first_passes,
    first_passes_left,
    numbers_of_runs,
)
from benchmarks.layer.mixing import ALL, CHUNKWISE, CONTENDERS, LINEAR, NAIVE, SDPA
from retnet.cli import run
from retnet.evaluation.report import curves
from retnet.model import MIXERS
from tests.benchmarks.test_layer_findings import cells

CPU = torch.device("cpu")
FEW = ["--lengths", "24", "8", "--batch", "2", "--device", "cpu"]
RECURRENT = "retention, recurrent"


def setup(**values) -> Setup:
    usual = {
        "device": CPU, "rows": 2, "width": 8, "lengths": (8, 16, 32), "contenders": (NAIVE, SDPA),
        "projected": (False,), "runs": 5, "limit_s": 1.0, "limit_bytes": 1000, "total_s": 10.0,
    }  # fmt: skip
    return Setup(**(usual | values))


@pytest.fixture
def here(monkeypatch) -> None:
    """First passes in this process: what they say of memory means nothing, but it is quick."""
    gc.freeze()  # collections between them need not look at all that the tests have imported
    monkeypatch.setattr(measuring, "_in_own_process", first_pass)


@pytest.fixture
def faked(monkeypatch) -> list[tuple[str, int]]:
    """First passes that cost what a law says: 2 ms and 1 byte a token at the start, squared."""
    asked = []

    def cost(cell: Cell, setup: Setup) -> tuple[float, int]:
        asked.append((cell.contender, cell.length))
        grown = (cell.length / 8) ** (2 if cell.contender == NAIVE else 1)
        return 0.002 * grown, int(8 * grown)

    monkeypatch.setattr(measuring, "_in_own_process", cost)
    return asked


def stops(setup: Setup) -> dict[tuple[str, int], str]:
    return {(one.contender, one.length): one.stopped for one in first_passes(setup)}


def test_nothing_is_stopped_that_fits(faked, capsys) -> None:
    assert set(stops(setup()).values()) == {""}
    assert faked == [(name, length) for length in (8, 16, 32) for name in (NAIVE, SDPA)]
    left = "about 1 s left of this part, then about 10 s of timed runs"
    assert f"memory: 8 tokens done; {left}" in capsys.readouterr().err


def test_what_would_take_too_long_is_stopped_and_stays_so(faked) -> None:
    found = stops(setup(lengths=(8, 16, 32, 64), limit_s=0.02))
    # 0.008 s at 16 tokens are 0.032 at 32; SDPA's 0.004 could be 0.016, its 0.008 0.032
    assert [found[NAIVE, t] for t in (8, 16, 32, 64)] == ["", "", "time", "time"]
    assert [found[SDPA, t] for t in (8, 16, 32, 64)] == ["", "", "", "time"]
    assert (NAIVE, 32) not in faked  # it was not tried


def test_what_would_not_fit_is_stopped(faked) -> None:
    found = stops(setup(limit_bytes=40))
    assert [found[NAIVE, t] for t in (8, 16, 32)] == ["", "", "memory"]
    assert (NAIVE, 32) not in faked
    assert stops(setup(limit_bytes=7))[SDPA, 8] == "memory"
    assert stops(setup(limit_s=0.001))[SDPA, 8] == "time"
    assert set(stops(setup(limit_bytes=None)).values()) == {""}


@pytest.mark.parametrize(
    "error", [BrokenProcessPool("killed"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_a_process_that_memory_ends_is_stopped(monkeypatch, error) -> None:
    def fail(cell: Cell, setup: Setup) -> tuple[float, int]:
        if cell.contender == NAIVE:
            raise error
        return 0.001, 8

    monkeypatch.setattr(measuring, "_in_own_process", fail)
    found = stops(setup())
    assert [found[NAIVE, t] for t in (8, 16, 32)] == ["memory"] * 3
    assert [found[SDPA, t] for t in (8, 16, 32)] == [""] * 3


def test_other_errors_are_not_hidden(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(measuring, "_in_own_process", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        stops(setup())


def test_the_time_left_follows_the_laws() -> None:
    own = setup(lengths=(8, 16, 32), limit_s=1.0)
    done = [Cell(NAIVE, False, 8, 0.01, 1), Cell(LINEAR + ALL, False, 8, 0.01, 1)]
    expected = 4 * measuring.START_S + 0.01 * (4 + 16) + 0.01 * (2 + 4)
    assert first_passes_left(done, own) == pytest.approx(expected)
    assert first_passes_left([Cell(NAIVE, False, 8, stopped="time")], own) == 0


def test_fewer_runs_of_what_takes_long() -> None:
    # above a second, as many as fit into as many seconds as runs were asked for
    assert numbers_of_runs([0.1, 1.0, 2.0, 50.0], 100, 1e9) == [100, 100, 50, 3]
    # in all no more seconds than asked for, the warm-up included, and equal shares of them
    firsts = [0.001, 0.1, 0.5, 1.0]
    counts = numbers_of_runs(firsts, 100, 30.0)
    assert counts[0] == 100
    assert counts == sorted(counts, reverse=True)
    total = sum((n + 1) * own for n, own in zip(counts, firsts, strict=True))
    assert 27 < total <= 30
    assert counts[1] * 0.1 == pytest.approx(counts[2] * 0.5, abs=0.5)
    assert numbers_of_runs([5.0, 0.0], 100, 1.0) == [3, 100]  # three of each at least
    assert numbers_of_runs([5.0], 2, 1.0) == [2]  # or as many as were asked for


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own() -> None:
    """Scores of all pairs, and their softmax: two matrices [B, T, T] in float32, and little else.

    It is counted anew each time, whatever this process, or the one before, has taken.
    """
    own = setup(rows=8, width=64)
    found = [
        measuring._in_own_process(Cell(name, False, length), own)[1]
        for name, length in ((NAIVE, 2048), (NAIVE + ALL, 1024), (NAIVE, 1024), (SDPA, 1024))
    ]
    scores = 2 * 4 * 8 * 1024**2
    assert found[0] == pytest.approx(4 * scores, rel=0.1)
    assert found[1] == pytest.approx(scores, rel=0.15)
    assert found[2] == pytest.approx(scores, rel=0.15)
    assert found[3] < 0.2 * scores


@pytest.mark.slow
def test_as_a_program(tmp_path) -> None:
    """On standard error there is nothing but how far it is."""
    path = tmp_path / "x.json"
    command = [sys.executable, "-m", measuring.PROGRAM, *FEW, "--contenders", SDPA, NAIVE]
    command += ["--runs", "2", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == {
        "memory", "times", "layer",
    }  # fmt: skip
    assert done.stdout.startswith("command   python -m benchmarks.single_layer")
    assert len(json.loads(path.read_text())["cells"]) == 8


def written(tmp_path: Path, *options: str) -> dict:
    path = tmp_path / "layer.json"
    assert run(single_layer.main, [*FEW, *options, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_everything_runs_and_is_written_down(here, tmp_path, capsys) -> None:
    plot = tmp_path / "layer.png"
    found = written(tmp_path, "--runs", "2", "--plot", str(plot))
    out, err = capsys.readouterr()
    assert found["setup"]["lengths"] == [8, 24]
    assert (found["setup"]["rows"], found["setup"]["width"]) == (2, 64)
    own = [(one["contender"], one["projected"], one["length"]) for one in found["cells"]]
    assert own == [(n, p, t) for t in (8, 24) for n in CONTENDERS for p in (False, True)]
    for one in found["cells"]:
        seconds = one["timing"]["seconds"]
        assert one["runs"] == len(seconds) == 2
        assert one["mean"] == pytest.approx(sum(seconds) / 2)
        assert one["deviation"] == pytest.approx(abs(seconds[0] - seconds[1]) / 2**0.5)
    assert len(found["time_laws"]) == len(found["memory_laws"]) == 2 * len(CONTENDERS)
    assert len(found["claim"]["ratios"]) == 8
    assert found["environment"]["command"].startswith("python -m benchmarks.single_layer --lengths")
    assert plot.read_bytes().startswith(b"\x89PNG")
    for name in CONTENDERS:
        assert out.count(f"\n{name} ") >= 2 + 2
    for title in ("8 tokens", "faster from which", "exponents of T", "what is left of 60"):
        assert f"== {title}" in out
    assert "memory: 8 tokens done; about" in err
    assert "times: 52 contenders and lengths, 2 to 2 runs of each, about" in err
    assert "times: about 0 s left" in err


def test_options_decide_what_is_measured(here, tmp_path, capsys, monkeypatch) -> None:
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    options = ["--contenders", SDPA, RECURRENT, "--projections", "with", "--runs", "3"]
    found = written(tmp_path, *options, "--width", "8", "--threads", "3", "--seconds", "99")
    names = {(one["contender"], one["projected"], one["runs"]) for one in found["cells"]}
    assert names == {(SDPA, True, 3), (RECURRENT, True, 3)}
    assert (found["setup"]["width"], found["setup"]["total_s"]) == (8, 99)
    assert threads == [3]
    printed = capsys.readouterr().out
    assert "mixing: ms" not in printed
    assert "batch 2, one head of width 8" in printed
    assert "more than 99 s" in printed
    without = written(tmp_path, "--contenders", SDPA, "--projections", "without", "--runs", "1")
    assert {one["projected"] for one in without["cells"]} == {False}
    assert {one["deviation"] for one in without["cells"]} == {None}


def test_seconds_bound_the_timed_part(faked, tmp_path) -> None:
    """By the first passes: 2 ms at 8 tokens, at 24 of naive softmax 18 and of SDPA 6."""
    options = ["--contenders", NAIVE, SDPA, "--projections", "without", "--runs", "20"]
    many = written(tmp_path, *options, "--seconds", "60")
    assert {one["runs"] for one in many["cells"]} == {20}
    few = written(tmp_path, *options, "--seconds", "0.2")
    assert sum((one["runs"] + 1) * one["first_s"] for one in few["cells"]) <= 0.2
    runs = {(one["contender"], one["length"]): one["runs"] for one in few["cells"]}
    assert runs[NAIVE, 24] == 3 < runs[SDPA, 24] < runs[SDPA, 8] == runs[NAIVE, 8] == 20


def test_freed_memory_is_kept_where_asked_for(faked, tmp_path, capsys, monkeypatch) -> None:
    kept = []
    monkeypatch.setattr(single_layer, "keep_freed_memory", lambda: kept.append(True))
    options = ["--contenders", SDPA, "--runs", "1"]
    assert not written(tmp_path, *options)["environment"]["keep_memory"]
    assert "freed memory as the C library does" in capsys.readouterr().out
    assert not kept
    assert written(tmp_path, *options, "--allocator", "keep")["environment"]["keep_memory"]
    assert "freed memory kept" in capsys.readouterr().out
    assert kept == [True]


@pytest.mark.parametrize(
    ("option", "reason"), [(["--limit", "0.01"], "time"), (["--memory", "4e-8"], "memory")]
)
def test_limits_reach_the_table_and_the_picture(
    faked, option, reason, tmp_path, capsys, monkeypatch
) -> None:
    """Naive softmax would take 18 ms, and 72 bytes, at 24 tokens."""
    drawn = []
    monkeypatch.setattr(report, "panels", lambda *given: drawn.append(given) or b"")
    monkeypatch.setattr(single_layer, "_least_bytes", lambda *_: 0)  # these bytes are made up
    names = ["--contenders", NAIVE, SDPA, "--projections", "without", "--runs", "1"]
    found = written(tmp_path, *option, *names, "--plot", str(tmp_path / "x.png"))
    stopped = {(one["contender"], one["length"]): one["stopped"] for one in found["cells"]}
    assert stopped[NAIVE, 24] == reason
    assert [stopped[name, 8] for name in (NAIVE, SDPA)] == ["", ""]
    assert f"stopped: {reason}" in capsys.readouterr().out
    shown, mixers, (((times, x, y), (peaks, *_)),) = drawn[0]
    assert (list(shown), mixers) == ([NAIVE, SDPA], ["attention", "attention"])
    assert (times[0].end, times[0].x) == ("stopped", [8.0])
    assert times[1].end == ("stopped" if stopped[SDPA, 24] else "")
    assert peaks[0].y == [8e-6]
    assert (x, y) == ("tokens", "ms, batch 2")


def test_all_stopped_is_one_line_and_writes_nothing(faked, tmp_path, capsys) -> None:
    path = tmp_path / "x.json"
    options = ["--limit", "0.0001", "--json", str(path)]
    assert run(single_layer.main, [*FEW, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --limit (0.0001) seconds, --memory (")
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "8", "16", "8"], "--lengths 8 16 8: name each length once"),
        (["--lengths", "0"], "argument --lengths: '0' must be a whole number of at least 1"),
        (["--lengths", "8", str(10**13)], "--lengths (10000000000000): inputs and outputs alone"),
        (["--memory", "0.001"], "GB of 0.0 (--memory)"),
        (["--batch", "no"], "argument --batch"),
        (["--width", "7"], "--width (7) is none of a head"),
        (["--contenders", SDPA, SDPA], "--contenders SDPA SDPA: name each once"),
        (["--contenders", "mamba"], "argument --contenders: invalid choice: 'mamba'"),
        (["--runs", "0"], "argument --runs"),
        (["--limit", "0"], "--limit (0) must be a number above 0"),
        (["--limit", "nan"], "--limit (nan) must be a number above 0"),
        (["--seconds", "-1"], "--seconds (-1) must be a number above 0"),
        (["--seconds", "inf"], "--seconds (inf) must be a number above 0"),
        (["--memory", "-2"], "--memory (-2) must be a number above 0"),
        (["--allocator", "mine"], "argument --allocator"),
        (["--device", "abacus"], "--device (abacus)"),
        (["--json", "/nowhere/x.json"], "--json (/nowhere/x.json)"),
        (["--plot", "/nowhere/x.png"], "--plot (/nowhere/x.png)"),
        (["--plot", "layer.svg"], "--plot (layer.svg) must end with .png"),
        (["--json", "x.png", "--plot", "x.png"], "--plot (x.png) is --json's file too"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(single_layer.main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_the_picture(monkeypatch) -> None:
    """Logarithmic axes, a colour for each mixer as in a report, a cross where it is stopped."""
    figures = []
    monkeypatch.setattr(curves, "to_png", lambda figure: figures.append(figure) or b"png")
    names = (NAIVE, SDPA, CHUNKWISE)
    found = [
        *cells(NAIVE, {8: 1.0, 16: 4.0}), Cell(NAIVE, False, 32, stopped="memory"),
        *cells(SDPA, {8: 1.0, 16: 2.0, 32: 4.0}), *cells(CHUNKWISE, {8: 2.0, 16: 2.0, 32: 2.0}),
    ]  # fmt: skip
    assert report.picture(found, setup(contenders=names)) == b"png"
    time, memory = figures[0].axes
    assert {axis.get_xscale() + axis.get_yscale() for axis in (time, memory)} == {"loglog"}
    lines = {line.get_label(): line for line in time.get_lines()}
    mixers = [CONTENDERS[name].mixer for name in names]
    looks = [curves.COLOURS[[*MIXERS].index(mixer)] for mixer in mixers]
    assert [lines[name].get_color() for name in names] == looks
    assert lines[NAIVE].get_linestyle() != lines[SDPA].get_linestyle()
    assert [*lines[NAIVE].get_ydata()] == [1000.0, 4000.0]  # ms
    assert [text.get_text() for text in time.texts] == ["stopped"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [*names]
    assert [*memory.get_lines()[0].get_ydata()] == [0.008, 0.016]  # MB


@pytest.mark.gpu
def test_on_a_gpu(tmp_path) -> None:
    options = [x if x != "cpu" else "cuda" for x in FEW]
    path = tmp_path / "x.json"
    assert run(single_layer.main, [*options, "--runs", "2", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["cells"]
    assert all(one["num_bytes"] > 0 and one["runs"] == 2 for one in found)
