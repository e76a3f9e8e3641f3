"""The manifest of a checkpoint: the size and checksum of each file, and whether they still hold."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from retnet.checkpoints.format import (
    ADAPTER,
    CARD,
    CONFIG,
    COPY_AGAIN,
    DATA_RECORD,
    MANIFEST,
    OPTIMIZER,
    TOKENIZER,
    TRAINING_STATE,
    WEIGHTS,
    read_progress,
)
from retnet.checkpoints.weights import is_path, weight_files
from retnet.data.record import entry
from retnet.errors import UserError
from retnet.files import read_json, sha256, unreadable, write_json
from retnet.paths import kind_of

logger = logging.getLogger(__name__)

CARD_SHA256 = "card_sha256"  # of the model card as it was written, to know one that was edited
ALWAYS_THERE = (CONFIG, WEIGHTS, TOKENIZER, DATA_RECORD, TRAINING_STATE)


def write_manifest(folder: Path) -> None:
    """Record every file of a folder as it is now; the model card is there to be edited."""
    paths = [path for path in sorted(folder.iterdir()) if path.name not in (CARD, MANIFEST)]
    content: dict[str, Any] = {"files": {path.name: _describe(path) for path in paths}}
    if (folder / CARD).is_file():
        content[CARD_SHA256] = sha256(folder / CARD).hex()
    write_json(folder / MANIFEST, content)


def edited_card(folder: Path) -> Path | None:
    """The model card of a checkpoint where it is not what was written with it."""
    if kind_of(folder / CARD, CARD) != "file":
        return None
    try:
        written = read_json(folder / MANIFEST, COPY_AGAIN).get(CARD_SHA256)
    except UserError:
        written = None  # whose it is can't be told
    return None if sha256(folder / CARD).hex() == written else folder / CARD


def find_damage(folder: Path, only: Collection[str] | None = None) -> str | None:
    """The first of a folder's described files, or of ``only`` some, that is missing or changed.

    Returns its name and what is wrong with it; None when all is well. A ``UserError`` where
    permissions keep a file from being read, which is no damage.
    """
    if not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing"
    try:
        described = {
            name: (entry(written, "bytes", int), entry(written, "sha256", str))
            for name, written in _described(folder).items()
            if name != CARD and (only is None or name in only)
        }
        if any(is_path(name) for name in described):
            raise ValueError("a name leads out of the folder")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        return f"{MANIFEST} cannot be read"
    for name, (size, checksum) in described.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, {size:,} were written"
            if sha256(path).hex() != checksum:
                return f"{name} is not what was written, its checksum differs"
        except PermissionError as error:
            raise UserError(unreadable(path)) from error
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def checkpoint_damage(folder: Path, *, resumable: bool) -> str | None:
    """What is wrong with a checkpoint, or None when it is as it was written.

    One that is ``resumable`` must hold the optimizer's state.
    """
    damage = find_damage(folder)
    if damage is None:
        described = _described(folder)
        needed = (*ALWAYS_THERE, OPTIMIZER) if resumable else ALWAYS_THERE
        lacking = [name for name in needed if name not in described]
        damage = f"{MANIFEST} says nothing of {', '.join(lacking)}" if lacking else None
    if damage is None:
        try:
            read_progress(folder)
        except UserError as error:
            damage = str(error)
    return damage


def check_weights_unchanged(folder: Path) -> None:
    """Raise a ``UserError`` when the weights are not what the manifest of their folder describes.

    The other files are text that one may want to edit; a folder without a manifest is accepted.
    What ``weight_files`` refuses is refused here too. One line says that an adapter beside the
    weights is not applied.
    """
    files = weight_files(folder)
    if (folder / ADAPTER).is_file():
        logger.warning(
            "%s: the adapter beside the weights is not applied: merge it into them, or remove it",
            folder / ADAPTER,
        )
    if not (folder / MANIFEST).is_file():
        return
    damage = find_damage(folder, only=(WEIGHTS, *files))
    if damage is not None:
        raise UserError(
            f"checkpoint ({folder}) is damaged, {damage}: copy it again, or remove {MANIFEST} if "
            "you changed the weights yourself"
        )


def described_files(folder: Path) -> Collection[str]:
    """The names in a folder's manifest; none where it has none that can be read."""
    try:
        return _described(folder).keys()
    except (UserError, KeyError, AttributeError):
        return ()


def _described(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = read_json(folder / MANIFEST, COPY_AGAIN)["files"]
    return files


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path).hex()}
