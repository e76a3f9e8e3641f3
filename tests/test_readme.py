"""Every command in the README is one that works."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from retnet import RetNetConfig, RetNetForCausalLM
from retnet.commands import compare, generate
from retnet.data import load_tokenizer
from retnet.training import load_config

README = Path("README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    inline = re.findall(r"`((?:python|make|pip) [^`]+)`", README)
    return [c.split(" #")[0].strip() for c in [*lines, *inline] if c and not c.startswith("#")]


@pytest.mark.parametrize("command", commands())
def test_command(command: str) -> None:
    words = shlex.split(command.split("|")[-1])
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", Path("Makefile").read_text(), flags=re.MULTILINE)
        assert arguments[0] in targets
    elif program == "pip":
        assert Path(arguments[-1]).is_file() or Path(arguments[-1], "pyproject.toml").is_file()
    elif arguments[0] == "train.py":
        assert load_config(arguments[1], arguments[2:])
    elif arguments[0] == "generate.py":
        generate.build_parser().parse_intermixed_args(arguments[1:])
    elif arguments[0] == "compare.py":
        compare.build_parser().parse_intermixed_args(arguments[1:])
    elif arguments[0] == "-m":
        module = Path(arguments[1].replace(".", "/"))
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
    else:
        pytest.fail(f"nobody checks {command}")


def small_checkpoint(folder: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(0)
    config = RetNetConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1)
    RetNetForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


PAGES = [page for page in sorted(Path("docs").glob("*.md")) if " train.py " in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_runs_that_the_pages_name_can_be(page: Path, tmp_path: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    if "model.init_from=" in text:  # one in its place, which decides the model
        small_checkpoint(tmp_path / "final")
        text = re.sub(r"model\.init_from=\S+", f"model.init_from={tmp_path}", text)
    lines = re.findall(r"^    [^\n]* train\.py (configs/[^\n]*)", text, flags=re.MULTILINE)
    assert lines
    for line in lines:
        recipe, *keys = shlex.split(line, comments=True)
        assert load_config(recipe, keys)


def test_python_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example runs as it stands, on a small checkpoint in the place of the demo's."""
    (example,) = [text for kind, text in BLOCKS if kind == "python"]
    small_checkpoint(tmp_path / "final")
    assert "runs/tiny-retention" in example
    exec(example.replace("runs/tiny-retention", str(tmp_path)), {})
    assert "bytes, whatever the length" in capsys.readouterr().out


def test_files_and_folders_that_it_names_exist() -> None:
    names = re.findall(r"`((?:retnet|configs|tests|benchmarks|docs)/[\w./-]*)`", README)
    assert names
    for name in names:
        assert Path(name).exists(), name
    assert not re.search(r"RESULTS_[A-Z]+", README), "a figure is missing"


def test_recipes_that_it_names_exist() -> None:
    named = set(re.findall(r"configs/[\w.-]+\.yaml", README))
    assert len(named) >= 7
    assert all(Path(name).is_file() for name in named)
