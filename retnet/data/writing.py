"""Documents on their way into token files: checked, counted, tokenised."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from retnet.data.progress import Phase, phase
from retnet.data.sources import Source
from retnet.data.split import DocumentsHash
from retnet.data.token_file import TokenFileWriter
from retnet.data.tokenizer import encode_documents, max_token_id, tokenizer_hash
from retnet.errors import UserError


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


def count(texts: Iterator[str], counter: Phase) -> Iterator[str]:
    """The texts, each counted as it goes by."""
    for text in texts:
        counter.advance(len(text.encode()))
        yield text


def write_tokens(
    folder: Path,
    texts: Iterator[str],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int | None,
    title: str,
) -> dict[str, Any]:
    """Tokenise documents into a token file until ``max_tokens``, which may cut the last one."""
    waiting: deque[int] = deque()  # sizes of the documents that the encoder holds
    total = DocumentsHash()

    def measured() -> Iterator[str]:
        for text in texts:
            encoded = text.encode()
            waiting.append(len(encoded))
            total.add(encoded)
            yield text

    with phase(title) as counter, TokenFileWriter(folder, max_token_id(tokenizer)) as writer:
        for ids in encode_documents(tokenizer, measured()):
            num_bytes = waiting.popleft()
            if max_tokens is not None and writer.num_tokens + len(ids) > max_tokens:
                kept = max_tokens - writer.num_tokens
                if kept:
                    writer.add(ids[:kept], round(num_bytes * kept / len(ids)))
                break
            writer.add(ids, num_bytes)
            counter.advance(num_bytes)
        facts = {
            "documents": writer.num_documents,
            "bytes": writer.num_bytes,
            "tokens": writer.num_tokens,
            "sha256": total.hexdigest(),
        }
        finish_tokens(writer, tokenizer, total.hexdigest())
    return facts


def finish_tokens(writer: TokenFileWriter, tokenizer: PreTrainedTokenizerFast, sha256: str) -> None:
    """Complete a token file of documents with the hash ``sha256``."""
    writer.finish(
        sha256=sha256,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
