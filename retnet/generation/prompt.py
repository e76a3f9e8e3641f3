"""From what the user typed to the tokens of a prompt."""

import logging
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from retnet.errors import UserError
from retnet.memory import memory_of
from retnet.model import TransformerConfig
from retnet.model.decoder import DecoderForCausalLM

logger = logging.getLogger(__name__)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """``<bos>`` and the text; special tokens spelled out in the text are ordinary text.

    Returns:
        Token ids, [1, T], on the CPU.
    """
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return torch.tensor([[tokenizer.bos_token_id, *encoded["input_ids"]]])


def check_length(
    model: DecoderForCausalLM, prompt_tokens: int, max_new_tokens: int, num_samples: int
) -> None:
    """Warn of a prompt that is longer than a Transformer can make sense of.

    A RetNet reads any length in the same memory, with a decay that it was trained with.

    Args:
        model: The model that is to read it.
        prompt_tokens: Tokens of the prompt.
        max_new_tokens: The most tokens to make of each sample.
        num_samples: Continuations side by side.

    Raises:
        UserError: The tokens, and what a Transformer keeps of each, exceed the machine's memory.
    """
    if model.config.model_type == TransformerConfig.model_type:
        window = model.config.max_position_embeddings
        if prompt_tokens > window:
            logger.warning(
                "the prompt has %s tokens, and this attention model was trained on texts of %s: "
                "expect poor text, and time that grows with the square of the length",
                f"{prompt_tokens:,}",
                f"{window:,}",
            )
    what = f"a prompt of {prompt_tokens:,} tokens and --max-new-tokens ({max_new_tokens:,}) need"
    check_memory(model, prompt_tokens + max_new_tokens, num_samples, what)


def check_memory(model: DecoderForCausalLM, tokens: int, rows: int, what: str) -> None:
    """Raise a ``UserError`` when tokens, and what a Transformer keeps of each, cannot fit.

    Args:
        model: The model that is to read them.
        tokens: Tokens of a row.
        rows: Texts side by side.
        what: Beginning of the message: whose tokens these are, and a verb.
    """
    config, per_token = model.config, 8  # an int64 id
    if config.model_type == TransformerConfig.model_type:
        per_token += 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    per_token *= rows
    memory = memory_of(model.device)
    if memory is not None and tokens * per_token > memory:
        raise UserError(
            f"{what} {tokens * per_token:,} bytes, {per_token:,} a token, and {model.device} has "
            f"{memory:,}: at most {memory // per_token:,} tokens can fit"
        )


def read_prompt(source: Path | None) -> str:
    """The prompt in a UTF-8 file, or on standard input, exactly as it is there.

    Args:
        source: The file; standard input when None.

    Raises:
        UserError: It cannot be read, or the bytes are not UTF-8.
    """
    if source is None:
        if sys.stdin is None:
            raise UserError("standard input is closed: send the prompt there, or use --prompt")
        try:
            return decode_utf8(sys.stdin.buffer.read(), "standard input")
        except OSError as error:
            raise UserError(
                f"standard input cannot be read ({error.strerror}): send text there"
            ) from error
    try:
        return decode_utf8(source.read_bytes(), str(source))
    except OSError as error:
        raise UserError(
            f"--prompt-file ({source}) cannot be read ({error.strerror}): name a text file"
        ) from error


def decode_utf8(data: bytes, name: str) -> str:
    """Decode text, or say at which byte it stops being UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte {error.start} (0x{data[error.start]:02x}): convert it"
        ) from error
