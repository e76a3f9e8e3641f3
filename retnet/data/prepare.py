"""From a ``DataSpec`` to token files: read, split, train the tokenizer, tokenise, keep."""

import hashlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from retnet.data.batches import check_window
from retnet.data.chat import CHATML, MARKERS, prepare_for_chat
from retnet.data.messages import Conversation
from retnet.data.prepared import (
    RECORD,
    SIDES,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    PreparedData,
    open_entry,
    publish,
    remove_abandoned,
    resumable,
    unfinished,
)
from retnet.data.record import NULL, entry, unusable
from retnet.data.sources import Source, open_source, open_validation, reopen_source
from retnet.data.spec import BPE, BYTES, DataSpec
from retnet.data.split import (
    DocumentsHash,
    SplitRule,
    Survey,
    check_held_back,
    choose_split,
    choose_tuning_split,
    not_held_back,
    survey_documents,
)
from retnet.data.streaming import stream_fingerprint, write_stream
from retnet.data.tokenizer import (
    chat_template_hash,
    load_tokenizer,
    max_token_id,
    panics_as_errors,
    tokenizer_hash,
    train_bpe,
)
from retnet.data.writing import phase, read_documents_of, write_tokens
from retnet.errors import UserError
from retnet.files import replacing, write_json
from retnet.paths import check_folder, expand

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cache and its records; a higher one leaves older entries unused
STREAMED_TOKENIZER_BYTES = 1 << 25  # of training text that a bpe tokenizer is trained on


@dataclass(frozen=True)
class _Inputs:
    """What a preparation is made from; no tokenizer where bpe is to be trained."""

    spec: DataSpec
    source: Source
    validation: Source | None
    tokenizer: PreTrainedTokenizerFast | None

    def fingerprints(self) -> list[str | None]:
        take = stream_fingerprint if self.spec.streaming else lambda source: source.fingerprint()
        return [take(self.source), take(self.validation) if self.validation else None]

    def entry_name(self, fingerprints: list[str | None]) -> str:
        """A readable name and a hash of everything that decides the token files."""
        spec, given, made = self.spec, self.validation, self.tokenizer
        template = (made.chat_template if made else CHATML) if spec.is_messages else None
        decides = {
            "format": FORMAT,
            "source": self.source.to_record(),
            "validation": given.to_record() if given else spec.validation_fraction,
            "fingerprints": fingerprints,
            "tokenizer": tokenizer_hash(made) if made else [BPE, spec.vocab_size],
            "tokenizers": tokenizers.__version__,
            "max_tokens": spec.max_tokens,
        } | ({"streaming": True} if spec.streaming else {})
        decides |= {"chat_template": template} if template else {}
        if spec.tuning_fraction:
            decides["tuning"] = [spec.tuning_fraction, spec.validation is not None]
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        only = re.ASCII if sys.getfilesystemencoding() != "utf-8" else 0  # what a name may have
        label = re.sub(r"[^\w.-]+", "-", Path(spec.source).name, flags=only)
        label = label.strip("-.")[:40] or "text"
        return f"{label}-{key}"


