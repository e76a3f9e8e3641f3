"""From a ``DataSpec`` to token files: read, split, train the tokenizer, tokenise, keep."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tokenizers
from transformers import PreTrainedTokenizerFast

from retnet.data.batches import check_window
from retnet.data.prepared import (
    TOKENIZER,
    TRAIN,
    VALIDATION,
    PreparedData,
    open_entry,
    publish,
    resumable,
    save_record,
    unfinished,
)
from retnet.data.progress import phase
from retnet.data.sources import Source, open_source, open_validation, reopen_source
from retnet.data.spec import BPE, DataSpec
from retnet.data.split import DocumentsHash, SplitRule, Survey, choose_split, survey_documents
from retnet.data.streaming import (
    as_stream,
    stream_fingerprint,
    stream_split,
    stream_tokenizer,
    write_stream,
)
from retnet.data.tokenizer import (
    load_tokenizer,
    max_token_id,
    tokenizer_hash,
    train_bpe,
)
from retnet.data.writing import count, read_documents_of, write_tokens
from retnet.errors import UserError
from retnet.paths import expand

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cache and its records; a higher one leaves older entries unused
Side = Literal["train", "validation"]


def prepare_data(spec: DataSpec) -> PreparedData:
    """Token files for ``spec``: from the cache when nothing changed, else made now.

    Raises:
        UserError: Whatever is wrong with the text, the tokenizer or an option; nothing is left
            behind then.
    """
    spec.validate()
    source = open_source(spec)
    validation = open_validation(spec, source)
    if spec.streaming:
        source, validation = as_stream(source), as_stream(validation) if validation else None
    tokenizer = None
    if spec.tokenizer != BPE:
        tokenizer = load_tokenizer(spec.tokenizer)
        _check_vocab_size(spec, tokenizer)
    fingerprints = _fingerprints(spec, source, validation)
    name = _entry_name(spec, source, validation, fingerprints, tokenizer)
    entry = expand(spec.cache_dir, "data.cache_dir") / name
    prepared = open_entry(entry, tokenizer)
    if prepared is None:
        with resumable(entry) if spec.streaming else unfinished(entry) as folder:
            complete = folder / "complete"
            build = _build_stream if spec.streaming else _build
            build(complete, spec, source, validation, tokenizer)
            if _fingerprints(spec, source, validation) != fingerprints:
                raise UserError(
                    f"data.source ({spec.source}) changed while it was being read: start again"
                )
            prepared = publish(complete, entry, tokenizer)
    check_window(prepared.train.num_tokens, spec.seq_len)
    if spec.tokenizer == BPE and len(prepared.tokenizer) < spec.vocab_size:
        logger.warning(
            "data.vocab_size (%s): the training text is too small for so many entries, the "
            "tokenizer has %s",
            spec.vocab_size,
            len(prepared.tokenizer),
        )
    logger.info(
        "data in %s: %s training and %s validation tokens",
        entry,
        f"{prepared.train.num_tokens:,}",
        f"{prepared.validation.num_tokens:,}",
    )
    return prepared


def rebuild_validation(record: dict[str, Any]) -> list[str]:
    """The validation documents that a ``PreparedData.record`` describes, read again.

    Raises:
        UserError: The record is incomplete, the corpus is gone, or it no longer gives the same
            documents.
    """
    try:
        given = record["validation_source"]
        source = reopen_source(given or record["source"])
        rule = SplitRule.from_record(record["split"])
        wanted, made_by = record["validation_sha256"], record["source"].get("python")
        read = record.get("documents_read")
        if read is not None and (type(read) is not int or read < 0):
            raise ValueError(f"documents_read ({read!r})")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the data record (data.json) is damaged, {error} is missing or unusable: copy it again"
        ) from error
    if read is not None:
        source = as_stream(source)
    total = DocumentsHash()
    documents = []
    for text in islice(read_documents_of(source), None if given else read):
        part = text if given else rule.divide(text)[1]
        if part:
            documents.append(part)
            total.add(part.encode())
    if total.hexdigest() != wanted:
        hint = f" (it was made with Python {made_by})" if made_by else ""
        raise UserError(
            f"the validation text of {source.name} is not what it was when the record was made"
            f"{hint}: restore it, or name a text to compare on"
        )
    return documents


def _check_vocab_size(spec: DataSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise a ``UserError`` when a size was set that a tokenizer of its own size does not have."""
    size = max_token_id(tokenizer) + 1
    # tokenizer.vocab_size: without the special tokens, as some count
    if spec.vocab_size not in (DataSpec.vocab_size, size, tokenizer.vocab_size):
        raise UserError(
            f"data.vocab_size ({spec.vocab_size}) is the size of a bpe tokenizer to be trained, "
            f"and data.tokenizer ({spec.tokenizer}) has {size} entries: leave data.vocab_size out, "
            f"or set data.tokenizer={BPE}"
        )


