"""From what the user typed to the tokens of a prompt."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from retnet.data.readers import BOM
from retnet.data.tokenizer import encode_text, no_token
from retnet.errors import UserError, os_errors

MOST_BYTES = 1 << 28  # of a prompt: a device may never end


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """The ids [1, T] of ``<bos>`` and the text, in which special tokens are ordinary text.

    A ``UserError`` where the tokenizer fails on it, or leaves all of it out.
    """
    ids = torch.from_numpy(encode_text(tokenizer, text).astype(np.int64))
    if not len(ids) and text.strip():
        raise no_token(tokenizer, "the prompt")
    return torch.cat((torch.tensor([tokenizer.bos_token_id]), ids))[None]


def read_prompt(source: Path | None) -> str:
    """The prompt in a UTF-8 file, or on standard input (None), as it is there.

    Raises:
        UserError: It cannot be read, or the bytes are not UTF-8.
    """
    if source is None:
        if sys.stdin is None:
            raise UserError("standard input is closed: send the prompt there, or use --prompt")
        with os_errors("standard input cannot be read", "send text there"):
            return decode_utf8(_read(sys.stdin.buffer, "standard input"), "standard input")
    what = f"--prompt-file ({source})"
    with os_errors(f"{what} cannot be read", "name a text file"), source.open("rb") as stream:
        return decode_utf8(_read(stream, what), str(source))


def read_messages() -> Iterator[str]:
    """What is said in a conversation: the lines of standard input, without empty ones.

    On a terminal they are edited, and earlier ones found again, as in a shell; Ctrl-C drops a line,
    Ctrl-D ends. Elsewhere there is one message a line. A ``UserError`` where one is not UTF-8.
    """
    if sys.stdin is None:
        raise UserError("standard input is closed: send messages there, one a line")
    lines = _typed() if sys.stdin.isatty() else _piped(sys.stdin.buffer)
    for number, line in enumerate(lines, start=1):
        message = decode_utf8(line, f"message {number}")
        if message.strip():
            yield message


def _typed() -> Iterator[bytes]:
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ").encode("utf-8", "surrogateescape")
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the conversation)", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:  # of a terminal with another encoding
            raise UserError("what was typed is not UTF-8: set the terminal to it") from error


def _piped(stream: BinaryIO) -> Iterator[bytes]:
    with os_errors("standard input cannot be read", "send messages there"):
        while line := stream.readline(MOST_BYTES + 1):
            if len(line) > MOST_BYTES:
                raise UserError(f"a message has more than {MOST_BYTES:,} bytes: send a shorter one")
            yield line.rstrip(b"\r\n")


def _read(stream: BinaryIO, name: str) -> bytes:
    """All that a stream gives; a ``UserError`` where that is too much, as of /dev/zero."""
    data = b""
    while len(data) <= MOST_BYTES:
        part = stream.read(MOST_BYTES + 1 - len(data))
        if part is None:  # a pipe that is set not to wait, and has nothing yet
            select.select([stream], [], [])
            continue
        data += part
        if not part or _waits(stream):
            break
    if len(data) > MOST_BYTES:
        raise UserError(f"{name} has more than {MOST_BYTES:,} bytes: name a shorter text")
    return data


def _waits(stream: BinaryIO) -> bool:
    """Whether reading waits for all there will be; else it gives what is there."""
    try:
        return os.get_blocking(stream.fileno())
    except OSError:  # it has no descriptor
        return True


def decode_utf8(data: bytes, name: str) -> str:
    """Decode text without its byte order mark, or say at which byte it stops being UTF-8."""
    try:
        return data.decode("utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte {error.start} (0x{data[error.start]:02x}): convert it"
        ) from error
