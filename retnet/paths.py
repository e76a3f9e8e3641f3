"""Paths that a user wrote: what is there, and one line where even that cannot be told."""

import stat
from pathlib import Path
from typing import Literal

from retnet.errors import UserError

Kind = Literal["file", "folder", "other"]


def expand(path: str, key: str) -> Path:
    """The path with the home folder in place of ``~``; ``key`` says in messages whose value it is.

    Raises:
        UserError: It begins with the name of a user that there is not.
    """
    try:
        return Path(path).expanduser()
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
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a null byte, or no file name's encoding
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{key} ({path}) cannot be reached ({reason}): name another path, or change its "
            "permissions"
        ) from error
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"
