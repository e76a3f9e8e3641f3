"""The ``data`` section of a configuration: which text, which tokenizer, how it is cut."""

from dataclasses import dataclass, field
from typing import Any, Literal

from retnet.data.messages import FIELD as MESSAGES
from retnet.errors import UserError

PYTHON_STDLIB = "python-stdlib"
BYTES = "bytes"
BPE = "bpe"
MAX_BPE_VOCAB_SIZE = 1 << 24  # the trainer reserves memory for so many at once


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DataSpec:
    """Everything that decides the training and validation tokens.

    Training uses this dataclass as its ``data`` section, so the fields keep to types that a
    structured configuration knows; each field's ``metadata["help"]`` is its line in ``--help``.
    """

    source: str = _option(
        PYTHON_STDLIB,
        "text to train on: python-stdlib, a file, folder or glob (.txt, .md, .jsonl[.gz], .csv, "
        ".parquet), or the name of a data set on the Hugging Face Hub",
    )
    format: Literal["text", "messages"] = _option(
        "text",
        "messages: rows of .jsonl[.gz], .parquet or the Hub with a list `messages` of {role, "
        "content}; trained on what the assistant says only, see docs/chat.md",
    )
    text_field: str = _option("text", "field of .jsonl, .csv, .parquet and Hub rows with the text")
    hub_config: str | None = _option(None, "configuration of a Hub data set (wikitext-2-raw-v1)")
    split: str = _option("train", "split of a Hub data set to train on")
    validation: str | None = _option(
        None,
        "validation text: a file, folder or glob, or a split name of the Hub data set; "
        "null holds back validation_fraction of the source",
    )
    validation_fraction: float = _option(
        0.1,
        "share held back when data.validation is null: whole documents by content hash when there "
        "are at least 20 and none holds over 5 % of the bytes, else the tail of each document",
    )
    tuning_fraction: float = _option(
        0.0,
        "above 0: train on that much less, judge on it, and leave the validation text alone: to "
        "choose settings by",
    )
    tokenizer: str = _option(
        BPE,
        "bytes, bpe (byte-level BPE trained on the training text), or the name or folder of a "
        "pretrained tokenizer",
    )
    vocab_size: int = _option(4096, "entries of a trained bpe tokenizer, special tokens included")
    seq_len: int = _option(256, "tokens in a training window")
    max_tokens: int | None = _option(None, "use at most this many training tokens; null uses all")
    streaming: bool = _option(
        False,
        "read the text once, as a stream that a killed run takes up again: for large corpora and "
        "Hub data sets that shall not be downloaded; see data.max_tokens. Each document has to fit "
        "in memory, and a .txt or .md file is one",
    )
    reset_state_at_documents: bool = _option(
        True, "nothing of a document reaches the next one in the same window"
    )
    cache_dir: str = _option("data/cache", "folder for the token files")

    @property
    def is_messages(self) -> bool:
        """Whether documents are conversations."""
        return self.format == "messages"

    @property
    def field(self) -> str:
        """The field of a row that is its document."""
        return MESSAGES if self.is_messages else self.text_field

    def validate(self) -> None:
        """Raise one ``UserError`` for all values that are out of range; no file is opened."""
        problems = [
            f"data.{key} ({getattr(self, key)!r}) must not be empty: set it or leave it out"
            for key in ("source", "text_field", "split", "tokenizer", "cache_dir", "validation")
            if getattr(self, key) is not None and not getattr(self, key).strip()
        ]
        if not 0.0 < self.validation_fraction < 1.0:
            problems.append(
                f"data.validation_fraction ({self.validation_fraction}) is out of range: "
                "use a share between 0 and 1, 0.1 for instance"
            )
        if not 0.0 <= self.tuning_fraction < 1.0:
            problems.append(
                f"data.tuning_fraction ({self.tuning_fraction}) is out of range: use 0 for none, "
                "or a share below 1, 0.1 for instance"
            )
        special = 5 if self.is_messages else 3  # <bos>, <eos>, <pad>, and what marks messages
        if self.tokenizer == BPE and self.vocab_size < 256 + special + 1:
            problems.append(
                f"data.vocab_size ({self.vocab_size}) is too small for a byte-level BPE, which "
                f"has 256 bytes and {special} special tokens before its first merge: "
                f"use at least {256 + special + 1}, or data.tokenizer=bytes"
            )
        if self.is_messages and self.text_field != "text":
            problems.append(
                f"data.text_field ({self.text_field}) has no meaning with data.format=messages, "
                f"whose rows have a field {MESSAGES}: leave it out"
            )
        if self.is_messages and self.source == PYTHON_STDLIB:
            problems.append(
                f"data.source ({self.source}) has no conversations, which data.format=messages "
                "asks for: name a .jsonl or .parquet file, a folder of them, or a Hub data set"
            )
        if self.tokenizer == BPE and self.vocab_size > MAX_BPE_VOCAB_SIZE:
            too_large = f"data.vocab_size ({self.vocab_size}) is too large to be trained"
            problems.append(f"{too_large}: use at most {MAX_BPE_VOCAB_SIZE}")
        for key in ("seq_len", "max_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                problems.append(f"data.{key} ({value}) is out of range: use at least 1")
        if problems:
            raise UserError("; ".join(problems))
