"""The manifest of a checkpoint: the size and checksum of each file, and whether they still hold."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Record every file of a folder as it is now."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    text = json.dumps({"files": files}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def find_damage(folder: Path, only: Collection[str] | None = None) -> str | None:
    """What is wrong with a folder that ``write_manifest`` described.

    Args:
        folder: The checkpoint.
        only: Names of the files to look at; None looks at all in the manifest.

    Returns:
        The first file that is missing or changed and how, or None when all is well.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, written in files.items():
            if only is not None and name not in only:
                continue
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size:,} bytes, {written['bytes']:,} were written"
            if _describe(path) != written:
                return f"{name} is not what was written, its checksum differs"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": checksum}
