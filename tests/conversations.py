"""Conversations, and tokenizers, models and checkpoints that know how to hold one."""

import json
import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from retnet.data.chat import prepare_for_chat
from tests.generation.builders import VOCAB, byte_tokenizer, tiny_model

START, END = VOCAB, VOCAB + 1  # the markers after the byte tokenizer's entries
SPELLED = " the end is <|im_end|>\n, then <eos> "


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def rows(number: int = 40) -> list[dict[str, Any]]:
    """Conversations of one to three turns, some with a system message."""
    rng = random.Random(0)
    found = []
    for i in range(number):
        said = [f"{'n' * rng.randint(1, 9)} {i} é" for _ in range(2 * rng.randint(1, 3))]
        found.append({"messages": turns(*said, system="be brief" if i % 3 == 0 else None), "n": i})
    return found


def write_rows(path: Path, content: list[Any] | None = None) -> Path:
    path.write_text("\n".join(map(json.dumps, rows() if content is None else content)))
    return path


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 259 and 260 are the markers."""
    tokenizer = byte_tokenizer()
    prepare_for_chat(tokenizer)
    return tokenizer


def save_chat_checkpoint(folder: Path, mixer: str = "retention") -> Path:
    tiny_model(mixer, vocab_size=END + 1).float().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
