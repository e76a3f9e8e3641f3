"""The paper's ablations: which models they are, what they are equal in, what is said of them."""

import json
import logging
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retnet import cli
from retnet.checkpoints import load_checkpoint
from retnet.evaluation import Difference, score_documents, validation_text
from retnet.experiments import ablations, contenders
from retnet.experiments.ablation_table import PAPER, Row, conclusions, pairs_in_order, table
from retnet.experiments.ablations import ablated, family
from retnet.model import MIXERS
from retnet.training import load_config
from retnet.training.build import build_model, model_config
from tests.experiments.test_repeat import small_runs  # noqa: F401

RECIPE = "configs/shakespeare-char.yaml"
ALONE = ("--mixers", "retention")
NAMES = [
    "retention", "no-gate", "no-gate-equal-width", "no-head-norm", "no-decay", "one-decay",
    "small-heads",
]  # fmt: skip


def model_of(recipe: str, keys: tuple[str, ...], *overrides: str) -> Any:
    return build_model(model_config(load_config(recipe, [*overrides, *keys]), 60))


@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])
def test_each_ablation_is_the_model_that_it_is_called(ffn: str) -> None:
    """Equal in parameters to a third of a percent, and in the feed-forward network's width."""
    models = {
        one.name: model_of(RECIPE, one.keys, f"model.ffn={ffn}")
        for one in ablated(RECIPE, [f"model.ffn={ffn}"])
    }
    assert [*models] == NAMES
    full = models.pop("retention")
    width, size = full.config.intermediate_size, full.num_parameters()
    changed = {
        "no-gate": {"gate": False}, "no-gate-equal-width": {"gate": False},
        "no-head-norm": {"head_norm": "none"}, "no-decay": {"decay": 1},
        "one-decay": {"decay": 127 / 128}, "small-heads": {"num_heads": 16},
    }  # fmt: skip
    names = ("gate", "head_norm", "decay", "num_heads", "value_size", "hidden_size", "ffn")
    for name, model in models.items():
        config = model.config
        assert [getattr(config, key) for key in names] == [
            changed[name].get(key, getattr(full.config, key)) for key in names
        ]
        equal = ablations.EQUAL[name].split(", ")
        assert ("width" in equal) == (config.intermediate_size == width)
        assert ("parameters" in equal) == (abs(model.num_parameters() - size) < size / 300)
    assert models["small-heads"].config.head_dim * 4 == full.config.head_dim
    gates = 4 * 128 * 256  # of four layers
    assert models["no-gate-equal-width"].num_parameters() == size - gates


def test_the_family_beside_them() -> None:
    """All mixers but retention; and the paper's RWKV, with the RetNet's feed-forward network."""

    def found(mixers: list[str] | None, *overrides: str, **options: Any) -> dict[str, tuple]:
        given = {"recipe": RECIPE, "overrides": [*overrides], "variant": [], "mixers": mixers}
        return {one.name: one.keys for one in family(Namespace(**given | options))}

    assert [*found(None)] == [*(m for m in MIXERS if m != "retention"), "rwkv-time-mix"]
    assert found(["retention"]) == {}
    assert found(["rwkv"])["rwkv-time-mix"] == ("model.mixer=rwkv", "model.ffn=gelu")
    assert [*found(["rwkv"], "model.ffn=swiglu")] == ["rwkv"], "there it is the time mix alone"
    assert [*found(None, variant=[["own", "retention", "model.decay=0.9"]])] == ["own"]


