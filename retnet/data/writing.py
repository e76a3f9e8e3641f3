"""Documents on their way into token files: checked, counted, tokenised.

Progress goes to stderr: a bar on a terminal, and one log line per finished phase everywhere.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from retnet.data.chat import pieces_of
from retnet.data.sources import Source
from retnet.data.split import DocumentsHash
from retnet.data.token_file import TokenFileWriter
from retnet.data.tokenizer import Piece, max_token_id, tokenizer_hash
from retnet.errors import UserError
from retnet.terminal import harmless, in_one_line

logger = logging.getLogger(__name__)


@dataclass
class Phase:
    """One phase of the preparation, counted in documents and bytes of text."""

    bar: tqdm
    documents: int = 0
    num_bytes: int = 0

    def advance(self, num_bytes: int) -> None:
        """Count one more document of ``num_bytes`` bytes."""
        self.documents += 1
        self.num_bytes += num_bytes
        self.bar.update(num_bytes)


@contextmanager
def phase(name: str, *, total: int | None = None) -> Iterator[Phase]:
    """Show a bar (of ``total`` bytes, where known) in the block and log what was counted in it."""
    started = time.perf_counter()
    # disable=None: a bar on a terminal only.
    with tqdm(
        total=total,
        desc=harmless(in_one_line(name)),
        unit="B",
        unit_scale=True,
        disable=None,
        dynamic_ncols=True,
    ) as bar:
        counter = Phase(bar)
        yield counter
    facts = f"{counter.documents:,} documents, {counter.num_bytes:,} bytes"
    logger.info("%s: %s, %.1f s", name, facts, time.perf_counter() - started)


def read_documents_of(source: Source) -> Iterator[str]:
    """The documents with text in them, checked to be encodable."""
    for number, text in enumerate(source.documents(), start=1):
        if not text:
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{source.name} document {number} holds half a surrogate pair at character "
                f"{error.start}, which is not text: repair or remove the document"
            ) from error
        yield text


def write_tokens(
    folder: Path,
    texts: Iterator[str],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int | None,
    title: str,
    *,
    answers: bool = False,
) -> dict[str, Any]:
    """Tokenise documents into a token file until ``max_tokens``, which may cut the last one.

    Of conversations (``answers``) only the answers count.
    """
    total = DocumentsHash()
    writer = TokenFileWriter(folder, max_token_id(tokenizer), answers=answers)
    with phase(title) as counter, closing(writer):
        for text, pieces in pieces_of(tokenizer, texts):
            total.add(text.encode())
            counter.advance(add_document(writer, pieces, max_tokens))
            if writer.num_tokens == max_tokens:
                break
        finish_tokens(writer, tokenizer, total.hexdigest())
    return {**writer.counts(), "sha256": total.hexdigest()}


def add_document(writer: TokenFileWriter, pieces: Iterable[Piece], max_tokens: int | None) -> int:
    """Append a document as far as ``max_tokens`` of the file allow; returns the UTF-8 bytes."""
    written, append = 0, writer.add
    for ids, num_bytes, bounds in pieces:
        if writer.num_tokens == max_tokens:
            break
        left = len(ids) if max_tokens is None else min(len(ids), max_tokens - writer.num_tokens)
        counted, of = left, len(ids)
        if bounds is not None:
            counted, of = (_length(cut := bounds.clip(max=left))), _length(bounds)
            bounds = cut[: 2 * np.count_nonzero(bounds[::2] < left)]
        # A tokenizer that strips whitespace gives no ids for a piece of nothing else.
        part = round(num_bytes * counted / of) if of else num_bytes
        append(ids[:left], part, bounds)
        written, append = written + part, writer.extend
    return written


def _length(bounds: np.ndarray) -> int:
    """The tokens of answers with these bounds."""
    return int((bounds[1::2] - bounds[::2]).sum())


def finish_tokens(writer: TokenFileWriter, tokenizer: PreTrainedTokenizerFast, sha256: str) -> None:
    """Complete a token file of documents with the hash ``sha256``."""
    writer.finish(
        sha256=sha256,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