def _fingerprints(spec: DataSpec, source: Source, validation: Source | None) -> list[str | None]:
    take = stream_fingerprint if spec.streaming else lambda source: source.fingerprint()
    return [take(source), take(validation) if validation else None]


def _entry_name(
    spec: DataSpec,
    source: Source,
    validation: Source | None,
    fingerprints: list[str | None],
    tokenizer: PreTrainedTokenizerFast | None,
) -> str:
    """A readable name and a hash of everything that decides the token files."""
    decides = {
        "format": FORMAT,
        "source": source.to_record(),
        "validation": validation.to_record() if validation else spec.validation_fraction,
        "fingerprints": fingerprints,
        "tokenizer": tokenizer_hash(tokenizer) if tokenizer else [BPE, spec.vocab_size],
        "tokenizers": tokenizers.__version__,
        "max_tokens": spec.max_tokens,
    } | ({"streaming": True} if spec.streaming else {})
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    label = re.sub(r"[^\w.-]+", "-", Path(spec.source).name).strip("-.")[:40] or "text"
    return f"{label}-{key}"


def _build(
    folder: Path,
    spec: DataSpec,
    source: Source,
    validation: Source | None,
    tokenizer: PreTrainedTokenizerFast | None,
) -> None:
    """Fill ``folder``: survey, split, tokenizer, both token files, and the record last."""
    survey = _survey(source, "data.source")
    rule = SplitRule("given")
    if validation is None:
        rule = choose_split(survey, spec.validation_fraction, spec.source)
    else:
        _survey(validation, "data.validation")
    trained = tokenizer is None
    if tokenizer is None:
        with phase("training the tokenizer", total=survey.num_bytes) as counter:
            texts = count(_side(source, rule, TRAIN), counter)
            tokenizer = train_bpe(texts, spec.vocab_size)
    record = _describe(spec, source, validation, rule, tokenizer)
    record["corpus_sha256"] = survey.sha256
    held_back = (
        _side(source, rule, VALIDATION) if validation is None else read_documents_of(validation)
    )
    train = _side(source, rule, TRAIN)
    for side, texts, max_tokens in ((TRAIN, train, spec.max_tokens), (VALIDATION, held_back, None)):
        facts = write_tokens(folder / side, texts, tokenizer, max_tokens, f"tokenising {side}")
        if facts["documents"] == 0:
            raise UserError(
                f"data.validation_fraction ({spec.validation_fraction}) of data.source "
                f"({spec.source}) leaves the {side} side empty: use another fraction or more text"
            )
        record[f"{side}_sha256"] = facts.pop("sha256")
        record[side] = facts
    check_window(record[TRAIN]["tokens"], spec.seq_len)
    if trained:
        tokenizer.save_pretrained(folder / TOKENIZER)
    save_record(folder, record)


def _build_stream(
    folder: Path,
    spec: DataSpec,
    source: Source,
    validation: Source | None,
    tokenizer: PreTrainedTokenizerFast | None,
) -> None:
    """Fill ``folder``, or go on where an earlier attempt was interrupted."""
    folder.mkdir(exist_ok=True)
    rule = stream_split(spec, validation)
    tokenizer = tokenizer or stream_tokenizer(folder, spec, source, rule)
    record = _describe(spec, source, validation, rule, tokenizer)
    record |= write_stream(folder, spec, source, rule, tokenizer)
    if validation is not None:
        shutil.rmtree(folder / VALIDATION, ignore_errors=True)
        texts = read_documents_of(validation)
        facts = write_tokens(folder / VALIDATION, texts, tokenizer, None, "tokenising validation")
        if facts["documents"] == 0:
            raise UserError(f"data.validation ({spec.validation}) is empty: name a file with text")
        record["validation_sha256"] = facts.pop("sha256")
        record[VALIDATION] = facts
    check_window(record[TRAIN]["tokens"], spec.seq_len)
    save_record(folder, record)


def _describe(
    spec: DataSpec,
    source: Source,
    validation: Source | None,
    rule: SplitRule,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Any]:
    """The part of the record that is known before the documents are written."""
    return {
        "format": FORMAT,
        "source": source.to_record(),
        "validation_source": validation.to_record() if validation else None,
        "split": rule.to_record(),
        "tokenizer": spec.tokenizer,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
    }


def _survey(source: Source, key: str) -> Survey:
    with phase(f"reading {source.name}") as counter:
        survey = survey_documents(
            text.encode() for text in count(read_documents_of(source), counter)
        )
    if not survey.num_bytes:
        raise UserError(f"{key} ({source.name}) is empty: name a file with text")
    return survey


def _side(source: Source, rule: SplitRule, side: Side) -> Iterator[str]:
    """One side's documents."""
    for text in read_documents_of(source):
        part = rule.divide(text)[0 if side == TRAIN else 1]
        if part:
            yield part
