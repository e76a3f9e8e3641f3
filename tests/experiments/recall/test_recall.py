"""The experiment on generated tasks: who is trained how, what is reported, what is reused."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from retnet import cli
from retnet.experiments.recall import __main__ as recall
from retnet.experiments.recall import results, training
from retnet.experiments.recall.tasks import TASKS
from retnet.experiments.recall.training import Cell, Outcome
from retnet.model.mixers import MIXERS

SMALL = ("model.hidden_size=16", "model.num_hidden_layers=1", "--length", "16", "--values", "4",
         "--steps", "2", "--rows", "6")  # fmt: skip
MQAR = ("mqar", "--pairs", "1", "4", "--mixers", "attention", *SMALL)
BASE = (*MQAR, "--rates", "3e-3", "--seeds", "0")


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch) -> None:
    monkeypatch.setattr(training, "TEST_ROWS", 8)
    monkeypatch.setattr(training, "ROWS_AT_ONCE", 4)


@pytest.fixture(scope="module", name="base")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "TEST_ROWS", 8)
        patch.setattr(training, "ROWS_AT_ONCE", 4)
        assert call(out, *BASE) == 0
    return out


def runs(out: Path) -> dict[str, dict]:
    return {file.parent.name: json.loads(file.read_text()) for file in out.glob("*/result.json")}


def call(out: Path, *options: str) -> int:
    return cli.run(recall.main, [*_keys_first(*options), "--out", str(out)])


def _keys_first(*options: str) -> list[str]:
    """An option of several values would take them for its own."""
    return sorted(options, key=lambda word: "=" not in word or word.startswith("--"))


def shortest(cells: list[dict[str, int]]) -> float:
    """The accuracy at the shortest distance."""
    own = [cell for cell in cells if cell["distance"] == min(c["distance"] for c in cells)]
    return sum(cell["right"] for cell in own) / sum(cell["asked"] for cell in own)


def test_every_contender_and_task_by_default(tmp_path: Path, capsys) -> None:
    """All mixers and the hybrid, one rate each here."""
    sizes = ("--length", "32", "--values", "4", "--steps", "1", "--rows", "6", "--rates", "1e-3")
    sizes += ("--pairs", "4", "8", "16")
    keys = ("model.hidden_size=16",)
    file = tmp_path / "all.json"
    assert call(tmp_path / "out", *sizes, *keys, "--json", str(file)) == 0
    out, content = capsys.readouterr().out, json.loads(file.read_text())
    assert [task["task"] for task in content["tasks"]] == [*TASKS]
    tables = out.strip().split("\n\n")
    for name, printed, task in zip(TASKS, tables, content["tasks"], strict=True):
        assert printed.startswith(f"{name}: ") and "not tuned" in printed
        who = [own["contender"] for own in task["contenders"]]
        assert who == [*MIXERS, "hybrid"]
        rows = printed.splitlines()[-len(who) :]
        for row, own in zip(rows, task["contenders"], strict=True):
            (run,) = own["runs"]
            assert row.split()[:3] == [own["contender"], "1e-3", "1"]
            assert float(row.split()[3]) == pytest.approx(100 * own["accuracy"], abs=0.051)
            assert float(row.split()[5]) == pytest.approx(100 * shortest(run["cells"]), abs=0.51)
        sizes_found = [own["runs"][0]["parameters"] for own in task["contenders"]]
        assert max(sizes_found) < 1.1 * min(sizes_found)
        png = (tmp_path / "out" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
    models = [run["settings"]["model"] for run in runs(tmp_path / "out").values()]
    assert sum(model["attention_layers"] is not None for model in models) == len(TASKS)


def test_rates_are_chosen_on_rows_that_are_not_reported(tmp_path: Path, capsys) -> None:
    options = (*MQAR, "--rates", "1e-4", "3e-2", "1e-3", "--seeds", "0", "1")
    assert call(tmp_path, *options, "--json", str(tmp_path / "a.json")) == 0
    captured = capsys.readouterr()
    (task,) = json.loads((tmp_path / "a.json").read_text())["tasks"]
    (own,) = task["contenders"]
    assert task["tuning_seed"] == 1000 and task["seeds"] == [0, 1] and task["counts"] == [1, 4]
    assert [trial["learning_rate"] for trial in own["trials"]] == ["1e-4", "3e-2", "1e-3"]
    chosen = max(own["trials"], key=lambda trial: trial["accuracy"])
    assert own["learning_rate"] == chosen["learning_rate"] and len(own["runs"]) == 2
    made = runs(tmp_path)
    seeds = [run["settings"]["train"]["seed"] for run in made.values()]
    assert sorted(seeds) == [0, 1, 1000, 1000, 1000]
    rates = {run["settings"]["train"]["learning_rate"] for run in made.values()
             if run["settings"]["train"]["seed"] < 1000}  # fmt: skip
    assert rates == {float(own["learning_rate"])}
    assert "on other rows, from seed 1000" in captured.out and "from seeds 0, 1" in captured.out
    assert "(run 1 of 5)" in captured.err
    assert re.search(r"\(run 5 of 5, at most .*left at this pace\)", captured.err)

    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/result.json")}
    assert call(tmp_path, *options) == 0  # finished runs are only read
    again = capsys.readouterr()
    assert again.out == captured.out and again.err.count("is finished") == 5
    assert {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/result.json")} == before


@pytest.mark.parametrize(
    "change",
    [
        ("--steps", "3"),
        ("--length", "20"),
        ("--values", "5"),
        ("--pair-tokens", "2"),
        ("--rows", "7"),
        ("--pairs", "2", "4"),
        ("--seeds", "1"),
        ("--rates", "1e-3"),
        ("model.num_heads=1",),
        ("train.warmup_steps=1",),
        ("train.grad_clip=0.1",),
        ("train.optimizer=muon",),
    ],
)
def test_what_changes_a_run_makes_another(base: Path, capsys, change: tuple[str, ...]) -> None:
    """Never a result of other settings."""
    words, before = [*BASE], runs(base)
    if change[0] in words:
        at = words.index(change[0])
        end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
        words[at:end] = change
    else:
        words += change
    assert call(base, *words) == 0
    (name,) = runs(base).keys() - before.keys()
    first, second = before[next(iter(before))], runs(base)[name]
    assert first["settings"] != second["settings"]
    keys = ("loss", "cells", "steps", "parameters")
    assert [first["result"][k] for k in keys] != [second["result"][k] for k in keys]
    assert "is finished" not in capsys.readouterr().err


def test_progress_of_the_command_itself(base: Path, monkeypatch, capsys) -> None:
    """Run as a script its module has another name, which loggers must not go by."""
    monkeypatch.delitem(sys.modules, recall.__name__)
    monkeypatch.setattr(sys, "argv", ["recall", *_keys_first(*BASE), "--out", str(base)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("retnet.experiments.recall", run_name="__main__")
    assert end.value.code == 0
    err = capsys.readouterr().err
    assert "(run 1 of 1) is finished" in err and f"picture in {base / 'mqar.png'}" in err


def test_copied_strings_and_variants(tmp_path: Path, capsys) -> None:
    options = ["copy", *SMALL, "--copied", "3", "2", "--rates", "1e-3", "--mixers", "rwkv"]
    options += ["--out", str(tmp_path), "--variant", "slow", "retention", "model.decay=1"]
    assert cli.run(recall.main, options) == 0
    out = capsys.readouterr().out
    assert "2, 3 symbols" in out and " 2 symbols  3 symbols" in out
    assert [row.split()[0] for row in out.strip().splitlines()[-2:]] == ["rwkv", "slow"]
    found = {name: run["settings"]["model"] for name, run in runs(tmp_path).items()}
    assert {model["mixer"]: model["decay"] for model in found.values()} == {
        "rwkv": None, "retention": 1
    }  # fmt: skip


def test_a_file_that_is_no_result(tmp_path: Path, capsys) -> None:
    options = (*MQAR, "--rates", "1e-3")
    assert call(tmp_path, *options) == 0
    (file,) = tmp_path.glob("*/result.json")
    content = json.loads(file.read_text())
    for damaged, words in (
        ({"settings": content["settings"]}, "holds no result"),
        (content | {"settings": {}}, "settings are not those that its folder is named by"),
    ):
        file.write_text(json.dumps(damaged))
        capsys.readouterr()
        assert call(tmp_path, *options) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert words in error and "remove that folder to train the run again" in error


def test_a_solved_task_ends_and_an_unsolved_one_does_not(tmp_path: Path, monkeypatch) -> None:
    """One symbol: there is only one answer."""
    options = ("needle", *SMALL[:4], "--values", "1", "--rows", "4", "--steps", "12",
               "--mixers", "linear", "--rates", "1e-2")  # fmt: skip
    monkeypatch.setattr(training, "LAST", 3)
    assert call(tmp_path / "a", *options) == 0
    monkeypatch.setattr(training, "SOLVED", 2.0)
    assert call(tmp_path / "b", *options) == 0
    (solved,), (all_steps,) = (runs(tmp_path / name).values() for name in "ab")
    assert 3 <= solved["result"]["steps"] < 12 == all_steps["result"]["steps"]
    assert all(cell["right"] == cell["asked"] for cell in solved["result"]["cells"])


def test_a_loss_that_is_not_finite_ends_a_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training, "_step", lambda *_: (math.inf, 0, 1))
    assert call(tmp_path, *MQAR, "--rates", "1e-3") == 0
    (run,) = runs(tmp_path).values()
    assert run["result"]["loss"] is None and run["result"]["steps"] == 1


def test_only_answers_count(monkeypatch) -> None:
    """The loss is the mean over the questions; nothing else of a row has a target."""
    task = TASKS["mqar"]
    run = training.planned(
        task, recall.HYBRID, ["model.hidden_size=16"], "1e-3", 0, Path("nowhere")
    )
    model = training.build_model(run.model)
    batch = task.batch(2 * len(task.counts), torch.Generator().manual_seed(0))
    optimizer = training.build_optimizer(model, run.config.train)
    expected = model(input_ids=batch.input_ids, shift_labels=batch.targets, labels=None)
    loss, _, asked = training._step(model, optimizer, batch, run.config, 1)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-5)
    assert asked == 2 * sum(task.counts)


def test_distances_by_powers_of_two() -> None:
    found = training.up_to(torch.tensor([1, 2, 3, 4, 5, 8, 9, 1000]))
    assert found.tolist() == [2, 2, 4, 4, 8, 8, 16, 1024]


def test_the_best_rate_is_that_of_most_answers_then_of_fewest_steps() -> None:
    def trial(rate: str, right: int, steps: int) -> results.Trial:
        return results.Trial(rate, Outcome(1, steps, 1.0, 1.0, (Cell(1, 2, right, 10),)))

    trials = [trial("1e-3", 9, 50), trial("3e-3", 10, 90), trial("1e-2", 10, 40)]
    assert results.best(trials) == "1e-2"
    standing = results.Standing(recall.HYBRID, "1e-2", trials, [trials[2].outcome])
    assert standing.at_edge and standing.share(distance=2) == 1.0


def test_rates_that_have_solved_the_task_are_equal() -> None:
    """The one that came there sooner is taken, not the one with half a percent more."""

    def trial(rate: str, right: int, steps: int) -> results.Trial:
        return results.Trial(rate, Outcome(1, steps, 1.0, 1.0, (Cell(1, 2, right, 1000),)))

    trials = [trial("1e-3", 996, 50), trial("3e-3", 1000, 60), trial("1e-2", 994, 40)]
    assert results.best(trials) == "1e-3"


def test_counts_weigh_the_same() -> None:
    cells = (Cell(1, 2, 1, 1), Cell(8, 2, 0, 8), Cell(8, 4, 4, 8))
    assert Outcome(1, 1, 1.0, 1.0, cells).accuracy == (1 + 4 / 16) / 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["walk"], "task (walk) must be one of mqar, copy, needle, each once"),
        (["copy", "copy"], "task (copy) must be one of"),
        (["copy", "--pairs", "2"], "--pairs (2) must be different numbers, for mqar, which is to"),
        (["--pairs", "2", "2"], "--pairs (2 2) must be different numbers"),
        (["--pair-tokens", "3"], "argument --pair-tokens: invalid choice"),
        (["--length", "9"], "has no room for"),
        (["--seeds", "1000"], "--seeds (1000) must be at least 0, and not 1000"),
        (
            ["--seeds", "0", "99999999999"],
            "--seeds (99999999999) must be at least 0, and",
        ),
        (["--seeds", "2", "2"], "--seeds (2) is there twice"),
        (["--rates", "1e-3", "0.001"], "--rates (1e-3 0.001): one is there twice"),
        (["--rates", "fast"], "argument --rates: 'fast' must be a number"),
        (["--rates", "-1"], "--rates (-1.0) must be above 0"),
        (["--steps", "0"], "argument --steps: '0' must be a whole number of at least 1"),
        (["--mixers", "mamba"], "argument --mixers: invalid choice: 'mamba'"),
        (["--variant", "a", "mamba"], "--variant (a mamba) must be NAME MIXER KEY=VALUE"),
        (["model.mixer=rwkv"], "(model.mixer=rwkv) has no effect, since --mixers or --variant"),
        (["train.learning_rate=1"], "has no effect, since --rates sets that key"),
        (["data.source=x"], "argument (data.source=x) has no effect here: give keys of model"),
        (["train.device=cuda"], "argument (train.device=cuda) has no effect here"),
        (["model.init_from=x"], "argument (model.init_from=x) has no effect: models begin anew"),
        (["model.hidden_sise=8"], "configuration key (model.hidden_sise) is not known"),
        (["--variant", "a", "retention", "train.seed=3"], "--variant a (train.seed=3) has no"),
        (["model.hidden_size=15", "--mixers", "retention"], "model.hidden_size (15) must be"),
        (["--json", "{here}/no/a.json"], "/no does not exist: make that folder first"),
    ],
)
def test_mistakes(tmp_path: Path, capsys, options: list[str], words: str) -> None:
    """One line, before the first run; nothing is written."""
    options = [option.format(here=tmp_path) for option in options]
    assert cli.run(recall.main, ["--out", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not [*tmp_path.iterdir()]


def test_a_checkpoint_is_no_place_for_results(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert call(tmp_path / "in", *MQAR) == 2
    assert "lies in a run or checkpoint" in capsys.readouterr().err
    assert len([*tmp_path.iterdir()]) == 2
