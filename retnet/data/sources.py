"""Where documents come from: the standard library, local files, or a Hub data set.

A source has a ``name`` for messages, a ``fingerprint()`` that changes exactly when its content does
and is quick enough for every start, its ``documents()`` in order, any number of times (the caller
leaves empty ones out), and a JSON-able ``to_record()`` that ``reopen_source`` opens it from.
"""

import glob
import logging
import platform
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from retnet.data.hub import RECORDED, HubSource, is_hub_layout
from retnet.data.network import HubUnreachableError, hub_revision
from retnet.data.prepared import known_revision
from retnet.data.readers import PLAIN_TEXT, READERS, SUFFIXES, hash_files, read_documents, suffix_of
from retnet.data.spec import PYTHON_STDLIB, DataSpec
from retnet.errors import UserError
from retnet.paths import expand, kind_of

logger = logging.getLogger(__name__)

# Tests and tables are no prose of code; site-packages and dist-packages are not the library.
NOT_STDLIB = re.compile(
    "(^|/)(tests?|site-packages|dist-packages|idlelib|lib2to3|encodings|pydoc_data)/"
)
GLOB_SIGNS = re.compile(r"[*?\[]")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class StdlibSource:
    """The .py files of the running interpreter's standard library, one document a file."""

    folder: Path

    @property
    def name(self) -> str:
        return PYTHON_STDLIB

    def fingerprint(self) -> str:
        return hash_files(self._files(), self.folder)

    def documents(self) -> Iterator[str]:
        for path in self._files():
            content = path.read_bytes()
            encoding, _ = tokenize.detect_encoding(BytesIO(content).readline)
            yield content.decode(encoding)

    def to_record(self) -> dict[str, Any]:
        return {"kind": PYTHON_STDLIB, "python": platform.python_version()}

    def _files(self) -> list[Path]:
        found = _sorted_files(
            self.folder,
            lambda path: path.suffix == ".py" and not NOT_STDLIB.search(path.as_posix()),
        )
        if not found:
            raise UserError(
                f"data.source ({PYTHON_STDLIB}) has no .py files in {self.folder}: "
                "this Python keeps none there, so name a file or folder of text"
            )
        return found


@dataclass(frozen=True)
class FileSource:
    """Local files, in sorted order."""

    location: str  # the absolute path or glob
    files: tuple[Path, ...]
    text_field: str

    @property
    def name(self) -> str:
        return self.location

    def fingerprint(self) -> str:
        return hash_files(self.files)

    def documents(self) -> Iterator[str]:
        for path in self.files:
            yield from read_documents(path, self.text_field)

    def to_record(self) -> dict[str, Any]:
        return {"kind": "files", "location": self.location, "text_field": self.text_field}


Source = StdlibSource | FileSource | HubSource


def open_source(spec: DataSpec) -> Source:
    """The source that ``data.source`` names; a ``UserError`` where an option does not apply."""
    key = "data.source"
    try:
        source = open_location(spec.source, key, spec.text_field, spec.hub_config, spec.split)
    except HubUnreachableError:
        revision = known_revision(expand(spec.cache_dir, "data.cache_dir"), spec.source)
        if revision is None:
            raise
        logger.warning("%s (%s): no network, revision %s as before", key, spec.source, revision)
        at = (spec.hub_config, spec.split, revision)
        source = HubSource(spec.source, key, spec.text_field, *at, offline=True)
    if isinstance(source, HubSource):
        return replace(source, streaming=spec.streaming)
    why = f"has no meaning for data.source ({spec.source}), which is not a Hub data set"
    if spec.hub_config is not None:
        raise UserError(f"data.hub_config ({spec.hub_config}) {why}: leave it out")
    if spec.split != "train":
        raise UserError(
            f"data.split ({spec.split}) {why}: leave it out, and name validation text in "
            "data.validation"
        )
    return source


def open_validation(spec: DataSpec, source: Source) -> Source | None:
    """The source that ``data.validation`` names: a path or glob, else a split of ``source``."""
    if spec.validation is None:
        return None
    if is_local(spec.validation, "data.validation"):
        return open_location(spec.validation, "data.validation", spec.text_field, None, "train")
    if isinstance(source, HubSource):
        return replace(source, split=spec.validation, key="data.validation")
    raise UserError(
        f"data.validation ({spec.validation}) is no file, folder or glob: correct the path "
        "(split names are for Hub data sets only)"
    )


