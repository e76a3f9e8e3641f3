"""The model card: what the Hub reads and people see, whatever things are called."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

from retnet import cli
from retnet.commands import generate
from retnet.training.card import Trained, model_card, plain
from retnet.training.config import load_config
from tests.generation.builders import byte_tokenizer, save_checkpoint, tiny_model
from tests.training.test_faults import flip_a_bit
from tests.training.test_train import metrics, run

ODD = "a: b|*c*_d_ `e` <!--f [g](h) # {i} & ~~j~~ $k$ 'l' \"m\" @n\n---\n\\o\udcff\x1b[31m"


class Side:
    """What a card asks of a token file."""

    num_documents, num_tokens = 3, 1000


class Data:
    train = validation = Side()
    tokenizer = byte_tokenizer()

    def __init__(self, source: dict, validation: dict | None = None, tokenizer: str = "bytes"):
        self.record = {"source": source, "validation_source": validation, "tokenizer": tokenizer}


HUB = {"kind": "hub", "location": "some/set", "text_field": "text", "hub_config": "raw",
       "split": "train", "revision": "abc"}  # fmt: skip
EVALUATION = {"step": 2, "val/loss": 2.0, "val/perplexity": 7.38905, "val/bits_per_byte": 1.5}


def card_of(data: Data, *given: str, mixer: str = "retention", evaluation=EVALUATION, code=True):
    begun = [key.partition("=")[2] for key in given if key.startswith("model.init_from=")]
    keys = [key for key in given if not key.startswith("model.init_from=")]
    config = load_config(None, ["data.seq_len=24", f"model.mixer={mixer}", *keys])
    config = replace(config, model=replace(config.model, init_from=begun[0] if begun else None))
    trained = Trained(3, 4, 0.5, evaluation)
    return model_card(config, tiny_model(mixer), data, trained, code=code)  # type: ignore[arg-type]


def header(text: str) -> ModelCardData:
    return ModelCard(text).data  # raises for what the Hub would refuse


def files(location: str) -> dict:
    return {"kind": "files", "location": location, "text_field": "text"}


def test_of_a_run(finished: Path, tmp_path: Path) -> None:
    text = (finished / "final/README.md").read_text()
    found, last = header(text), metrics(finished)[-1]
    assert (found.library_name, found.pipeline_tag) == ("transformers", "text-generation")
    assert found.license is None and found.datasets is None and "# license:" in text
    assert found.model_name == "run"
    values = {result.metric_type: result.metric_value for result in found.eval_results}
    assert values == {
        "perplexity": pytest.approx(last["val/perplexity"], abs=1e-4),
        "bits_per_byte": pytest.approx(last["val/bits_per_byte"], abs=1e-4),
    }
    record = json.loads((finished / "final/data.json").read_text())
    parameters = json.loads((finished / "final/config.json").read_text())["vocab_size"] * 16
    assert re.search(r"retention: ([\d,]+) parameters", text)
    assert int(re.search(r"([\d,]+) parameters", text)[1].replace(",", "")) > parameters
    for words in ("# run\n", "6 steps of 96 tokens: 576 tokens",
                  f"{record['train']['tokens']:,} tokens", f"{last['val/bits_per_byte']:.4g} |",
                  "windows of 24 tokens", "trust_remote_code=True", "generate.py"):  # fmt: skip
        assert words in text, words
    assert "README.md" not in json.loads((finished / "final/manifest.json").read_text())["files"]
    assert not (finished / "best/README.md").exists()
    for part in tmp_path.parts[1:]:
        assert f"/{part}" not in text


def test_data_sets_of_the_hub_are_named() -> None:
    found = header(card_of(Data(HUB, HUB | {"split": "test"})))
    assert found.datasets == ["some/set"]
    result = found.eval_results[0]
    assert (result.dataset_type, result.dataset_config) == ("some/set", "raw")
    assert header(card_of(Data(files("/x"), HUB))).datasets == ["some/set"]
    local = Data(HUB | {"location": "/home/me/set", "revision": None})
    assert header(card_of(local)).datasets is None and "/home" not in card_of(local)
    text = card_of(Data({"kind": "python-stdlib", "python": "3.11.4"}))
    assert "standard library of Python 3.11.4: 3 documents" in text


@pytest.mark.parametrize("tokenizer", ["/home/me/tok", "openai-community/gpt2", "bpe", "bytes"])
def test_of_paths_the_last_part_alone(tokenizer: str) -> None:
    text = card_of(Data(files("/home/me/*.txt"), files("/home/me/b"), tokenizer))
    assert "/home" not in text and "/me" not in text
    assert r"local files (\*.txt)" in text and "local files (b)" in text
    shown = {"bpe": "byte-level BPE, trained on", "/home/me/tok": "| tok;"}
    assert shown.get(tokenizer, f"| {tokenizer};") in text


def test_names_break_nothing(tmp_path: Path) -> None:
    """In YAML they come back, in Markdown they are one cell of a table."""
    data = Data(files(f"/home/me/{ODD}".replace("/o", "")), files(ODD), f"/{ODD}")
    text = card_of(data, f"train.out_dir={tmp_path}/x: 'y' #z|")
    found = header(text)
    assert found.model_name == "x: 'y' #z|" and "# x: 'y' \\#z\\|\n" in text
    assert text.encode() and "\x1b" not in text and found.eval_results[0].dataset_name
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 9
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows), rows
    body = text.split("\n---\n", 1)[1]
    of_names = "".join(row for row in rows if "local files" in row)
    assert not re.search(r"(?<!\\)[`*<\[\]#{~$&@]", of_names) and "<!--" in body
    assert re.sub(r"\\(.)", r"\1", plain("a|b*c\\d")) == "a|b*c\\d"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["train.eval_max_tokens=500"], "over the first 500 tokens of the text"),
        (["train.eval_max_tokens=5000"], "over all 1,000 tokens of the text"),
        (["train.carry_state=true"], "begins with the state that the one before"),
        (["data.reset_state_at_documents=false"], "documents in a window are not kept apart"),
        (["model.init_from=runs/secret"], "tokens, on the weights of another checkpoint: 288"),
    ],
)
def test_conventions(keys: list[str], words: str) -> None:
    text = card_of(Data(HUB), *keys)
    assert words in text and "secret" not in text
    assert words not in card_of(Data(HUB), "train.eval_max_tokens=600")


@pytest.mark.parametrize("evaluation", [None, EVALUATION | {"val/perplexity": float("inf")}])
def test_figures_that_there_are_not(evaluation) -> None:
    text = card_of(Data(HUB), evaluation=evaluation)
    results = [result.metric_type for result in header(text).eval_results or []]
    assert results == (["bits_per_byte"] if evaluation else [])
    assert ("It was not evaluated." in text) is (evaluation is None)


def test_the_example_runs(finished: Path, tmp_path: Path, capsys) -> None:
    """Also where the model's positions end."""
    short = save_checkpoint(tmp_path / "short", "aft")
    (short / "README.md").write_text(card_of(Data(HUB), mixer="aft"))
    for folder in (finished / "final", short):
        text = (folder / "README.md").read_text()
        (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        capsys.readouterr()
        torch.manual_seed(0)
        exec(example.replace('name = "."', f"name = {str(folder)!r}"), {})
        assert "The " in capsys.readouterr().out
        (command,) = re.findall(r"python generate.py FOLDER (.*)", text)
        assert cli.run(generate.main, [str(folder), *shlex.split(command)]) == 0
        assert ("up to 16 tokens" in text) is (folder == short)


def test_an_edited_card_stays(options, finished: Path, capsys) -> None:
    """Over a longer run, and where the end is damaged and written again."""
    card = finished / "final/README.md"
    card.write_text("mine")
    before = card.stat().st_mtime_ns
    assert run(options) == 0
    assert "nothing to do" in capsys.readouterr().err and card.stat().st_mtime_ns == before
    for steps in (7, 8):
        assert run(options, train__max_steps=steps) == 0
        assert "README.md was edited and is kept" in capsys.readouterr().err
        assert card.read_text() == "mine"
        flip_a_bit(finished / "final")  # so that it is set aside, and written again


def test_a_card_that_nobody_edited_is_renewed(options, finished: Path, capsys) -> None:
    card = finished / "final/README.md"
    before = card.read_text()
    assert run(options, train__max_steps=8) == 0
    assert "8 steps of 96" in card.read_text() != before
    assert "was edited" not in capsys.readouterr().err


def test_a_run_that_lost_its_evaluation(options, finished: Path) -> None:
    """The end comes after the last checkpoint: its figures are read back."""
    wanted = (finished / "final/README.md").read_text()
    shutil.rmtree(finished / "final")
    assert run(options) == 0
    assert (finished / "final/README.md").read_text() == wanted
