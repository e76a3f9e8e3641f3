"""The files of a tokenizer, looked at before the libraries that read them are trusted with them.

They wait for a pipe without end, and a few lines of tokenizer.json can have every letter become
gigabytes, or number an entry four billion: both end the process where memory does.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retnet.errors import TooLargeError, UserError, memory_errors
from retnet.files import read_json, unreadable
from retnet.paths import kind_of

TOKENIZER = "tokenizer.json"
# What the libraries read beside it, each as a whole.
OTHERS = ("*token*.json", "vocab.json", "merges.txt", "chat_template.*",
          "additional_chat_templates/*")  # fmt: skip
MOST_IDS = (
    1 << 24
)  # a vocabulary's; the library and the model reserve memory for all up to the last
MOST_GROWTH = 1000  # characters that a text's single one may become


def check_tokenizer_files(folder: Path, fix: str) -> None:
    """Raise a ``UserError`` where one is no file, may not be read, or takes too much memory.

    The message ends with ``fix`` where a file is at fault.
    """
    others = {file for pattern in OTHERS for file in folder.glob(pattern)}
    for file in sorted({folder / TOKENIZER, *others}):
        kind = kind_of(file, TOKENIZER)
        if kind not in (None, "file"):
            raise UserError(f"{file} is a folder, pipe or device, where a file is needed: {fix}")
        try:
            if kind is not None:
                with memory_errors(file), file.open("rb") as stream:
                    stream.read(1 if file.name == TOKENIZER else -1)
        except PermissionError as error:
            raise UserError(unreadable(file)) from error
    if not (folder / TOKENIZER).exists():
        return
    try:
        content = read_json(folder / TOKENIZER, fix)
    except TooLargeError:
        raise
    except UserError:  # the library says what is wrong with it
        return
    largest = max(_ids(content), default=0)
    if largest >= MOST_IDS:
        raise UserError(
            f"{folder / TOKENIZER}: an id ({largest}) is beyond {MOST_IDS - 1}, and memory is "
            f"reserved for all before it: number the entries without holes, or {fix}"
        )
    for parts in (("normalizer", "pre_tokenizer"), ("decoder",)):
        where, growth = " and ".join(parts), math.prod(_growth(content.get(part)) for part in parts)
        if growth > MOST_GROWTH:
            raise UserError(
                f"{folder / TOKENIZER}: the {where} can make more than {MOST_GROWTH:,} characters "
                f"of one: leave replacements out there, or {fix}"
            )


def _ids(content: dict[str, Any]) -> Iterator[int]:
    """The ids that a tokenizer.json gives to its entries one by one."""
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    named = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    parts = added if isinstance(added, list) else []
    named += [part.get("id") for part in parts if isinstance(part, dict)]
    yield from (number for number in named if isinstance(number, int))


def _growth(part: Any) -> float:
    """How many characters a part of the pipeline makes of one, at most; 1 where it has no say."""
    if not isinstance(part, dict):
        return 1
    growth = 1.0
    for steps in (part.get("normalizers"), part.get("pretokenizers"), part.get("decoders")):
        for step in steps if isinstance(steps, list) else ():
            growth *= _growth(step)
    if part.get("type") == "ByteLevel":
        return 2  # of a byte that is no letter a letter of two bytes
    content, pattern = part.get("content"), part.get("pattern")
    if part.get("type") == "Prepend" and isinstance(part.get("prepend"), str):
        return 1 + len(part["prepend"])
    if part.get("type") == "Replace" and isinstance(content, str) and isinstance(pattern, dict):
        text = pattern.get("String")  # else an expression, which may match between letters too
        return max(1, len(content) / len(text)) if text else 1 + len(content)
    return growth
