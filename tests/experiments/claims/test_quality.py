"""Claims about trained models: the rules with made-up losses, and small runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retnet import cli
from retnet.errors import UserError
from retnet.evaluation.profile import MeanLoss
from retnet.evaluation.scoring import DocumentScores
from retnet.experiments.claims import __main__ as command
from retnet.experiments.claims import quality
from retnet.experiments.claims.rivals import ablations, relatives_of
from retnet.experiments.claims.trials import Trials
from retnet.experiments.claims.verdict import Outcome, verdict
from retnet.experiments.contenders import Contender
from retnet.experiments.intervals import Scored, intervals
from retnet.experiments.repeat import repeat
from retnet.training import load_config

ORDER = ("one-decay", "no-head-norm", "small-heads", "no-gate", "no-decay")


def made_of(nats: NDArray[np.float64]) -> Scored:
    """Nats per token of documents of ten tokens, [seeds, documents]."""
    ten = np.full(nats.shape[1], 10)
    sizes = DocumentScores(nll=10 * nats[0], targets=ten, bytes=ten)
    return Scored(10 * nats, sizes, frozenset({"one"}), parameters=1)


class MadeUp(Trials):
    """Contenders that lose so many nats per token on 50 documents, with so much noise."""

    losses: dict[str, float]
    noise = 1e-3

    def scored(self, who):  # type: ignore[no-untyped-def]
        draw, documents = np.random.default_rng(0), 50
        shape = (len(self.seeds), documents)
        return {
            one.name: made_of(self.losses[one.name] + self.noise * draw.standard_normal(shape))
            for one in who
        }


def made_up(losses: dict[str, float], noise: float = 1e-3, seeds: tuple[int, ...] = (0, 1, 2)):  # type: ignore[no-untyped-def]
    own = type("Own", (MadeUp,), {"losses": losses, "noise": noise})
    return own(seeds=seeds)


@pytest.mark.parametrize(
    ("retention", "noise", "expected"),
    [(3.9, 1e-3, Outcome.HELD), (4.005, 1e-4, Outcome.HELD), (4.1, 1e-3, Outcome.NOT),
     (4.0, 1.0, Outcome.OPEN)],
)  # fmt: skip
def test_as_good_as_a_transformer(retention: float, noise: float, expected: Outcome) -> None:
    findings = quality.transformer(made_up({"retention": retention, "attention": 4.0}, noise))
    assert verdict(findings) is expected
    difference, ours, theirs = findings
    assert difference.figure.value == pytest.approx(retention - 4, abs=noise)
    assert difference.figure.over == "3 seeds, 50 documents"
    assert ours.figure.value == pytest.approx(retention, abs=noise) and theirs.limit is None


def test_the_interval_covers_both() -> None:
    trials = made_up({"retention": 3.9, "attention": 4.0}, 0.3)
    found = trials.scored(quality.both(trials))
    both, over_seeds = intervals(found["attention"], found["retention"])
    figure = quality.transformer(trials)[0].figure
    assert (figure.low, figure.high) == (
        min(both.low, over_seeds.low), max(both.high, over_seeds.high)
    )  # fmt: skip
    one = quality.widest([both], 1, 50)
    assert one.over == "1 seed, 50 documents"


def test_one_seed_and_one_text_decide_nothing() -> None:
    class One(MadeUp):
        losses = {"retention": 3.0, "attention": 4.0}  # noqa: RUF012

        def scored(self, who):  # type: ignore[no-untyped-def]
            return {one.name: made_of(np.array([[self.losses[one.name]]])) for one in who}

    findings = quality.transformer(One(seeds=(0,)))
    assert findings[0].figure.low is None and verdict(findings) is Outcome.OPEN


def test_better_than_relatives_in_the_papers_order() -> None:
    losses = {"retention": 3.0, "rwkv-time-mix": 3.2, "linear": 3.5}
    assert verdict(quality.relatives(made_up(losses))) is Outcome.HELD
    findings = quality.relatives(made_up(losses | {"rwkv-time-mix": 2.9}))
    assert verdict(findings) is Outcome.PART
    assert [x.what for x in findings[:2]] == ["retention - rwkv-time-mix", "rwkv-time-mix - linear"]
    assert [x.outcome for x in findings[:3]] == [Outcome.NOT, Outcome.HELD, Outcome.NOT]
    backwards = dict(zip(losses, reversed(losses.values()), strict=True))
    assert verdict(quality.relatives(made_up(backwards))) is Outcome.NOT


def test_better_than_ablations_in_the_papers_order() -> None:
    losses = {"retention": 3.0} | {name: 3.1 + i / 10 for i, name in enumerate(ORDER)}
    findings = quality.own_ablations(made_up(losses))
    assert verdict(findings) is Outcome.HELD
    assert [x.what for x in findings[:5]] == [f"retention - {name}" for name in ORDER]
    assert " < ".join(("retention", *ORDER)) in findings[5].what
    two = losses | {"one-decay": 9.0}  # worse than the others, better in no pair of its own
    findings = quality.own_ablations(made_up(two))
    assert findings[5].figure.value == pytest.approx(11 / 15)
    assert verdict(findings) is Outcome.PART
    backwards = {name: -loss for name, loss in losses.items()}
    assert verdict(quality.own_ablations(made_up(backwards))) is Outcome.NOT


def test_pairs_in_order() -> None:
    figure = quality.in_order([[1.0, 1.0], [2.0, 3.0], [3.0, 2.0]])
    assert (figure.value, figure.low, figure.high) == (2 / 3, 2 / 3, 1.0)
    assert quality.in_order([[1.0], [2.0]]).low is None, "one seed has no range"


def test_ablations_are_models_of_one_size() -> None:
    who = ablations("configs/tiny.yaml", [])
    assert [rival.name for rival in sorted(who, key=lambda rival: rival.published)] == [*ORDER]
    for rival in who:
        model = load_config("configs/tiny.yaml", rival.contender.keys).model
        assert model.mixer == "retention"
    small, full = (load_config("configs/tiny.yaml", keys) for keys in (who[2].contender.keys, []))
    assert small.model.num_heads == 4 * full.model.num_heads


@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])
def test_the_time_mix_has_the_recipes_feed_forward_network(ffn: str) -> None:
    time_mix, linear = relatives_of("configs/tiny.yaml", [f"model.ffn={ffn}"])
    assert f"model.ffn={ffn}" in time_mix.contender.keys and time_mix.published == 30.92
    assert linear.contender.keys == ("model.mixer=linear",)


@pytest.mark.parametrize(
    ("growth", "expected"), [(1.0, Outcome.HELD), (1.5, Outcome.NOT), (None, Outcome.OPEN)]
)
def test_flat_beyond_training_comes_out_each_way(
    trained: Trials, monkeypatch, growth: float | None, expected: Outcome
) -> None:
    calls: list[int] = []

    def losses(model, tokens, contexts, **options: Any):  # type: ignore[no-untyped-def]
        calls.append(1)
        shift = 0.0 if growth is None else float(np.log(growth))
        steps = (0.3 * (len(calls) % 2) if growth is None else 1e-4 * len(calls)) + shift
        found = {c: MeanLoss(2 + steps * (c > contexts[0]), 9) for c in contexts[:3]}
        return {**found, contexts[3]: None}

    monkeypatch.setattr(quality, "by_context", losses)
    findings = quality.extrapolation(trained)
    assert verdict(findings) is expected
    assert len(findings) == 2 * 2 and len(calls) == 4, "two contexts, contenders, seeds"
    assert [x.limit is None for x in findings] == [False, False, True, True]


SMALL = """
model: {hidden_size: 16, num_hidden_layers: 1, num_heads: 2}
data: {tokenizer: bytes, seq_len: 16}
train: {device: cpu, precision: fp32, batch_size: 12, warmup_steps: 1, eval_every: 4, save_every: 4,
        sample_tokens: 0}
