"""The file that a comparison is written to: never one that is read, or belongs to a checkpoint."""

import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from retnet import files
from retnet.checkpoints.format import CONFIG, PARTS_OF_A_RUN, is_run
from retnet.errors import UserError, os_errors
from retnet.paths import kind_of


def check_writable(path: Path, option: str = "--json") -> None:
    """Find out before the long work whether the file that an option names can be written.

    A ``UserError`` where its folder is missing or cannot be written, it is no file, it lies
    among the files of a checkpoint or run, or it is where standard output goes.
    """
    kind = kind_of(path, option)
    if str(path) == "-":
        raise UserError(
            f"{option} (-) would be a file of that name, standard output gets the table: "
            "name a file"
        )
    if kind == "folder":
        raise UserError(f"{option} ({path}) is a folder: name a file in it")
    if kind == "other":
        raise UserError(f"{option} ({path}) is a device or pipe: name a file")
    if kind_of(path.absolute().parent, option) != "folder":
        raise UserError(f"{option} ({path}): {path.parent} does not exist: make that folder first")
    place = _place(path)
    for folder in place.parents:
        if _is_of_training(place, folder):
            raise UserError(
                f"{option} ({path}) lies among the files of a checkpoint or run ({folder}): name a "
                "file elsewhere"
            )
    for stream, name in ((sys.stdout, "output"), (sys.stderr, "error")):
        with suppress(OSError, AttributeError):  # closed, without a descriptor; or no such file yet
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                raise UserError(
                    f"{option} ({path}) is where standard {name} goes: name another file"
                )
    with _writing(path, option):
        files.try_to_write(path)


def check_not_read(path: Path, inputs: Iterable[Path], what: str = "text") -> None:
    """Raise a ``UserError`` when the JSON file is one of those that the text is read from.

    ``what``: the word for the text, where they are of something else.
    """
    for file in inputs:
        with suppress(OSError):  # one of them is not there
            if path.samefile(file):
                raise UserError(
                    f"--json ({path}) is a file that the {what} is read from: name another file"
                )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file at once or not at all; numbers that JSON cannot hold become null.

    A ``UserError`` where it cannot be written.
    """
    with _writing(path):
        files.write_json(path, content)


def write_bytes(path: Path, content: bytes, option: str) -> None:
    """Write the file that an option names, at once or not at all; errors as of ``write_json``."""
    with _writing(path, option):
        files.write_bytes(path, content)


def _place(path: Path) -> Path:
    return Path(os.path.realpath(path))  # of a link the file that is written


def _is_of_training(place: Path, folder: Path) -> bool:
    """Whether a folder is a checkpoint's, or a run's that has its own files where ``place`` is."""
    if (folder / CONFIG).is_file() and any(folder.glob("*.safetensors")):
        return True
    parts = place.relative_to(folder).parts
    beside = len(parts) == 1 and place.suffix != ".json"
    return (parts[0] in PARTS_OF_A_RUN or beside) and is_run(folder)


def _writing(path: Path, option: str = "--json") -> AbstractContextManager[None]:
    return os_errors(f"{option} ({path}) cannot be written", "name another file")