def prepare_data(spec: DataSpec) -> PreparedData:
    """Token files for ``spec``: from the cache when nothing changed, else made now.

    Raises a ``UserError`` for a text, tokenizer or option that is wrong, and leaves nothing then.
    """
    spec.validate()
    source = open_source(spec)
    # under tuning it is not looked at
    validation = None if spec.tuning_fraction else open_validation(spec, source)
    tokenizer = None
    if spec.tokenizer != BPE:
        tokenizer = load_tokenizer(spec.tokenizer)
        _check_vocab_size(spec, tokenizer)
        if spec.is_messages and prepare_for_chat(tokenizer) and spec.tokenizer != BYTES:
            logger.info(
                f"data.tokenizer ({spec.tokenizer}) has no chat template: it gets ChatML, and "
                f"{' and '.join(MARKERS)} as new entries"
            )
    inputs = _Inputs(spec, source, validation, tokenizer)
    fingerprints = inputs.fingerprints()
    cache = expand(spec.cache_dir, "data.cache_dir", for_libraries=True)
    check_folder(cache, "data.cache_dir")
    entry = cache / inputs.entry_name(fingerprints)
    prepared = open_entry(entry, tokenizer)
    remove_abandoned(entry.parent)
    if prepared is None:
        with resumable(entry) if spec.streaming else unfinished(entry) as folder:
            _build(folder / "complete", inputs)
            if inputs.fingerprints() != fingerprints:
                raise UserError(
                    f"data.source ({spec.source}) changed while it was being read: start again"
                )
            prepared = publish(folder / "complete", entry, tokenizer)
    check_window(prepared.train.num_tokens, spec.seq_len)
    size = len(prepared.tokenizer)
    if spec.tokenizer == BPE and size < spec.vocab_size:
        logger.warning(
            f"data.vocab_size ({spec.vocab_size}): the training text is too small for so many "
            f"entries, the tokenizer has {size}"
        )
    sizes = f"{prepared.train.num_tokens:,}", f"{prepared.validation.num_tokens:,}"
    logger.info("data in %s: %s training and %s validation tokens", entry, *sizes)
    return prepared


def rebuild_validation(record: dict[str, Any]) -> list[str]:
    """The validation documents that a ``PreparedData.record`` describes, read again.

    Raises a ``UserError`` where the record is incomplete or the corpus is gone or another.
    """
    try:
        given, trained = (
            entry(record, "validation_source", dict, NULL),
            entry(record, "source", dict),
        )
        read = entry(record, "documents_read", int, NULL, missing=None)
        if read is not None and not 0 <= read <= sys.maxsize:
            raise unusable(record, "documents_read")
        rule = SplitRule.from_record(entry(record, "split", dict))
        wanted = entry(record, "validation_sha256", str)
        made_by = entry(trained, "python", str, NULL, missing=None)
        source = reopen_source(given or trained, streaming=read is not None)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"the data record (data.json) is damaged, {error}: copy it again"
        ) from error
    texts = islice(read_documents_of(source), None if given else read)
    documents = list(texts) if given else list(filter(None, (rule.divide(x)[1] for x in texts)))
    total = DocumentsHash()
    for text in documents:
        total.add(text.encode())
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


def _build(folder: Path, inputs: _Inputs) -> None:
    """Fill ``folder``: the split, the tokenizer, both token files, and the record last.

    A stream goes on where an earlier attempt was interrupted.
    """
    spec, source, validation = inputs.spec, inputs.source, inputs.validation
    folder.mkdir(exist_ok=True)
    survey = None if spec.streaming else _survey(source, "data.source")
    rule = SplitRule("given")
    if spec.validation is None:
        fraction = spec.validation_fraction
        rule = choose_split(survey, fraction, spec.source, whole=spec.is_messages)
    elif survey is not None and validation is not None:
        check_held_back(spec, survey, _survey(validation, "data.validation"))
    if spec.tuning_fraction:
        fraction = spec.tuning_fraction
        rule = choose_tuning_split(rule, survey, fraction, spec.source, whole=spec.is_messages)
    tokenizer = inputs.tokenizer or _train_tokenizer(
        folder, inputs, rule, survey.num_bytes if survey else STREAMED_TOKENIZER_BYTES
    )
    record: dict[str, Any] = {
        "format": FORMAT,
        "source": source.to_record(),
        "validation_source": validation.to_record() if validation else None,
        "split": rule.to_record(),
        "tokenizer": spec.tokenizer,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
    }
    if spec.is_messages:
        record["chat_template_sha256"] = chat_template_hash(tokenizer)
    sides = SIDES
    if survey is None:
        record |= write_stream(folder, spec, source, rule, tokenizer)
        sides = SIDES[1:] if validation else ()
    else:
        record["corpus_sha256"] = survey.sha256
    for side in sides:
        record |= _write_side(folder, inputs, rule, side, tokenizer)
    if record["train_sha256"] == record["validation_sha256"]:  # a stream has not been surveyed
        raise not_held_back(spec)
    check_window(record[TRAIN]["tokens"], spec.seq_len)
    for side in SIDES:
        _check_text_is_left(record[side], side, spec)
    write_json(folder / RECORD, record)


