"""What is wrong around the entry points: streams, devices, networks, texts and prompts."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import CppCompileError

from retnet import cli
from retnet.commands import generate, train
from tests.places import MAINS, RUN, C, G
from tests.test_mistakes import tree


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_absent(places: dict[str, Path], tmp_path: Path, capsys) -> None:
    arguments = [*RUN.format(**places, new=tmp_path).split(), "train.device=cuda"]
    assert cli.run(train.main, arguments) == 2
    assert capsys.readouterr().err.startswith("error: train.device (cuda)")


@pytest.mark.parametrize("damage", ["tokens.bin", "manifest.json"])
def test_a_token_file_that_changed_is_made_again(
    places: dict[str, Path], tmp_path: Path, capsys, damage: str
) -> None:
    """Not a mistake that needs the user: the run warns and goes on."""
    arguments = RUN.format(**places, new=tmp_path).split()
    assert cli.run(train.main, arguments) == 0
    (file,) = (tmp_path / "cache").glob(f"*/train/{damage}")
    file.write_bytes(file.read_bytes()[:-3])
    shutil.rmtree(tmp_path / "run")
    assert cli.run(train.main, arguments) == 0
    assert "is damaged and is made again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("one.txt", "bytes"),
        pytest.param("one.jsonl", "bytes", marks=pytest.mark.slow),
        pytest.param("one.txt", "bpe", marks=pytest.mark.slow),
    ],
)
def test_a_huge_line_is_a_document(
    places: dict[str, Path], tmp_path: Path, name: str, tokenizer: str
) -> None:
    text = "word " * 1_000_000
    (tmp_path / name).write_text(json.dumps({"text": text}) if name == "one.jsonl" else text)
    arguments = RUN.format(**places, new=tmp_path).split()
    more = [f"data.source={tmp_path / name}", "train.eval_max_tokens=64"]
    more += [f"data.tokenizer={tokenizer}", "data.vocab_size=261"] * (tokenizer == "bpe")
    assert cli.run(train.main, [*arguments, *more]) == 0


def test_a_vocabulary_that_the_text_cannot_fill(
    places: dict[str, Path], tmp_path: Path, capsys
) -> None:
    arguments = RUN.format(**places, new=tmp_path).split()
    more = ["data.tokenizer=bpe", "data.vocab_size=100000"]
    for _ in range(2):  # made, and found in the cache
        assert cli.run(train.main, [*arguments, *more]) == 0
        assert re.search(
            r"data\.vocab_size \(100000\): the training text is too small for so many entries, "
            r"the tokenizer has \d{3}\n",
            capsys.readouterr().err,
        )
        shutil.rmtree(tmp_path / "run")


def test_a_tokenizer_of_the_command_line_has_its_own_size(
    places: dict[str, Path], tmp_path: Path
) -> None:
    """The file's data.vocab_size is for the file's tokenizer; the run's own file works again."""
    assert "vocab_size: 2048" in places["tiny"].read_text()
    arguments = RUN.format(**places, new=tmp_path).split()
    assert cli.run(train.main, arguments) == 0
    again = [str(tmp_path / "run/config.yaml"), f"train.out_dir={tmp_path / 'second'}"]
    assert cli.run(train.main, again) == 0


