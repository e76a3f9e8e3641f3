"""Several seeds and settings of a recipe."""

import json
import re
import shutil
import statistics
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from retnet import cli
from retnet.checkpoints import load_checkpoint
from retnet.errors import UserError
from retnet.evaluation import score_documents, t_interval, validation_text
from retnet.experiments import contenders as module
from retnet.experiments import repeat
from retnet.experiments.contenders import contenders
from retnet.experiments.tune import read_tuned
from retnet.model import MIXERS
from retnet.training import key_of


@pytest.fixture(name="arguments")
def small_runs(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("every token adds its key and value to the state, and the state decays. " * 40)
    return [
        "configs/shakespeare-char.yaml", "--out", str(tmp_path / "runs"), f"data.source={text}",
        f"data.cache_dir={tmp_path / 'cache'}", "data.seq_len=16", "model.hidden_size=16",
        "model.num_hidden_layers=1", "model.num_heads=2", "train.max_steps=4", "train.device=cpu",
        "train.warmup_steps=1", "train.sample_tokens=0", "train.eval_every=2",
    ]  # fmt: skip


def test_a_row_for_each_mixer_and_setting(arguments, tmp_path: Path, capsys) -> None:
    vary = ["--mixers", "retention", "attention"]
    vary += ["--seeds", "0", "1", "--vary", "train.learning_rate=1e-3,1e-1"]
    assert cli.run(repeat.main, [*arguments, *vary]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == (1 + 2 * 2) + 1 + (2 + 3), "runs, differences of all but the first"
    settings = [re.split(r"  +", row)[0] for row in table[1:5]]
    assert settings == [
        "retention, learning_rate=1e-3", "retention, learning_rate=1e-1",
        "attention, learning_rate=1e-3", "attention, learning_rate=1e-1",
    ]  # fmt: skip
    mean, spread, *each = map(float, table[1].split()[2:])
    assert mean == pytest.approx(statistics.mean(each), abs=1e-4)
    assert spread == pytest.approx(statistics.stdev(each), abs=1e-4)
    last = (tmp_path / "runs/shakespeare-char-retention-1e-3-0/metrics.jsonl").read_text()
    assert json.loads(last.splitlines()[-1])["val/loss"] == pytest.approx(each[0], abs=1e-4)

    assert cli.run(repeat.main, [*arguments, *vary]) == 0  # finished runs are only read
    again = capsys.readouterr()
    assert again.out.splitlines() == table and again.err.count("is finished") == 8


def test_one_mixer_one_seed(arguments, capsys) -> None:
    assert cli.run(repeat.main, [*arguments, "--seeds", "3", "--mixers", "attention"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert row.startswith("attention ") and row.split()[2] == "-"


def test_every_mixer_takes_part_and_variants_too(arguments, capsys) -> None:
    variant = ["--variant", "short", "retention", "model.decay=0.9"]
    assert cli.run(repeat.main, [*arguments, *variant, "--seeds", "0"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert row.startswith("short, decay=0.9 ")
    who = contenders(Namespace(mixers=None, variant=[]))
    assert [one.name for one in who] == list(MIXERS)


def many_documents(arguments: list[str], tmp_path: Path) -> list[str]:
    """The same small runs on 40 documents, of which some are held back."""
    file = tmp_path / "rows.jsonl"
    texts = [f"document {n} adds its key and value to the state. " * (1 + n % 3) for n in range(40)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [f"data.source={file}" if "data.source" in text else text for text in arguments]


def test_differences_with_intervals_over_seeds_and_documents(arguments, tmp_path, capsys) -> None:
    who = ["--mixers", "retention", "--variant", "wild", "retention", "train.learning_rate=0.3"]
    options = [*many_documents(arguments, tmp_path), *who, "--seeds", "4", "5"]
    assert cli.run(repeat.main, options) == 0
    head, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert re.split(r"  +", head) == [
        "minus retention", "nats/token", "95% over seeds and documents", "over 2 seeds (t)",
    ]  # fmt: skip
    _, _, value, *ends = re.sub(r"[\[\],]", "", row).split()
    low, high, t_low, t_high = map(float, ends)
    # by the parts: every run scored on what it held back
    totals = []
    for who_ in ("retention", "wild-0.3"):
        for seed in (4, 5):
            checkpoint = load_checkpoint(tmp_path / f"runs/shakespeare-char-{who_}-{seed}")
            texts = validation_text([checkpoint]).documents
            model, tokenizer = checkpoint.model, checkpoint.tokenizer
            scores = score_documents(model, tokenizer, texts, context=16)
            totals.append(scores.nll)
    gaps = (np.stack(totals[2:]) - np.stack(totals[:2])).sum(axis=1) / scores.targets.sum()
    assert float(value) == pytest.approx(gaps.mean(), abs=1e-4)
    assert low < float(value) < high
    student = t_interval(gaps.tolist())
    assert (t_low, t_high) == pytest.approx((student.low, student.high), abs=1e-4)


def test_one_seed_and_other_tokenizers_or_texts(arguments, tmp_path, capsys) -> None:
    given = many_documents(arguments, tmp_path)
    given += ["--mixers", "linear", "--seeds", "0"]
    assert cli.run(repeat.main, [*given, "--vary", "data.tokenizer=bytes,bpe"]) == 0
    head = capsys.readouterr().out.splitlines()[-3]
    assert re.split(r"  +", head)[1:] == ["bits/byte", "95% over documents"]
    assert cli.run(repeat.main, [*given, "--vary", "data.validation_fraction=0.2,0.5"]) == 0
    assert "no differences: " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vary", "train.seed"], "--vary (train.seed) must be key=value,value"),
        (["--vary", "train.seed=1,"], "--vary (train.seed=1,) must be key=value,value"),
        (["--variant", "a"], "--variant (a) must be NAME MIXER KEY=VALUE"),
        (["--variant", "a", "lstm"], "--variant (a lstm) must be NAME MIXER KEY=VALUE"),
        (["--variant", "a/b", "retention"], "--variant (a/b) must be a folder's name"),
        (["--variant", "a", "retention", "--variant", "a", "attention"], "--variant (a) must be"),
        (["--tuned", "no.json"], "no.json is not readable JSON"),
        (["--vary", "train.weight_decay=0.1,0.1"], "must be key=value,value, each key and value"),
        (["--mixers", "aft", "rwkv", "aft"], "--mixers (aft) is there twice: leave one of them"),
        (["--vary", "train.weight_decay=0.1,1e-1"], "must be key=value,value, each key and value"),
        (["--variant", "a", "retention", "train.beta1=0.8", "--variant", "a-0.8", "retention"],
         "--variant: two contenders would have one run folder ("),
        (["--seeds", "0", "1", "0"], "--seeds (0) is there twice: the same run, and no spread"),
        # found before the first run
        (["--vary", "train.weight_decay=0.1,some"], "train.weight_decay (some) must be a number"),
        (["--mixers", "performer", "linear", "--vary", "model.num_features=8,16"],
         "model.num_features (8) has no meaning with model.mixer=linear"),
        (["--mixers", "retention", "--vary", "model.value_size=16,17"], "model.value_size (17)"),
        (["--seeds", "\u0661_\u0662"], "argument --seeds: '\u0661_\u0662' must be a whole number"),
        (["--seeds", "0", "-1"], "--seeds (-1) must be at least 0, and below 2^32 (4294967296)"),
        (["--seeds", "4294967296"], "--seeds (4294967296) must be at least 0, and below 2^32"),
        (["--seeds", "9" * 30], "argument --seeds: '" + "9" * 30 + "' must be a whole number"),
        # what would have no effect
        (["train.seed=7"], "argument (train.seed=7) has no effect, since --seeds sets that key"),
        (["train.out_dir=x"], "argument (train.out_dir=x) has no effect, since --out sets that"),
        (["model.mixer=rwkv"], "(model.mixer=rwkv) has no effect, since --mixers or --variant s"),
        (["--vary", "train.max_steps=3,5"], "argument (train.max_steps=4) has no effect, since --"),
        (["--vary", "model.mixer=rwkv,aft"], "--vary (model.mixer) has no effect, since --mixers"),
        (["--variant", "a", "rwkv", "train.seed=3"], "--variant a (train.seed=3) has no effect"),
    ],
)  # fmt: skip
def test_mistakes(arguments, tmp_path: Path, capsys, options: list[str], words: str) -> None:
    assert cli.run(repeat.main, [*arguments, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ("train.max_steps=2", "train.max_steps=4", "train.max_steps (2 -> 4)"),
        ("train.eval_max_tokens=99", "train.eval_max_tokens=9", "train.eval_max_tokens (99 -> 9)"),
    ],
)
def test_runs_of_before_are_no_others(
    arguments, tmp_path: Path, capsys, before: str, after: str, change: str
) -> None:
    """train.py would go on with them, and they would stand beside runs of another length."""
    given = [text for text in arguments if key_of(text) != key_of(before)]
    options = ["--mixers", "retention", "--seeds", "0"]
    assert cli.run(repeat.main, [*given, before, *options]) == 0
    kept = (tmp_path / "runs/shakespeare-char-retention-0/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert cli.run(repeat.main, [*given, after, *options, "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: run ({tmp_path}/runs/shakespeare-char-retention-0) is of ")
    assert f"it differs in {change}: give another --out" in line
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.jsonl").read_bytes() == kept


def test_runs_of_before_on_another_text(arguments, tmp_path: Path, capsys) -> None:
    """A finished run is not looked at again by train.py."""
    given = [*arguments, "--mixers", "linear", "--seeds"]
    assert cli.run(repeat.main, [*given, "0"]) == 0
    text = tmp_path / "text.txt"
    before = text.read_text()
    text.write_text(f"{before} something new")
    capsys.readouterr()
    assert cli.run(repeat.main, [*given, "0", "1"]) == 2
    first = tmp_path / "runs/shakespeare-char-linear-0"
    words = f"data.source ({text}) is not the text that run ({first}) was trained on: restore it"
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert cli.run(repeat.main, [*given, "1"]) == 0
    text.write_text(before)
    assert cli.run(repeat.main, [*given, "0", "1"]) == 2  # both are finished
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert cli.run(repeat.main, [*given, "0", "2"]) == 0


@pytest.mark.parametrize("name", ["final", "final/data.json"])
def test_a_run_of_before_whose_end_is_lost(arguments, tmp_path: Path, name: str) -> None:
    given = [*arguments, "--mixers", "linear", "--seeds", "0"]
    assert cli.run(repeat.main, given) == 0
    place = tmp_path / "runs/shakespeare-char-linear-0" / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert cli.run(repeat.main, [*given, "1"]) == 0
    assert place.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vary", "train.beta1=0.8,0.9"], "--tuned a (train.beta1=0.7) has no effect, since --"),
        (["train.beta1=0.8"], "argument (train.beta1=0.8) has no effect, since --tuned ("),
    ],
)
def test_a_key_that_was_tuned(arguments, tmp_path, capsys, options: list[str], words: str) -> None:
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"chosen": [{"contender": "a", "values": {"train.beta1": "0.7"}}]}))
    more = ["--variant", "a", "retention", "--tuned", str(file)]
    assert cli.run(repeat.main, [*arguments, *options, *more]) == 2
    assert words in capsys.readouterr().err


def test_a_contender_that_was_tuned_twice(tmp_path: Path) -> None:
    """As two results that a hand has put together: the last one counted, without a word."""
    file = tmp_path / "tuned.json"
    one = {"contender": "a", "values": {"train.beta1": "0.7"}}
    file.write_text(json.dumps({"chosen": [one, one | {"contender": "b"}]}))
    assert read_tuned(file) == {"a": ["train.beta1=0.7"], "b": ["train.beta1=0.7"]}
    file.write_text(json.dumps({"chosen": [one, one]}))
    with pytest.raises(UserError, match=r"tuned\.json: chosen has a twice: leave one of them out"):
        read_tuned(file)


def test_a_run_that_does_not_finish(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train", lambda *_: 3)
    with pytest.raises(UserError, match="did not finish"):
        repeat.main([*arguments, "--seeds", "0", "--mixers", "retention"])


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"step": 4}', '{"val/loss": null}'])
def test_a_finished_run_without_its_metrics(arguments, monkeypatch, content: str | None) -> None:
    def finished(config, by_hand) -> int:
        config.train.run_folder.mkdir(parents=True)
        if content is not None:
            (config.train.run_folder / "metrics.jsonl").write_text(content)
        return 0

    monkeypatch.setattr(module, "train", finished)
    words = r"metrics\.jsonl does not tell the last step's validation loss: restore it, or remove"
    with pytest.raises(UserError, match=words):
        repeat.main([*arguments, "--seeds", "0", "--mixers", "retention"])
