"""Paths that a user wrote: one way to read them, what is there, and one line where neither works.

Inside the package a ``str`` is text as it was typed and a ``Path`` has been through ``expand``.
Every path of every command goes through it once, so ``~`` means the same everywhere.
"""

import errno
import os
import re
import stat
import sys
from pathlib import Path
from typing import Literal

from retnet.errors import UserError

Kind = Literal["file", "folder", "other"]
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # C:/ is a path
NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # the last: a link that leads to itself


def expand(path: str | Path, key: str, *, for_libraries: bool = False) -> Path:
    """The path in a text, with the home folder in place of ``~``; ``key`` is named in messages.

    A ``Path`` comes back as it is: ``./~x`` stays a file of that name. Names are UTF-8 on disk
    whatever the locale is. ``for_libraries``: tokenizers will write there, which knows only names
    that are text here.

    Raises:
        UserError: It is empty, an address (https://), no name that a file can have, or begins
            with the name of a user that there is not.
    """
    if isinstance(path, Path):
        return path
    if not path.strip():
        raise UserError(f"{key} ({path!r}) is empty: name a path, . for the current folder")
    if ADDRESS.match(path):
        raise UserError(
            f"{key} ({path}) is an address, and nothing is loaded from one: download it, and name "
            "the file or folder on this machine"
        )
    if "\0" in path:
        raise UserError(f"{key} ({path}) cannot be a path, it has a null byte: remove that")
    try:  # the escapes are bytes that were no text when they were typed
        name = os.fsdecode(path.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key} ({path!r}) cannot be a path, it has half a surrogate pair: correct it"
        ) from error
    if for_libraries and any("\udc80" <= letter <= "\udcff" for letter in name):
        raise UserError(
            f"{key} ({path}) cannot be written where names are {sys.getfilesystemencoding()}: set "
            "PYTHONUTF8=1 or a UTF-8 locale, or use another name"
        )
    if not name.startswith("~"):
        return Path(name)
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key} ({path}) has no home folder: write the path in full") from error


def kind_of(path: Path, key: str) -> Kind | None:
    """What a path leads to; None where nothing is, and "other" for a pipe or device.

    ``Path.exists`` and its like raise where a folder above may not be entered or a name is too
    long.

    Raises:
        UserError: It cannot be told.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte, or no file name's encoding
        if getattr(error, "errno", None) in NOTHING:
            return None
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{key} ({path}) cannot be reached ({reason}): name another path, or change its "
            "permissions"
        ) from error
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def check_folder(path: Path, key: str) -> None:
    """Raise a ``UserError`` where no folder is nor can be made: something else stands in its way.

    The other may be a file or a link to nothing, at the path or above it.
    """
    for place in (path, *path.parents):
        kind = kind_of(place, key)
        if kind == "folder":
            return
        if kind is not None or place.is_symlink():
            what = {None: "a link to nothing", "file": "a file"}.get(kind, "a pipe or device")
            where = "" if place == path else f": {place}"
            raise UserError(f"{key} ({path}){where} is {what}: name a folder")
