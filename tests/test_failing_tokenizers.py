"""A tokenizer that loads and fails on a text is one clear line in every command, which names it."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from retnet import cli
from tests.places import MAINS, RUN

# Backtracks without end, which the library answers with a panic: no Exception in Python.
PANIC = "a" * 40 + "b"


def spoil(folder: Path, kind: str) -> Path:
    """Exchange the tokenizer.json in a folder for one that fails."""
    file = folder / "tokenizer.json"
    if kind == "regex":
        backend = Tokenizer.from_file(str(file))
        split = pre_tokenizers.Split(Regex("^(a+)+$"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    else:
        backend = Tokenizer(models.WordLevel({"<bos>": 0, "<eos>": 1, "<pad>": 2}))
        backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    backend.save(str(file))
    return folder


@pytest.mark.parametrize(
    ("kind", "reason"), [("regex", "retry-limit-in-match over"), ("words", "Missing [UNK] token")]
)
def test_each_command_names_it(
    places: dict[str, Path], tmp_path: Path, capsys, kind: str, reason: str
) -> None:
    model = spoil(Path(shutil.copytree(places["runs"] / "retention/final", tmp_path / "m")), kind)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(PANIC * 3)
    run = RUN.format(**places, new=tmp_path).replace("bytes", str(model))
    for entry, arguments in (
        ("train", f"{run} data.source={tmp_path}/a.txt"),
        ("train", f"{run} data.source={tmp_path}/a.txt data.streaming=true "
                  f"data.validation={tmp_path}/b.txt"),
        ("generate", f"{model} --prompt {PANIC}"),
        ("compare", f"{model} {model} --no-speed --text {tmp_path}/a.txt"),
    ):  # fmt: skip
        assert cli.run(MAINS[entry], arguments.split()) == 2
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        assert last.startswith(f"error: tokenizer ({model}) fails on the text (") and not out
        assert reason in last
        assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "m"]


def test_one_that_leaves_all_of_a_text_out(places: dict[str, Path], tmp_path: Path, capsys) -> None:
    """It answered to no prompt at all, and needed 0.02 bits a byte."""
    model = Path(shutil.copytree(places["runs"] / "retention/final", tmp_path / "m"))
    file = model / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.model = models.BPE(vocab={}, merges=[])
    backend.save(str(file))
    (tmp_path / "a.txt").write_text("Once upon a time.")
    for entry, arguments in (
        ("generate", f"{model} --prompt Once"),
        ("compare", f"{model} {model} --no-speed --text {tmp_path}/a.txt"),
    ):
        assert cli.run(MAINS[entry], arguments.split()) == 2
        out, err = capsys.readouterr()
        assert err.splitlines()[-1].startswith(f"error: tokenizer ({model}) makes no token of the ")
        assert not out
    assert cli.run(MAINS["generate"], [str(model), "--max-new-tokens", "1"]) == 0, "no prompt"
