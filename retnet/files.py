"""Files and folders that are there as a whole or not at all, and JSON objects.

What is written goes under a temporary name beside its place, to the disk, and only then takes the
place. So a reader finds the old or the new, also after a power cut, and ``tidy`` knows what to do
with everything that an interruption leaves.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from retnet.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
UNFINISHED = ".unfinished-"
REPLACED = ".unfinished-old-"


def sync(path: Path) -> None:
    """Have a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    return path.with_name(UNFINISHED + path.name)


def try_to_write(path: Path) -> None:
    """Raise the ``OSError`` that ``write_text`` would; leaves nothing."""
    _beside(path).write_text("", encoding="utf-8")
    _beside(path).unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole; half a surrogate pair becomes an escape, as JSON has it.

    Raises:
        OSError: It can't be written; nothing has changed then.
    """
    new = _beside(path)
    try:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")
        sync(new)
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise


def write_json(
    path: Path, content: Any, *, not_finite: Callable[[float], Any] = lambda number: None
) -> None:
    """Write a JSON file as a whole.

    For infinities and nan, which JSON does not have, stands what ``not_finite`` returns: null, or
    with ``str`` "inf" and "nan".

    Raises:
        OSError: It can't be written; nothing has changed then.
    """
    # Python writes them as Infinity and NaN, and asks when it reads those what they are
    allowed = json.loads(json.dumps(content), parse_constant=lambda name: not_finite(float(name)))
    write_text(path, json.dumps(allowed, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: It cannot be read or is no object; the message ends with ``fix``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): {fix}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold an object: {fix}")
    return content


def read_record(path: Path, kind: type[Record], fix: str) -> Record:
    """The dataclass ``kind`` that a JSON file describes: all of its fields, each of its type.

    Fields may be int, float, str, bool, and None beside one of them.

    Raises:
        UserError: It does not; names the key and its value, the message ends with ``fix``.
    """
    content = read_json(path, fix)
    types = {option.name: option.type for option in fields(kind)}
    for key in sorted(content.keys() ^ types.keys()):
        what = "is missing" if key in types else "is no key of it"
        raise UserError(f"{path}: {key} {what}: {fix}")
    for key, value in content.items():
        options = get_args(types[key]) or (types[key],)
        whole_as_float = type(value) is int and float in options
        if type(value) not in options and not whole_as_float:
            names = " or ".join(option.__name__ for option in options).replace("NoneType", "null")
            raise UserError(f"{path}: {key} ({json.dumps(value)[:40]}) must be {names}: {fix}")
    return kind(**content)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``folder`` when it is complete and on disk.

    Raises:
        OSError: It can't be written; nothing has changed then.
    """
    new = _beside(folder)
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
        for file in new.iterdir():
            sync(file)
        sync(new)
    except Exception:
        shutil.rmtree(new, ignore_errors=True)  # a full disk needs the space
        raise
    old = folder.with_name(REPLACED + folder.name)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder; one half removed is never seen under its name."""
    rest = _beside(folder.with_name(f"removed-{folder.name}"))
    shutil.rmtree(rest, ignore_errors=True)
    folder.rename(rest)
    shutil.rmtree(rest)


def tidy(parent: Path) -> None:
    """Remove what interrupted writes left in a folder, and put back what they were replacing."""
    for old in parent.glob(f"{REPLACED}*"):
        folder = parent / old.name.removeprefix(REPLACED)
        if not folder.exists():
            old.rename(folder)
    for rest in parent.glob(f"{UNFINISHED}*"):
        if rest.is_dir():
            shutil.rmtree(rest, ignore_errors=True)
        else:
            rest.unlink()


def sha256(path: Path) -> bytes:
    """The hash of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those above it that are not there yet, the innermost first."""
    return [missing for missing in (folder, *folder.parents) if not missing.exists()]
