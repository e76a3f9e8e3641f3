"""Data sets in the Hub's layout: on the Hub, or a local folder laid out the same way.

A local folder is streamed, because the data set library's own cache goes by modification times and
would return what the files held before.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from retnet.data.network import (
    HubUnreachableError,
    is_network_failure,
    is_refusal,
    offline,
    reason_of,
    while_reachable,
)
from retnet.data.readers import READERS, hash_files, missing_field, suffix_of, text_of
from retnet.errors import UserError

T = TypeVar("T")
ROWS = 1000
RECORDED = ("location", "text_field", "hub_config", "split", "revision")
# As the Hub recognises splits: train.csv, test-00000-of-00001.parquet, validation/a.jsonl.
SPLIT_NAME = re.compile(r"(train(ing)?|validation|valid|val|dev|test(ing)?|eval(uation)?)([-_.]|$)")
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
        found = Path(self.location).rglob("*") if self.is_folder else ()
        return tuple(sorted(path for path in found if path.is_file()))

    def fingerprint(self) -> str:
        if not self.is_folder:
            return f"{self.revision}/{self.hub_config}/{self.split}"
        return hash_files(self.files, Path(self.location), f"{self.hub_config}/{self.split}")

    def documents(self) -> Iterator[str]:
        for number, value in enumerate(self._values(), start=1):
            yield text_of(value, self.text_field, f"{self.name} row {number}")

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
                raise missing_field(self.text_field, list(batch), self.name)
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
        return {"kind": "hub"} | {name: getattr(self, name) for name in RECORDED}


def is_hub_layout(folder: Path) -> bool:
    """Whether a folder is laid out like a data set.

    Either its card (README.md) declares configurations, or every file is named after a split and
    one is the train split. Otherwise it is simply a folder of text files, and all are read.
    """
    card = folder / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace")
        if head.startswith("---") and CARD_KEYS.search(head.split("\n---", 1)[0]):
            return True
    splits = [
        next((part for part in parts if SPLIT_NAME.match(part)), "")
        for path in folder.rglob("*")
        if suffix_of(path) in READERS and path != card
        for parts in [[part.lower() for part in path.relative_to(folder).parts]]
    ]
    return all(splits) and any(split.startswith("train") for split in splits)


def _load(source: HubSource) -> Any:
    """The rows of a split."""
    import datasets

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
