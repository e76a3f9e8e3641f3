"""Data sets in the Hub's layout: on the Hub, or a local folder laid out the same way.

A local folder without a card that declares configurations is read as any other files are, those of
one split. With such a card the data set library reads it, as a stream, because the library's own
cache goes by modification times and would return what the files held before.
"""

import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from retnet.data.aliases import MOST_NODES, MOST_TEXT, too_large
from retnet.data.listing import files_below
from retnet.data.network import (
    HubUnreachableError,
    is_network_failure,
    is_refusal,
    offline,
    reason_of,
    while_reachable,
)
from retnet.data.readers import (
    READERS,
    document_of,
    hash_files,
    missing_field,
    read_documents,
    suffix_of,
)
from retnet.errors import UserError, memory_errors

T = TypeVar("T")
ROWS = 1000
RECORDED = ("location", "text_field", "hub_config", "split", "revision")
# As the Hub recognises splits: train.csv, test-00000-of-00001.parquet, validation/a.jsonl.
SPLIT_NAME = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<validation>validation|valid|val|dev)"
    r"|(?P<test>test(?:ing)?|eval(?:uation)?))(?:[-_.]|$)"
)
CARD = "README.md"
SECOND_CARD = ".huggingface.yaml"  # what it says stands in place of the other's
# what the library raises for a value that is not of the tag before it
UNTYPED = ValueError, TypeError, LookupError, ArithmeticError, AttributeError
OUTSIDE = re.compile(r"^[/~]|^\w+:[/\\]|::|(^|[/\\])\.\.([/\\]|$)")  # a path, an address
CARD_KEYS = re.compile(r"^(configs|dataset_info)\s*:", re.MULTILINE)


@dataclass(frozen=True)
class HubSource:
    """One split of one configuration of a data set."""

    location: str  # Hub name, or the absolute path of a local folder
    key: str  # the configuration key it comes from
    text_field: str
    hub_config: str | None
    split: str
    revision: str | None  # commit on the Hub; None for a local folder
    streaming: bool = False  # read from the Hub row by row rather than downloaded as a whole
    offline: bool = False  # the Hub was asked and does not answer
    messages: bool = False  # whether documents are conversations

    @property
    def name(self) -> str:
        return f"{self.location}, split {self.split}"

    @property
    def is_folder(self) -> bool:
        """Whether it is a local folder."""
        return self.revision is None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of a local folder; none of the Hub."""
        if not self.is_folder:
            return ()
        return tuple(files_below(Path(self.location), self.key, lambda path: True))

    def fingerprint(self) -> str:
        if not self.is_folder:
            return f"{self.revision}/{self.hub_config}/{self.split}"
        return hash_files(self.files, Path(self.location), f"{self.hub_config}/{self.split}")

    def documents(self) -> Iterator[str]:
        if self.is_folder and not _declares_configurations(Path(self.location)):
            yield from self._documents_of_files()
            return
        for number, value in enumerate(self._values(), start=1):
            where = f"{self.name} row {number}"
            yield document_of(self.messages)(value, self.text_field, where)

    def _documents_of_files(self) -> Iterator[str]:
        what = f"{self.key} ({self.name})"
        if self.hub_config is not None:
            raise UserError(
                f"data.hub_config ({self.hub_config}) has no meaning for {what}: its README.md "
                "declares no configurations, so leave it out"
            )
        splits = _splits(Path(self.location), self.key)
        files = [path for path, split in splits.items() if split == self.split]
        if not files:
            names = ", ".join(sorted(set(splits.values())))
            raise UserError(f"{what} has no such split: there are {names}")
        try:
            for path in files:
                yield from read_documents(path, self.text_field, self.messages)
        except UserError as error:
            raise UserError(f"{what}: {error}") from error

    def _values(self) -> Iterator[Any]:
        rows = _load(self).iter(batch_size=ROWS)
        while True:
            try:
                batch = self.wait_for(lambda: next(rows, None))
            except HubUnreachableError:
                raise
            except Exception as error:  # whatever the builder meets in a damaged file
                if not self.is_folder and (is_network_failure(error) or is_refusal(error)):
                    raise HubUnreachableError(
                        f"{self.key} ({self.name}): the Hub failed while it was being read "
                        f"({reason_of(error)}): start again when it is back, or log in again if "
                        "it refuses"
                    ) from error
                raise UserError(
                    f"{self.key} ({self.name}) cannot be read ({reason_of(error)}): "
                    "repair the files"
                ) from error
            if batch is None:
                return
            if self.text_field not in batch:
                raise missing_field(self.text_field, list(batch), self.name, self.messages)
            yield from batch[self.text_field]

    def wait_for(self, call: Callable[[], T]) -> T:
        """The result of a call that may use the network."""
        if self.is_folder:
            return call()
        if self.offline:
            with offline():
                return call()
        return while_reachable(call, self.location, "dataset", f"{self.key} ({self.location})")

    def to_record(self) -> dict[str, Any]:
        own = {"kind": "hub"} | {name: getattr(self, name) for name in RECORDED}
        return own | ({"format": "messages"} if self.messages else {})


def is_hub_layout(folder: Path, key: str) -> bool:
    """Whether a folder, the value of a key, is laid out like a data set.

    Either its card (README.md) declares configurations, or every file is named after a split and
    one is the train split. Otherwise it is simply a folder of text files, and all are read.
    """
    if _declares_configurations(folder):
        return True
    splits = set(_splits(folder, key).values())
    return "train" in splits and "" not in splits


def _declares_configurations(folder: Path) -> bool:
    card = folder / CARD
    if not card.is_file():
        return False
    head = _read(card)
    return head.startswith("---") and bool(CARD_KEYS.search(head.split("\n---", 1)[0]))


def _read(card: Path) -> str:
    with memory_errors(card):
        return card.read_text(encoding="utf-8", errors="replace")


def _check_card(folder: Path, what: str) -> None:
    """Raise a ``UserError`` where a local data set's cards lead out of its folder, or are huge.

    Any file of this machine could become text that way, and changes of it would not be noticed.
    What is looked at is what the library reads: the same lines, with aliases and merged keys.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(_read(folder / CARD))
    heads = {folder / CARD: block[2] if block else ""}
    if (folder / SECOND_CARD).is_file():
        heads[folder / SECOND_CARD] = _read(folder / SECOND_CARD)
    for file, head in heads.items():
        try:
            large = len(head) > MOST_TEXT or too_large(yaml.compose(head, yaml.SafeLoader))
            card = None if large else yaml.safe_load(head)
        except (yaml.YAMLError, RecursionError, *UNTYPED) as error:
            raise UserError(
                f"{what}: {file} is not valid YAML ({reason_of(error)}): correct it"
            ) from error
        if large:
            raise UserError(
                f"{what}: {file} has more than {MOST_NODES:,} values before its text, aliases "
                f"written out, or more than {MOST_TEXT:,} characters: make it shorter"
            )
        for text in _texts(card.get("configs") if isinstance(card, dict) else None):
            if OUTSIDE.search(text):
                raise UserError(
                    f"{what}: {file} names {reprlib.repr(text)}, which is outside of the folder: "
                    "put the files into it, and name them there"
                )


