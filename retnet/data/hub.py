"""Data sets in the Hub's layout: on the Hub, or a local folder laid out the same way.

One request with a short timeout asks the Hub for the revision; only then is anything loaded, so
that no network means a message within seconds rather than after the client's many retries. A
local folder is streamed, because the data set library's own cache goes by modification times and
would return what the files held before.
"""

import hashlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from retnet.data.readers import READERS, missing_field, suffix_of, text_of_row
from retnet.errors import UserError

# A host name that never resolves, or eight addresses that never answer, outlast the client's own
# timeout, so the whole request has one too.
TIMEOUT_S = 5.0
DEADLINE_S = 20.0
ROWS = 1000
# As the Hub recognises splits: train.csv, test-00000-of-00001.parquet, validation/a.jsonl.
SPLIT_NAME = re.compile(r"(train(ing)?|validation|valid|val|dev|test(ing)?|eval(uation)?)([-_.]|$)")
CARD_KEYS = re.compile(r"^(configs|dataset_info)\s*:", re.MULTILINE)


class HubUnreachableError(UserError):
    """The Hub does not answer."""


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

    @property
    def name(self) -> str:
        return f"{self.location}, split {self.split}"

    @property
    def is_folder(self) -> bool:
        """Whether it is a local folder."""
        return self.revision is None

    def fingerprint(self) -> str:
        if not self.is_folder:
            return f"{self.revision}/{self.hub_config}/{self.split}"
        total = hashlib.sha256(f"{self.hub_config}/{self.split}".encode())
        folder = Path(self.location)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + content)
        return total.hexdigest()

    def documents(self) -> Iterator[str]:
        number = 0
        for batch in self._batches():
            if self.text_field not in batch:
                raise missing_field(self.text_field, list(batch), self.name)
            for text in batch[self.text_field]:
                number += 1
                where = f"{self.name} row {number}"
                yield text_of_row({self.text_field: text}, self.text_field, where)

    def _batches(self) -> Iterator[dict[str, list[Any]]]:
        rows = _load(self).iter(batch_size=ROWS)
        while True:
            try:
                batch = next(rows, None)
            except Exception as error:  # whatever the builder meets in a damaged file
                raise UserError(
                    f"{self.key} ({self.name}) cannot be read ({_reason(error)}): repair the files"
                ) from error
            if batch is None:
                return
            yield batch

    def with_split(self, split: str, key: str) -> "HubSource":
        """Another split of the same data set at the same revision."""
        return replace(self, split=split, key=key)

    def to_record(self) -> dict[str, Any]:
        return {
            "kind": "hub",
            "location": self.location,
            "text_field": self.text_field,
            "hub_config": self.hub_config,
            "split": self.split,
            "revision": self.revision,
        }


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


def open_hub(
    location: str,
    key: str,
    text_field: str,
    hub_config: str | None,
    split: str,
    revision: str | None = None,
) -> HubSource:
    """A data set by Hub name or local folder, at ``revision`` or the newest one.

    Raises:
        UserError: There is no such data set, or it is no local path and the Hub cannot be reached.
    """
    if not Path(location).is_dir() and revision is None:
        revision = hub_revision(location, "dataset", f"{key} ({location})")
    return HubSource(location, key, text_field, hub_config, split, revision)


def hub_revision(name: str, kind: Literal["dataset", "model"], what: str) -> str:
    """The commit that the main branch of a Hub repository is at.

    Args:
        name: Repository name.
        kind: Of the repository.
        what: Key and value, for the message.

    Raises:
        UserError: The Hub does not know the name or refuses access.
        HubUnreachableError: The Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        revision = _within(DEADLINE_S, lambda: ask(name, timeout=TIMEOUT_S).sha)
    except HfHubHTTPError as error:
        raise UserError(
            f"{what} is no local path, and the Hub refuses it "
            f"({str(error).splitlines()[0]}): correct the name, or log in if it is private"
        ) from error
    except Exception as error:  # every transport has its own; all mean the same here
        raise HubUnreachableError(
            f"{what} is no local path, and the Hub cannot be reached "
            f"({_reason(error)}): correct the path, or connect to the network"
        ) from error
    if revision is None:
        raise UserError(f"{what} has no commit on the Hub: name another one")
    return revision


def _within(seconds: float, call: Callable[[], str | None]) -> str | None:
    """The call's result, or TimeoutError; a thread left behind does not keep the process alive."""
    result: Future[str | None] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return result.result(timeout=seconds)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {' '.join(text.split())}" if text else type(error).__name__


def _load(source: HubSource) -> Any:
    """The rows of a split; a local folder as a stream that reads the files as they are now."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        builder = _builder(source)
        if builder.name == "text":
            # The library's default is a row a line; here a text file is one document.
            builder = _builder(source, sample_by="document")
        if source.is_folder or source.streaming:
            return builder.as_streaming_dataset(split=source.split)
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split)
    except Exception as error:  # the builders' own errors: no such configuration, split, network
        raise UserError(
            f"{source.key} ({source.location}, configuration {source.hub_config}, split "
            f"{source.split}) cannot be loaded ({_reason(error)}): correct data.hub_config, "
            "data.split or data.validation"
        ) from error


def _builder(source: HubSource, **options: Any) -> Any:
    import datasets

    return datasets.load_dataset_builder(
        source.location, source.hub_config, revision=source.revision, **options
    )
