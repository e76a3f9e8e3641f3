"""Settings chosen with equal effort, on text that is not reported."""

import json
import shutil
from pathlib import Path

import pytest

from retnet import cli
from retnet.experiments import repeat, tune
from retnet.experiments.tune import Chosen, Trial, best_of, table, widened
from tests.experiments.test_repeat import small_runs  # noqa: F401

RATE = "train.learning_rate"
GRID = ("--grid", f"{RATE}=1e-3,2e-3", "--mixers", "linear")


def trials(**losses: float) -> list[Trial]:
    return [Trial("a", {RATE: rate}, loss) for rate, loss in losses.items()]


def test_the_grid_is_continued_where_somebodys_best_is_at_its_end() -> None:
    grid = {RATE: ["4e-3", "1e-3", "2e-3"], "train.schedule": ["cosine", "linear"]}

    def chosen(rate: str) -> Chosen:
        own = [Trial("a", {RATE: r, "train.schedule": "linear"}, r != rate) for r in grid[RATE]]
        return best_of(own, "a", grid)

    assert widened(grid, [chosen("2e-3")]) == grid and not chosen("2e-3").at_edge
    assert widened(grid, [chosen("2e-3"), chosen("4e-3")])[RATE] == [*grid[RATE], "0.008"]
    low = widened(grid, [chosen("1e-3")])
    assert low == grid | {RATE: [*grid[RATE], "0.0005"]}
    assert chosen("1e-3").at_edge == [RATE]
    both = widened(grid, [chosen("1e-3"), chosen("4e-3")])
    assert both[RATE] == [*grid[RATE], "0.008", "0.0005"]


def test_the_table_says_what_was_chosen() -> None:
    found = trials(**{"1e-3": 3.0, "2e-3": 2.0})
    best = best_of(found, "a", {RATE: ["1e-3", "2e-3"]})
    lines = table(found, [best])
    assert lines[1].endswith("2.0000  chosen, at an end of the grid") and "chosen" not in lines[2]


def test_equal_trials_judged_on_the_tuning_split(arguments, tmp_path: Path, capsys) -> None:
    """Then the chosen settings are run with the whole training side."""
    file = tmp_path / "tuned.json"
    options = ["--mixers", "retention", "--variant", "short", "attention", "model.ffn=swiglu"]
    options += ["--json", str(file), "--grid", f"{RATE}=1e-3,1e-2"]
    assert cli.run(tune.main, [*arguments, *options]) == 0
    printed, content = capsys.readouterr().out, json.loads(file.read_text())
    who = [trial["contender"] for trial in content["trials"]]
    assert who.count("retention") == who.count("short") > 2, "the grid was not continued"
    for best in content["chosen"]:
        own = [t for t in content["trials"] if t["contender"] == best["contender"]]
        assert best["loss"] == min(trial["loss"] for trial in own)
        assert f"{best['loss']:.4f}  chosen" in printed
    folders = sorted((tmp_path / "runs").glob("shakespeare-char-tune-*/final/data.json"))
    assert len(folders) == len(who)
    assert all("within" in json.loads(path.read_text())["split"] for path in folders)

    more = [*options[:-4], "--seeds", "0", "--tuned", str(file)]
    assert cli.run(repeat.main, [*arguments, *more]) == 0
    rows = capsys.readouterr().out.splitlines()[1:3]
    for row, best in zip(rows, content["chosen"], strict=True):
        assert row.startswith(best["contender"]) and f"learning_rate={best['values'][RATE]}" in row
    whole = json.loads(
        next((tmp_path / "runs").glob("shakespeare-char-retention-*/final/data.json")).read_text()
    )
    assert "within" not in whole["split"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--grid", RATE], f"--grid ({RATE}) must be key=value,value"),
        (["--grid", f"{RATE}=1,2", "--tuning-fraction", "1"], "--tuning-fraction (1.0) must be"),
        ([], "--grid"),
        (["--mixers", "linear", "--grid", f"{RATE}=1,fast"], f"{RATE} (fast) must be a number"),
        (["--grid", f"{RATE}=1e-3,2e-3", f"{RATE}=1"], f"argument ({RATE}=1) has no effect, since"),
        (["data.tuning_fraction=0.2", "--grid", f"{RATE}=1,2"], "--tuning-fraction sets that key"),
        (["--grid", "train.seed=1,2"], "--grid (train.seed) has no effect, since --seed sets"),
        ([*GRID, "--json", "{here}/no/tuned.json"], "({here}/no/tuned.json): {here}/no does not"),
        ([*GRID, "--json", "{here}/text.txt"], "({here}/text.txt) is a file that the text is read"),
        ([*GRID, "--json", "{here}/a.yaml"], "({here}/a.yaml) is a file that the recipe is read"),
    ],
)
def test_mistakes(arguments, tmp_path: Path, capsys, options: list[str], words: str) -> None:
    """Found before the first trial."""
    recipe = shutil.copy(arguments[0], tmp_path / "a.yaml")
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    options = [option.format(here=tmp_path) for option in options]
    assert cli.run(tune.main, [str(recipe), *arguments[1:], *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words.format(here=tmp_path) in line
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_grid_goes_on_only_to_values_that_there_are(arguments, capsys) -> None:
    """Half a row: what was tried is told all the same."""
    options = ["--mixers", "retention", "--grid", "train.batch_size=2,3"]
    assert cli.run(tune.main, [*arguments, *options]) == 0
    out, err = capsys.readouterr()
    assert "the grid is not continued there: train.batch_size (" in err
    assert len(out.splitlines()) == 3 and out.count("chosen, at an end of the grid") == 1
