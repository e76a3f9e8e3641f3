"""Files and folders that are there as a whole or not at all, and JSON objects.

What is written goes under a temporary name beside its place, to the disk, and only then takes the
place. So a reader finds the old or the new, also after a power cut, and ``tidy`` knows what to do
with everything that an interruption leaves. Temporary names are drawn by chance, so that no two
writers meet and no file of a user's is hit; while a process works under one it holds a lock, which
the system takes back however the process ends.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from retnet.errors import UserError, memory_errors

if sys.platform != "win32":
    import fcntl


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAY_LACK = {"may_lack": True}  # metadata of a field that older files of a record do not have
Record = TypeVar("Record", bound="DataclassInstance")
UNFINISHED = ".unfinished-"
REPLACED = ".unfinished-old-"
LFS_POINTER = b"version https://git-lfs"  # how one begins
MOST_OF_A_POINTER = 1024  # bytes, as its specification has it
OURS = re.compile(r"\.unfinished-(?P<old>old-)?[0-9a-f]{16}-(?P<name>.+)", re.DOTALL)


def sync(path: Path) -> None:
    """Have a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path, prefix: str = UNFINISHED) -> Path:
    """A temporary name that nothing has."""
    return path.with_name(f"{prefix}{secrets.token_hex(8)}-{path.name}")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep every process's ``tidy`` away from a file or folder, also when that is renamed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if sys.platform != "win32":
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def is_held(path: Path) -> bool:
    """Whether a living process is at work on a file or folder; False where there are no locks."""
    if sys.platform == "win32":
        return False
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
    except OSError:  # gone, or not ours
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(handle)
    return False


@contextmanager
def _new_file(path: Path) -> Iterator[tuple[Path, Path]]:
    """A file to write beside the one that ``path`` leads to, with its permissions; and that one."""
    place = Path(os.path.realpath(path))  # of a link the file that it names
    new = _beside(place)
    new.open("x").close()
    try:
        with held(new):
            with suppress(FileNotFoundError):
                new.chmod(stat.S_IMODE(place.stat().st_mode))
            yield new, place
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise


def check_no_pointer(path: Path, beginning: bytes, size: int) -> None:
    """Raise a ``UserError`` where a file only says which one Git LFS would put in its place."""
    if size <= MOST_OF_A_POINTER and beginning.startswith(LFS_POINTER):
        raise UserError(
            f"{path} is a Git LFS pointer, a few lines in place of the file: fetch it with "
            "git lfs pull, or copy the file from elsewhere"
        )


def try_to_write(path: Path) -> None:
    """Raise the ``OSError`` that ``write_text`` would; leaves nothing."""
    with _new_file(path) as (new, _):
        new.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole; half a surrogate pair becomes an escape, as JSON has it.

    A file that is there keeps its permissions; a link stays one, and its file is written.

    Raises:
        OSError: It can't be written; nothing has changed then.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """``write_text`` of what is no text."""
    with _new_file(path) as (new, place):
        new.write_bytes(content)
        sync(new)
        new.replace(place)


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
        if path.exists() and not path.is_file():  # of a pipe the end would be waited for
            raise UserError(f"{path} is a folder, pipe or device, where a file is needed: {fix}")
        with memory_errors(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:  # nothing is wrong with what is in it
        raise UserError(unreadable(path)) from error
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): {fix}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold an object: {fix}")
    return content


def read_record(path: Path, kind: type[Record], fix: str) -> Record:
    """The dataclass ``kind`` that a JSON file describes: all of its fields, each of its type.

    Those with the metadata ``MAY_LACK`` may be missing in older files. Fields may be int, float,
    str, bool, and None beside one of them.

    Raises:
        UserError: It does not; names the key and its value, the message ends with ``fix``.
    """
    content = read_json(path, fix)
    types = {option.name: option.type for option in fields(kind)}
    later = {option.name for option in fields(kind) if option.metadata == MAY_LACK}
    for key in sorted((content.keys() ^ types.keys()) - (later - content.keys())):
        what = "is missing" if key in types else "is no key of it"
        raise UserError(f"{path}: {key} {what}: {fix}")
    for key, value in content.items():
        options = get_args(types[key]) or (types[key],)
        whole_as_float = type(value) is int and float in options
        if type(value) not in options and not whole_as_float:
            names = " or ".join(option.__name__ for option in options).replace("NoneType", "null")
            raise UserError(f"{path}: {key} ({json.dumps(value)[:40]}) must be {names}: {fix}")
    return kind(**content)


def unreadable(path: Path) -> str:
    """The message for a file that permissions keep from being read."""
    return f"{path} cannot be read (Permission denied): change its permissions"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``folder`` when it is complete and on disk.

    Raises:
        OSError: It can't be written; nothing has changed then.
    """
    new = _beside(folder)
    new.mkdir()
    with held(new):
        try:
            yield new
            for file in new.iterdir():
                sync(file)
            sync(new)
        except Exception:
            shutil.rmtree(new, ignore_errors=True)  # a full disk needs the space
            raise
        if folder.exists():
            old = _beside(folder, REPLACED)
            with held(folder):
                folder.rename(old)
                new.rename(folder)
                with suppress(OSError):
                    remove(old)
        else:
            new.rename(folder)
    sync(folder.parent)


def remove(path: Path) -> None:
    """Remove a folder with what is in it, or a file; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, or the link to one; one half removed is never seen under its name.

    An ``OSError``, and nothing has changed, where permissions protect it.
    """
    as_now = os.access in os.supports_effective_ids
    allowed = os.access(folder, os.W_OK | os.X_OK, effective_ids=as_now)
    if not (allowed or folder.is_symlink()):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    rest = _beside(folder)
    with held(folder):
        folder.rename(rest)
        remove(rest)


def tidy(parent: Path) -> None:
    """Remove what interrupted writes left in a folder, and put back what they were replacing.

    What a living process is at work on stays, and so does what has no name of ours.
    """
    for path in list(parent.glob(f"{UNFINISHED}*")):
        name = OURS.fullmatch(path.name)
        if name is None or is_held(path):
            continue
        place = parent / name["name"]
        if name["old"] and not place.exists():
            path.rename(place)
        else:
            with suppress(OSError):
                remove(path)


def sha256(path: Path) -> bytes:
    """The hash of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those above it that are not there yet, the innermost first."""
    return [missing for missing in (folder, *folder.parents) if not missing.exists()]
