"""Prompts begin with <bos>, special tokens in them are text, bad bytes are named."""

import io
import os
import threading
import time
from pathlib import Path

import pytest
import torch

import retnet.data.tokenizer as tokenizer_module
from retnet.commands import generate
from retnet.data import byte_tokenizer as data_byte_tokenizer
from retnet.errors import UserError
from retnet.generation import encode_prompt, read_prompt
from retnet.generation.prompt import read_messages
from tests.generation.builders import BOS, byte_tokenizer


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), data_byte_tokenizer()])
@pytest.mark.parametrize("text", ["", "ab", "é<eos> <bos>\r\n"])
def test_a_prompt_is_bos_and_the_bytes(tokenizer, text: str) -> None:
    assert encode_prompt(tokenizer, text).tolist() == [[BOS, *text.encode()]]


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("é\r\n".encode())
    assert read_prompt(file) == "é\r\n"


def test_stdin_is_read_as_it_is(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é\r\n".encode())))
    assert read_prompt(None) == "é\r\n"


def test_a_pipe_that_does_not_wait_is_waited_for(monkeypatch) -> None:
    """Who opened it may have set it so; the text comes in two parts."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    def send() -> None:
        for part in (b"a" * 10, b"b"):
            time.sleep(0.05)
            os.write(writer, part)
        time.sleep(0.05)
        os.close(writer)

    thread = threading.Thread(target=send)
    with os.fdopen(reader) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        thread.start()
        assert read_prompt(None) == "a" * 10 + "b"
    thread.join()


def test_a_byte_order_mark_is_no_text(tmp_path: Path, monkeypatch) -> None:
    """Wherever the prompt comes from; training text and compare's drop it, too."""
    marked = b"\xef\xbb\xbfa\xef\xbb\xbf"
    (tmp_path / "prompt.txt").write_bytes(marked)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(marked)))
    of_file = ["--prompt-file", str(tmp_path / "prompt.txt")]
    for argv in (["--prompt", marked.decode()], of_file, ["-"]):
        arguments = generate.build_parser().parse_intermixed_args(["checkpoint", *argv])
        assert generate.prompt_of(arguments) == "a\ufeff"


def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"prompt\.txt is not UTF-8 at byte 3 \(0xff\)"):
        read_prompt(file)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\x80")))
    with pytest.raises(UserError, match="standard input is not UTF-8 at byte 0"):
        read_prompt(None)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--prompt-file .*No such file"):
        read_prompt(tmp_path / "none.txt")


def test_a_prompt_that_never_ends(tmp_path: Path, monkeypatch) -> None:
    """/dev/zero took all memory, and the answer was to make the model smaller."""
    monkeypatch.setattr("retnet.generation.prompt.MOST_BYTES", 9)
    words = r"--prompt-file \(/dev/zero\) has more than 9 bytes"
    with pytest.raises(UserError, match=words):
        read_prompt(Path("/dev/zero"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a" * 10)))
    with pytest.raises(UserError, match="standard input has more than 9 bytes"):
        read_prompt(None)
    (tmp_path / "prompt.txt").write_text("a" * 9)
    assert read_prompt(tmp_path / "prompt.txt") == "a" * 9


def test_a_long_prompt_is_encoded_in_pieces(monkeypatch) -> None:
    """At once, one of 40 MB took 6 GB; the tokens are the same."""
    tokenizer, longest = byte_tokenizer(merges=(("a", "b"), ("ab", "ab"))), []
    text = "abab ab, " * 50_000
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = tokenizer_module._encoder

    def watched(tokenizer: object) -> object:
        encode = own(tokenizer)
        return lambda texts: longest.append(sum(map(len, texts))) or encode(texts)

    monkeypatch.setattr(tokenizer_module, "BATCH_CHARACTERS", 1 << 17)
    monkeypatch.setattr(tokenizer_module, "_encoder", watched)
    ids = encode_prompt(tokenizer, text)
    assert ids.dtype == torch.int64 and ids[0].tolist() == [tokenizer.bos_token_id, *whole]
    assert max(longest) <= 1 << 18 and len(longest) > 2


def test_a_message_that_never_ends(monkeypatch) -> None:
    monkeypatch.setattr("retnet.generation.prompt.MOST_BYTES", 9)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"12345678\n123456789")))
    assert [*read_messages()] == ["12345678", "123456789"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"1234567890")))
    with pytest.raises(UserError, match="a message has more than 9 bytes"):
        next(read_messages())