def _check_text_is_left(counts: dict[str, int], side: str, spec: DataSpec) -> None:
    """Raise a ``UserError`` when documents are nothing but their ends: every loss would be low."""
    tokens = counts["tokens"]
    if tokens <= 2 * counts["documents"] and tokens != spec.max_tokens:
        raise UserError(
            f"data.tokenizer ({spec.tokenizer}) makes no token of the {counts['bytes']:,} bytes of "
            f"the {side} text: repair its tokenizer.json, or use another one"
        )
    if counts.get("answers") == 0:
        raise UserError(
            f"data.max_tokens ({spec.max_tokens}) ends before the first answer of the {side} "
            "conversations: use more"
        )


def _survey(source: Source, key: str) -> Survey:
    def encoded() -> Iterator[bytes]:
        for text in read_documents_of(source):
            document = text.encode()
            counter.advance(len(document))
            yield document

    with phase(f"reading {source.name}") as counter:
        survey = survey_documents(encoded())
    if not survey.num_bytes:
        raise UserError(f"{key} ({source.name}) is empty: name a file with text")
    return survey


def _train_tokenizer(
    folder: Path, inputs: _Inputs, rule: SplitRule, num_bytes: int
) -> PreTrainedTokenizerFast:
    """The bpe tokenizer of an earlier attempt, or one trained on the first ``num_bytes``."""
    if (folder / TOKENIZER).is_dir():
        try:
            with panics_as_errors():
                return PreTrainedTokenizerFast.from_pretrained(str(folder / TOKENIZER))
        except Exception as error:  # a damaged file can fail in any way
            logger.warning("%s is damaged and is made again (%s)", folder / TOKENIZER, error)

    def first() -> Iterator[str]:
        for text in _side(inputs.source, rule, TRAIN):
            part = text[: num_bytes - counter.num_bytes]
            counter.advance(len(part.encode()))
            if isinstance(text, Conversation):  # as the template has it between markers
                yield from (f"{one['role']}\n{one['content']}" for one in text.messages)
            else:
                yield part
            if counter.num_bytes >= num_bytes:
                return

    markers = MARKERS if inputs.spec.is_messages else ()
    with phase("training the tokenizer", total=num_bytes) as counter:
        tokenizer = train_bpe(first(), inputs.spec.vocab_size, markers)
    if inputs.spec.is_messages:
        prepare_for_chat(tokenizer)
    with replacing(folder / TOKENIZER) as new:
        tokenizer.save_pretrained(new)
    return tokenizer


def _write_side(
    folder: Path, inputs: _Inputs, rule: SplitRule, side: str, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Write one side's token file; returns its entries of the record."""
    spec, limit = inputs.spec, inputs.spec.max_tokens if side == TRAIN else None
    shutil.rmtree(folder / side, ignore_errors=True)
    if side == VALIDATION and inputs.validation is not None:
        texts = read_documents_of(inputs.validation)
        empty = f"data.validation ({spec.validation}) is empty: name a file with text"
    else:
        texts = _side(inputs.source, rule, side)
        empty = (
            f"data.validation_fraction ({spec.validation_fraction}) of data.source "
            f"({spec.source}) leaves the {side} side empty: use another fraction or more text"
        )
    title = f"tokenising {side}"
    facts = write_tokens(folder / side, texts, tokenizer, limit, title, answers=spec.is_messages)
    if facts["documents"] == 0:
        raise UserError(empty)
    return {f"{side}_sha256": facts.pop("sha256"), side: facts}


def _side(source: Source, rule: SplitRule, side: str) -> Iterator[str]:
    """One side's documents."""
    parts = (rule.divide(text)[SIDES.index(side)] for text in read_documents_of(source))
    return filter(None, parts)
