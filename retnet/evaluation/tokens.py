"""How a text becomes targets, whatever the tokenizer: where a document begins, and where it ends.

A document begins with ``<bos>``, with ``<eos>`` where a tokenizer has no ``<bos>`` (as GPT-2's
<|endoftext|> is both), and with nothing where it has neither: then its first token counts as one of
a vocabulary of equally likely ones, so that bits per byte stay the length of a code for the text.
It ends with ``<eos>``, unless that is left out for all.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retnet.data import encode_documents
from retnet.data.tokenizer import naming, no_token, tokenizer_hash
from retnet.errors import UserError

logger = logging.getLogger(__name__)


def use_eos_for_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a document begin with ``<eos>`` where a tokenizer has no ``<bos>``."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.bos_token = tokenizer.eos_token


def check_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise a ``UserError`` where the tokenizer of ``name`` has no ``<eos>`` to be a target."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{name}: its tokenizer has no <eos>, which others have to predict at the end of a "
            "document: add --no-eos, which leaves it out for all"
        )


def beginning(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that a document begins with; None where there is none."""
    return None if tokenizer.bos_token_id is None else str(tokenizer.bos_token)


def nats_of_first(model: Any, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """What a document's first token costs where nothing comes before it; None where ``<bos>``."""
    return math.log(model.config.vocab_size) if tokenizer.bos_token_id is None else None


def tokens_of(
    model: Any, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], *, eos: bool = True
) -> list[Tensor]:
    """The ids of each document, int64 [tokens], with its beginning, and its end if ``eos``.

    Special tokens that a text spells are ordinary text, and none is added but the ends.

    Raises:
        UserError: The tokenizer has no ``<eos>`` to end with, fails, leaves all of the text out, or
            gives ids that the model does not have.
    """
    if eos:
        check_end(tokenizer, f"tokenizer ({tokenizer.name_or_path})")
    tokens = [torch.from_numpy(ids) for ids in _encoded(tokenizer, documents, eos)]
    ends = (tokenizer.bos_token_id is not None) + eos
    if all(len(ids) <= ends for ids in tokens) and any(text.strip() for text in documents):
        raise no_token(tokenizer, "the text")  # which would cost nothing
    largest = max((int(ids.max()) for ids in tokens if len(ids)), default=0)
    if largest >= model.config.vocab_size:
        raise UserError(
            f"tokenizer ({tokenizer.name_or_path}) gives an id ({largest}) beyond the model's "
            f"vocab_size ({model.config.vocab_size}): use the one that it was trained with"
        )
    return tokens


def _encoded(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], eos: bool
) -> Iterator[np.ndarray]:
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    if isinstance(tokenizer, PreTrainedTokenizerFast) and None not in ends:
        for ids in encode_documents(tokenizer, documents):
            yield ids if eos else ids[:-1]
        return
    begin = [] if ends[0] is None else [ends[0]]
    for text in documents:
        yield np.array([*begin, *plain_ids(tokenizer, text), *([ends[1]] if eos else [])], np.int64)


def warn_of_unknown(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Tensor]) -> None:
    """A line where a tokenizer does not have all of a text: what it leaves out costs nothing."""
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
        return
    number = sum(int((ids == unknown).sum()) for ids in tokens)
    if number:
        logger.warning(
            f"tokenizer ({tokenizer.name_or_path}) has {tokenizer.unk_token} for {number:,} tokens "
            "of the text, which may stand for anything: its bits per byte are too low"
        )


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text alone; a ``UserError`` where the tokenizer fails on it."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    with naming(tokenizer):  # type: ignore[arg-type]
        ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides the ids of a text; of a slow tokenizer its class and vocabulary."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer_hash(tokenizer)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(f"{type(tokenizer)}{ends}{entries}".encode()).hexdigest()