def is_local(location: str, key: str) -> bool:
    """Whether a name, the value of a key, can only mean local files."""
    path = expand(location, key)
    return (
        kind_of(path, key) is not None
        or location == PYTHON_STDLIB
        or bool(GLOB_SIGNS.search(location))
        or suffix_of(path) in READERS
        or not HUB_NAME.fullmatch(location)
    )


def open_location(
    location: str, key: str, text_field: str, hub_config: str | None, split: str
) -> Source:
    """The source at a location: a name, an existing path, a glob, else a Hub name.

    Raises a ``UserError`` that names ``key`` where nothing is there.
    """
    if location == PYTHON_STDLIB:
        return StdlibSource(Path(sysconfig.get_path("stdlib")))
    path = expand(location, key)
    kind = kind_of(path, key)
    if kind == "folder":
        place = path.resolve()
        if is_hub_layout(path):
            logger.info("%s (%s): a data set folder, split %s", key, location, split)
            return HubSource(str(place), key, text_field, hub_config, split, revision=None)
        files = _files_of_folder(place, key)
    elif kind == "file":
        place = path.resolve()
        files = [place]
        if suffix_of(path) not in READERS:
            raise UserError(
                f"{key} ({location}) has a suffix that is not known "
                f"({suffix_of(path) or 'none'}): use one of {SUFFIXES}"
            )
    elif kind == "other":
        raise UserError(f"{key} ({location}) is a pipe or device: name a file or folder")
    elif GLOB_SIGNS.search(location):
        place = Path.cwd() / path
        files = _files_of_glob(str(place), location, key)
    elif is_local(location, key):
        raise UserError(f"{key} ({location}) does not exist: correct the path")
    else:
        revision = hub_revision(location, "dataset", f"{key} ({location})")
        return HubSource(location, key, text_field, hub_config, split, revision)
    if text_field != "text" and all(suffix_of(file) in PLAIN_TEXT for file in files):
        logger.warning("data.text_field (%s) has no effect: %s holds plain text", text_field, place)
    return FileSource(str(place), tuple(files), text_field)


def reopen_source(record: dict[str, Any], streaming: bool = False) -> Source:
    """The source of a ``to_record()``; Hub data at the revision it had then."""
    if record["kind"] == PYTHON_STDLIB:
        return open_location(PYTHON_STDLIB, "data.source", "text", None, "train")
    key, location = "data.source", record["location"]
    if record["kind"] != "hub":
        return open_location(location, key, record["text_field"], None, "train")
    source = HubSource(key=key, streaming=streaming, **{x: record[x] for x in RECORDED})
    if source.is_folder:
        if kind_of(Path(location), key) != "folder":
            raise UserError(f"{key} ({location}) does not exist: restore it")
        return source
    try:
        hub_revision(location, "dataset", f"{key} ({location})")
    except HubUnreachableError:  # then it may still be in the client's own cache
        return replace(source, offline=True)
    return source


def _files_of_folder(folder: Path, key: str) -> list[Path]:
    found = _sorted_files(
        folder,
        lambda path: suffix_of(path) in READERS and not any(x.startswith(".") for x in path.parts),
    )
    if not found:
        raise UserError(
            f"{key} ({folder}) is a folder without a file to read: put files of {SUFFIXES} there"
        )
    return found


def _sorted_files(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """The files below a folder whose relative paths are wanted, sorted by these."""
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    found = sorted(filter(wanted, names), key=Path.as_posix)
    return [folder / name for name in found if (folder / name).is_file()]


def _files_of_glob(absolute: str, pattern: str, key: str) -> list[Path]:
    matches = (Path(match) for match in glob.glob(absolute, recursive=True))  # noqa: PTH207
    found = sorted(path for path in matches if path.is_file())
    if not found:
        raise UserError(f"{key} ({pattern}) matches no file: correct the pattern")
    for path in found:
        if suffix_of(path) not in READERS:
            raise UserError(
                f"{key} ({pattern}) matches {path.name}, whose suffix is not known: "
                f"narrow the pattern to {SUFFIXES}"
            )
    return found
