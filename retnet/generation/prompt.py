"""From what the user typed to the tokens of a prompt."""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from retnet.data.readers import BOM
from retnet.data.tokenizer import naming
from retnet.errors import UserError, os_errors


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """The ids [1, T] of ``<bos>`` and the text, in which special tokens are ordinary text.

    A ``UserError`` where the tokenizer fails on it.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    with naming(tokenizer):
        encoded = tokenizer(text, **options)
    return torch.tensor([[tokenizer.bos_token_id, *encoded["input_ids"]]])


def read_prompt(source: Path | None) -> str:
    """The prompt in a UTF-8 file, or on standard input (None), as it is there.

    Raises:
        UserError: It cannot be read, or the bytes are not UTF-8.
    """
    if source is None:
        if sys.stdin is None:
            raise UserError("standard input is closed: send the prompt there, or use --prompt")
        with os_errors("standard input cannot be read", "send text there"):
            return decode_utf8(sys.stdin.buffer.read(), "standard input")
    with os_errors(f"--prompt-file ({source}) cannot be read", "name a text file"):
        return decode_utf8(source.read_bytes(), str(source))


def decode_utf8(data: bytes, name: str) -> str:
    """Decode text without its byte order mark, or say at which byte it stops being UTF-8."""
    try:
        return data.decode("utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte {error.start} (0x{data[error.start]:02x}): convert it"
        ) from error