def test_a_tokenizer_whose_ids_have_a_hole(places: dict[str, Path], tmp_path: Path) -> None:
    """The model has a row for each id up to the last, or nothing could be made with it."""
    folder = Path(shutil.copytree(places["runs"] / "retention/final", tmp_path / "m"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["far"] = 501
    (folder / "tokenizer.json").write_text(json.dumps(content))
    arguments = [*RUN.format(**places, new=tmp_path).split(), f"data.tokenizer={folder}"]
    assert cli.run(train.main, arguments) == 0
    assert json.loads((tmp_path / "run/final/config.json").read_text())["vocab_size"] == 502
    assert cli.run(generate.main, [str(tmp_path / "run"), "--max-new-tokens", "1"]) == 0


PRINTING = [
    ("train", "{tiny} --print-config"),
    ("generate", G + " --prompt a --max-new-tokens 3"),
    ("compare", C),
]


@pytest.mark.parametrize(("entry", "arguments"), PRINTING)
def test_output_that_takes_nothing(
    places: dict[str, Path], capsys, monkeypatch, entry: str, arguments: str
) -> None:
    argv = arguments.format(**places).split()
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert cli.run(MAINS[entry], argv) == 2
        monkeypatch.setattr("sys.stdout", None)  # as Python leaves a descriptor that is closed
        assert cli.run(MAINS[entry], argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: standard output cannot be written (No space left on device): free space there, or "
        "send it elsewhere",
        "error: standard output is closed: leave it open, or send it to a file",
    ]


@pytest.mark.parametrize(("entry", "arguments"), PRINTING)
def test_a_reader_that_has_gone_is_no_mistake(
    places: dict[str, Path], capsys, monkeypatch, entry: str, arguments: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr("sys.stdout", unread)
        assert cli.run(MAINS[entry], arguments.format(**places).split()) == 0
    assert "rror" not in capsys.readouterr().err


def test_input_that_is_closed(places: dict[str, Path], capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert cli.run(generate.main, [str(places["runs"] / "retention"), "-"]) == 2
    assert capsys.readouterr().err.startswith("error: standard input is closed: send the prompt")


def test_errors_that_nobody_hears(monkeypatch) -> None:
    """With standard error closed, nothing of it may get into the text."""
    monkeypatch.setattr("sys.stderr", None)
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    assert cli.run(generate.main, []) == 2
    assert out.getvalue() == ""


def test_a_prompt_beyond_the_training_window(places: dict[str, Path], capsys) -> None:
    """A RetNet reads any length; a Transformer is warned of, once."""
    warned = "the prompt has 41 tokens, and this attention model was trained on texts of 16"
    for mixer, words in (("retention", ""), ("attention", warned)):
        argv = [str(places["runs"] / mixer), "--prompt", "x" * 40, "--max-new-tokens", "3"]
        assert cli.run(generate.main, argv) == 0
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith(words) and len(lines) == (2 if words else 1)


def test_a_prompt_that_no_memory_holds(places: dict[str, Path], capsys, monkeypatch) -> None:
    """Keys and values of 2 layers of width 16 in float32 and the id: 264 bytes a token."""
    monkeypatch.setattr("retnet.generation.checks.memory_of", lambda device: 264 * 50)
    for tokens, code in ((9, 0), (10, 2)):
        argv = [str(places["runs"] / "attention"), "--prompt", "x" * 40, "--max-new-tokens"]
        assert cli.run(generate.main, [*argv, str(tokens)]) == code
    out, err = capsys.readouterr()
    assert out.count("x" * 40) == 1
    assert err.splitlines()[-1] == (
        "error: a prompt of 41 tokens and --max-new-tokens (10) need 13,464 bytes, 264 a token, "
        "and cpu has 13,200: at most 50 tokens can fit"
    )
    argv[0] = str(places["runs"] / "retention")
    assert cli.run(generate.main, [*argv, "1000"]) == 0


def test_no_answer_within_seconds_is_an_answer(monkeypatch, capsys, tmp_path, places) -> None:
    """A Hub that never answers costs seconds, not minutes."""
    monkeypatch.setattr("retnet.data.network.DEADLINE_S", 0.2)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: os.read(pipe[0], 1))
    pipe = os.pipe()
    arguments = [*RUN.format(**places, new=tmp_path).split(), "data.source=nobody/nothing"]
    assert cli.run(train.main, arguments) == 2
    assert "the Hub cannot be reached" in capsys.readouterr().err
    os.close(pipe[1])  # and the thread that waits for it ends


def test_a_file_that_may_not_be_read(places: dict[str, Path], capsys, monkeypatch) -> None:
    """Permissions do not apply to the superuser, who may run this."""
    file = places["bad"] / "denied.yaml"
    real = Path.read_text

    def denied(path: Path, *args, **options) -> str:
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    assert cli.run(train.main, [str(file)]) == 2
    assert capsys.readouterr().err == (
        f"error: configuration ({file}) cannot be read (Permission denied): check its permissions\n"
    )


def test_errors_of_files_are_one_line_wherever_they_come_from(capsys) -> None:
    def fails(argv) -> None:
        raise OSError(*argv)

    assert cli.run(fails, [30, "Read-only file system", "/there/it is"]) == 2
    assert capsys.readouterr().err == "error: /there/it is: Read-only file system\n"
    with pytest.raises(OSError, match="of no file"):
        cli.run(fails, [5, "of no file"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("unable to mmap 40000061152 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("DefaultCPUAllocator:\ncan't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_an_allocation_that_fails_is_one_line(capsys, error: Exception) -> None:
    def fails(argv) -> None:
        raise error

    assert cli.run(fails, []) == 2
    assert capsys.readouterr().err.startswith("error: out of memory (")
    error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError):
        cli.run(fails, [])


@pytest.mark.parametrize(
    ("entry", "arguments"), [pytest.param("compare", "", marks=pytest.mark.slow), ("generate", G)]
)
def test_as_a_process(places: dict[str, Path], entry: str, arguments: str) -> None:
    """What the interpreter does at its end counts too. train.py's is in tests/training."""
    command = [sys.executable, f"{entry}.py", *arguments.format(**places).split()]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=-1, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


CARD = "{new}/set/README.md"


@pytest.mark.parametrize(
    ("entry", "arguments", "file"),
    [
        ("train", "{new}/recipe.yaml", "{new}/recipe.yaml"),
        ("train", RUN + " data.source={new}/x.txt", "{new}/x.txt"),
        ("train", RUN + " data.source={new}/set", CARD),
        ("train", RUN + " data.tokenizer={new}/m", "{new}/m/tokenizer.json"),
        ("generate", "{new}/m", "{new}/m/config.json"),
        ("generate", "{new}/m", "{new}/m/tokenizer.json"),
        ("compare", C + " --text {new}/x.txt", "{new}/x.txt"),
    ],
)
def test_a_file_that_memory_does_not_take(
    places: dict[str, Path], tmp_path: Path, capsys, monkeypatch, entry, arguments, file
) -> None:
    """As one with a hole of terabytes; the answer was to make the model smaller."""
    file = file.format(new=tmp_path)
    shutil.copytree(places["runs"] / "retention/final", tmp_path / "m")
    (tmp_path / "set").mkdir()
    for name in ("recipe.yaml", "x.txt", "set/README.md", "set/a.txt"):
        (tmp_path / name).write_text("some text " * 20)

    def too_large(own):
        def read(path: Path, *args, **options):
            if str(path) == file:
                raise MemoryError
            return own(path, *args, **options)

        return read

    for name in ("read_text", "read_bytes"):
        monkeypatch.setattr(Path, name, too_large(getattr(Path, name)))
    assert cli.run(MAINS[entry], arguments.format(**places, new=tmp_path).split()) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {file} has ") and "bytes, and memory does not take" in line


def test_metrics_that_memory_does_not_take(places, tmp_path: Path, capsys, monkeypatch) -> None:
    """Found before anything is written."""
    argv = RUN.format(**places, new=tmp_path).split()
    assert cli.run(train.main, argv) == 0
    file, own = tmp_path / "run/metrics.jsonl", Path.read_bytes
    before = tree(tmp_path / "run")

    def read(path: Path) -> bytes:
        if path == file:
            raise MemoryError
        return own(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert cli.run(train.main, [*argv, "train.max_steps=2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {file} has ") and "bytes, and memory does not take" in line
    assert tree(tmp_path / "run") == before


def test_a_compiler_that_fails(capsys) -> None:
    """It is another's program, or none at all (CXX=/bin/true)."""

    def fails(argv) -> None:
        raise CppCompileError(["c++"], "no such header\nand more")

    assert cli.run(fails, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: torch.compile fails (C++ compile error): look at the C++ comp")
