"""The command: what it prints and writes, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch

from retnet import cli
from retnet.errors import UserError
from retnet.evaluation.comparison import describe_environment
from retnet.experiments.claims import __main__ as command
from retnet.experiments.claims.output import About, to_json
from retnet.experiments.claims.registry import CLAIMS
from retnet.experiments.claims.setup import Setup
from tests.experiments.claims.test_costs import tiny_setup  # noqa: F401
from tests.experiments.test_repeat import small_runs  # noqa: F401

PAGE = Path("docs/claims.md")


def test_printed_and_written(tiny: Setup, tmp_path: Path, capsys) -> None:
    names = ["normalisations", "batch-latency"]
    files = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    options = ["--size", tiny.size, "--rounds", "2", "--context", "64", "--dtype", "float64"]
    assert cli.run(command.main, [*names, *options, *files]) == 0
    printed = capsys.readouterr()
    content = json.loads((tmp_path / "out.json").read_text())
    assert [claim["name"] for claim in content["claims"]] == names
    assert content["rounds"] == 2 and content["training"] == ""
    assert "width 16, 1 layers" in content["size"] and content["size"].endswith("float64")
    page = (tmp_path / "out.md").read_text()
    for claim in content["claims"]:
        name, verdict = claim["name"], claim["verdict"]
        assert verdict in ("held", "held in part", "did not hold", "not decided")
        assert re.search(rf"^{name}: {verdict}$", printed.out, re.MULTILINE)
        assert f"| `{name}`: {claim['says']} | {claim['source']} | **{verdict}**" in page
        assert f"\n## {name}: {verdict}\n" in page
        assert re.search(rf"^== {name}, about \d+ s(; then 1 more)?$", printed.err, re.MULTILINE)
        assert re.search(rf"^{name}: {verdict}, [\d.]+ s(, about \d+ s left)?$", printed.err,
                         re.MULTILINE)  # fmt: skip
        untested = claim["of"] and f"The claim is of {claim['of']}: this tests it at another size"
        assert untested in page and " ".join(untested.split()) in " ".join(printed.out.split())
        assert bool(untested) == (name == "batch-latency")
        for finding in claim["findings"]:
            assert finding["what"] in printed.out and finding["what"] in page
            assert finding["low"] <= finding["value"] <= finding["high"]
            assert (finding["limit"] is None) == (finding["outcome"] is None)
    assert printed.err.count(" s left") == 1, "nothing is left after the last"
    assert "python -m retnet.experiments.claims normalisations" in page
    for name in CLAIMS.keys() - set(names):
        assert f"| `{name}`: " in page, "the page names those that were not measured"
    assert page.count("not measured: needs --train") == sum(c.trains for c in CLAIMS.values())


def test_options_reach_the_measurement(tiny: Setup, monkeypatch, capsys) -> None:
    seen: list[Setup] = []

    def measure(setup: Setup):  # type: ignore[no-untyped-def]
        seen.append(setup)
        raise KeyboardInterrupt

    claim = CLAIMS["normalisations"]
    monkeypatch.setitem(CLAIMS, claim.name, type(claim)(**{**vars(claim), "measure": measure}))
    options = ["--size", tiny.size, "--rounds", "4", "--context", "70", "--dtype", "bfloat16"]
    assert cli.run(command.main, [claim.name, *options, "--device", "cpu"]) == 130
    assert seen == [Setup(tiny.size, torch.device("cpu"), torch.bfloat16, 4, 70)]
    assert cli.run(command.main, [claim.name, "--device", "cpu"]) == 130
    assert seen[1] == Setup()
    capsys.readouterr()


def test_what_was_measured_is_kept_where_another_claim_fails(
    tiny: Setup, tmp_path: Path, monkeypatch, capsys
) -> None:
    def fails(setup: Setup):  # type: ignore[no-untyped-def]
        raise UserError("made up")

    claim = CLAIMS["batch-latency"]
    monkeypatch.setitem(CLAIMS, claim.name, type(claim)(**{**vars(claim), "measure": fails}))
    names = [claim.name, "normalisations"]
    options = ["--size", tiny.size, "--rounds", "1", "--context", "64"]
    file = tmp_path / "out.json"
    assert cli.run(command.main, [*names, *options, "--json", str(file)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: claim (batch-latency) was not measured: made up"
    assert [x["name"] for x in json.loads(file.read_text())["claims"]] == ["normalisations"]
    file.unlink()
    assert cli.run(command.main, [claim.name, *options, "--json", str(file)]) == 2
    assert not file.exists(), "nothing was measured"
    capsys.readouterr()


@pytest.mark.parametrize(("load", "marked"), [(3.2, True), (0.1, False), (None, False)])
def test_a_busy_machine_is_marked(load: float | None, marked: bool) -> None:
    about = About("", "", 1, "", describe_environment(torch.device("cpu")), load)
    assert any("other work (load average 3.2" in line for line in about.lines()) == marked
    assert to_json({}, about)["load_average"] == load


def test_list(capsys) -> None:
    assert cli.run(command.main, ["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*CLAIMS]
    assert sum(", --train:" in line for line in lines) == sum(c.trains for c in CLAIMS.values())
    assert cli.run(command.main, ["--list", "rwkv-cost"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("rwkv-cost ") and CLAIMS["rwkv-cost"].source in line
    assert cli.run(command.main, ["--list", "equal-to-transformer"]) == 0
    capsys.readouterr()


def test_under_ten_minutes_without_training() -> None:
    assert sum(claim.seconds for claim in CLAIMS.values() if not claim.trains) < 600


def test_the_page_names_every_claim() -> None:
    page = PAGE.read_text()
    for claim in CLAIMS.values():
        assert f"| `{claim.name}`: {claim.says} | {claim.source} | " in page, claim.name
        if not claim.trains:
            verdict = "(held|held in part|did not hold|not decided)"
            assert re.search(rf"^## {claim.name}: {verdict}$", page,
                             re.MULTILINE), claim.name  # fmt: skip
    assert "python -m retnet.experiments.claims" in page and " thread" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["perpetual-motion"], "claim (perpetual-motion) is none of three-forms, normalisations,"),
        (
            ["equal-to-transformer"],
            "claim (equal-to-transformer) needs trained models: add --train",
        ),
        (["rwkv-cost", "--seeds", "1"], "--seeds ([1]) has no effect, since nothing is trained"),
        (["rwkv-cost", "--tuned", "x"], "--tuned (x) has no effect, since nothing is trained"),
        (["rwkv-cost", "--recipe", "x"], "--recipe (x) has no effect, since nothing is trained"),
        (["rwkv-cost", "--out", "x"], "--out (x) has no effect, since nothing is trained"),
        (["rwkv-cost", "train.max_steps=3"], "argument (train.max_steps=3) has no effect, since"),
        (["rwkv-cost", "--train"], "--train has no effect, since these claims need no training"),
        (["rwkv-cost", "--size", "huge"], "--size (huge) must be a recipe of configs/ (base, "),
        (["rwkv-cost", "--size", "no.yaml"], "configuration (no.yaml) is not a file"),
        (["equal-to-transformer", "--train", "--recipe", "no.yaml"], "configuration (no.yaml) is"),
        (["rwkv-cost", "--context", "9" * 12], "--context (999,999,999,999) with 8 rows needs"),
        (["rwkv-cost", "--context", "10"], "--context (10) must be at least 64"),
        (["rwkv-cost", "--rounds", "0"], "argument --rounds: '0' must be a whole number of at"),
        (["rwkv-cost", "--device", "abacus"], "--device (abacus) cannot be used"),
        (["rwkv-cost", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["rwkv-cost", "--json", "no/x.json"], "--json (no/x.json): no does not exist"),
        (["rwkv-cost", "--markdown", "no/x.md"], "--markdown (no/x.md): no does not exist"),
        (["rwkv-cost", "--markdown", "."], "--markdown (.) is a folder: name a file in it"),
    ],
)
def test_mistakes(tmp_path: Path, capsys, monkeypatch, options: list[str], words: str) -> None:
    assert cli.run(command.main, options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--size", "base"],
            "--size (base) has no effect, since all of these claims are of trained",
        ),
        (["--rounds", "3"], "--rounds (3) has no effect, since all of these claims are of trained"),
        (["--seeds", "1", "1"], "--seeds (1) is there twice"),
        (["--tuned", "no.json"], "no.json is not readable JSON"),
        (["train.seed=3"], "argument (train.seed=3) has no effect, since --seeds sets that key"),
        (["model.mixer=rwkv"], "argument (model.mixer=rwkv) has no effect, since"),
        (["model.layers=3"], "model.layers"),
        (["model.num_heads=3"], "model.hidden_size (16) must be divisible by"),
    ],
)
def test_mistakes_of_training(
    arguments: list[str], tmp_path: Path, capsys, options: list[str], words: str
) -> None:
    recipe, _, out, *overrides = arguments
    given = ["--recipe", recipe, "--out", out, "--train", "equal-to-transformer"]
    assert cli.run(command.main, [*given, *overrides, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"], "nothing was trained"
