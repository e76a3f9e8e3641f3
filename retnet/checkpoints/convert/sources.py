"""Where other projects' checkpoints come from, and their weights as stored.

The only place that reads PyTorch's own files.

Those are pickles. torch reads tensors and plain containers of them (``weights_only``), and nothing
that they name is run; a file that needs more is refused.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import Tensor

from retnet.checkpoints.format import CONFIG, WEIGHTS, WEIGHTS_INDEX
from retnet.checkpoints.weights import NUMBERS, read_file, read_weights, weight_files
from retnet.cli import shortened
from retnet.data.network import hub_revision, reason_of, while_reachable
from retnet.errors import UserError, os_errors
from retnet.files import unreadable
from retnet.paths import expand, kind_of

PICKLES = (".pth", ".pt", ".bin")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FROM_HUB = ("*.json", "*.safetensors", "*.txt")  # what is fetched: nothing pickled, no code
KINDS = f"a folder, or a file that ends with {', '.join(PICKLES)} or .safetensors"


def find_source(text: str) -> Path:
    """The folder or file of a path, or a folder with what is kept of a repository on the Hub.

    A path that is there is taken before a name on the Hub, and what was fetched before the Hub. A
    ``UserError`` where there is neither, or the Hub can't be reached or refuses the name.
    """
    path = expand(text, "source")
    if kind_of(path, "source") is not None or not HUB_NAME.fullmatch(text):
        return path
    try:
        validate_repo_id(text)
    except HFValidationError:  # two dots, a dash at the end, other letters
        return path
    import huggingface_hub

    fetch = partial(huggingface_hub.snapshot_download, text, allow_patterns=list(FROM_HUB))
    what = f"source ({text})"
    try:
        folder = Path(fetch(local_files_only=True))
        weight_files(folder)  # all of them
        if (folder / CONFIG).is_file():
            return folder
    except (LocalEntryNotFoundError, UserError):
        pass
    commit = hub_revision(text, "model", what)
    try:
        return Path(while_reachable(lambda: fetch(revision=commit), text, "model", what))
    except HfHubHTTPError as error:
        raise UserError(
            f"{what} cannot be loaded from the Hub ({reason_of(error)}): name another one"
        ) from error


def read_tensors(source: Path) -> dict[str, Tensor]:
    """All weights of a folder or file by name, floating-point numbers.

    A folder's are its ``model.safetensors``, the files of the index beside, or its only other file.
    A ``UserError`` where there are none, or they can't be read, or hold something else.
    """
    file = source
    kind = kind_of(source, "source")
    if kind == "folder" and any((source / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        with (
            os_errors(f"source ({source}) cannot be read", "change its permissions"),
            safetensors_errors(source),
        ):
            tensors = read_weights(source, tied=False)
        return _checked(source, tensors)
    if kind == "folder":
        file = _only_file(source)
    elif kind is None:
        raise UserError(f"source ({source}) does not exist: name {KINDS}")
    if file.suffix not in (*PICKLES, ".safetensors") or kind == "other":
        raise UserError(f"source ({source}) is of no kind that is read here: name {KINDS}")
    try:
        file.open("rb").close()
    except PermissionError as error:
        raise UserError(unreadable(file)) from error
    if file.suffix == ".safetensors":
        with safetensors_errors(file):
            return _checked(file, read_file(file))
    return _checked(file, _unpickled(file))


def _only_file(folder: Path) -> Path:
    found = sorted(file for file in folder.iterdir() if file.suffix in (*PICKLES, ".safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(
            f"source ({folder}) must have {WEIGHTS} or one file of weights, and has {names}: name "
            "the file"
        )
    return found[0]


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """A ``UserError`` for what safetensors raises of a damaged file."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"source ({path}) is damaged ({error}): copy it again") from error


def _unpickled(file: Path) -> Any:
    """Tensors stay in the file until they are read."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        needed = re.search(r"GLOBAL ([\w.]+)|class '?([\w.]+)", str(error))
        what = f"needs {needed[1] or needed[2]}" if needed else "is no file of tensors alone"
        raise UserError(
            f"source ({file}) {what}, which could run code, and is not read: save its tensors as "
            ".safetensors where you trust it"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        with file.open("rb") as start:
            is_pickle = start.read(1) == b"\x80"
        if "mmap" in reason and not is_pickle:
            raise UserError(
                f"source ({file}) is no file of torch.save: copy it again, or name another one"
            ) from error
        if "mmap" in reason:
            raise UserError(
                f"source ({file}) is in torch's format of before 2020: load it and torch.save it "
                "again"
            ) from error
        raise UserError(f"source ({file}) can't be read ({reason}): copy it again") from error


def _checked(source: Path, content: Any) -> dict[str, Tensor]:
    """The tensors, if they are all that there is."""
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"source ({source}) holds a {type(content).__name__} and no weights by name: save the "
            "model's state_dict()"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"source ({source}): {shortened(name)} is a {type(value).__name__} and no weight: "
                "save the model's state_dict() alone"
            )
        if value.dtype not in NUMBERS or value.layout != torch.strided:
            raise UserError(
                f"source ({source}): {name} is of type {value.dtype}, in which nothing is computed "
                "here: save the weights as floating-point numbers"
            )
        held = 0 if value.is_meta else value.untyped_storage().nbytes()
        if held < value.nbytes:
            raise UserError(
                f"source ({source}): {name} has {value.nbytes:,} bytes of numbers, of which "
                f"{held:,} are stored: save the weights as they are, by contiguous()"
            )
    return content