"""
RATES = {"retention": "1e-3", "attention": "2e-3"}


@pytest.fixture(scope="module", name="trained")
def small_trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    """Four finished runs, with tuned settings, of a recipe made small."""
    folder = tmp_path_factory.mktemp("trials")
    file, tuned = folder / "rows.jsonl", folder / "tuned.json"
    texts = [f"document {n} adds its key and value to the state. " * (1 + n % 3) for n in range(40)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chosen = [{"contender": name, "values": {"train.learning_rate": rate}}
              for name, rate in RATES.items()]  # fmt: skip
    tuned.write_text(json.dumps({"chosen": chosen}))
    overrides = (f"data.source={file}", f"data.cache_dir={folder / 'cache'}", "train.max_steps=4")
    recipe = folder / "small.yaml"
    recipe.write_text(SMALL)
    trials = Trials(str(recipe), overrides, seeds=(0, 1), tuned=tuned, out=folder / "runs")
    trials.trained(quality.both(trials))
    return trials


@pytest.fixture(name="given")
def small_options(trained: Trials) -> list[str]:
    """Those of the same runs."""
    given = [*trained.overrides, "--train", "--recipe", trained.recipe, "--out", str(trained.out)]
    return [*given, "--seeds", *map(str, trained.seeds)]


def test_small_runs(given: list[str], trained: Trials, tmp_path: Path, capsys) -> None:
    """Runs that the experiment of several seeds made are only read; tuned settings count."""
    names = ["equal-to-transformer", "flat-beyond-training"]
    out = ["--json", str(tmp_path / "out.json"), "--tuned", str(trained.tuned)]
    assert cli.run(command.main, [*names, *given, *out]) == 0
    assert capsys.readouterr().err.count("is finished") == 8, "four runs, of two claims"
    content = json.loads((tmp_path / "out.json").read_text())
    equal, flat = content["claims"]
    assert str(trained.tuned) in content["training"] and content["size"] == ""
    found = {x["what"]: x["value"] for x in equal["findings"]}
    who = [Contender(name, (f"model.mixer={name}", f"train.learning_rate={rate}"))
           for name, rate in RATES.items()]  # fmt: skip
    rows = repeat(trained.recipe, who, seeds=(0, 1), variations={}, tuned={},
                  overrides=trained.overrides, out=trained.out)  # fmt: skip
    assert capsys.readouterr().err.count("is finished") == 4
    # which validate on rows of the whole text, not on windows of each document
    means = [float(np.mean(row.losses)) for row in rows]
    assert [found["retention"], found["attention"]] == pytest.approx(means, abs=1e-3)
    assert found["retention - attention"] == pytest.approx(means[0] - means[1], abs=1e-3)
    assert [x["what"] for x in flat["findings"]] == [
        f"{name}: perplexity from {16 * times} tokens / from 16, as trained"
        for name in ("retention", "attention") for times in (2, 4)
    ]  # fmt: skip
    assert {x["over"] for x in flat["findings"]} == {"2 seeds"}


def test_documents_that_are_too_short(trained: Trials, monkeypatch) -> None:
    encode = quality.tokens_of
    short = lambda *given: [ids[:20] for ids in encode(*given)]  # noqa: E731
    monkeypatch.setattr(quality, "tokens_of", short)
    with pytest.raises(UserError, match=r"are no longer than 2 times data.seq_len \(16\)"):
        quality.extrapolation(trained)


@pytest.mark.slow
def test_all_claims_of_trained_models(given: list[str], tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.md"
    options = ["--markdown", str(page), "--context", "64", "--rounds", "1"]
    assert cli.run(command.main, [*given, *options]) == 0
    text = page.read_text()
    assert "not measured" not in text and text.count("\n## ") == 13
    assert capsys.readouterr().out.count("  (") >= 13
