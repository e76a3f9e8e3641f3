"""Preparations and the cache of them: complete folders only.

A preparation is built under a temporary name and renamed when it is complete, so another process
sees all of it or nothing, and of two that build the same one the later keeps the earlier's.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerFast

from retnet.data.network import HubUnreachableError
from retnet.data.record import NULL
from retnet.data.record import entry as part
from retnet.data.token_file import DamagedTokenFileError, TokenFile
from retnet.data.tokenizer import chat_template_hash, max_token_id, tokenizer_hash
from retnet.errors import UserError, os_errors
from retnet.files import UNFINISHED, missing_folders, read_json
from retnet.paths import kind_of

logger = logging.getLogger(__name__)

RECORD: Final = "record.json"
TRAIN: Final = "train"
VALIDATION: Final = "validation"
SIDES: tuple[str, ...] = (TRAIN, VALIDATION)
TOKENIZER: Final = "tokenizer"
STREAMING = ".streaming-"
LOCK = "lock"  # in an unfinished folder; held as long as its process lives
PREPARE_AGAIN = "prepare the text again"


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Both sides' tokens, the tokenizer, and how to make the validation side again.

    ``record`` is JSON-able: source, split rule, hashes of the corpus, the validation documents
    and the tokenizer, counts on each side, for python-stdlib the Python version, and of
    conversations the hash of the chat template.
    """

    train: TokenFile
    validation: TokenFile
    tokenizer: PreTrainedTokenizerFast
    record: dict[str, Any]


def open_entry(entry: Path, tokenizer: PreTrainedTokenizerFast | None) -> PreparedData | None:
    """The preparation in a folder of the cache; None when it is not there or damaged.

    Without a ``tokenizer`` its tokens are of the one that was trained with them.
    """
    if kind_of(entry, "data.cache_dir") is None:
        return None
    try:
        record = read_json(entry / RECORD, PREPARE_AGAIN)
        _check_record(record)
        train, validation = TokenFile.open(entry / TRAIN), TokenFile.open(entry / VALIDATION)
        if tokenizer is None:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(entry / TOKENIZER))
        if tokenizer_hash(tokenizer) != record["tokenizer_sha256"] or record.get(
            "chat_template_sha256"
        ) not in (None, chat_template_hash(tokenizer)):
            raise DamagedTokenFileError(f"{entry / TOKENIZER} is not what was written")
        for side in (train, validation):
            side.check_ids(max_token_id(tokenizer))
    except Exception as error:  # a damaged file can fail in any way; it is made again
        logger.warning("%s is damaged and is made again (%s)", entry, error)
        return None
    return PreparedData(train, validation, tokenizer, record)


def _check_record(record: dict[str, Any]) -> None:
    """Raise a ``ValueError`` where a record lacks what a run or a comparison asks of it."""
    for side in SIDES:
        part(record, f"{side}_sha256", str)
    for name in ("corpus_sha256", "tokenizer_sha256"):
        part(record, name, str)
    for name in ("source", "split"):
        part(record, name, dict)
    part(record, "validation_source", dict, NULL)


def known_revision(cache_dir: Path, location: str) -> str | None:
    """The revision of a Hub data set that was prepared last, for a start without network."""
    records = cache_dir.glob(f"*/{RECORD}")
    for path in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            source = read_json(path, PREPARE_AGAIN)["source"]
            if source["kind"] == "hub" and source["location"] == location:
                return source["revision"]
        except (ValueError, KeyError, TypeError):  # a damaged entry knows nothing
            continue
    return None


@contextmanager
def unfinished(entry: Path) -> Iterator[Path]:
    """A temporary folder beside ``entry``; it is gone after the block, with parents made for it."""
    with _parents_of(entry), ExitStack() as stack:
        with _writing(entry, "name a folder that can"):
            entry.parent.mkdir(parents=True, exist_ok=True)
            folder, lock = _locked_folder(entry.parent)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.callback(lock.release)
        with _writing(entry):
            yield folder


def _locked_folder(parent: Path) -> tuple[Path, FileLock]:
    """A new unfinished folder, and the lock in it that keeps it from ``remove_abandoned``."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
        lock = FileLock(folder / LOCK)
        with suppress(Timeout, FileNotFoundError):
            lock.acquire(timeout=0)
            if (folder / LOCK).exists():
                return folder, lock
            lock.release()
        # another process came between, found nobody's lock and is removing the folder


def remove_abandoned(cache_dir: Path) -> None:
    """Remove the unfinished folders of processes that were killed: whose locks nobody holds."""
    with suppress(OSError):  # the cache may be another's, to be read only
        for folder in cache_dir.glob(f"{UNFINISHED}*"):
            if folder.is_symlink():  # into a folder that is none of the cache's
                continue
            with suppress(OSError), FileLock(folder / LOCK).acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def resumable(entry: Path) -> Iterator[Path]:
    """A folder beside ``entry`` that stays when the block is interrupted, for the next attempt.

    It goes, with parents made for it, when the text is at fault. A ``UserError`` where another
    process is at work there.
    """
    folder = entry.with_name(f"{STREAMING}{entry.name}")
    lock = FileLock(f"{folder}.lock")
    with _parents_of(entry), ExitStack() as stack, _writing(entry):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"data.cache_dir ({entry.parent}): another process is preparing the same text: wait"
            ) from error
        stack.callback(Path(lock.lock_file).unlink, missing_ok=True)
        stack.callback(lock.release)
        try:
            yield folder
            shutil.rmtree(folder)
        except HubUnreachableError:
            raise  # nothing is wrong with the text: what is committed serves the next attempt
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)  # the text must change: nothing fits then
            raise


@contextmanager
def _parents_of(entry: Path) -> Iterator[None]:
    """Folders above that were not there and are empty after the block go again."""
    made = missing_folders(entry.parent)
    try:
        yield
    finally:
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _writing(
    entry: Path, fix: str = "free space there, or name another folder"
) -> AbstractContextManager[None]:
    return os_errors(f"data.cache_dir ({entry.parent}) cannot be written", fix)


def publish(complete: Path, entry: Path, tokenizer: PreTrainedTokenizerFast | None) -> PreparedData:
    """Rename a complete folder to its place, unless another process has filled it meanwhile.

    A damaged entry there is moved into the temporary folder first, and goes with it.
    """
    found = open_entry(entry, tokenizer)
    if found is not None:
        return found
    if entry.exists():
        entry.rename(complete.with_name("damaged"))
    try:
        complete.rename(entry)
    except OSError:  # a folder with files cannot be renamed onto: somebody was quicker
        if not entry.exists():
            raise
    prepared = open_entry(entry, tokenizer)
    if prepared is None:
        raise OSError(f"{entry} was written and cannot be read back")
    return prepared
