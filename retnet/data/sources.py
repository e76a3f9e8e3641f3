"""Where documents come from: the standard library, local files, or a Hub data set.

A source has a ``name`` for messages, a ``fingerprint()`` that changes exactly when its content does
and is quick enough for every start, its ``documents()`` in order, any number of times (the caller
leaves empty ones out), and a JSON-able ``to_record()`` that ``reopen_source`` opens it from.
"""

import logging
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from retnet.data.hub import HubSource, is_hub_layout
from retnet.data.listing import files_below, files_of_glob, glob_location, split_glob
from retnet.data.network import HubUnreachableError, hub_revision
from retnet.data.prepared import known_revision
from retnet.data.readers import (
    PLAIN_TEXT,
    READERS,
    hash_files,
    read_documents,
    readers,
    suffix_of,
    suffixes,
)
from retnet.data.record import NULL, entry, unusable
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
        names = (path.relative_to(self.folder) for path in self.folder.rglob("*.py"))
        wanted = (name for name in names if not NOT_STDLIB.search(name.as_posix()))
        paths = (self.folder / name for name in sorted(wanted, key=Path.as_posix))
        found = [path for path in paths if path.is_file()]
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
    messages: bool = False  # whether documents are conversations

    @property
    def name(self) -> str:
        return self.location

    def fingerprint(self) -> str:
        return hash_files(self.files)

    def documents(self) -> Iterator[str]:
        for path in self.files:
            yield from read_documents(path, self.text_field, self.messages)

    def to_record(self) -> dict[str, Any]:
        own = {"kind": "files", "location": self.location, "text_field": self.text_field}
        return own | ({"format": "messages"} if self.messages else {})


Source = StdlibSource | FileSource | HubSource


def open_source(spec: DataSpec) -> Source:
    """The source that ``data.source`` names; a ``UserError`` where an option does not apply."""
    key = "data.source"
    try:
        at_hub = spec.hub_config, spec.split
        source = open_location(spec.source, key, spec.field, *at_hub, spec.is_messages)
    except HubUnreachableError:
        revision = known_revision(expand(spec.cache_dir, "data.cache_dir"), spec.source)
        if revision is None:
            raise
        logger.warning("%s (%s): no network, revision %s as before", key, spec.source, revision)
        at = (spec.hub_config, spec.split, revision)
        source = HubSource(
            spec.source, key, spec.field, *at, messages=spec.is_messages, offline=True
        )
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
    """The source that ``data.validation`` names: a path or glob, else a split of ``source``.

    A ``UserError`` where it is neither, or text that ``source`` has too.
    """
    if spec.validation is None:
        return None
    key, validation = "data.validation", None
    if is_local(spec.validation, key):
        validation = open_location(
            spec.validation, key, spec.field, None, "train", spec.is_messages
        )
    elif isinstance(source, HubSource):
        validation = replace(source, split=spec.validation, key=key)
    if validation is None:
        raise UserError(
            f"{key} ({spec.validation}) is no file, folder or glob: correct the path "
            "(split names are for Hub data sets only)"
        )
    if shared := _shared_text(source, validation):
        raise UserError(
            f"{key} ({spec.validation}): {shared} is in data.source ({spec.source}) too, and a "
            "loss on text that is trained on tells nothing: leave it out of one of them, or leave "
            "data.validation out, which holds text back"
        )
    return validation