def many_documents(arguments: list[str], folder: Path) -> list[str]:
    """The same small runs on documents of which several are held back."""
    file = folder / "rows.jsonl"
    texts = (f"token {n} adds its key and value to the state. " * (1 + n % 3) for n in range(40))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [f"data.source={file}" if "data.source" in text else text for text in arguments]


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Few ablations, since runs take time; the test above is about all of them."""

    def some(recipe: str, overrides: list[str]) -> list[contenders.Contender]:
        return [one for one in ablated(recipe, overrides) if one.name in names]

    monkeypatch.setattr(ablations, "ablated", some)


def test_one_table_from_runs_that_are_reused(arguments, tmp_path, capsys, monkeypatch) -> None:
    names = ["retention", "no-gate-equal-width", "no-decay"]
    only(monkeypatch, *names)
    file, given = tmp_path / "found.json", many_documents(arguments, tmp_path)
    given += ["--mixers", "linear", "--seeds", "2", "--json", str(file), "train.max_steps=1"]
    assert cli.run(ablations.main, given) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == [*names, "linear"]
    content = json.loads(file.read_text())
    assert content["recipe"] == RECIPE and content["seeds"] == 2
    full, *others = content["rows"]
    # by the parts
    runs = [tmp_path / f"runs/shakespeare-char-{name}-{s}" for name, s in
            (("retention", 0), ("retention", 1), ("no-decay-1", 0), ("no-decay-1", 1))]  # fmt: skip
    losses = []
    for checkpoint in map(load_checkpoint, runs):
        texts = validation_text([checkpoint]).documents
        scores = score_documents(checkpoint.model, checkpoint.tokenizer, texts, context=16)
        losses.append(scores.nats_per_token)
    by_name = {row["contender"]: row for row in content["rows"]}
    assert full["losses"] == pytest.approx(losses[:2])
    assert by_name["no-decay"]["losses"] == pytest.approx(losses[2:])
    for row, line in zip(content["rows"], lines[2:6], strict=True):
        assert row["loss"] == pytest.approx(statistics.mean(row["losses"]))
        assert row["perplexity"] == pytest.approx(np.exp(row["loss"]))
        shown = [f"{row['parameters']:,}", f"{row['loss']:.4f}", f"{row['spread']:.4f}"]
        assert all(cell in line for cell in [*shown, f"{row['perplexity']:.3f}"])
        assert line.endswith(f"{row['paper']:.2f}") and row["paper"] == PAPER[row["contender"]]
    for row in others:
        both = row["minus_full"]
        assert len(both) == 2 and both[0]["low"] <= both[0]["value"] <= both[0]["high"]
        assert both[1]["value"] == pytest.approx(row["loss"] - full["loss"])
    assert [row["equal"] for row in content["rows"]] == [
        "parameters, width", "width", "parameters, width", "parameters",
    ]  # fmt: skip
    assert full["parameters"] == by_name["no-gate-equal-width"]["parameters"] + 16 * 32
    assert "untuned: all have the recipe's train.learning_rate (0.005)" in printed.out
    assert "run 8 of 8" in printed.err

    assert cli.run(ablations.main, given) == 0
    again = capsys.readouterr()
    assert again.out == printed.out and again.err.count("is finished") == 8


def test_all_are_tuned_alike_and_that_is_taken(arguments, tmp_path, capsys, monkeypatch) -> None:
    names = ["retention", "no-decay"]
    only(monkeypatch, *names)
    file = tmp_path / "found.json"
    given = [*arguments, *ALONE, "--seeds", "1", "train.max_steps=1"]
    grid = ["--grid", "train.schedule=linear,cosine", "--json", str(file)]
    assert cli.run(ablations.main, [*given, *grid]) == 0
    out = capsys.readouterr().out
    content = json.loads(file.read_text())
    trials = [(t["contender"], t["values"]["train.schedule"]) for t in content["trials"]]
    assert sorted(trials) == sorted((n, v) for n in names for v in ("linear", "cosine"))
    for best, row in zip(content["chosen"], content["rows"], strict=True):
        own = [t for t in content["trials"] if t["contender"] == best["contender"]]
        assert best["loss"] == min(trial["loss"] for trial in own)
        assert row["settings"][-1] == f"train.schedule={best['values']['train.schedule']}"
    assert "every contender was tuned alike, on 10% of the training text" in out
    chosen = content["chosen"][1]["values"]["train.schedule"]
    for name, within in (("tune-no-decay-linear-1", True), (f"no-decay-1-{chosen}-0", False)):
        split = tmp_path / f"runs/shakespeare-char-{name}/final/data.json"
        assert ("within" in json.loads(split.read_text())["split"]) == within

    assert cli.run(ablations.main, [*given, "--tuned", str(file)]) == 0
    again = capsys.readouterr()
    first = out.splitlines().index(next(line for line in out.splitlines() if "equal in" in line))
    assert again.out.splitlines()[:4] == out.splitlines()[first : first + 4]
    assert again.err.count("is finished") == 2
    assert f"every contender has its own settings, of {file}" in again.out


@pytest.mark.slow
def test_all_of_them_beside_the_family(arguments, tmp_path: Path) -> None:
    given = [text for text in arguments if "num_heads" not in text]  # which some do not have
    given += ["model.hidden_size=32", "--seeds", "1", "--json", str(tmp_path / "found.json")]
    assert cli.run(ablations.main, given) == 0
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    others = [mixer for mixer in MIXERS if mixer != "retention"]
    assert [row["contender"] for row in found] == [*NAMES, *others, "rwkv-time-mix"]
    assert len({row["loss"] for row in found}) == len(found), "no two are one model"


def row(name: str, loss: float, low: float | None = None, high: float | None = None) -> Row:
    gaps = [] if name == "retention" else [Difference(loss - 1, low, high)]
    return Row(name, "parameters", [], 1000, [loss], gaps, PAPER.get(name))


def test_the_papers_order() -> None:
    """The two without gate have one figure there, and are no pair; what has none is in no pair."""
    found = [row("retention", 1.0), row("no-gate", 1.2), row("no-gate-equal-width", 1.3),
             row("linear", 1.1), row("attention", 0.5)]  # fmt: skip
    assert pairs_in_order(found) == (3, 5)
    lines = conclusions(found, "untuned")
    assert lines[-1] == "3 of 5 pairs stand in the paper's order"
    assert lines[-2].endswith(": retention, linear, no-gate, no-gate-equal-width")


def test_what_is_clear_and_what_not() -> None:
    found = [row("retention", 1.0), row("no-gate", 1.2, 0.1, 0.3), row("linear", 1.1, -0.1, 0.3),
             row("rwkv", 0.8, -0.3, -0.1)]  # fmt: skip
    assert [one.direction for one in found] == [0, 1, 0, -1]
    lines = conclusions(found, "untuned")
    assert lines[2:5] == [
        "clearly worse than retention: no-gate",
        "clearly better than retention: rwkv",
        "not clearly other than retention: linear",
    ]
    disputed = Row("a", None, [], 1, [2.0], [Difference(1, 0.5, 1.5), Difference(1, -1, 3)], None)
    assert disputed.direction == 0, "Student's interval holds zero"
    nothing = conclusions([found[0], row("no-gate", 1.2)], "untuned")
    assert "no intervals, since there are one seed and one document" in nothing[2]
    cells = table([found[0], disputed], ["95% over seeds", "over 2 seeds (t)"])[-1].split()
    assert cells[:3] == ["a", "-", "1"] and cells[-1] == "-"


def test_how_many_runs_there_are_and_how_long_they_take(tmp_path, monkeypatch, caplog) -> None:
    """A finished one takes no time, and is none that is waited for."""
    (tmp_path / "2/final").mkdir(parents=True)
    clock = iter(range(0, 1000, 65))
    monkeypatch.setattr(contenders.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(contenders, "check_runs", lambda runs: None)

    class Fake:
        def __init__(self, number: int) -> None:
            self.folder = tmp_path / str(number)

        def __call__(self) -> float:
            return float(self.folder.name)

    with caplog.at_level(logging.INFO):
        found = contenders.run_all([Fake(number) for number in (1, 2, 3)])  # type: ignore[misc]
    assert found == [1, 2, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "run 1 of 3", "run 2 of 3, about 1:05 left", "run 3 of 3, about 1:05 left",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.gate=false"], "model.gate (False) is an ablation itself: leave it out"),
        (["model.head_norm=none"], "model.head_norm (none) is an ablation itself"),
        (["model.decay=0.9"], "model.decay (0.9) must be a schedule, of a decay for each head"),
        (["model.intermediate_size=64"], "model.intermediate_size (64) must be null, so that all"),
        (["model.attention_layers=[0]"], "model.attention_layers ([0]) must be null, so that all"),
        (["model.num_heads=4"], "model.hidden_size (16) / model.num_heads (4) is 4: make it a mu"),
        (["model.mixer=rwkv"], "argument (model.mixer=rwkv) has no effect, since --mixers or"),
        (["train.seed=3"], "argument (train.seed=3) has no effect, since --seeds sets that key"),
        (["--seeds", "0"], "argument --seeds: '0' must be a whole number of at least 1"),
        (["--seeds", "0,1"], "argument --seeds: '0,1' must be a whole number of at least 1"),
        (["--grid", "train.beta1"], "--grid (train.beta1) must be key=value,value"),
        (["--grid", "model.decay=0.8,0.9"], "--grid (model.decay) is what no-decay changes"),
        (["--grid", "train.max_steps=1,2"], "has no effect, since --grid sets that key"),
        (["--grid", "train.batch_size=1,2"], "--grid (train.batch_size) changes the tokens, which"),
        (["--grid", "train.seed=1,2"], "--grid (train.seed) has no effect, since --seeds sets"),
        (["--grid", "train.beta1=0.1,0.9", "data.tuning_fraction=0.3"], "since --grid sets that"),
        (["--grid", "train.beta1=0.1,0.9", "--tuned", "x.json"], "--tuned (x.json) has no effect"),
        (["--variant", "a", "rwkv", "data.tokenizer=bpe"], "--variant a (data.tokenizer=bpe) chan"),
        (["--variant", "no-gate", "rwkv"], "--variant (no-gate) must be a folder's name that no"),
        (["--variant", "retention", "rwkv"], "--variant (retention) must be a folder's name that"),
        (["--tuned", "no.json"], "no.json is not readable JSON"),
        (["--tuned", "{tuned}"], "tuned.json) says nothing of no-gate"),
        (["--tuned", "{tuned}", "--json", "{tuned}"], "that the choice of settings is read from"),
        (["--json", "{here}/text.txt"], "text.txt) is a file that the text is read from"),
        (["--json", "{here}/no/x.json"], "/no does not exist: make that folder first"),
    ],
)  # fmt: skip
def test_mistakes(arguments, tmp_path: Path, capsys, options: list[str], words: str) -> None:
    """Found before the first run."""
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps({"chosen": [{"contender": "retention", "values": {}}]}))
    options = [option.format(here=tmp_path, tuned=tuned) for option in options]
    more = ["--mixers", "linear"]
    assert cli.run(ablations.main, [*arguments, *options, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not (tmp_path / "runs").exists()
