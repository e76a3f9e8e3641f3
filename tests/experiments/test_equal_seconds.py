"""Losses after the same number of seconds."""

import contextlib
import json
import shutil
import statistics
from itertools import pairwise, product
from pathlib import Path

import pytest

from retnet import cli
from retnet.experiments import equal_seconds
from retnet.experiments.equal_seconds import PACE_STEPS, Outcome, table
from tests.experiments.test_repeat import small_runs  # noqa: F401

WHO = ("--mixers", "linear", "--variant", "short", "attention", "model.ffn=swiglu")


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_budget_has_a_run_of_its_own(arguments, tmp_path: Path, capsys) -> None:
    options = [*WHO, "--seconds", "0.2", "0.4", "--seeds", "1", "--json", str(tmp_path / "o.json")]
    own = ("train.max_steps", "train.eval_every")
    given = [text for text in arguments if text.partition("=")[0] not in own]
    given += ["train.learning_rate=1e-2", "train.schedule=constant", "train.warmup_steps=500"]
    assert cli.run(equal_seconds.main, [*given, *options]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    runs = json.loads((tmp_path / "o.json").read_text())["runs"]
    assert [run["contender"] for run in runs] == ["linear", "short"] * 2, "they take turns"
    assert [row.split()[0] for row in rows] == ["linear", "short"] * 2
    for run in runs:
        steps, name = run["steps"], run["contender"]
        folder = tmp_path / f"runs/shakespeare-char-{name}-{run['budget']:g}s-{steps}-1"
        lines = metrics(folder)
        assert len(lines) == steps and lines[-1]["val/loss"] == run["loss"]
        assert lines[-1]["perf/seconds"] == run["seconds"] > 0
        assert sum("val/loss" in line for line in lines) == 1
        # the recipe warms up for 500 of its 2,000 steps, a run for a quarter of its own
        rising = [line["optim/lr"] for line in lines if line["optim/lr"] < 1e-2]
        assert len(rising) == max(0, steps // 4 - 1)
        pace = metrics(tmp_path / f"runs/shakespeare-char-pace-{name}")
        assert len(pace) == PACE_STEPS
        ends = [line["perf/seconds"] for line in pace[PACE_STEPS // 3 :]]
        median = statistics.median(after - before for before, after in pairwise(ends))
        assert steps == pytest.approx(run["budget"] / median, rel=0.1, abs=1)

    assert cli.run(equal_seconds.main, [*given, *options]) == 0  # finished runs are only read
    again = capsys.readouterr()
    assert again.out.splitlines()[1:] == rows and again.err.count("is finished") == 6

    (tmp_path / "o.json").unlink()
    with Path("/dev/full").open("w") as full, contextlib.redirect_stdout(full):
        assert cli.run(equal_seconds.main, [*given, *options]) == 2
    assert json.loads((tmp_path / "o.json").read_text())["runs"] == runs, "it does not get lost"


def test_a_line_for_each_contender_and_budget() -> None:
    losses = {"b": 1.0, "a": 2.0}
    runs = [
        Outcome(name, budget, seed, 10, budget + seed, losses[name] + seed)
        for budget, seed, name in product((2.0, 1.0), (0, 1), losses)
    ]
    lines = [line.split() for line in table(runs)[1:]]
    assert [(line[0], float(line[1])) for line in lines] == [
        ("a", 1), ("b", 1), ("a", 2), ("b", 2)
    ]  # fmt: skip
    assert lines[0] == ["a", "1", "s", "1.5", "s", "10", "2.5000", "0.7071"]
    assert table(runs[:1])[1].split()[-2:] == ["1.0000", "-"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seconds", "0"], "argument --seconds: (0) must be above 0"),
        (["--seconds", "soon"], "argument --seconds: "),
        (["--seconds", "inf"], "argument --seconds: (inf) must be above 0, and finite"),
        (["--seconds", "1", "nan"], "argument --seconds: (nan) must be above 0, and finite"),
        (["--seeds", "1", "1"], "--seeds (1) is there twice"),
        (["train.save_every=3"], "(train.save_every=3) has no effect, since --seconds sets that"),
        (["--tuned", "no.json"], "no.json is not readable JSON"),
        (["--json", "{here}/text.txt"], "({here}/text.txt) is a file that the text is read"),
        (
            [
                "--json",
                "{here}/rows.txt",
                "--variant",
                "a",
                "linear",
                "data.source={here}/rows.txt",
            ],
            "({here}/rows.txt) is a file that the text is read",
        ),
        (
            ["--json", "{here}/tuned.json", "--tuned", "{here}/tuned.json"],
            "({here}/tuned.json) is a file that the choice of settings is read from: name another",
        ),
        (["train.beta1=2"], "train.beta1 (2.0)"),
    ],
)
def test_mistakes(arguments, tmp_path: Path, capsys, options: list[str], words: str) -> None:
    given = [text for text in arguments if "steps" not in text and "eval_every" not in text]
    options = [option.format(here=tmp_path) for option in options]
    shutil.copy(tmp_path / "text.txt", tmp_path / "rows.txt")
    (tmp_path / "tuned.json").write_text('{"chosen": []}')
    assert cli.run(equal_seconds.main, [*given, *WHO, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words.format(here=tmp_path) in line
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "rows.txt", "tuned.json"}


def test_runs_of_before(arguments, tmp_path: Path, capsys) -> None:
    """They do not say how long they took."""
    given = [text for text in arguments if "max_steps" not in text and "eval_every" not in text]
    options = ["--mixers", "linear", "--seconds", "0.01"]
    assert cli.run(equal_seconds.main, [*given, *options]) == 0
    file = tmp_path / "runs/shakespeare-char-pace-linear/metrics.jsonl"
    file.write_text(file.read_text().replace("perf/seconds", "perf/time"))
    capsys.readouterr()
    assert cli.run(equal_seconds.main, [*given, *options]) == 2
    assert "is of an older version: give another --out" in capsys.readouterr().err
