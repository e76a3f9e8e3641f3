"""generate.py --chat: messages in, answers out, and what has no effect there."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from retnet.cli import run
from retnet.commands import generate
from tests.conversations import save_chat_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_chat_checkpoint(tmp_path_factory.mktemp("chat") / "final"))


@pytest.fixture
def main(checkpoint: str, capsys, monkeypatch):
    """Say lines to the model; returns exit code, stdout, stderr."""

    def call(said: bytes, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said)))
        code = run(generate.main, [checkpoint, "--chat", *options])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def plain(checkpoint: str) -> str:
    """What the model answers without options."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
        assert run(generate.main, [checkpoint, "--chat", "--max-new-tokens", "20"]) == 0
    return out.getvalue()


def test_each_line_is_answered(main) -> None:
    code, out, err = main("hello\n\n  \nhé\r\nlast".encode(), "--max-new-tokens", "5")
    assert code == 0 and out.endswith("\n")
    assert err.count("(the answer ends at --max-new-tokens)") == 3
    assert re.search(
        r"^messages: 3 of \d+ tokens, [\d,]+ tokens/s \| new: 15 tokens, [\d.]+ ms/token \| "
        r"state: [\d,]+ bytes \| fast step$", err.splitlines()[-1],
    )  # fmt: skip
    assert main(b"")[:2] == (0, "")


@pytest.mark.parametrize(
    "options",
    [["--system", "be brief"], ["--temperature", "3"], ["--seed", "1"], ["--greedy"],
     ["--top-k", "1"], ["--repetition-penalty", "9"], ["--max-new-tokens", "9"]],
    ids=lambda options: options[0],
)  # fmt: skip
def test_every_option_changes_the_answers(main, plain: str, options: list[str]) -> None:
    most = () if options[0] == "--max-new-tokens" else ("--max-new-tokens", "20")
    assert main(b"a\nb\n", *most, *options)[1] != plain


def test_a_system_message_is_the_bytes_that_were_typed(main) -> None:
    """Whatever the locale's encoding: escapes are of bytes, which must be UTF-8."""
    said = (main(b"a\n", "--system", text)[:2] for text in ("\xe9", "\udcc3\udca9"))
    assert next(said) == next(said)
    code, _, err = main(b"a\n", "--system", "\udcff")
    assert code == 2 and err == "error: --system is not UTF-8 at byte 0 (0xff): convert it\n"


def test_a_text_to_stop_at(main) -> None:
    whole = main(b"a\n", "--max-new-tokens", "60")[1]
    letter = next(one for one in whole[9:] if one.isascii() and one.isalpha())
    cut = main(b"a\n", "--max-new-tokens", "60", "--stop", letter)[1]
    assert whole.startswith(cut.rstrip("\n")) and letter not in cut


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_typed_lines(checkpoint: str, capsys, monkeypatch) -> None:
    """Ctrl-C drops a line, Ctrl-D ends; the prompt is shown by what reads the line."""
    typed = iter(["hello", KeyboardInterrupt(), " ", "again", EOFError(), "never"])

    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", Terminal(io.BytesIO()))
    code = run(generate.main, [checkpoint, "--chat", "--max-new-tokens", "2"])
    err = capsys.readouterr().err
    assert code == 0 and "messages: 2 of" in err
    assert "\n(Ctrl-D ends the conversation)\n" in err and next(typed) == "never"


def test_what_was_said_before_matters(main) -> None:
    one, other = (main(f"{said}\nb\n".encode(), "--greedy", "--max-new-tokens", "9")[1]
                  for said in ("a", "x y z"))  # fmt: skip
    assert one != other


def test_a_message_that_is_no_text(main) -> None:
    code, _, err = main(b"a\nb\xff\n", "--max-new-tokens", "2")
    assert code == 2 and err.splitlines()[-1] == (
        "error: message 2 is not UTF-8 at byte 1 (0xff): convert it"
    )


@pytest.mark.slow
def test_on_a_terminal(checkpoint: str) -> None:
    """Typed lines, shown prompts, and Ctrl-D at the end."""
    outside, inside = pty.openpty()
    command = [sys.executable, str(ROOT / "generate.py"), checkpoint, "--chat"]
    command += ["--max-new-tokens", "3"]
    process = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    os.close(inside)
    shown = b""

    def read() -> None:
        nonlocal shown
        try:
            while part := os.read(outside, 1000):
                shown += part
                if shown.endswith(b"> "):
                    os.write(outside, b"hello\n" if shown.count(b"> ") < 3 else b"\x04")
        except OSError:  # the other side is closed
            return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0 and "messages: 2 of" in err, err
    assert shown.count(b"> ") == 3 and b"hello" in shown
