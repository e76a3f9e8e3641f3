"""Tokenizers: bytes, a byte-level BPE of our own, or a pretrained one.

All are ``PreTrainedTokenizerFast``. Text that spells a special token ("<eos>") is encoded as the
ordinary characters it is: by the code here always, by the tokenizer itself unless it has a chat
template, which writes such tokens into the text that it encodes (see ``chat``).
``tokenizer(text)`` puts ``<bos>`` before a text, which makes it a prompt; documents are encoded by
``encode_documents``, which adds both ends itself.
"""

import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from retnet.data.network import HubUnreachableError, hub_revision, while_reachable
from retnet.data.spec import BPE, BYTES
from retnet.data.tokenizer_files import check_tokenizer_files
from retnet.errors import UserError
from retnet.files import read_json
from retnet.model.mixers import MIXERS
from retnet.model.models import configuration, model_class
from retnet.paths import expand, kind_of

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SPECIAL_TOKENS = [BOS, EOS, PAD]
BYTE_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
# GPT-2's pattern with runs of at most 64 characters: a line of a million letters or spaces is
# then many short words rather than one, which merges would take hours over.
WORDS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,64}| ?\p{N}{1,64}| ?[^\s\p{L}\p{N}]{1,64}"
    r"|\s{1,64}(?!\S)|\s{1,64}"
)
BATCH_CHARACTERS = 1 << 20
# Longer documents are encoded in pieces. A cut between a word and a space is a border between
# words for the pattern above, so the tokens are those of the whole text.
PIECE_CHARACTERS = 1 << 17
CUT = re.compile(r"\S(?=[ \n])")
Text = TypeVar("Text", bound=str)


class Piece(NamedTuple):
    """A document, or a part of it, as tokens."""

    ids: np.ndarray  # [t]
    num_bytes: int  # UTF-8 bytes of the text that is predicted
    bounds: np.ndarray | None = None  # [2 a] where its answers begin and end; None: all counts


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0..255 are the bytes, then ``<bos>``, ``<eos>``, ``<pad>``: 259 entries, no training."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(SPECIAL_TOKENS)
    return _finish(backend)


def train_bpe(
    documents: Iterable[str], vocab_size: int, markers: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``documents``; the same documents give the same tokenizer.

    The three special tokens (ids 0, 1, 2) and further ``markers`` after them count in
    ``vocab_size``; a small text may have fewer pairs to merge and so give a smaller vocabulary.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *markers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    pieces = (piece for text in documents for piece in _pieces(text))
    backend.train_from_iterator(pieces, trainer=trainer)
    return _finish(backend)


def load_tokenizer(
    name: str | Path, key: str = "data.tokenizer", rows: int | None = None
) -> PreTrainedTokenizerFast:
    """``bytes``, or a pretrained tokenizer by folder (a ``Path`` is always one) or Hub name.

    ``key`` is what messages call it. ``rows`` are those of the embedding of the model that it is
    for; None: of the model of ours that lies in its folder, if any.

    A pretrained tokenizer without ``<bos>``, ``<eos>`` or a padding token of its own gets those it
    lacks as new entries; where that model has no row for another one, ``<eos>`` pads (what is
    padded counts nowhere), and what ``rows`` leave no room for stays lacking. A ``UserError`` where
    there is none, or it is not a fast one.
    """
    if name == BPE:
        raise UserError(
            "data.tokenizer (bpe) is trained on the corpus: name the folder it was saved to"
        )
    if name == BYTES:
        return byte_tokenizer()
    tokenizer = _load(name, key)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{key} ({name}) has no tokenizer.json: convert it to a fast tokenizer")
    if isinstance(tokenizer.chat_template, dict):  # by name; the others are for tools
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        tokenizer.split_special_tokens = True
        tokenizer.init_kwargs["split_special_tokens"] = True
    most = _rows_beside(name, key) if rows is None else rows
    for kind, text in (("eos", EOS), ("bos", BOS), ("pad", PAD)):
        current = getattr(tokenizer, f"{kind}_token")
        lacking = not current or getattr(tokenizer, f"{kind}_token_id") is None  # "" is none
        lacking = lacking or (kind == "pad" and current == tokenizer.eos_token)
        fits = text in tokenizer.get_vocab() or max_token_id(tokenizer) + 1 < most
        if lacking and (fits or (kind != "pad" and rows is None)):
            tokenizer.add_special_tokens({f"{kind}_token": text})
        elif lacking and kind == "pad":
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _rows_beside(name: str | Path, key: str) -> float:
    """The vocab_size of the model of ours that lies beside a tokenizer; infinite without one."""
    file = expand(name, key) / "config.json"
    if not file.is_file():
        return math.inf
    stored = read_json(file, "correct it, or copy the checkpoint again")
    ours = {configuration(model_class(mixer)).model_type for mixer in MIXERS}
    rows = stored.get("vocab_size") if stored.get("model_type") in ours else None
    return rows if isinstance(rows, int) else math.inf


def max_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest id, which exceeds ``len(tokenizer) - 1`` where the ids have holes."""
    return max(tokenizer.get_vocab().values())


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """The sha256 of everything that decides the ids of a text."""
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return hashlib.sha256(f"{ends}{plain_backend(tokenizer).to_str()}".encode()).hexdigest()


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256 of what besides that decides the ids of a conversation."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]
) -> Iterator[np.ndarray]:
    """The ids, int64 [tokens], of each document as ``<bos>`` text ``<eos>``, read as needed."""
    for _, pieces in encode_in_pieces(tokenizer, documents):
        yield np.concatenate([piece.ids for piece in pieces], dtype=np.int64)


def encode_in_pieces(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]
) -> Iterator[tuple[str, Iterable[Piece]]]:
    """Each document in order, with its pieces, which are encoded as they are asked for.

    One of up to 131,072 characters is a single piece, as ``encode_documents`` gives it.
    The pieces bound the memory: with our own tokenizers the tokens are those of the whole text,
    with a pretrained one they may differ at a cut. Text without a space or a line break in the half
    of a piece that is searched for one (Chinese, minified code) is cut through its words: there
    those of a bpe tokenizer may differ too.
    """
    bos, eos = _end(tokenizer, "bos"), _end(tokenizer, "eos")
    encode = _encoder(tokenizer)
    for group in in_groups(documents, BATCH_CHARACTERS):
        bodies = iter(encode([text for text in group if len(text) <= PIECE_CHARACTERS]))
        for text in group:
            if len(text) <= PIECE_CHARACTERS:
                ids = np.concatenate([bos, next(bodies), eos])
                yield text, [Piece(ids, len(text.encode()))]
            else:
                yield text, _encode_long(encode, text, bos, eos)


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """The ids, uint32 [tokens], of a text without ends; in bounded memory, as above."""
    encode = _encoder(tokenizer)
    parts = [ids for group in in_groups(_pieces(text), BATCH_CHARACTERS) for ids in encode(group)]
    return np.concatenate(parts, dtype=np.uint32)


def _end(tokenizer: PreTrainedTokenizerFast, kind: str) -> np.ndarray:
    """The id, uint32 [1], that begins ("bos") or ends ("eos") a document."""
    token = getattr(tokenizer, f"{kind}_token_id")
    if token is None:
        raise UserError(
            f"tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) has no {kind}_token,"
            f" which every document has: set {kind}_token in its tokenizer_config.json"
        )
    return np.array([token], dtype=np.uint32)


def _encode_long(
    encode: Callable[[list[str]], list[np.ndarray]], text: str, bos: np.ndarray, eos: np.ndarray
) -> Iterator[Piece]:
    yield Piece(bos, 0)
    for part in in_groups(_pieces(text), BATCH_CHARACTERS):
        for piece, ids in zip(part, encode(part), strict=True):
            yield Piece(ids, len(piece.encode()))
    yield Piece(eos, 0)


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[str]], list[np.ndarray]]:
    """Texts to the ids of each, without ends; 32 bits at most, because they wait in memory."""
    if len(tokenizer) == BYTE_VOCAB_SIZE and tokenizer_hash(tokenizer) == _byte_tokenizer_hash():
        return lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts]
    backend = plain_backend(tokenizer)

    def encode(texts: list[str]) -> list[np.ndarray]:
        with naming(tokenizer):
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]

    return encode


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is no ``Exception``, into a ``ValueError``."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from error


@contextmanager
def naming(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Turn what a tokenizer raises while it encodes or decodes into a ``UserError`` that names it.

    One that loads may still fail on a text.
    """
    try:
        with panics_as_errors():
            yield
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) fails on the text "
            f"({reason}): repair its tokenizer.json, or use another one"
        ) from error