def _shared_text(source: Source, validation: Source) -> str | None:
    """The name of a text that two sources have, as far as that is known without reading."""
    if source.to_record() == validation.to_record():
        return validation.name
    if not isinstance(source, FileSource) or not isinstance(validation, FileSource):
        return None
    read = {path.resolve() for path in source.files}
    return next((str(path) for path in validation.files if path.resolve() in read), None)


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
    location: str | Path,
    key: str,
    text_field: str,
    hub_config: str | None,
    split: str,
    messages: bool = False,
) -> Source:
    """The source at a location: a name, an existing path, a glob, else a Hub name.

    Raises a ``UserError`` that names ``key`` where nothing is there.
    """
    if location == PYTHON_STDLIB:
        return StdlibSource(Path(sysconfig.get_path("stdlib")))
    path = expand(location, key)
    kind, location = kind_of(path, key), str(location)
    if kind == "folder":
        place = path.resolve()
        if is_hub_layout(place, key):
            logger.info("%s (%s): a data set folder, split %s", key, location, split)
            at_hub = hub_config, split, None
            return HubSource(str(place), key, text_field, *at_hub, messages=messages)
        files = files_below(place, key, lambda file: suffix_of(file) in readers(messages))
        if not files:
            raise UserError(
                f"{key} ({place}) is a folder without a file to read: put files of "
                f"{suffixes(messages)} "
                "there (run folders and caches are no text)"
            )
    elif kind == "file":
        place = path.resolve()
        if suffix_of(place) != suffix_of(path):  # the Hub's cache has links to files without any
            place = path.parent.resolve() / path.name
        files = [place]
        if suffix_of(path) not in readers(messages):
            what = "is not one of conversations" if messages else "is not known"
            raise UserError(
                f"{key} ({location}) has a suffix that {what} "
                f"({suffix_of(path) or 'none'}): use one of {suffixes(messages)}"
            )
    elif kind == "other":
        raise UserError(f"{key} ({location}) is a pipe or device: name a file or folder")
    elif GLOB_SIGNS.search(location):
        base, parts = split_glob(location, key)
        place, files = (
            glob_location(base, parts),
            _files_of_glob(base, parts, location, key, messages),
        )
    elif is_local(location, key):
        raise UserError(f"{key} ({location}) does not exist: correct the path")
    else:
        revision = hub_revision(location, "dataset", f"{key} ({location})")
        return HubSource(location, key, text_field, hub_config, split, revision, messages=messages)
    if text_field != "text" and all(suffix_of(file) in PLAIN_TEXT for file in files):
        option = "--text-field" if key.startswith("--") else "data.text_field"
        logger.warning("%s (%s) has no effect: %s holds plain text", option, text_field, place)
    return FileSource(str(place), tuple(files), text_field, messages)


def reopen_source(record: dict[str, Any], streaming: bool = False) -> Source:
    """The source of a ``to_record()``; Hub data at the revision it had then.

    A ``ValueError`` that names what is wrong with an entry of the record, and a ``UserError`` where
    the source is not there.
    """
    key, kind = "data.source", entry(record, "kind", str)
    if kind == PYTHON_STDLIB:
        entry(record, "python", str, missing="")
        return open_location(PYTHON_STDLIB, key, "text", None, "train")
    location, text_field = entry(record, "location", str), entry(record, "text_field", str)
    if entry(record, "format", str, missing="messages") != "messages":
        raise unusable(record, "format")
    messages = "format" in record  # of texts nothing is said
    if kind == "files":
        return open_location(location, key, text_field, None, "train", messages)
    if kind != "hub":
        raise unusable(record, "kind")
    maybe = {name: entry(record, name, str, NULL) for name in ("hub_config", "revision")}
    split = entry(record, "split", str)
    source = HubSource(
        location, key, text_field, split=split, streaming=streaming, messages=messages, **maybe
    )
    if source.is_folder:
        if kind_of(Path(location), key) != "folder":
            raise UserError(f"{key} ({location}) does not exist: restore it")
        return source
    try:
        hub_revision(location, "dataset", f"{key} ({location})")
    except HubUnreachableError:  # then it may still be in the client's own cache
        return replace(source, offline=True)
    return source


def _files_of_glob(
    base: Path, parts: list[str], pattern: str, key: str, messages: bool
) -> list[Path]:
    found = files_of_glob(base, parts, key)
    if not found:
        raise UserError(f"{key} ({pattern}) matches no file: correct the pattern")
    for path in found:
        if suffix_of(path) not in readers(messages):
            what = "not one of conversations" if messages else "not known"
            raise UserError(
                f"{key} ({pattern}) matches {path.name}, whose suffix is {what}: "
                f"narrow the pattern to {suffixes(messages)}"
            )
    return found
