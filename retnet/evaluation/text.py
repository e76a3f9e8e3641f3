"""The text that models are compared on: a file, or validation data made again from its record."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet.checkpoints import Checkpoint
from retnet.checkpoints.format import DATA_RECORD
from retnet.data import rebuild_validation
from retnet.data.sources import FileSource, HubSource, Source, open_location, reopen_source
from retnet.data.writing import read_documents_of
from retnet.errors import UserError
from retnet.evaluation.metrics import words_of
from retnet.evaluation.tokens import are_conversations, predicted_text
from retnet.paths import kind_of

ASK_FOR_TEXT = "name a text that none of the models was trained on with --text FILE"


@dataclass(frozen=True)
class EvaluationText:
    """Documents to evaluate."""

    description: str  # where they come from, for the table
    documents: Sequence[str]  # none of them empty; texts, or conversations
    files: tuple[Path, ...] = ()  # that they are read from, as far as they are local

    @property
    def num_bytes(self) -> int:
        """Of what is predicted."""
        return sum(len(predicted_text(one).encode()) for one in self.documents)

    @property
    def words(self) -> int:
        """As ``metrics.words_of`` counts them, of what is predicted."""
        return sum(words_of(predicted_text(one)) for one in self.documents)

    @property
    def are_conversations(self) -> bool:
        return are_conversations(self.documents)


def text_of_file(path: Path, text_field: str = "text") -> EvaluationText:
    """The documents of a file (or of a folder's files), of the kinds that ``data.source`` reads.

    Raises:
        UserError: It is missing, unreadable or without text.
    """
    if kind_of(path, "--text") is None:
        raise UserError(f"--text ({path}) does not exist: correct the path")
    try:
        source = open_location(path, "--text", text_field, None, "train")
        documents = list(read_documents_of(source))
    except UserError as error:  # readers know the option under its name in configurations
        raise UserError(str(error).replace("data.text_field", "--text-field")) from error
    if not documents:
        raise UserError(f"--text ({path}) is empty: name a file with text")
    return EvaluationText(str(path), documents, files_of(source))


def validation_text(checkpoints: Sequence[Checkpoint]) -> EvaluationText:
    """The validation data of the first checkpoint, which all must have held back alike.

    Raises:
        UserError: There is no record of it, the corpus is gone or has changed, or another
            checkpoint was validated on other data and so may have been trained on this.
    """
    first = checkpoints[0]
    wanted = _validation_hash(first)
    for other in checkpoints[1:]:
        found = _validation_hash(other)
        if found != wanted:
            raise UserError(
                f"{other.path} was validated on other data ({found[:12]}) than {first.path} "
                f"({wanted[:12]}): {ASK_FOR_TEXT}"
            )
    assert first.data_record is not None
    try:
        documents = rebuild_validation(first.data_record)
    except UserError as error:
        raise UserError(f"{error}; or {ASK_FOR_TEXT}") from error
    kind = "conversations" if are_conversations(documents) else "data"
    description = f"validation {kind} of {describe_corpus(first.data_record)}"
    return EvaluationText(description, documents, _recorded_files(first.data_record))


def files_of(source: Source) -> tuple[Path, ...]:
    """The local files that a source is read from, none for the standard library."""
    if isinstance(source, HubSource) and source.is_folder:
        return tuple(Path(source.location).rglob("*"))
    return source.files if isinstance(source, FileSource) else ()


def _recorded_files(record: dict[str, Any]) -> tuple[Path, ...]:
    """The local files of a data record, for training and validation."""
    found: tuple[Path, ...] = ()
    source: Any
    for source in (record.get("source"), record.get("validation_source")):
        with suppress(ValueError, KeyError, TypeError):  # the training text may be gone
            if source["kind"] == "files" or Path(source["location"]).is_dir():  # not the Hub
                found += files_of(reopen_source(source))
    return found


def _validation_hash(checkpoint: Checkpoint) -> str:
    wanted = (checkpoint.data_record or {}).get("validation_sha256")
    if not isinstance(wanted, str):
        raise UserError(
            f"{checkpoint.path} has no {DATA_RECORD} that says what it was validated on: "
            f"{ASK_FOR_TEXT}"
        )
    return wanted


def describe_corpus(record: dict[str, Any]) -> str:
    """The corpus of a data record with its hash, and its Python version where that matters."""
    source = record["validation_source"] or record["source"]
    name = source.get("location", source["kind"])
    version = f"Python {source['python']}, " if "python" in source else ""
    return f"{name} ({version}corpus {str(record.get('corpus_sha256'))[:12]})"