def _texts(value: Any) -> Iterator[str]:
    """The texts in and below a value of YAML; it is not large, ``too_large`` was asked."""
    if isinstance(value, dict | list | tuple | set):
        for part in (*value, *(value.values() if isinstance(value, dict) else ())):
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


def _splits(folder: Path, key: str) -> dict[Path, str]:
    """The files of a data set without declared configurations, and the split each belongs to.

    The first part of a path that is named after a split decides; "" where none is.
    """
    card = folder / CARD
    found = files_below(folder, key, lambda path: suffix_of(path) in READERS and path != card)
    return {path: _split_of(path.relative_to(folder)) for path in found}


def _split_of(path: Path) -> str:
    matches = (SPLIT_NAME.match(part.lower()) for part in path.parts)
    return next((str(match.lastgroup) for match in matches if match), "")


def _load(source: HubSource) -> Any:
    """The rows of a split."""
    import datasets

    if source.is_folder:
        _check_card(Path(source.location), f"{source.key} ({source.location})")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return source.wait_for(lambda: _open(source))
    except HubUnreachableError:
        raise
    except Exception as error:  # the builders' own errors: no such configuration, split, network
        place = f"{source.location}, configuration {source.hub_config}, split {source.split}"
        what = f"{source.key} ({place})"
        if source.offline or (not source.is_folder and is_network_failure(error)):
            raise HubUnreachableError(
                f"{what} is not kept on this machine at revision {source.revision}, and the Hub "
                f"cannot be reached ({reason_of(error)}): connect to the network"
            ) from error
        raise UserError(
            f"{what} cannot be loaded ({reason_of(error)}): correct data.hub_config, data.split or "
            "data.validation"
        ) from error


def _open(source: HubSource) -> Any:
    import datasets

    load = partial(datasets.load_dataset_builder, source.location, source.hub_config)
    builder = load(revision=source.revision)
    if builder.name == "text":
        # The library's default is a row a line; here a text file is one document.
        builder = load(revision=source.revision, sample_by="document")
    if source.is_folder or source.streaming:
        return builder.as_streaming_dataset(split=source.split)
    builder.download_and_prepare()
    return builder.as_dataset(split=source.split)