def no_token(tokenizer: PreTrainedTokenizerBase, what: str) -> UserError:
    """The error for a tokenizer that knows nothing of a text and leaves it out without a word."""
    return UserError(
        f"tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) makes no token of "
        f"{what}: repair its tokenizer.json, or use another one"
    )


def in_groups(documents: Iterable[Text], characters: int) -> Iterator[list[Text]]:
    """Texts together while they are short: what is held at a time bounds the memory."""
    group: list[Text] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        # The first word border in the second half; a text without one is cut where it must be.
        half = start + PIECE_CHARACTERS // 2
        border = CUT.search(text, half, start + PIECE_CHARACTERS)
        end = border.end() if border else start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def _finish(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, backend.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The Rust tokenizer, with the settings that a call with other arguments may have changed."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


@cache
def _byte_tokenizer_hash() -> str:
    return tokenizer_hash(byte_tokenizer())


def _load(given: str | Path, key: str) -> PreTrainedTokenizerBase:
    name, what = str(given), f"{key} ({given})"
    folder = expand(given, key)
    kind = kind_of(folder, key)
    is_path = isinstance(given, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1
    if kind != "folder" and (kind is not None or is_path):
        raise UserError(f"{what} is not a folder: name the folder that holds tokenizer.json")
    if kind == "folder":
        check_tokenizer_files(folder, f"name another folder than {what}")
        inside = sorted(str(file.parent) for file in folder.glob("*/tokenizer.json"))
        if inside and not any(folder.glob("*token*")):
            raise UserError(f"{what} has no tokenizer.json: name {' or '.join(inside[:4])} in it")
    try:
        return _from_pretrained(str(folder) if kind else name, local_files_only=True)
    except Exception as error:  # missing, damaged and unknown files each raise another kind
        if kind == "folder":
            raise UserError(
                f"{what} is a folder without a tokenizer that can be read "
                f"({' '.join(str(error).split())}): name one with tokenizer.json"
            ) from error
    commit = hub_revision(name, "model", what)  # it is not in the local cache
    try:
        return while_reachable(lambda: _from_pretrained(name, revision=commit), name, "model", what)
    except HubUnreachableError:
        raise
    except Exception as error:
        raise UserError(
            f"{what} cannot be loaded from the Hub "
            f"({' '.join(str(error).split())}): name a repository with tokenizer.json"
        ) from error


def _from_pretrained(name: str, **options: Any) -> PreTrainedTokenizerBase:
    # Without a word on remote code transformers would ask on the terminal whether to run it.
    with panics_as_errors():
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
