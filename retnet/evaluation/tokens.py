"""How a text becomes targets, whatever the tokenizer: where a document begins, and where it ends.

A document begins with ``<bos>``, with ``<eos>`` where a tokenizer has no ``<bos>`` (as GPT-2's
<|endoftext|> is both), and with nothing where it has neither: then its first token counts as one of
a vocabulary of equally likely ones, so that bits per byte stay the length of a code for the text.
It ends with ``<eos>``, unless that is left out for all.

A conversation is what the tokenizer's chat template makes of it, and only answers are targets.
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
from retnet.data.chat import ChatFormat
from retnet.data.messages import Conversation
from retnet.data.tokenizer import Piece, naming, no_token, tokenizer_hash
from retnet.errors import UserError
from retnet.model.loss import IGNORE_INDEX

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
            gives ids that the model does not have; or it has no template for conversations.
    """
    tokens, _ = tokens_and_targets(model, tokenizer, documents, eos=eos)
    return tokens


def tokens_and_targets(
    model: Any, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], *, eos: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """The ids of each document as of ``tokens_of``, and the same with -100 for what is no target.

    Of a text, all are targets.
    """
    if are_conversations(documents):
        pieces = [piece for _, piece in ChatFormat(tokenizer).encode(documents)]  # type: ignore[arg-type]
        tokens = [torch.from_numpy(piece.ids.astype(np.int64)) for piece in pieces]
        _check_ids(model, tokenizer, tokens)
        return tokens, [_answers(ids, own) for ids, own in zip(tokens, pieces, strict=True)]
    if eos:
        check_end(tokenizer, f"tokenizer ({tokenizer.name_or_path})")
    tokens = [torch.from_numpy(ids) for ids in _encoded(tokenizer, documents, eos)]
    ends = (tokenizer.bos_token_id is not None) + eos
    if all(len(ids) <= ends for ids in tokens) and any(text.strip() for text in documents):
        raise no_token(tokenizer, "the text")  # which would cost nothing
    _check_ids(model, tokenizer, tokens)
    return tokens, tokens


def are_conversations(documents: Sequence[str]) -> bool:
    """Whether documents are conversations; all are, or none is."""
    return bool(documents) and isinstance(documents[0], Conversation)


def predicted_text(document: str) -> str:
    """What of a document is predicted: all of a text, the answers of a conversation."""
    return "".join(document.answers) if isinstance(document, Conversation) else document


def _answers(ids: Tensor, piece: Piece) -> Tensor:
    """The ids with -100 for all but answers."""
    assert piece.bounds is not None
    places = np.arange(len(ids))
    said = torch.from_numpy(np.searchsorted(piece.bounds, places, side="right") % 2 == 1)
    return ids.masked_fill(~said, IGNORE_INDEX)


def _check_ids(model: Any, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Tensor]) -> None:
    """Raise a ``UserError`` where a tokenizer gives ids that a model does not have."""
    largest = max((int(ids.max()) for ids in tokens if len(ids)), default=0)
    if largest >= model.config.vocab_size:
        raise UserError(
            f"tokenizer ({tokenizer.name_or_path}) gives an id ({largest}) beyond the model's "
            f"vocab_size ({model.config.vocab_size}): use the one that it was trained with"
        )


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
