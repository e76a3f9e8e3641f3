"""What is printed, and what happens when nobody reads it."""

import io
import os
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from retnet.errors import UserError
from retnet.generation import print_samples
from retnet.generation.console import converse
from retnet.terminal import text_output


def test_one_sample_is_prompt_and_text_and_a_newline(capsys) -> None:
    print_samples("a", [["b"], ["c"]], 1)
    assert capsys.readouterr().out == "abc\n"
    print_samples("a", [["b\n"]], 1)
    assert capsys.readouterr().out == "ab\n"


@pytest.mark.parametrize("pieces", [["a", ""], ["a\n", ""], ["", "a"], ["a", "\n"]])
def test_an_answer_ends_with_one_newline(pieces: list[str], capsys) -> None:
    converse(SimpleNamespace(answer=lambda *_: iter(pieces), cut=False), ["hello"])
    assert capsys.readouterr() == ("a\n", "")


def test_several_samples_have_titles(capsys) -> None:
    print_samples("a", [["b", "x"], ["c", "\n"]], 2)
    expected = "----- sample 1 of 2 -----\nabc\n----- sample 2 of 2 -----\nax\n"
    assert capsys.readouterr().out == expected


def test_one_sample_is_not_kept(monkeypatch) -> None:
    """What is kept of 20,000 pieces would show in the memory: 160 KB of a list alone."""
    with Path("/dev/null").open("w") as nowhere:
        monkeypatch.setattr("sys.stdout", nowhere)
        pieces = (["twelve bytes"] for _ in range(20_000))
        tracemalloc.start()
        try:
            print_samples("prompt", pieces, 1)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 100_000


def test_pieces_come_out_as_they_are_made(monkeypatch) -> None:
    class Recorder(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    recorder = Recorder()
    monkeypatch.setattr("sys.stdout", recorder)

    def pieces():
        assert recorder.flushed == "prompt "
        yield ["b"]
        assert recorder.flushed == "prompt b"

    print_samples("prompt ", pieces(), 1)


@pytest.mark.parametrize("gone", [BrokenPipeError, ConnectionResetError])
def test_a_reader_that_goes_away_ends_the_block_quietly(
    monkeypatch, tmp_path: Path, gone: type[OSError]
) -> None:
    with (tmp_path / "out").open("w") as file:

        class Closed(io.TextIOBase):
            def write(self, text: str) -> int:
                raise gone

            def fileno(self) -> int:
                return file.fileno()

        monkeypatch.setattr("sys.stdout", Closed())
        after = []
        with text_output():
            print("text")
            after.append("more")
        assert after == []


def test_a_full_pipe_that_does_not_wait(monkeypatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(reader), os.fdopen(writer, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        with pytest.raises(UserError, match="standard output cannot be written"), text_output():
            print("x" * 10_000_000)


def test_a_terminal_without_the_character_gets_a_substitute(monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with text_output():
        print("é", end="")
    assert raw.getvalue() == b"?"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_what_it_would_obey(monkeypatch) -> None:
    """Also where a model says it piece by piece; ends of lines may come in two pieces."""
    pieces = [["\x1b"], ["[2J"], ["\x9b1m"], ["\r"], ["\n"], ["a\r"], ["b"], ["c\r\n"], ["\r"]]
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr("sys.stdout", stream)
        with text_output():
            print_samples("\x1b]0;", pieces, 1)
    assert terminal.getvalue() == r"\x1b]0;\x1b[2J\x9b1m" + "\n" + r"a\rbc" + "\n\n"
    assert file.getvalue() == "\x1b]0;" + "".join(piece for (piece,) in pieces) + "\n"


def test_a_carriage_return_at_the_end_is_shown(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout", Terminal())
    stream = sys.stdout
    with text_output():
        print("a\r", end="")
    assert stream.getvalue() == r"a\r"
    assert sys.stdout is stream


def test_what_was_made_is_printed_before_the_error(capsys) -> None:
    def pieces():
        yield ["b", "x"]
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        print_samples("a", pieces(), 2)
    expected = "----- sample 1 of 2 -----\nab\n----- sample 2 of 2 -----\nax\n"
    assert capsys.readouterr().out == expected
