"""data.streaming: a large corpus read once into token files, in bounded memory.

Documents go by one after the other: each is hashed, given to a side by its hash, tokenised and
appended. Now and then everything so far is committed. A later attempt reads the committed documents
again, to check that they are the same, and goes on behind them; they are not tokenised again.
Memory holds one batch of documents (4 MiB of text, or one longer document) and 16 bytes for each
document. Reading stops when ``data.max_tokens`` training tokens are there.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from retnet.data.chat import pieces_of
from retnet.data.hub import HubSource
from retnet.data.prepared import SIDES, TRAIN
from retnet.data.record import entry
from retnet.data.sources import FileSource, Source
from retnet.data.spec import DataSpec
from retnet.data.split import DocumentsHash, SplitRule
from retnet.data.token_file import TokenFileWriter, can_go_on
from retnet.data.tokenizer import in_groups, max_token_id
from retnet.data.writing import Phase, add_document, finish_tokens, phase, read_documents_of
from retnet.errors import UserError
from retnet.files import read_json, write_json

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
BATCH_CHARACTERS = 1 << 22
COMMIT_BYTES = 1 << 26


def stream_fingerprint(source: Source) -> str:
    """A hash of names, sizes and times of the files: their content would take a read of all."""
    if not isinstance(source, FileSource | HubSource) or not source.files:
        return source.fingerprint()
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    return hashlib.sha256(json.dumps([source.name, facts]).encode()).hexdigest()


class _Hashes:
    """The hashes of all documents and of each side, so far."""

    def __init__(self, rule: SplitRule) -> None:
        self._rule = rule
        self.all, self.sides = DocumentsHash(), {side: DocumentsHash() for side in SIDES}
        self.documents = 0

    def side(self, text: str) -> str | None:
        """Which one a document is on, if any."""
        parts = zip(SIDES, self._rule.divide(text), strict=True)
        return next((side for side, part in parts if part), None)

    def add(self, text: str, side: str | None) -> int:
        """Append a document; returns its UTF-8 bytes."""
        encoded = text.encode()
        self.all.add(encoded)
        if side is not None:
            self.sides[side].add(encoded)
        self.documents += 1
        return len(encoded)


def write_stream(
    folder: Path,
    spec: DataSpec,
    source: Source,
    rule: SplitRule,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Any]:
    """Tokenise both sides (only training where validation is given) into ``folder``.

    Returns what the record says of the documents; a ``UserError`` where a side is empty.
    """
    documents, hashes = read_documents_of(source), _Hashes(rule)
    sides, largest = SIDES[:1] if rule.kind == "given" else SIDES, max_token_id(tokenizer)
    committed = _take_up(folder, documents, hashes, sides, largest, answers=spec.is_messages)
    if not committed:  # nothing yet, or the text is another
        for side in SIDES:
            shutil.rmtree(folder / side, ignore_errors=True)
        documents, hashes = read_documents_of(source), _Hashes(rule)
    with ExitStack() as stack:
        writers = {
            side: stack.enter_context(
                closing(
                    TokenFileWriter(
                        folder / side, largest, committed.get(side), answers=spec.is_messages
                    )
                )
            )
            for side in sides
        }
        with phase(f"tokenising {source.name}") as counter:
            last_commit = 0
            for batch in in_groups(documents, BATCH_CHARACTERS):
                full = _append(batch, writers, hashes, tokenizer, spec.max_tokens, counter)
                batch.clear()  # a long document is not kept while the next one is read
                if full:
                    break
                if counter.num_bytes - last_commit >= COMMIT_BYTES:
                    last_commit = counter.num_bytes
                    _commit(folder, writers, hashes)
        facts: dict[str, Any] = {"documents_read": hashes.documents}
        facts["corpus_sha256"] = hashes.all.hexdigest()
        if not hashes.documents:
            raise UserError(f"data.source ({source.name}) is empty: name a file with text")
        for side, writer in writers.items():
            if not writer.num_documents:
                until = f", read up to data.max_tokens ({spec.max_tokens})," * bool(spec.max_tokens)
                raise UserError(
                    f"data.source ({spec.source}){until} leaves the {side} side empty: streaming "
                    "holds whole documents back, so use more of them, or name a text in "
                    "data.validation"
                )
            facts[f"{side}_sha256"] = hashes.sides[side].hexdigest()
            facts[side] = writer.counts()
            finish_tokens(writer, tokenizer, facts[f"{side}_sha256"])
        (folder / PROGRESS).unlink(missing_ok=True)
        for writer in writers.values():
            writer.forget()
    return facts


def _take_up(
    folder: Path,
    documents: Iterator[str],
    hashes: _Hashes,
    sides: Sequence[str],
    largest: int,
    *,
    answers: bool,
) -> dict[str, Any]:
    """Read past the committed documents; nothing is where there are none or they are others now."""
    if not (folder / PROGRESS).is_file():
        return {}
    try:
        committed = read_json(folder / PROGRESS, "start again")
        read, sha256 = entry(committed, "documents_read", int), entry(committed, "sha256", str)
        for side in sides:
            counts = entry(committed, side, dict)
            names = ("documents", "bytes", "tokens", *(("answers",) if answers else ()))
            counts = {name: entry(counts, name, int) for name in names}
            if not can_go_on(folder / side, largest, counts):
                raise ValueError(f"{side} has less than was written")
    except ValueError as error:  # a UserError is one
        logger.warning(f"what was tokenised already is damaged ({error}): tokenising it anew")
        return {}
    with phase("reading what is tokenised already") as counter:
        for text in islice(documents, read):
            counter.advance(hashes.add(text, hashes.side(text)))
    if hashes.all.hexdigest() == sha256:
        return committed
    logger.warning("the text is not what it was at the last attempt: tokenising it anew")
    return {}


def _append(
    batch: list[str],
    writers: dict[str, TokenFileWriter],
    hashes: _Hashes,
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int | None,
    counter: Phase,
) -> bool:
    """Tokenise and write a batch; returns whether there are enough training tokens now."""
    sided = [(text, hashes.side(text)) for text in batch]
    encoded = {
        name: pieces_of(tokenizer, [text for text, side in sided if side == name])
        for name in writers
    }
    for text, side in sided:
        if side is not None:
            _, pieces = next(encoded[side])
            add_document(writers[side], pieces, max_tokens if side == TRAIN else None)
        counter.advance(hashes.add(text, side))
        if side == TRAIN and writers[side].num_tokens == max_tokens:
            return True
    return False


def _commit(folder: Path, writers: dict[str, TokenFileWriter], hashes: _Hashes) -> None:
    progress: dict[str, Any] = {side: writer.commit() for side, writer in writers.items()}
    progress |= {"documents_read": hashes.documents, "sha256": hashes.all.hexdigest()}
    write_json(folder / PROGRESS, progress)
